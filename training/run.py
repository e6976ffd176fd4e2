"""Trains students one after another and saves them with their curves."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import UserError
from ..core.extras import load_library
from ..core.memory import give_back_memory
from ..core.stage import Context, Inputs
from ..data.calibration import pad_id
from ..data.chat import Encoded, load_encoded
from ..data.packing import Batch, pack
from ..data.rows import Split
from ..modeling.blocks import forget_depths, record_depths
from ..modeling.checkpoint import quiet, save_checkpoint
from ..modeling.load import load_tokenizer
from ..modeling.types import ModelTokenizer
from ..records.curves import CURVES, TrainingStep, student_lines
from ..records.students import HeldOutFigures, PaceFigures, StudentFigures
from .budget import Pace, pace, total_steps
from .config import Copy, Lora, TrainingConfig
from .job import TrainingJob, share
from .on_policy import StudentRows
from .recorder import BEST, Best
from .students import Preparation, best_model
from .train import DistillTrainer
from .weights import latest_checkpoint

if TYPE_CHECKING:
    from .students import Rounders

SPLITS: tuple[Split, ...] = ("train", "heldout")


def check(config: TrainingConfig, base: Path, context: Context) -> None:
    """Reject quantization without bitsandbytes, and steps that cannot be split among the processes, before any work."""
    if config.accumulate is not None and config.accumulate % context.world:
        raise UserError(
            f"{config.stage}.accumulate is {config.accumulate}, which is not a multiple of the "
            f"{context.world} processes that share each step; make it a multiple, or start fewer processes"
        )
    for own in config.students:
        _check_shard(own, context)
    tunes = [own.tune for own in config.students]
    copied = config.teacher.quantize if isinstance(config.teacher, Copy) else None
    bits = copied or next((t.quantize_base for t in tunes if isinstance(t, Lora) and t.quantize_base), None)
    if bits or config.optimizer == "adamw_8bit":
        load_library(f"{config.stage}: {bits or config.optimizer}", "bitsandbytes")


def _check_shard(config: TrainingConfig, context: Context) -> None:
    for wrong, why in (
        (context.world == 1, "needs several processes: start them with torchrun or accelerate launch"),
        (
            isinstance(config.tune, Lora),
            f"shards trained weights, of which {config.stage}.tune: lora has few; leave --shard out",
        ),
        (config.optimizer != "adamw", f"cannot shard the states of {config.stage}.optimizer: adamw_8bit; use adamw"),
        (
            config.on_policy is not None,
            f"cannot write rows with a model in pieces; leave {config.stage}.on_policy out",
        ),
        (context.dtype == "float16", "cannot scale float16 gradients; use --dtype bfloat16"),
    ):
        if context.shard and wrong:
            raise UserError(f"--shard {why}")


def train_students(
    config: TrainingConfig,
    jobs: list[TrainingJob],
    inputs: Inputs,
    context: Context,
    rounders: Rounders | None = None,
) -> None:
    """Train students one after another, and save them with their curves; `rounders` are for `tune.quantize_as`."""
    tokenizer = load_tokenizer(inputs.model)
    answers, held = (load_encoded(inputs.stages["data"], tokenizer, split, config.length) for split in SPLITS)
    train = answers
    if config.learn == "all":
        train = [replace(row, loss_mask=[True] * len(row.loss_mask)) for row in train]
    preparation = Preparation(inputs, pack_rows(config, held, tokenizer), context, rounders)
    for number, job in enumerate(jobs, start=1):
        chosen = pace_of(job, train)
        job = replace(job, config=job.config.model_copy(update={"tune": chosen.tune}))
        batches = load_batches(job, train, tokenizer, chosen.width)
        own_rows = None
        if config.on_policy is not None:
            rows = share(answers, job)
            own_rows = StudentRows(job, config.on_policy, chosen, rows, batches, tokenizer, inputs.base)
        figures = _train_student(job, chosen, inputs, tokenizer, preparation, batches, own_rows, jobs[number:])
        if figures is not None:
            job.finish(figures)


def _train_student(
    job: TrainingJob,
    chosen: Pace,
    inputs: Inputs,
    tokenizer: ModelTokenizer,
    preparation: Preparation,
    train: list[Batch],
    own_rows: StudentRows | None,
    later: list[TrainingJob],
) -> StudentFigures | None:
    """Train one student and save it with its curves; its figures, in the first process."""
    job.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with quiet(bars=True):
        steps, parameters = _train(job, chosen, preparation, train, own_rows, later)
    if not later:
        preparation.forget()
    give_back_memory()  # the trainer's objects form reference cycles
    if job.context.rank:
        return None
    seconds = time.monotonic() - started
    lines = student_lines(job.work / CURVES)
    held_out = [line for line in lines if isinstance(line, HeldOutFigures)]
    best = Best.read(job.work / BEST).figures
    job.context.progress.note(
        f"{job.label}held-out KL to the unpruned model {held_out[0].eval_kl:.3f} → {best.eval_kl:.3f} "
        f"(step {best.step} of {steps})"
    )
    with quiet():
        model = best_model(job.config, inputs, job.work, job.context)
    if job.config.sorts:
        record_depths(model.config, list(job.config.depth_weights(model.config.num_hidden_layers)))
    else:
        forget_depths(model.config)
    save_checkpoint(model, tokenizer, job.folder / "model")
    rounder = preparation.rounder(job.config.tune)
    if rounder is not None:
        rounder.carry(job.folder / "model")
    shutil.copyfile(job.work / CURVES, job.folder / CURVES)
    return StudentFigures(
        objective=job.config.objective.kind,
        steps=steps,
        trainable_parameters=parameters,
        quantized_as=None if rounder is None else rounder.type,
        before=held_out[0],
        last=held_out[-1],
        best=best,
        target_tokens=sum(line.tokens for line in lines if isinstance(line, TrainingStep)),
        train_tokens=sum(batch.tokens for batch in train),
        pace=PaceFigures(
            learned=chosen.learned,
            epochs=chosen.epochs,
            tokens_per_step=job.config.batch * chosen.width * chosen.accumulate,
            lr=chosen.lr,
            rank=chosen.rank,
            eval_every=chosen.eval_every,
        ),
        on_policy=None if own_rows is None else own_rows.figures(),
        seconds_training=round(seconds, 1),
    )


def pace_of(job: TrainingJob, rows: list[Encoded]) -> Pace:
    """A job's settings, from its share of the training rows."""
    own = share(rows, job)
    learned, longest = sum(sum(row.loss_mask[1:]) for row in own), max(len(row.input_ids) for row in own)
    return pace(job.config, learned, longest, job.context.world)


def load_batches(job: TrainingJob, rows: list[Encoded], tokenizer: ModelTokenizer, width: int) -> list[Batch]:
    """A job's share of the training rows, shuffled by its seed and packed into sequences of up to `width` tokens;
    batches hold rows of similar length."""
    own = share(rows, job)
    random.Random(job.context.seed).shuffle(own)
    return pack(own, width, job.config.batch, pad_id(tokenizer), grouped=True)


def pack_rows(config: TrainingConfig, rows: list[Encoded], tokenizer: ModelTokenizer) -> list[Batch]:
    """Rows packed into sequences of the section's length, in order."""
    return pack(rows, config.length, config.batch, pad_id(tokenizer))


def _train(
    job: TrainingJob,
    chosen: Pace,
    preparation: Preparation,
    train: list[Batch],
    own_rows: StudentRows | None,
    later: list[TrainingJob],
) -> tuple[int, int]:
    """Optimizer steps, and how many parameters they change."""
    config, work, context = job.config, job.work, job.context
    student, teacher, held_out = preparation.student(job, train, later)
    steps = total_steps(config, chosen, len(train))
    with context.progress.bar(f"{job.label}training", steps) as advance:
        trainer = DistillTrainer(student, config, chosen, teacher, held_out, work, context, train, advance, own_rows)
        checkpoint = latest_checkpoint(work / "trainer") if context.rank == 0 else None
        trainer.train(resume_from_checkpoint=context.group.share(str(checkpoint) if checkpoint else None))
    return steps, sum(p.numel() for p in student.parameters() if p.requires_grad)
