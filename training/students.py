"""The student that is trained, its teacher, and the model that is saved in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..core.stage import Context, Inputs
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from ..modeling.load import load_model
from .cached import CachedTeacher
from .config import Cached, Copy, Lora, Shared, TrainingConfig
from .depths import Depths
from .job import TrainingJob
from .sharding import sharded
from .shared import SharedTeacher
from .teacher import CopyTeacher, Teacher, quantization
from .train import HeldOut, Student, hold_out, lora_model
from .weights import load_trainable


class Preparation:
    """Students, one after another, with their teachers and the held-out rows.

    The unpruned model looks at the held-out rows once for each way it is run: another way rounds differently, and a
    run that was killed must find the figures it would have found. However the teacher is held, students are measured
    against the unpruned model itself, or its quantized self where that is the teacher.
    """

    def __init__(self, inputs: Inputs, held: Sequence[Batch], context: Context):
        self.inputs, self.held, self.context = inputs, list(held), context
        self._known: dict[str, HeldOut] = {}
        self._copy: CopyTeacher | None = None

    def student(
        self, job: TrainingJob, train: Sequence[Batch], later: Sequence[TrainingJob]
    ) -> tuple[Student, Teacher | None, HeldOut]:
        """A job's student, its teacher (none where the objective asks nothing of one), and the held-out rows; `later`
        are the jobs to come."""
        config, way, tune = job.config, job.config.teacher, job.config.tune
        anchored = config.objective.needs_teacher
        bits = tune.quantize_base if isinstance(way, Shared) and isinstance(tune, Lora) else None
        if anchored and isinstance(way, Shared) and isinstance(tune, Lora):
            shared = SharedTeacher(self.inputs.base, self.inputs.model, tune, job.context)
            job.context.progress.note(
                f"shared teacher: {shared.held_twice / 1e6:.2f} M healed parameters are held twice"
            )
            held_out = self._look(f"shared {bits}", lambda: shared)
            return as_student(shared.model, shared.decoder, config), shared, held_out
        how = way if isinstance(way, Copy) else Copy(quantize=bits)
        teacher: Teacher | None = None
        if anchored:
            cached = isinstance(way, Cached)
            teacher = CachedTeacher(self.inputs.stages["data"], train) if cached else self._copied(how)
        ran = f"copy {how.quantize}"
        held_out = self._look(ran, lambda: self._copied(how))
        if not (isinstance(way, Copy) and any(other.config.objective.needs_teacher for other in later)):
            self._copy = None  # unless it is the teacher, it was only needed to say how far the students are from it
        student = build_student(config, self.inputs, job.context)
        self._known[ran] = held_out.with_head_of(student.decoder)
        return student, teacher, self._known[ran]

    def forget(self) -> None:
        """Let go of what was seen, when no student is to come: the unpruned model's head alone, a part of a mapped
        file, holds on to all of it."""
        self._known.clear()
        self._copy = None

    def _copied(self, how: Copy) -> CopyTeacher:
        if self._copy is None:
            self._copy = CopyTeacher(self.inputs.base, how, self.context)
        return self._copy

    def _look(self, ran: str, teacher: Callable[[], CopyTeacher | SharedTeacher]) -> HeldOut:
        if ran not in self._known:
            self._known[ran] = hold_out(self.held, teacher(), self.context.device, self.context.group)
        return self._known[ran]


def build_student(config: TrainingConfig, inputs: Inputs, context: Context, *, quantize: bool = True) -> Student:
    """The pruned model ready to be trained: with fresh adapters, or with all weights trainable."""
    if context.shard:
        alone = replace(context, shard=False, device="cpu")
        return sharded(lambda: build_student(config, inputs, alone), context)
    tune = config.tune
    if isinstance(tune, Lora):
        bits = tune.quantize_base if quantize else None
        options = quantization(bits, context.dtype)
        if options:
            options["device_map"] = {"": context.device}
        model = load_model(inputs.model, context.dtype, context.device, **options)
        adapted = lora_model(model, tune, context.seed)
    else:
        model = load_model(inputs.model, "float32", context.device)
        adapted = model.requires_grad_(True)
    return as_student(adapted, Decoder(model), config)


def as_student(adapted: Any, decoder: Decoder, config: TrainingConfig) -> Student:
    """A model with what is trained in it, to be called for hidden states."""
    if config.gradient_checkpointing:
        decoder.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Student(adapted, decoder, Depths.of(config, decoder.num_blocks))


def best_model(config: TrainingConfig, inputs: Inputs, work: Path, context: Context) -> Any:
    """The student with its best weights, adapters merged into the full-precision weights, in the run's type."""
    if context.world > 1:  # one of them makes it, and what they trained together may not fit its GPU
        context = replace(context, shard=False, device="cpu")
    student = build_student(config, inputs, context, quantize=False)
    load_trainable(student, work / "best.safetensors")
    model = student.model
    if isinstance(config.tune, Lora):
        model = model.merge_and_unload()  # type: ignore[operator]
    return model.to(getattr(torch, context.dtype))
