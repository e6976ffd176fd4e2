"""The distill stage: the pruned model learns from the unpruned one; the best checkpoint of the best student is kept."""

from __future__ import annotations

import gc
import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data.calibration import pad_id
from ..data.chat import Encoded, load_encoded
from ..data.packing import Batch, pack
from ..data.rows import Split
from ..errors import UserError
from ..modeling.blocks import Decoder
from ..modeling.checkpoint import link_files, quiet, save_checkpoint
from ..modeling.load import load_model, load_tokenizer
from ..stage import Context, Inputs
from .config import DistillConfig, Lora
from .losses import needs_teacher
from .sharding import shard
from .teacher import CopyTeacher, quantization
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
from .variants import Job, choose, plan_jobs, share, write_record

SPLITS: tuple[Split, ...] = ("train", "heldout")


def check(config: DistillConfig, base: Path, context: Context) -> None:
    """Refuse bits without bitsandbytes, and steps that do not divide among the processes, before any work is done."""
    if config.accumulate % context.world:
        raise UserError(
            f"distill.accumulate is {config.accumulate}: so many forward passes per step cannot be shared evenly by "
            f"{context.world} processes; make it a multiple of that, or start fewer processes"
        )
    configs = [job.config for job in plan_jobs(config, base, context)]
    for own in configs:
        _check_shard(own, context)
    bits = config.teacher.quantize or next(
        (own.tune.quantize_base for own in configs if isinstance(own.tune, Lora) and own.tune.quantize_base), None
    )
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

    With variants each one has these two in `variants/NAME/`, the best one's are here as well, and `variants.json`
    has the figures of all. A variant that is finished is not trained again. Several processes train together; the
    first one writes.
    """
    jobs = plan_jobs(config, out_dir, context)
    pending = context.group.share([job.name for job in jobs if job.figures is None])
    if pending:
        _recover_all(config, [job for job in jobs if job.name in pending], inputs, context)
    if context.rank:
        return {}
    figures = {job.name: job.figures or {} for job in jobs}
    if config.variants is None:
        return figures[""]
    chosen = choose(config, figures)
    link_files(out_dir / "variants" / chosen / "model", out_dir / "model")
    shutil.copyfile(out_dir / "variants" / chosen / "curves.jsonl", out_dir / "curves.jsonl")
    write_record(config, jobs, figures, chosen, out_dir)
    context.progress.note(f"of {len(jobs)} variants {chosen} goes on")
    seconds = round(sum(entry["seconds_training"] for entry in figures.values()), 1)
    return figures[chosen] | {"seconds_training": seconds, "chosen": chosen, "variants": figures}


def _recover_all(config: DistillConfig, jobs: list[Job], inputs: Inputs, context: Context) -> None:
    """Train students one after another; the teacher's states on the held-out rows are computed once for all."""
    tokenizer = load_tokenizer(inputs.model)
    train, held = (load_encoded(inputs.stages["data"], tokenizer, split, config.length) for split in SPLITS)
    with quiet(bars=True):
        teacher: CopyTeacher | None = CopyTeacher(inputs.base, config.teacher, context)
        held_out = hold_out(pack_rows(config, held, tokenizer), teacher, context.device, context.group)
    for number, job in enumerate(jobs):
        if not any(needs_teacher(later.config.objective) for later in jobs[number:]):
            teacher = None  # it was only needed to say how far the students are from it
        batches = load_batches(job, train, tokenizer)
        figures = _recover(job, inputs, tokenizer, batches, teacher, held_out)
        if context.rank == 0:
            job.finish(figures)
        gc.collect()  # a trainer and its model refer to each other


def _recover(
    job: Job, inputs: Inputs, tokenizer: Any, train: list[Batch], teacher: CopyTeacher | None, held_out: HeldOut
) -> dict[str, Any]:
    """Train one student and save it with its curves; its figures."""
    job.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with quiet(bars=True):
        figures = _train(job, inputs, train, teacher, held_out)
    if job.context.rank:
        return {}
    seconds = time.monotonic() - started
    job.context.progress.note(
        f"{job.label}held-out KL to the unpruned model {figures['before']['eval_kl']:.3f} → "
        f"{figures['best']['eval_kl']:.3f} (step {figures['best']['step']} of {figures['steps']})"
    )
    with quiet():
        model = best_model(job.config, inputs, job.work, job.context)
    save_checkpoint(model, tokenizer, job.folder / "model")
    shutil.copyfile(job.work / "curves.jsonl", job.folder / "curves.jsonl")
    lines = [line for line in read_lines(job.folder / "curves.jsonl") if "tokens" in line]
    return figures | {
        "target_tokens": sum(line["tokens"] for line in lines),
        "train_tokens": sum(batch.tokens for batch in train),
        "seconds_training": round(seconds, 1),
    }


def load_batches(job: Job, rows: list[Encoded], tokenizer: Any) -> list[Batch]:
    """A job's share of the training rows, packed in an order drawn from its seed."""
    own = share(rows, job)
    random.Random(job.context.seed).shuffle(own)
    return pack_rows(job.config, own, tokenizer)


def pack_rows(config: DistillConfig, rows: list[Encoded], tokenizer: Any) -> list[Batch]:
    """Rows as they are run: in packed sequences of the section's length, in their order."""
    return pack(rows, config.length, config.batch, pad_id(tokenizer))


def _train(
    job: Job, inputs: Inputs, train: list[Batch], teacher: CopyTeacher | None, held_out: HeldOut
) -> dict[str, Any]:
    config, work, context = job.config, job.work, job.context
    student = build_student(config, inputs, context)
    steps = total_steps(config, len(train))
    own = teacher if needs_teacher(config.objective) else None
    with context.progress.bar(f"{job.label}training", steps) as advance:
        trainer = DistillTrainer(student, config, own, held_out, work, context, train, advance)
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
    tune = config.tune
    if isinstance(tune, Lora):
        bits = tune.quantize_base if quantize else None
        options = quantization(bits, context.dtype)
        if options:
            options["device_map"] = {"": context.device}
        model = load_model(inputs.model, context.dtype, context.device, **options)
        adapted = lora_model(model, tune, context.seed)
    else:
        # What is going to be sharded need not fit the device.
        model = load_model(inputs.model, "float32", "cpu" if context.shard else context.device)
        adapted = model.requires_grad_(True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student = Student(adapted, Decoder(model))
    if context.shard:
        shard(student, student.decoder.blocks, context)
    return student


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
