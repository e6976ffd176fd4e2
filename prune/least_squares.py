"""Ridge regression from accumulated sums, for the output that an MLP should have.

X and s minimise Σ w²·‖x·X + s·r − z‖² + α‖X − s·X₀‖² over tokens: x are the features (the MLP's output or `down_proj`'s
input), r the residual stream, z the target stream, w a weight per token, X₀ the matrix that X is shrunk towards. s is 1
unless it is fitted, and at least LEAST_SCALE. The sums are float64 and do not grow with the number of tokens. X is
diagonal where only a scale per channel can be fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import UserError

LEAST_SCALE = 0.1  # the stream is divided by s, so it must stay well above 0


@dataclass
class Sums:
    """Sums over tokens, float64; for a diagonal problem only the diagonals."""

    xx: Tensor  # (F, F) or (F,)
    xd: Tensor  # (F, H) or (F,), d = z − r
    xr: Tensor  # the same with r
    dd: float = 0.0
    rd: float = 0.0
    rr: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, outputs: int, device: torch.device, *, diagonal: bool) -> Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        if diagonal:
            return cls(zeros(features), zeros(features), zeros(features))
        return cls(zeros(features, features), zeros(features, outputs), zeros(features, outputs))

    @property
    def diagonal(self) -> bool:
        return self.xx.ndim == 1

    def add(self, x: Tensor, residual: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens: x (N, F), residual and target (N, H), weight (N,)."""
        x, r, z = x.double(), residual.double(), target.double()
        if weight is not None:
            x, r, z = (part * weight.double()[:, None] for part in (x, r, z))
        d = z - r
        if self.diagonal:
            self.xx += x.square().sum(0)
        else:
            self.xx.addmm_(x.T, x)  # in place: a second such matrix would be larger than a block's weights
        self.xd += self._product(x, d)
        self.xr += self._product(x, r)
        self.dd += float(d.square().sum())
        self.rd += float((r * d).sum())
        self.rr += float(r.square().sum())
        self.tokens += len(x)

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(0) if self.diagonal else x.T @ y

    def to(self, device: torch.device) -> Sums:
        """The same sums on another device."""
        tensors = (self.xx.to(device), self.xd.to(device), self.xr.to(device))
        return Sums(*tensors, self.dd, self.rd, self.rr, self.tokens)

    def __add__(self, other: Sums) -> Sums:
        tensors = (self.xx + other.xx, self.xd + other.xd, self.xr + other.xr)
        return Sums(*tensors, self.dd + other.dd, self.rd + other.rd, self.rr + other.rr, self.tokens + other.tokens)

    def solve(self, ridge: float, prior: Tensor, *, scaled: bool = False) -> tuple[Tensor, float]:
        """X (F, H) or (F,), float64, and s; α = ridge · the mean diagonal of Σ xᵀx. `UserError` where singular."""
        alpha = ridge * float(self.xx.mean() if self.diagonal else self.xx.diagonal().mean())
        fixed = self._divide(alpha, self.xd + alpha * prior)
        if not scaled:
            return fixed, 1.0
        # With s = 1 + t: x·X + t·r should equal d, so X = fixed − t·turn for any t; the error is quadratic in t.
        turn = self._divide(alpha, self.xr - alpha * prior)
        away, drift = fixed - prior, turn + prior
        curve = self.rr - 2 * float((turn * self.xr).sum()) + self._square(turn, turn) + alpha * _dot(drift, drift)
        slope = self.rd - float((turn * self.xd).sum()) - float((fixed * self.xr).sum()) + self._square(fixed, turn)
        slope += alpha * _dot(away, drift)
        # Above a bound, a parabola's minimum is its vertex or the bound. If it is flat, any t is as good.
        t = max(slope / curve, LEAST_SCALE - 1.0) if curve > 0 else 0.0
        return fixed - t * turn, 1.0 + t

    def error(self, solution: Tensor, scale: float = 1.0) -> float:
        """Σ ‖x·X + s·r − z‖² ÷ Σ ‖d‖² over the tokens of these sums."""
        t = scale - 1.0
        linear = float((solution * (self.xd - t * self.xr)).sum())
        total = self._square(solution, solution) - 2 * linear + self.dd - 2 * t * self.rd + t * t * self.rr
        return total / self.dd if self.dd else 0.0

    def _square(self, a: Tensor, b: Tensor) -> float:
        return _dot(a, self.xx * b if self.diagonal else self.xx @ b)

    def _divide(self, alpha: float, right: Tensor) -> Tensor:
        if self.diagonal:
            solution, failed = right / (self.xx + alpha), bool((self.xx + alpha == 0).any())
        else:
            eye = torch.eye(len(self.xx), dtype=torch.float64, device=self.xx.device)
            solution, info = torch.linalg.solve_ex(self.xx + alpha * eye, right)
            failed = bool(info)
        if failed:
            raise UserError(
                f"healing has no solution on {self.tokens} tokens; give prune.heal.ridge larger values, or raise "
                "prune.calibration.tokens"
            )
        return solution


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())


@dataclass(frozen=True)
class Fit:
    """A solution on all rows, with the ridge that is best on the held-out rows."""

    solution: Tensor
    scale: float
    ridge: float
    errors: dict[str, float]
    unhealed: float
    tokens: int


def choose(
    sums: Sequence[Sums], ridges: Sequence[float], toward: Tensor, unhealed: Tensor, *, scaled: bool = False
) -> Fit:
    """Solve with the ridge that, fitted on the fit rows, has the smallest error on the held-out rows.

    `sums` are those of the fit rows and of the held-out rows; `toward` is X₀, `unhealed` the X that changes nothing,
    for comparison. This runs on the CPU: a solution takes several times the memory of the sums (gigabytes for 14,336
    features), which a GPU that holds the model does not have.
    """
    device, home = toward.device, torch.device("cpu")
    fit, held = (part.to(home) for part in sums)
    toward, unhealed = toward.to(home), unhealed.to(home)
    errors = {ridge: held.error(*fit.solve(ridge, toward, scaled=scaled)) for ridge in ridges}
    best = min(errors, key=lambda ridge: (errors[ridge], ridge))
    both = fit + held
    solution, scale = both.solve(best, toward, scaled=scaled)
    by_name = {f"{ridge:g}": error for ridge, error in errors.items()}
    return Fit(solution.to(device), scale, best, by_name, held.error(unhealed), both.tokens)
