"""What rounding and cutting cost, found on the weights: KL to the unpruned model on the held-out rows, in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from ..core.errors import UserError
from ..core.stage import Context, Inputs
from ..data.calibration import calibration_batches
from ..data.chat import Encoded
from ..evaluation.language import BaseLogProbs, log_probs, targets, text_windows
from ..export.cost import SENSED, TEXT
from ..export.damage import K
from ..export.gguf import Conversion
from ..export.gguf_sized import GgufSizes
from ..export.imatrix import collect, load_imatrix, save_imatrix
from ..export.sensitivity import collect_sensitivity, load_sensitivity, save_sensitivity
from ..export.sized import Chosen, Sizes
from ..modeling.blocks import Decoder, drop_blocks, replaced, without_blocks
from ..modeling.checkpoint import save_checkpoint
from ..modeling.cuts import Cut
from ..modeling.gguf_layout import Array, from_gguf
from ..modeling.load import load_config, load_model, load_tokenizer
from ..modeling.types import CausalModel
from ..prune.config import Calibration, PruneConfig
from ..prune.healing import fit_gaps, heal
from ..prune.heals.refit import RefitHeal
from ..prune.searches import choose
from ..prune.searches.greedy import Greedy
from ..prune.searches.window import Window
from ..prune.stage import calibration_rows, candidate_blocks, make_study
from ..prune.study import Study
from ..runtime.artifact_sizes import Target, target_of
from ..runtime.artifact_types import GGUF_TYPES
from .rows import Effort, too_few

TOP_K = 64  # tokens that llama.cpp lists of each prediction; the rest count as one
SMALL_VOCABULARY = 2048  # of which it lists all
COPYING = 0.5  # of the rows on which cuts are chosen: one that no longer copies is not seen on ordinary rows


class Damage:
    """The unpruned model, loaded once, and what becomes of it.

    `area` holds what a later attempt need not do again.
    """

    def __init__(
        self, base: Path, rows: Path, area: Path, effort: Effort, context: Context, name: Callable[[int], str] = str
    ):
        self.base, self.rows, self.area, self.effort, self.context = base, rows, area, effort, context
        self.name = name  # the model's in a file, by its blocks
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
        with rounded(self.model, self.base, self.types(self.base, mix, self.model)):
            return self._kl(f"rounded to {mix}")

    def roomier(self, sizes: Sizes[Any], limit: int, others: Sequence[int]) -> list[float]:
        """The estimated KL of own types for the unpruned model's files of other sizes, as shares of that of `limit`
        bytes."""
        found = [self.chosen(sizes, Target(bytes=size).name, self.model).damage for size in (limit, *others)]
        return [each / found[0] if found[0] > 0 else 1.0 for each in found[1:]]

    def types(self, checkpoint: Path, mix: str, model: CausalModel | None = None) -> FileTypes:
        """What a GGUF file of a checkpoint in a mix is written with; a mix may be a size."""
        if target_of(mix) is None:
            return FileTypes(mix, self.matrix(checkpoint, model) if GGUF_TYPES[mix].calibrated else None)
        chosen = self.chosen(self.gguf_sizes(checkpoint), mix, model)
        return FileTypes(chosen.like, chosen.importance, chosen.types)

    def gguf_sizes(self, checkpoint: Path) -> GgufSizes:
        """What sizes a checkpoint's GGUF file can have."""
        return GgufSizes(checkpoint, name=self.name(load_config(checkpoint).num_hidden_layers))

    def chosen(self, sizes: Sizes[K], size: str, model: CausalModel | None = None) -> Chosen[K]:
        """A type for every tensor, chosen as an export stage chooses it; `model` is the checkpoint's, where it is
        loaded."""
        checkpoint = sizes.checkpoint
        name = self.label(checkpoint)
        file = self.area / f"sensitivity-{name}.safetensors"
        if not file.exists():
            model = load_model(checkpoint, self.context.dtype, self.context.device) if model is None else model
            tokenizer = load_tokenizer(self.base)
            rows = calibration_batches(self._inputs, tokenizer, tokens=SENSED, length=TEXT, batch=1)
            with self._bar("sensitivity", sum(batch.tokens for batch in rows)) as advance:
                found = collect_sensitivity(model, rows, seed=self.context.seed, advance=advance)
            save_sensitivity(found, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        return sizes.chosen(
            size,
            load_sensitivity(file),
            self.matrix(checkpoint, model),
            cache=self.area / f"damage-{sizes.form}-{name}.json",
            progress=self.context.progress,
        )

    def cut(self, count: int) -> Cut:
        """The blocks that go where `count` do."""
        return choose(self.study, self.section(count), count, candidate_blocks(self.section(count), self.blocks))

    def of_cut(self, cut: Cut) -> float:
        """KL of the model without these blocks, the gaps healed."""
        values, _ = fit_gaps(self.model, cut, self.batches, RefitHeal(), self.context.progress)
        with replaced(values), without_blocks(self.model, cut):
            return self._kl(f"{len(cut)} cut")

    def label(self, checkpoint: Path) -> str:
        """A checkpoint's name in the work area."""
        return "unpruned" if checkpoint == self.base else checkpoint.parent.name

    def checkpoint(self, cut: Cut) -> Path:
        """A folder with the healed model without these blocks; made once."""
        if not cut:
            return self.base
        folder = self.area / "cuts" / "-".join(map(str, cut))
        if not (folder / "model" / "config.json").is_file():
            model, tokenizer = load_model(self.base, self.context.dtype, self.context.device), load_tokenizer(self.base)
            heal(model, cut, self.batches, RefitHeal(), self.context.progress)
            drop_blocks(model, cut)
            save_checkpoint(model, tokenizer, folder / "unfinished")
            (folder / "unfinished").rename(folder / "model")
        return folder / "model"

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
        file = self.area / f"imatrix-{self.label(checkpoint)}.safetensors"
        if not file.exists():
            self.area.mkdir(parents=True, exist_ok=True)
            model = load_model(checkpoint, self.context.dtype, self.context.device) if model is None else model
            with self._bar("importance matrix", sum(batch.tokens for batch in self.batches)) as advance:
                save_imatrix(collect(model, self.batches, advance), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        return load_imatrix(file)

    def _kl(self, label: str) -> float:
        """As llama.cpp lets a candidate be measured, so that prediction and measurement are of the same thing."""
        base, total, start = self.reference.open(), 0.0, 0
        with self._bar(label, self._tokens) as advance:
            for logs, wanted in log_probs(self.model, self.held_out, advance):
                expected = torch.from_numpy(base[slice(start, start + len(wanted))]).to(logs.device)
                total += float(divergences(expected, logs, wanted, listed(logs.shape[-1])).sum())
                start += len(wanted)
        if not np.isfinite(total):
            raise UserError(f"the model's predictions {label} are not numbers: its weights are out of range")
        return max(total / start, 0.0)

    @property
    def _tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.held_out)

    @property
    def _inputs(self) -> Inputs:
        return Inputs(self.base, self.base, {"data": self.rows})

    def _bar(self, label: str, total: int) -> Any:
        return self.context.progress.bar(label, total)


def listed(vocabulary: int) -> int | None:
    """How many tokens llama.cpp is asked to list of each prediction; None: all."""
    return None if vocabulary <= SMALL_VOCABULARY else TOP_K


def divergences(expected: Tensor, logs: Tensor, targets: Tensor, top_k: int | None) -> Tensor:
    """KL(expected ‖ logs) of each position, both (n, V) log-probabilities, in nats, float64 (n,); with `top_k` as
    `runtime.engine.divergence` has it: all but the other's most probable tokens and the target count as one."""
    p, log_p, log_q = expected.double().exp(), expected.double(), logs.double()
    if top_k is None:
        return (p * (log_p - log_q)).sum(-1)
    mask = torch.zeros_like(log_q).scatter_(1, logs.topk(top_k).indices, 1.0).scatter_(1, targets[:, None], 1.0)
    rest_p, rest_q = 1 - (p * mask).sum(-1), 1 - (log_q.exp() * mask).sum(-1)
    rest = rest_p * (rest_p.clamp_min(1e-6) / rest_q.clamp_min(1e-6)).log()
    return (p * (log_p - log_q) * mask).sum(-1) + torch.where(rest_p > 1e-6, rest, 0.0)


@dataclass(frozen=True)
class FileTypes:
    """What a file is written with."""

    mix: str  # plain
    importance: Mapping[str, Array] | None
    types: Mapping[str, GGMLQuantizationType] | None = None  # of every tensor; None: the mix's


@contextmanager
def rounded(model: CausalModel, checkpoint: Path, how: FileTypes) -> Iterator[None]:
    """The model with every weight as a file of these types would have it; `checkpoint` is where it was loaded from."""
    conversion = Conversion(checkpoint, how.mix, imatrix=how.importance, types=how.types)
    parameters = dict(model.named_parameters())
    values: dict[Any, Tensor] = {}
    for tensor in conversion.tensors:
        original = conversion.source.originals.get(tensor.name)
        if original is None or len(tensor.shape) < 2 or original not in parameters:
            continue
        stored = gguf.dequantize(conversion.packed(tensor), tensor.kind).reshape(tensor.shape)
        restored = from_gguf(tensor.name, stored, conversion.config)
        values[parameters[original]] = torch.from_numpy(np.ascontiguousarray(restored))
    with replaced(values):
        yield
