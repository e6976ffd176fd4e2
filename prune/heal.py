"""Closing the gap with a least-squares map (ReplaceMe, arXiv 2505.02819).

With M the MLP output of the last kept block before the gap, Y the residual stream it is added to, and Z the output
of the last dropped block, T minimises ‖M·T − (Z − Y)‖². T is fused into the block's `down_proj`, so the healed
model has the same shape and costs nothing more. Sums are float64, over real tokens only; they do not grow with
the number of tokens. Several gaps are healed upstream first, each behind the healed ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.packing import Batch
from ..errors import UserError
from ..modeling.blocks import Decoder, without_blocks
from ..stage import Advance
from .config import LinearHeal


@dataclass
class Statistics:
    """Sums over tokens that a least-squares fit and its error need, float64."""

    mm: Tensor  # (H, H)  Σ mᵀm
    md: Tensor  # (H, H)  Σ mᵀd, d = target − residual
    dd: float  # Σ ‖d‖²
    tokens: int

    @classmethod
    def empty(cls, size: int, device: torch.device) -> Statistics:
        zeros = torch.zeros(size, size, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone(), 0.0, 0)

    def add(self, m: Tensor, d: Tensor) -> None:
        """Add tokens: m and d are (N, H)."""
        m, d = m.double(), d.double()
        self.mm += m.T @ m
        self.md += m.T @ d
        self.dd += float(d.square().sum())
        self.tokens += len(m)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.mm + other.mm, self.md + other.md, self.dd + other.dd, self.tokens + other.tokens)

    def solve(self, ridge: float, toward: str) -> Tensor:
        """T (H, H) of (MᵀM + αI)·T = MᵀD [+ αI], α = ridge · mean diagonal of MᵀM. `UserError` where singular."""
        alpha = ridge * float(self.mm.diagonal().mean())
        identity = torch.eye(len(self.mm), dtype=torch.float64, device=self.mm.device)
        right = self.md + alpha * identity if toward == "identity" else self.md
        solution, failed = torch.linalg.solve_ex(self.mm + alpha * identity, right)
        if failed:
            raise UserError(
                f"heal: linear has no solution with the ridge {ridge:g} on {self.tokens} tokens; "
                "give prune.heal.ridge larger values, or raise prune.calibration.tokens"
            )
        return solution

    def error(self, transform: Tensor) -> float:
        """‖M·T − D‖² ÷ ‖D‖² over the tokens of these sums."""
        squared = (transform * (self.mm @ transform)).sum() - 2 * (transform * self.md).sum() + self.dd
        return float(squared) / self.dd


@dataclass(frozen=True)
class Healing:
    """What was fitted for one gap, for the record."""

    block: int  # the kept block whose down_proj was changed
    gap: tuple[int, int]  # first and last dropped block
    ridge: float
    errors: dict[str, float]  # held-out relative squared error by ridge candidate
    unhealed_error: float  # the same without a map
    tokens: int


def gaps(dropped: list[int]) -> list[tuple[int, int]]:
    """Runs of adjacent blocks as (first, last), in order."""
    runs: list[tuple[int, int]] = []
    for block in sorted(dropped):
        if runs and runs[-1][1] == block - 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return runs


@torch.no_grad()
def heal_linear(
    model: Any, dropped: list[int], batches: list[Batch], config: LinearHeal, advance: Advance
) -> list[Healing]:
    """Change the `down_proj` before each gap of the *unpruned* model so that the pruned one follows it.

    The blocks themselves are dropped by the caller afterwards. Without dropped blocks nothing is touched. Raises
    `UserError` where there is no block before a gap, where the last block goes, or for families whose MLP output is
    normalised before it is added.
    """
    decoder = Decoder(model)
    runs = gaps(dropped)
    if runs and not decoder.can_fuse_after_mlp:
        raise UserError(
            f"heal: linear cannot be fused into a {model.config.model_type} model, which normalises its MLP output; "
            "use heal: none"
        )
    if runs and (runs[0][0] == 0 or runs[-1][1] == decoder.num_blocks - 1):
        raise UserError("heal: linear needs a kept block before each gap, and the last block must stay")
    healed: dict[int, Tensor] = {}  # the map behind each block's MLP
    report = []
    for first, last in runs:
        upstream = [block for block in dropped if block < first]
        fit, held = collect(decoder, (first, last), upstream, healed, batches, config.held_out, advance)
        transform, record = choose(fit, held, config, first - 1, (first, last))
        healed[first - 1] = transform
        report.append(record)
    for block, transform in healed.items():
        fuse(decoder.down_proj(block), transform)
    return report


@torch.no_grad()
def fuse(linear: torch.nn.Linear, transform: Tensor) -> None:
    """Change a linear layer in place so that it gives y·T where it gave y; T is (H, H), float64."""
    for parameter in linear.parameters():  # weight (H, intermediate), and bias (H,) in models that have one
        parameter.copy_((transform.T @ parameter.double()).to(parameter.dtype))


def choose(
    fit: Statistics, held: Statistics, config: LinearHeal, block: int, gap: tuple[int, int]
) -> tuple[Tensor, Healing]:
    """The map with the ridge that held-out rows prefer, fitted on all rows."""
    errors = {ridge: held.error(fit.solve(ridge, config.toward)) for ridge in config.ridge}
    best = min(errors, key=lambda ridge: (errors[ridge], ridge))
    identity = torch.eye(len(fit.mm), dtype=torch.float64, device=fit.mm.device)
    both = fit + held
    record = Healing(block, gap, best, {f"{r:g}": e for r, e in errors.items()}, held.error(identity), both.tokens)
    return both.solve(best, config.toward), record


def collect(
    decoder: Decoder,
    gap: tuple[int, int],
    upstream: list[int],
    healed: dict[int, Tensor],
    batches: list[Batch],
    held_out: float,
    advance: Advance,
) -> tuple[Statistics, Statistics]:
    """Sums for one gap: over the rows to fit on, and over the held-out rows (every k-th packed row)."""
    rows = sum(len(batch.input_ids) for batch in batches)
    every = min(max(2, round(1 / held_out)), rows)
    if rows < 2:
        raise UserError("heal: linear needs at least two packed calibration rows; raise prune.calibration.tokens")
    device = decoder.model.device
    sums = [Statistics.empty(decoder.hidden_size, device) for _ in range(2)]
    row = 0
    for batch in batches:
        batch = batch.to(device)
        with capture(decoder, gap) as seen:
            decoder.hidden(**batch.model_inputs())
        target = seen["target"]
        if upstream:  # behind healed gaps, the MLP's input is what the pruned model will feed it
            with (
                replaced(decoder, healed),
                capture(decoder, gap) as seen,
                without_blocks(decoder.model, upstream),
            ):
                decoder.hidden(**batch.model_inputs())
        m, residual = seen["mlp"], seen["output"] - seen["mlp"]
        for number in range(len(m)):
            real = batch.segment_ids[number] >= 0
            sums[row % every == every - 1].add(m[number][real], (target[number] - residual[number])[real])
            row += 1
        advance(int((batch.segment_ids >= 0).sum()))
    return sums[0], sums[1]


@contextmanager
def capture(decoder: Decoder, gap: tuple[int, int]) -> Iterator[dict[str, Tensor]]:
    """Fills a dict during a forward pass: "mlp" and "output" of the block before the gap, "target" of its last."""
    seen: dict[str, Tensor] = {}

    def save(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    before = gap[0] - 1
    handles = [
        decoder.down_proj(before).register_forward_hook(save("mlp")),
        decoder.blocks[before].register_forward_hook(save("output")),
        decoder.blocks[gap[1]].register_forward_hook(save("target")),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(decoder: Decoder, healed: dict[int, Tensor]) -> Iterator[None]:
    """The model with maps fused behind some blocks' MLPs inside the context; restored exactly afterwards."""
    parameters = [parameter for block in healed for parameter in decoder.down_proj(block).parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        for block, transform in healed.items():
            fuse(decoder.down_proj(block), transform)
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)
