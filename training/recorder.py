"""The Trainer callback that writes the curves, measures on the held-out rows and keeps the best weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from ..core.files import read_json, write_json
from ..core.stage import Advance
from ..records.curves import CURVES, TrainingStep, append_line, student_lines, write_lines
from ..records.students import HeldOutFigures
from .weights import save_whole, trainable_state

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from .train import DistillTrainer

BEST = "best.json"  # in the stage's work folder


@dataclass(frozen=True)
class Best:
    """The best held-out measurement so far, and the value it was selected by (lower is better)."""

    value: float
    figures: HeldOutFigures

    @classmethod
    def read(cls, file: Path) -> Best:
        """Read what `write` wrote."""
        values = read_json(file)
        return cls(values.pop("value"), HeldOutFigures.model_validate(values))

    def write(self, file: Path) -> None:
        """Write value and figures as one flat JSON object."""
        write_json(file, {"value": self.value, **self.figures.model_dump()})


class Recorder(TrainerCallback):
    """Writes the curves, measures on the held-out rows, keeps the best weights and requests checkpoints.

    All processes measure; rank 0 writes.
    """

    def __init__(self, trainer: DistillTrainer, work: Path, advance: Advance):
        self.trainer, self.advance, self.group = trainer, advance, trainer.group
        self.curves, self.best = work / CURVES, work / BEST
        self.best_weights = work / "best.safetensors"
        self.note, self.lr = "", 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if self.group.rank:
            torch.manual_seed(args.seed + self.group.rank)  # other dropout masks in each process
        begun = False
        if self.group.rank == 0:
            keep = [line for line in student_lines(self.curves) if line.step <= state.global_step > 0]
            write_lines(self.curves, keep)
            begun = bool(keep)
        self.advance(state.global_step)
        if not self.group.share(begun):
            self._measure(0)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        # When one of several processes resumes within an epoch, the Trainer does not set the sampler's epoch.
        self.trainer.order.set_epoch(state.global_step // self._epoch_steps())

    def _epoch_steps(self) -> int:
        return math.ceil(self.trainer.order.count / self.trainer.pace.accumulate)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.lr = self.trainer._get_learning_rate()  # read now: on_step_end sees the next step's

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        trainer = self.trainer
        table = torch.tensor(self.group.gather(trainer.running.tolist()), dtype=torch.float64).sum(0)
        trainer.running.zero_()
        trainer.passed = 0
        means = trainer.depth_means(table)
        loss, nll, kl = trainer.depths.mean(means).tolist()
        config, step = trainer.config, state.global_step
        epochs, steps = divmod(step, self._epoch_steps())
        line = TrainingStep(
            step=step,
            epoch=round(epochs + steps * trainer.pace.accumulate / trainer.order.count, 4),
            loss=loss,
            nll=nll,
            lr=self.lr,
            tokens=int(table[-1, 3]),
        )
        if trainer.teacher is not None:
            line.kl = kl
        if config.sorts:
            line.depths = trainer.by_depth(means)
        if self.group.rank == 0:
            append_line(self.curves, line)
        last = step >= state.max_steps
        if step % trainer.pace.eval_every == 0 or last:
            self._measure(step)
        elif trainer.student.rounded is not None:
            trainer.student.rounded.follow(step)
        if step % config.save_every == 0 and not last:
            control.should_save = True
        self.advance(1, f"loss {loss:.3f}  {self.note}")

    def _measure(self, step: int) -> None:
        figures = self.trainer.measure(step)
        rounded = self.trainer.student.rounded
        if rounded is not None and step < rounded.first:
            rounded.follow(step)
        for name, figure in (("loss", figures.eval_loss), ("kl", figures.eval_kl)):
            if not math.isfinite(figure):
                raise self.trainer.diverged(f"held-out {name}", figure, step)
        if self.group.rank == 0:
            append_line(self.curves, figures)
        self.note = f"held-out kl {figures.eval_kl:.3f}, perplexity {figures.eval_perplexity:.2f}"
        value = self._value(step, figures)
        # A run killed between a measurement and its checkpoint measures again; the same value changes nothing.
        if self.group.share(self.group.rank == 0 and self._is_best(value)):
            weights = trainable_state(self.trainer.student)
            if self.group.rank == 0:
                save_whole(weights, self.best_weights)
                Best(value, figures).write(self.best)

    def _value(self, step: int, figures: HeldOutFigures) -> float:
        """The value that the best step is selected by; lower is better."""
        values = {"kl": figures.eval_kl, "perplexity": figures.eval_perplexity, "loss": figures.eval_loss}
        return values.get(self.trainer.config.select, -float(step))  # select: last

    def _is_best(self, value: float) -> bool:
        best = Best.read(self.best).value if self.best.exists() else math.inf
        return value < best or not self.best_weights.exists()
