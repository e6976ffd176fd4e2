"""The distill stage: the pruned model learns from the unpruned one; the best checkpoint of the best student is kept."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

from ..data.calibration import pad_id
from ..data.chat import Encoded, load_encoded
from ..data.packing import Batch, pack
from ..data.rows import Split
from ..errors import UserError
from ..modeling.blocks import forget_depths, record_depths
from ..modeling.checkpoint import link_files, quiet, save_checkpoint
from ..modeling.load import load_tokenizer
from ..stage import Context, Inputs, give_back_memory
from .config import Copy, DistillConfig, Lora, TrainingConfig
from .recorder import read_lines
from .sorted.config import SortConfig
from .students import Preparation, best_model
from .train import DistillTrainer, total_steps
from .variants import Job, choose, plan_jobs, share, write_record
from .weights import latest_checkpoint

SPLITS: tuple[Split, ...] = ("train", "heldout")


def check(config: TrainingConfig, base: Path, context: Context) -> None:
    """Refuse bits without bitsandbytes, and steps that do not divide among the processes, before any work is done."""
    if config.accumulate % context.world:
        raise UserError(
            f"{config.stage}.accumulate is {config.accumulate}: so many forward passes per step cannot be shared "
            f"evenly by {context.world} processes; make it a multiple of that, or start fewer processes"
        )
    for own in config.students:
        _check_shard(own, context)
    tunes = [own.tune for own in config.students]
    copied = config.teacher.quantize if isinstance(config.teacher, Copy) else None
    bits = copied or next((t.quantize_base for t in tunes if isinstance(t, Lora) and t.quantize_base), None)
    if bits or config.optimizer == "adamw_8bit":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            what = f"{config.stage}: {bits or config.optimizer}"
            raise UserError(f"{what} needs bitsandbytes, which failed: {error}") from error


def _check_shard(config: TrainingConfig, context: Context) -> None:
    for wrong, why in (
        (context.world == 1, "needs several processes: start them with torchrun or accelerate launch"),
        (
            isinstance(config.tune, Lora),
            f"spreads what is trained, which {config.stage}.tune: lora has little of; leave it out",
        ),
        (config.optimizer != "adamw", f"cannot spread the states of {config.stage}.optimizer: adamw_8bit; use adamw"),
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
        recover_all(config, [job for job in jobs if job.name in pending], inputs, context)
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


def recover_all(config: TrainingConfig, jobs: list[Job], inputs: Inputs, context: Context) -> None:
    """Train students one after another, and save them with their curves."""
    tokenizer = load_tokenizer(inputs.model)
    train, held = (load_encoded(inputs.stages["data"], tokenizer, split, config.length) for split in SPLITS)
    preparation = Preparation(inputs, pack_rows(config, held, tokenizer), context)
    for number, job in enumerate(jobs, start=1):
        batches = load_batches(job, train, tokenizer)
        figures = _recover(job, inputs, tokenizer, preparation, batches, jobs[number:])
        if context.rank == 0:
            job.finish(figures)


def _recover(
    job: Job, inputs: Inputs, tokenizer: Any, preparation: Preparation, train: list[Batch], later: list[Job]
) -> dict[str, Any]:
    """Train one student and save it with its curves; its figures."""
    job.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with quiet(bars=True):
        figures = _train(job, preparation, train, later)
    if not later:
        preparation.forget()
    give_back_memory()  # the trainer's objects refer to each other
    if job.context.rank:
        return {}
    seconds = time.monotonic() - started
    job.context.progress.note(
        f"{job.label}held-out KL to the unpruned model {figures['before']['eval_kl']:.3f} → "
        f"{figures['best']['eval_kl']:.3f} (step {figures['best']['step']} of {figures['steps']})"
    )
    with quiet():
        model = best_model(job.config, inputs, job.work, job.context)
    if isinstance(job.config, SortConfig):
        record_depths(model.config, job.config.depths)
    else:
        forget_depths(model.config)
    save_checkpoint(model, tokenizer, job.folder / "model")
    shutil.copyfile(job.work / "curves.jsonl", job.folder / "curves.jsonl")
    lines = [line for line in read_lines(job.folder / "curves.jsonl") if "tokens" in line]
    return figures | {
        "target_tokens": sum(line["tokens"] for line in lines),
        "train_tokens": sum(batch.tokens for batch in train),
        "seconds_training": round(seconds, 1),
    }


def load_batches(job: Job, rows: list[Encoded], tokenizer: Any) -> list[Batch]:
    """A job's share of the training rows, packed in an order drawn from its seed; batches are of like lengths."""
    own = share(rows, job)
    random.Random(job.context.seed).shuffle(own)
    return pack_rows(job.config, own, tokenizer, grouped=True)


def pack_rows(config: TrainingConfig, rows: list[Encoded], tokenizer: Any, *, grouped: bool = False) -> list[Batch]:
    """Rows as they are run: in packed sequences of the section's length, in their order."""
    return pack(rows, config.length, config.batch, pad_id(tokenizer), grouped=grouped)


def _train(job: Job, preparation: Preparation, train: list[Batch], later: list[Job]) -> dict[str, Any]:
    config, work, context = job.config, job.work, job.context
    student, teacher, held_out = preparation.student(job, train, later)
    steps = total_steps(config, len(train))
    with context.progress.bar(f"{job.label}training", steps) as advance:
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
