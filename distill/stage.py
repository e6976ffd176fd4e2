"""The distill stage: the pruned model learns from the unpruned one; the best checkpoint is kept."""

from __future__ import annotations

import gc
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from ..data.calibration import pad_id
from ..data.chat import load_encoded
from ..data.packing import Batch, pack
from ..errors import UserError
from ..modeling.blocks import Decoder
from ..modeling.checkpoint import quiet, save_checkpoint
from ..modeling.load import load_model, load_tokenizer
from ..stage import WORK, Context, Inputs
from .cached import CachedTeacher
from .config import Cached, Copy, DistillConfig, Lora, Shared, needs_teacher
from .shared import SharedTeacher
from .teacher import CopyTeacher, Teacher, quantization
from .train import (
    DistillTrainer,
    HeldOut,
    Student,
    hold_out,
    latest_checkpoint,
    load_trainable,
    lora_model,
    read_lines,
    total_steps,
)


def check(config: DistillConfig, base: Path, context: Context) -> None:
    """Refuse bits without bitsandbytes before any work is done."""
    copied = config.teacher.quantize if isinstance(config.teacher, Copy) else None
    bits = copied or (config.tune.quantize_base if isinstance(config.tune, Lora) else None)
    if bits or config.optimizer == "adamw_8bit":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise UserError(f"distill: {bits or config.optimizer} needs bitsandbytes, which failed: {error}") from error


def run(config: DistillConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `model/` (the recovered checkpoint) and `curves.jsonl` (a line per step and per measurement)."""
    work = out_dir / WORK
    work.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(inputs.model)
    train, held = load_batches(config, inputs, tokenizer, context.seed)
    started = time.monotonic()
    with quiet(bars=True):
        figures = _train(config, inputs, work, context, train, held)
    seconds = time.monotonic() - started
    context.progress.note(
        f"held-out KL to the unpruned model {figures['before']['eval_kl']:.3f} → {figures['best']['eval_kl']:.3f} "
        f"(step {figures['best']['step']} of {figures['steps']})"
    )
    gc.collect()  # the trainer's objects refer to each other: what was trained would be held beside what is merged
    with quiet():
        model = best_model(config, inputs, work, context)
    save_checkpoint(model, tokenizer, out_dir / "model")
    shutil.copyfile(work / "curves.jsonl", out_dir / "curves.jsonl")
    lines = [line for line in read_lines(out_dir / "curves.jsonl") if "tokens" in line]
    return figures | {
        "target_tokens": sum(line["tokens"] for line in lines),
        "train_tokens": sum(batch.tokens for batch in train),
        "seconds_training": round(seconds, 1),
    }


def load_batches(config: DistillConfig, inputs: Inputs, tokenizer: Any, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Packed training rows, in an order drawn from the seed, and packed held-out rows."""
    data, pad = inputs.stages["data"], pad_id(tokenizer)
    rows = load_encoded(data, tokenizer, "train", config.length)
    random.Random(seed).shuffle(rows)
    held = load_encoded(data, tokenizer, "heldout", config.length)
    return pack(rows, config.length, config.batch, pad, grouped=True), pack(held, config.length, config.batch, pad)


def _train(
    config: DistillConfig, inputs: Inputs, work: Path, context: Context, train: list[Batch], held: list[Batch]
) -> dict[str, Any]:
    student, teacher, held_out = prepare(config, inputs, context, train, held)
    steps = total_steps(config, len(train))
    with context.progress.bar("training", steps) as advance:
        trainer = DistillTrainer(student, config, teacher, held_out, work, context, train, advance)
        resume = latest_checkpoint(work / "trainer")
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    lines = [line for line in read_lines(work / "curves.jsonl") if "eval_kl" in line]
    return {
        "objective": config.objective.kind,
        "steps": steps,
        "trainable_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "before": lines[0],
        "last": lines[-1],
        "best": {k: v for k, v in json.loads((work / "best.json").read_text()).items() if k != "value"},
    }


def prepare(
    config: DistillConfig, inputs: Inputs, context: Context, train: list[Batch], held: list[Batch]
) -> tuple[Student, Teacher | None, HeldOut]:
    """The student, its teacher while it trains (none where the objective asks nothing of one), and the held-out rows
    with what the unpruned model makes of them: however the teacher is held, the student is measured against the model
    itself, or its quantized self where that is the teacher."""
    way, tune, anchored = config.teacher, config.tune, needs_teacher(config.objective)
    if anchored and isinstance(way, Shared) and isinstance(tune, Lora):
        shared = SharedTeacher(inputs.base, inputs.model, tune, context)
        context.progress.note(f"shared teacher: {shared.held_twice / 1e6:.2f} M healed parameters are held twice")
        return _student(shared.model, shared.decoder, config), shared, hold_out(held, shared, context.device)
    teacher: Teacher | None = None
    if anchored and isinstance(way, Cached):
        teacher = CachedTeacher(inputs.stages["data"], train)
    quantize = tune.quantize_base if isinstance(way, Shared) and isinstance(tune, Lora) else None
    copy = CopyTeacher(inputs.base, way if isinstance(way, Copy) else Copy(quantize=quantize), context)
    held_out = hold_out(held, copy, context.device)
    teacher = (teacher or copy) if anchored else None
    del copy  # unless it is the teacher, it was only needed to say how far the student is from it
    student = build_student(config, inputs, context)
    return student, teacher, held_out.with_head_of(student.decoder)


def build_student(config: DistillConfig, inputs: Inputs, context: Context, *, quantize: bool = True) -> Student:
    """The pruned model ready to be trained: with fresh adapters, or with all weights trainable."""
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
    return _student(adapted, Decoder(model), config)


def _student(adapted: Any, decoder: Decoder, config: DistillConfig) -> Student:
    if config.gradient_checkpointing:
        decoder.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Student(adapted, decoder)


def best_model(config: DistillConfig, inputs: Inputs, work: Path, context: Context) -> Any:
    """The student with its best weights, adapters merged into the full-precision weights, in the run's type."""
    student = build_student(config, inputs, context, quantize=False)
    load_trainable(student, work / "best.safetensors")
    model = student.model
    if isinstance(config.tune, Lora):
        model = model.merge_and_unload()  # type: ignore[operator]
    return model.to(getattr(torch, context.dtype))
