"""Training rows that the student writes itself (GKD, arXiv 2306.13649).

Every `refresh` steps the student, as it is then, writes the answers of the chosen rows of the coming steps. They stay
in files until the training is done, because a run that resumes within these steps has not the weights any more that
wrote them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.files import json_lines
from ..data.calibration import pad_id
from ..data.chat import Encoded, end_tokens
from ..data.packing import Batch, assemble, unpack
from ..data.parts import Records, in_rounds
from ..data.sampling import Sampling, row_seed, sample
from ..modeling.types import CausalModel, ModelTokenizer
from ..records.students import OnPolicyFigures
from .budget import Pace, total_steps
from .config import OnPolicy
from .job import ON_POLICY, TrainingJob
from .order import BatchOrder

Key = tuple[int, int]  # a row's id, and the position of its first token in it
Place = tuple[int, int, int]  # epoch, and key


def prompt_length(row: Encoded) -> int:
    """Tokens before a row's last answer; half of the row where it is text without a prompt."""
    learned = [t for t, marked in enumerate(row.loss_mask) if marked]
    first = learned[-1]
    while first and row.loss_mask[first - 1]:
        first -= 1
    return first if first > 1 else max(1, len(row.input_ids) // 2)


@dataclass(frozen=True)
class Steps:
    """Which batches each optimizer step learns from."""

    batches: int  # per epoch
    per_step: int
    world: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-self.batches // self.per_step)

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to; both count from 0."""
        return step // self.per_epoch

    def of(self, epoch: int, steps: Sequence[int]) -> list[int]:
        """The batches of adjacent steps of an epoch, those of all processes."""
        order = BatchOrder(self.batches, self.world, self.seed)
        order.set_epoch(epoch)
        start, end = steps[0] % self.per_epoch, steps[-1] % self.per_epoch + 1
        batches = list(order)[start * self.per_step : end * self.per_step]
        return [number for number in batches if number < self.batches]


class StudentRows:
    """Writes answers with the student, and puts them into batches."""

    def __init__(
        self,
        job: TrainingJob,
        config: OnPolicy,
        chosen: Pace,
        rows: Sequence[Encoded],
        batches: Sequence[Batch],
        tokenizer: ModelTokenizer,
        base: Path,
    ):
        """`rows` have the masks of their answers, whatever is learned; `batches` are made of them. A row with its
        written answer has at most the section's `length` tokens."""
        self.config, self.context, self.folder, self.length = (
            config,
            job.context,
            job.work / ON_POLICY,
            job.config.length,
        )
        self.pad, self.stop = pad_id(tokenizer), frozenset(end_tokens(tokenizer, base))
        self.steps = Steps(len(batches), chosen.accumulate, job.context.world, job.context.seed)
        self.last = total_steps(job.config, chosen, len(batches))
        self.prompts = {(row.row, row.start): row.input_ids[: prompt_length(row)] for row in rows}
        self.keys = [[(row.row, row.start) for rows in unpack(batch) for row in rows] for batch in batches]
        self._first = -1
        self._written: dict[Place, list[int]] = {}

    def chosen(self, epoch: int) -> set[Key]:
        """The rows of an epoch whose answers the student writes: exactly their share, others in every epoch."""
        ranked = sorted(self.prompts, key=lambda key: _rank(f"{self.context.seed}/on policy/{epoch}/{key}"))
        return set(ranked[: round(self.config.share * len(ranked))])

    def prepare(self, step: int, model: CausalModel) -> None:
        """Let the model write the answers of a step and of those up to the next refresh, unless they are written; all
        processes must call it."""
        first = step - step % self.config.refresh
        if first != self._first:
            self._first, self._written = (
                first,
                self._write(range(first, min(first + self.config.refresh, self.last)), model),
            )

    def replaced(self, batch: Batch, step: int) -> Batch:
        """A batch of a prepared step with the written answers in place of its own. Of prompts is learned what the batch
        learns of them."""
        if not batch.loss_mask.any():  # a blank one
            return batch
        epoch = self.steps.epoch(step)
        bins = [[self._with_answer(row, epoch) for row in rows] for rows in unpack(batch)]
        return assemble(bins, self.length, self.pad).to(batch.input_ids.device)

    def figures(self) -> OnPolicyFigures:
        """What was written, from the files."""
        written = [record["tokens"] for file in sorted(self.folder.glob("*/*.jsonl")) for _, record in json_lines(file)]
        return OnPolicyFigures(rows=len(written), tokens=sum(map(len, written)))

    def _with_answer(self, row: Encoded, epoch: int) -> Encoded:
        answer = self._written.get((epoch, row.row, row.start))
        if answer is None:
            return row
        prompt = len(self.prompts[row.row, row.start])
        mask = [*row.loss_mask[:prompt], *[True] * len(answer)]
        return replace(row, input_ids=[*row.input_ids[:prompt], *answer], loss_mask=mask)

    def _places(self, steps: range) -> Iterator[Place]:
        """The chosen rows of some steps."""
        for epoch, group in itertools.groupby(steps, self.steps.epoch):
            chosen = self.chosen(epoch)
            for number in self.steps.of(epoch, list(group)):
                yield from ((epoch, *key) for key in self.keys[number] if key in chosen)

    def _write(self, steps: range, model: CausalModel) -> dict[Place, list[int]]:
        """The answers of some steps; all processes must call it. Those in files are read."""
        # Prompts of similar length together need little padding.
        places = sorted(self._places(steps), key=lambda place: (len(self.prompts[place[1:]]), place))
        groups = [places[i : i + self.config.batch] for i in range(0, len(places), self.config.batch)]
        folder = self.folder / f"{steps.start:07d}"
        written: dict[Place, list[int]] = {}
        for records in in_rounds(folder, len(groups), self.context.group, lambda n: self._draw(groups[n], model)):
            written |= {(one["epoch"], one["row"], one["start"]): one["tokens"] for one in records}
        return written

    def _draw(self, places: Sequence[Place], model: CausalModel) -> Records:
        prompts = [self.prompts[place[1:]] for place in places]
        seeds = [row_seed(self.context.seed, row, f"on policy/{epoch}/{start}") for epoch, row, start in places]
        how = Sampling(self.config.max_tokens, self.config.temperature)
        drawn = sample(model, prompts, seeds, how, stop=self.stop)
        records: list[dict[str, Any]] = []
        for (epoch, row, start), prompt, sampled in zip(places, prompts, drawn, strict=True):
            answer = [*sampled.tokens, *([] if sampled.stop is None else [sampled.stop])]
            records.append({"epoch": epoch, "row": row, "start": start, "tokens": answer[: self.length - len(prompt)]})
        return records


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
