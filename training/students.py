"""Builds the student, its teacher and the held-out reference, and at the end the model that is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.stage import Context, Inputs
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from ..modeling.load import load_model
from .cached import CachedTeacher
from .config import Cached, Copy, Lora, Shared, TrainingConfig, Tune
from .depths import Depths
from .job import TrainingJob
from .sharding import sharded
from .shared import SharedTeacher
from .teacher import CopyTeacher, Teacher, quantization
from .train import HeldOut, Student, hold_out, lora_model
from .weights import load_trainable

if TYPE_CHECKING:
    from .rounded import Rounder

    Rounders = Callable[[str], Rounder]  # of an exported type


class Preparation:
    """Builds students one after another, with their teachers and the held-out reference.

    The reference on the held-out rows is computed once per way of holding the teacher (copy or shared, quantized or
    not), because each rounds differently and a resumed run must report the same figures. Students are always measured
    against the unpruned model, quantized only where the teacher is.
    """

    def __init__(self, inputs: Inputs, held: Sequence[Batch], context: Context, rounders: Rounders | None = None):
        self.inputs, self.held, self.context, self.rounders = inputs, list(held), context, rounders
        self._known: dict[str, HeldOut] = {}
        self._copy: CopyTeacher | None = None

    def student(
        self, job: TrainingJob, train: Sequence[Batch], later: Sequence[TrainingJob]
    ) -> tuple[Student, Teacher | None, HeldOut]:
        """A job's student, its teacher (None where the objective needs none), and the held-out rows; `later` are the
        jobs that follow."""
        config, holding, tune = job.config, job.config.teacher, job.config.tune
        anchored = config.objective.needs_teacher
        bits = tune.quantize_base if isinstance(holding, Shared) and isinstance(tune, Lora) else None
        if anchored and isinstance(holding, Shared) and isinstance(tune, Lora):
            shared = SharedTeacher(self.inputs.base, self.inputs.model, tune, job.context)
            job.context.progress.note(
                f"shared teacher: {shared.held_twice / 1e6:.2f} M healed parameters are held twice"
            )
            held_out = self._look(f"shared {bits}", lambda: shared)
            student = self._through_rounding(as_student(shared.model, shared.decoder, config), tune, shared)
            return student, shared, held_out
        copy = holding if isinstance(holding, Copy) else Copy(quantize=bits)
        teacher: Teacher | None = None
        if anchored:
            cached = isinstance(holding, Cached)
            teacher = CachedTeacher(self.inputs.stages["data"], train) if cached else self._copied(copy)
        variant = f"copy {copy.quantize}"
        held_out = self._look(variant, lambda: self._copied(copy))
        if not (isinstance(holding, Copy) and any(other.config.objective.needs_teacher for other in later)):
            self._copy = None  # no later job learns from it: it served for the held-out reference alone
        student = self._through_rounding(build_student(config, self.inputs, job.context), tune)
        self._known[variant] = held_out.with_head_of(student.decoder)
        return student, teacher, self._known[variant]

    def _through_rounding(self, student: Student, tune: Tune, shared: SharedTeacher | None = None) -> Student:
        """The student, its weights rounded where `quantize_as` says so."""
        rounder = self.rounder(tune)
        if rounder is not None:
            from .rounded import RoundedWeights

            student.rounded = RoundedWeights(student, student.decoder, rounder, self.inputs.model, shared)
        return student

    def rounder(self, tune: Tune) -> Rounder | None:
        """How the weights that `tune` names are rounded; None where they are not."""
        if not isinstance(tune, Lora) or tune.quantize_as is None:
            return None
        assert self.rounders is not None, "sections without a way to round refuse quantize_as"
        return self.rounders(tune.quantize_as)

    def forget(self) -> None:
        """Free the references once no student is left to build: the unpruned model's head, a slice of a mapped file,
        keeps the whole file mapped."""
        self._known.clear()
        self._copy = None

    def _copied(self, copy: Copy) -> CopyTeacher:
        if self._copy is None:
            self._copy = CopyTeacher(self.inputs.base, copy, self.context)
        return self._copy

    def _look(self, variant: str, teacher: Callable[[], CopyTeacher | SharedTeacher]) -> HeldOut:
        """The held-out rows as one variant of the teacher sees them; computed once."""
        if variant not in self._known:
            self._known[variant] = hold_out(self.held, teacher(), self.context.device, self.context.group)
        return self._known[variant]


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
    """The student of a model: `adapted` has the trained weights or adapters and is called for hidden states."""
    if config.gradient_checkpointing:
        decoder.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Student(adapted, decoder, Depths.of(config, decoder.num_blocks))


def best_model(config: TrainingConfig, inputs: Inputs, work: Path, context: Context) -> Any:
    """The student with its best weights, adapters merged into full-precision weights, in the run's dtype."""
    if context.world > 1:  # rank 0 builds it alone, and a model that was sharded may not fit its GPU
        context = replace(context, shard=False, device="cpu")
    student = build_student(config, inputs, context, quantize=False)
    load_trainable(student, work / "best.safetensors")
    model = student.model
    if isinstance(config.tune, Lora):
        model = model.merge_and_unload()  # type: ignore[operator]
    return model.to(getattr(torch, context.dtype))
