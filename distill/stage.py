"""The distill stage: the pruned model learns from the unpruned one; the best checkpoint is kept."""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import replace
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
from .config import DistillConfig, Lora
from .losses import needs_teacher
from .sharding import sharded
from .teacher import CopyTeacher, quantization
from .train import (
    DistillTrainer,
    Student,
    hold_out,
    latest_checkpoint,
    load_trainable,
    lora_model,
    read_lines,
    total_steps,
)


def check(config: DistillConfig, base: Path, context: Context) -> None:
    """Refuse bits without bitsandbytes, and steps that do not divide among the processes, before any work is done."""
    if config.accumulate % context.world:
        raise UserError(
            f"distill.accumulate is {config.accumulate}: so many forward passes per step cannot be shared evenly by "
            f"{context.world} processes; make it a multiple of that, or start fewer processes"
        )
    _check_shard(config, context)
    bits = config.teacher.quantize or (config.tune.quantize_base if isinstance(config.tune, Lora) else None)
    if bits or config.optimizer == "adamw_8bit":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise UserError(f"distill: {bits or config.optimizer} needs bitsandbytes, which failed: {error}") from error


def _check_shard(config: DistillConfig, context: Context) -> None:
    for wrong, why in (
        (context.world == 1, "needs several processes: start them with torchrun or accelerate launch"),
        (
            isinstance(config.tune, Lora),
            "spreads what is trained, which distill.tune: lora has little of; leave it out",
        ),
        (config.optimizer != "adamw", "cannot spread the states of distill.optimizer: adamw_8bit; use adamw"),
        (context.dtype == "float16", "cannot scale float16 gradients; use --dtype bfloat16"),
    ):
        if context.shard and wrong:
            raise UserError(f"--shard {why}")


def run(config: DistillConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `model/` (the recovered checkpoint) and `curves.jsonl` (a line per step and per measurement).

    Several processes train together; the first one writes.
    """
    work = out_dir / WORK
    work.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(inputs.model)
    train, held = load_batches(config, inputs, tokenizer, context.seed)
    started = time.monotonic()
    with quiet(bars=True):
        figures = _train(config, inputs, work, context, train, held)
    if context.rank:
        return {}
    seconds = time.monotonic() - started
    context.progress.note(
        f"held-out KL to the unpruned model {figures['before']['eval_kl']:.3f} → {figures['best']['eval_kl']:.3f} "
        f"(step {figures['best']['step']} of {figures['steps']})"
    )
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
    return pack(rows, config.length, config.batch, pad), pack(held, config.length, config.batch, pad)


def _train(
    config: DistillConfig, inputs: Inputs, work: Path, context: Context, train: list[Batch], held: list[Batch]
) -> dict[str, Any]:
    teacher: CopyTeacher | None = CopyTeacher(inputs.base, config.teacher, context)
    assert teacher is not None
    held_out = hold_out(held, teacher, context.device, context.group)
    if not needs_teacher(config.objective):
        teacher = None  # it was only needed to say how far the student is from it
    student = build_student(config, inputs, context)
    steps = total_steps(config, len(train))
    with context.progress.bar("training", steps) as advance:
        trainer = DistillTrainer(student, config, teacher, held_out, work, context, train, advance)
        found = latest_checkpoint(work / "trainer") if context.rank == 0 else None
        trainer.train(resume_from_checkpoint=context.group.share(str(found) if found else None))
    if context.rank:
        return {}
    lines = [line for line in read_lines(work / "curves.jsonl") if "eval_kl" in line]
    return {
        "objective": config.objective.kind,
        "steps": steps,
        "trainable_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "before": lines[0],
        "last": lines[-1],
        "best": {k: v for k, v in json.loads((work / "best.json").read_text()).items() if k != "value"},
    }


def build_student(config: DistillConfig, inputs: Inputs, context: Context, *, quantize: bool = True) -> Student:
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
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Student(adapted, Decoder(model))


def best_model(config: DistillConfig, inputs: Inputs, work: Path, context: Context) -> Any:
    """The student with its best weights, adapters merged into the full-precision weights, in the run's type."""
    if context.world > 1:  # one of them makes it, and what they trained together may not fit its GPU
        context = replace(context, shard=False, device="cpu")
    student = build_student(config, inputs, context, quantize=False)
    load_trainable(student, work / "best.safetensors")
    model = student.model
    if isinstance(config.tune, Lora):
        model = model.merge_and_unload()  # type: ignore[operator]
    return model.to(getattr(torch, context.dtype))
