"""What rounding and cutting cost, found on the weights: KL to the unpruned model on the held-out rows, in torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ..core.errors import UserError
from ..core.stage import Context, Inputs
from ..data.chat import Encoded
from ..evaluation.language import BaseLogProbs, log_probs, measure_model, targets, text_windows
from ..export.gguf import Conversion
from ..export.imatrix import collect, load_imatrix, save_imatrix
from ..modeling.blocks import Decoder, drop_blocks, replaced, without_blocks
from ..modeling.checkpoint import save_checkpoint
from ..modeling.gguf_layout import Array, from_gguf
from ..modeling.load import load_config, load_model, load_tokenizer
from ..modeling.types import CausalModel
from ..prune.config import Calibration, PruneConfig
from ..prune.cuts import Cut
from ..prune.healing import fit_gaps, heal
from ..prune.heals.refit import RefitHeal
from ..prune.searches import choose
from ..prune.searches.greedy import Greedy
from ..prune.searches.window import Window
from ..prune.stage import calibration_rows, candidate_blocks, make_study
from ..prune.study import Study
from ..runtime.artifact_types import GGUF_TYPES
from .rows import Effort, too_few

COPYING = 0.5  # of the rows on which cuts are chosen: one that no longer copies is not seen on ordinary rows


class Damage:
    """The unpruned model, loaded once, and what becomes of it.

    `area` holds what a later attempt need not do again.
    """

    def __init__(self, base: Path, rows: Path, area: Path, effort: Effort, context: Context):
        self.base, self.rows, self.area, self.effort, self.context = base, rows, area, effort, context
        self.searched = True  # False: cuts come from one pass, for want of time

    @cached_property
    def model(self) -> CausalModel:
        return load_model(self.base, self.context.dtype, self.context.device)

    @cached_property
    def held_out(self) -> list[Encoded]:
        """The windows that KL is measured on."""
        tokenizer = load_tokenizer(self.base)
        found = text_windows(tokenizer, None, self.rows, self.effort.length, 1 << 60)
        kept: list[Encoded] = []
        for row in found:
            if sum(len(targets(each)) for each in kept) >= self.effort.positions:
                break
            kept.append(row)
        return kept

    @property
    def positions(self) -> int:
        """How many tokens KL is measured on."""
        return sum(len(targets(row)) for row in self.held_out)

    @cached_property
    def reference(self) -> BaseLogProbs:
        """The unpruned model's predictions there."""
        vocabulary = load_config(self.base).vocab_size
        found = BaseLogProbs(self.area / "unpruned.logs", self.positions, vocabulary)
        if not found.complete:
            self.area.mkdir(parents=True, exist_ok=True)
            with self._bar("unpruned model", self._tokens) as advance:
                found.write(log_probs(self.model, self.held_out, advance))
        return found

    def check(self, what: str) -> None:
        """`UserError` where the rows (`what` names them) are too few to tell two types apart."""
        effort, tokens = self.effort, sum(batch.tokens for batch in self.batches)
        if tokens < effort.least_calibration:
            raise too_few(f"{what}: {tokens} tokens of training rows", f"{effort.least_calibration} are needed")
        if self.positions < effort.least_positions:
            raise too_few(f"{what}: {self.positions} held-out tokens", f"{effort.least_positions} are needed")

    def of_type(self, mix: str) -> float:
        """KL of the unpruned model in a mix."""
        with rounded(self.model, self.base, mix, self.matrix(self.base, self.model)):
            return self._kl(f"rounded to {mix}")

    def cut(self, count: int) -> Cut:
        """The blocks that go where `count` do."""
        return choose(self.study, self.section(count), count, candidate_blocks(self.section(count), self.blocks))

    def of_cut(self, cut: Cut) -> float:
        """KL of the model without these blocks, the gaps healed."""
        values, _ = fit_gaps(self.model, cut, self.batches, RefitHeal(), self.context.progress)
        with replaced(values), without_blocks(self.model, cut):
            return self._kl(f"{len(cut)} cut")

    def checkpoint(self, cut: Cut) -> tuple[Path, dict[str, Array]]:
        """A folder with the healed model without these blocks, and the importance matrix of its export; made once."""
        if not cut:
            return self.base, self.matrix(self.base, self.model)
        folder = self.area / "cuts" / "-".join(map(str, cut))
        if not (folder / "model" / "config.json").is_file():
            model, tokenizer = load_model(self.base, self.context.dtype, self.context.device), load_tokenizer(self.base)
            heal(model, cut, self.batches, RefitHeal(), self.context.progress)
            drop_blocks(model, cut)
            save_checkpoint(model, tokenizer, folder / "unfinished")
            (folder / "unfinished").rename(folder / "model")
        return folder / "model", self.matrix(folder / "model", None)

    def section(self, count: int) -> PruneConfig:
        """The recipe's `prune` section that makes the cut of so many blocks."""
        effort = self.effort
        part = min(effort.scoring, sum(batch.tokens for batch in self.batches) // 4)
        calibration = self._calibration.model_copy(update={"scoring": part, "held_out": part})
        search = Greedy(copying=COPYING) if self.searched else Window()
        return PruneConfig(blocks=count, search=search, heal=RefitHeal(), calibration=calibration)

    @property
    def blocks(self) -> int:
        return Decoder(self.model).num_blocks

    @cached_property
    def batches(self) -> list[Any]:
        """The rows that gaps are healed on."""
        section = PruneConfig(blocks=1, calibration=self._calibration)
        return calibration_rows(section, self._inputs, load_tokenizer(self.base), self.context)

    @property
    def _calibration(self) -> Calibration:
        effort = self.effort
        return Calibration(tokens=effort.calibration, length=effort.length, batch=effort.batch)

    @cached_property
    def study(self) -> Study:
        return make_study(self.section(1), self.model, self.batches, self.area / "search.jsonl", self.context)

    def matrix(self, checkpoint: Path, model: CausalModel | None) -> dict[str, Array]:
        """The importance matrix of a checkpoint, made once."""
        name = "unpruned" if checkpoint == self.base else checkpoint.parent.name
        file = self.area / f"imatrix-{name}.safetensors"
        if not file.exists():
            self.area.mkdir(parents=True, exist_ok=True)
            model = load_model(checkpoint, self.context.dtype, self.context.device) if model is None else model
            with self._bar("importance matrix", sum(batch.tokens for batch in self.batches)) as advance:
                save_imatrix(collect(model, self.batches, advance), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        return load_imatrix(file)

    def _kl(self, label: str) -> float:
        with self._bar(label, self._tokens) as advance:
            found = measure_model(self.model, self.held_out, self.reference, advance)["kl_to_base"]
        if found is None or not np.isfinite(found):
            raise UserError(f"the model's predictions {label} are not numbers: its weights are out of range")
        return max(found, 0.0)

    @property
    def _tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.held_out)

    @property
    def _inputs(self) -> Inputs:
        return Inputs(self.base, self.base, {"data": self.rows})

    def _bar(self, label: str, total: int) -> Any:
        return self.context.progress.bar(label, total)


@contextmanager
def rounded(model: CausalModel, checkpoint: Path, mix: str, matrix: dict[str, Array]) -> Iterator[None]:
    """The model with every weight as a file of this mix would have it; `checkpoint` is where it was loaded from."""
    conversion = Conversion(checkpoint, mix, imatrix=matrix if GGUF_TYPES[mix].calibrated else None)
    parameters = dict(model.named_parameters())
    values: dict[Any, torch.Tensor] = {}
    for tensor in conversion.tensors:
        original = conversion.source.originals.get(tensor.name)
        if original is None or len(tensor.shape) < 2 or original not in parameters:
            continue
        stored = gguf.dequantize(conversion.packed(tensor), tensor.kind).reshape(tensor.shape)
        restored = from_gguf(tensor.name, stored, conversion.config)
        values[parameters[original]] = torch.from_numpy(np.ascontiguousarray(restored))
    with replaced(values):
        yield
