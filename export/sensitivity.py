"""How much each matrix's rounding errors will cost: the second order of the KL, from one pass over calibration rows.

A small change dW of a matrix moves the predictions by KL ≈ ½ Σ_ij F_ij dW_ij², where F is the diagonal of the Fisher
information: E[G_ij²] of the gradient G of a text's log-probability, with every next token drawn from the model itself
(arXiv:1503.05671). G sums over all positions of a text, which matters: through attention one change acts on many
positions alike. F is kept as the product of its row and column sums (as in arXiv:1804.04235). Rounding errors of
different weights hardly depend on each other, so that the diagonal is what counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.stage import Advance
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from ..modeling.families import EMBEDDING, HEAD
from ..modeling.types import CausalModel

Array = NDArray[np.float32]
TOLD_APART = 0.3  # relative standard error up to which a type's damage is told from its neighbour's, about half of it
ENOUGH = 1000  # tokens that are named where there is no standard error


@dataclass(frozen=True)
class Term:
    """One use of a matrix: a change dW of it costs ½ Σ_ij rows_i columns_j dW_ij² nats per token."""

    rows: Array  # (N,)
    columns: Array  # (K,)


@dataclass(frozen=True)
class Sensitivity:
    """The terms of every matrix by the checkpoint's name; a tied embedding has two, as embedding and as head."""

    terms: Mapping[str, Sequence[Term]]
    spread: float  # relative standard error of a matrix's sensitivity, the median over matrices
    tokens: int

    def importance(self, name: str) -> Array:
        """(K,): how much the rounding errors of each column matter, rows taken alike."""
        uses = [term.rows.mean() * term.columns for term in self.terms[name]]
        return np.stack(uses).sum(0).astype(np.float32)


@dataclass
class _Sums:
    """Sums over texts of F's rows and columns, of one matrix."""

    rows: Tensor | None = None  # (N,)
    columns: Tensor | None = None  # (K,)
    each: list[float] = field(default_factory=list)  # the sum of all of F per token, of each text

    def add(self, rows: Tensor, columns: Tensor, tokens: int) -> None:
        self.rows = rows if self.rows is None else self.rows + rows
        self.columns = columns if self.columns is None else self.columns + columns
        self.each.append(float(rows.sum()) / tokens)

    def term(self, tokens: int) -> Term:
        assert self.rows is not None and self.columns is not None
        share = self.columns / self.columns.sum().clamp(min=1e-300)
        return Term((self.rows / tokens).float().cpu().numpy(), share.float().cpu().numpy())


def collect_sensitivity(
    model: CausalModel, batches: Iterable[Batch], *, seed: int = 0, advance: Advance | None = None
) -> Sensitivity:
    """Measure a model on packed rows, a batch at a time. Raises `UserError` without rows."""
    decoder = Decoder(model)
    linears = {f"{p}.weight": m for p, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in p}
    sums = {name: _Sums() for name in [*linears, EMBEDDING, HEAD]}
    random = torch.Generator().manual_seed(seed)
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    tokens = 0
    try:
        for batch in batches:
            _add(decoder, linears, batch.to(model.device), sums, random)
            tokens += batch.tokens
            if advance is not None:
                advance(batch.tokens)
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
    if not tokens:
        raise UserError("a type for every tensor is chosen on calibration rows, but the data stage has none")
    terms = {name: [found.term(tokens)] for name, found in sums.items()}
    if model.config.tie_word_embeddings:
        terms[EMBEDDING] += terms.pop(HEAD)
    return Sensitivity(terms, _spread([found.each for found in sums.values()]), tokens)


def _add(
    decoder: Decoder, linears: Mapping[str, nn.Linear], batch: Batch, sums: Mapping[str, _Sums], random: torch.Generator
) -> None:
    real = (batch.segment_ids >= 0).flatten()

    def add(name: str, gradient: Tensor) -> None:
        squares = gradient.square()
        sums[name].add(squares.sum(1).double(), squares.sum(0).double(), batch.tokens)

    def watch(name: str):
        def hook(_module: object, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = args[0].detach().flatten(0, 1)
            output.register_hook(lambda g: add(name, g.flatten(0, 1).float().T @ inputs.float()))

        return hook

    def embed(module: nn.Embedding, _args: object, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_(True)
        scale = float(getattr(module, "embed_scale", 1.0))  # by which Gemma-3 multiplies what it looks up

        def keep(gradient: Tensor) -> None:
            summed = torch.zeros(module.weight.shape, dtype=torch.float32, device=gradient.device)
            summed.index_add_(0, batch.input_ids.flatten(), scale * gradient.flatten(0, 1).float())
            add(EMBEDDING, summed)

        output.register_hook(keep)
        return output

    handles = [module.register_forward_hook(watch(name)) for name, module in linears.items()]
    handles.append(decoder.embedding.register_forward_hook(embed))  # type: ignore[arg-type]
    try:
        with torch.enable_grad():
            hidden = decoder.hidden(**batch.model_inputs()).flatten(0, 1)[real]
            scores = torch.log_softmax(decoder.head(hidden).float(), -1)
            chances = scores.detach().exp()
            drawn = torch.multinomial(chances.cpu(), 1, generator=random).to(scores.device)
            scores.gather(1, drawn).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    # A change of the head acts on one position at a time: F_ij is E[p_i (1 - p_i) h_j²], taken as a product.
    squares = hidden.detach().float().square().sum(0).double()
    rows = (chances * (1 - chances)).sum(0).double() * squares.sum() / batch.tokens
    sums[HEAD].add(rows, squares, batch.tokens)


def check_spread(found: Sensitivity) -> None:
    """Raise `UserError` where the text was too short to tell which of two types of a tensor costs more."""
    if found.spread <= TOLD_APART:
        return
    if not np.isfinite(found.spread):
        raise UserError(
            f"{found.tokens} calibration tokens in one text are too few to choose types by: give several texts, of "
            f"about {ENOUGH} tokens together"
        )
    wanted = int(found.tokens * (found.spread / TOLD_APART) ** 2) + 1
    raise UserError(
        f"{found.tokens} calibration tokens are too few to tell two types apart: how much a tensor's errors cost is "
        f"known to ±{found.spread:.0%}, and neighbouring types differ by about half; about {wanted} tokens are needed"
    )


def _spread(each: Sequence[Sequence[float]]) -> float:
    """The median over matrices of the relative standard error of the mean of their batches' values."""
    count = min(len(values) for values in each)
    if count < 2:
        return float("inf")
    table = np.array([values[:count] for values in each])
    return float(np.median(table.std(1, ddof=1) / table.mean(1)) / np.sqrt(count))


def save_sensitivity(found: Sensitivity, file: Path) -> None:
    """Write as safetensors."""
    from safetensors.numpy import save_file

    arrays = {}
    for name, terms in found.terms.items():
        for number, term in enumerate(terms):
            arrays |= {f"{name}|{number}|rows": term.rows, f"{name}|{number}|columns": term.columns}
    save_file(arrays, file, {"spread": repr(found.spread), "tokens": str(found.tokens)})


def load_sensitivity(file: Path) -> Sensitivity:
    """Read what `save_sensitivity` wrote."""
    from safetensors import safe_open

    terms: dict[str, list[Term]] = {}
    with safe_open(file, "np") as opened:
        notes = opened.metadata()
        for key in sorted(opened.keys()):
            name, number, part = key.split("|")
            if part == "rows":
                terms.setdefault(name, []).append(
                    Term(opened.get_tensor(key), opened.get_tensor(f"{name}|{number}|columns"))
                )
    return Sensitivity(terms, float(notes["spread"]), int(notes["tokens"]))
