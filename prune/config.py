"""The recipe's `prune` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..stage import Section

FORMAT = 1


class Calibration(Section):
    """The tokens on which importance is measured and healing is fitted."""

    tokens: int = Field(
        default=16384, ge=16, description="how many tokens of the data stage's training rows, or of `text`"
    )
    length: int = Field(default=512, ge=8, description="tokens per packed row")
    batch: int = Field(default=4, ge=1, description="packed rows per forward pass")
    text: str | None = Field(default=None, description="a text file to calibrate on instead of the data stage's rows")


class NoHeal(Section):
    """Leave the gap as it is."""

    kind: Literal["none"] = "none"


class LinearHeal(Section):
    """A least-squares map over the gap, fused into the preceding `down_proj` (ReplaceMe, arXiv 2505.02819)."""

    kind: Literal["linear"] = "linear"
    ridge: list[Annotated[float, Field(ge=0)]] = Field(
        default=[1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        min_length=1,
        description="candidates for the ridge, as a share of the mean squared MLP output; held-out rows choose",
    )
    toward: Literal["zero", "identity"] = Field(
        default="identity",
        description="what the ridge shrinks the map towards: zero (as published) or leaving the MLP as is",
    )
    held_out: float = Field(default=0.125, gt=0, le=0.5, description="share of calibration rows that choose the ridge")


def _named(value: Any) -> Any:
    """`heal: linear` is short for `heal: {kind: linear}`."""
    return {"kind": value} if isinstance(value, str) else value


Heal = Annotated[NoHeal | LinearHeal, Field(discriminator="kind"), BeforeValidator(_named)]


class PruneConfig(Section):
    """Which blocks go, and how the gap is closed."""

    blocks: int = Field(ge=0, description="how many blocks to drop")
    importance: Literal["angular", "influence"] = Field(
        default="angular",
        description="angular: arccos of the cosine between the hidden states around the blocks (arXiv 2403.17887); "
        "influence: one minus that cosine (ShortGPT, arXiv 2403.03853)",
    )
    position: Literal["last", "all"] = Field(
        default="all", description="measured on every token, or on the last token of each row"
    )
    search: Literal["window", "lowest"] = Field(
        default="window",
        description="window: the best run of adjacent blocks; lowest: the least important blocks, anywhere",
    )
    heal: Heal = Field(default_factory=LinearHeal, description="how the gap is closed: linear or none")
    calibration: Calibration = Field(default_factory=Calibration, description="the tokens to measure and heal on")

    def input_files(self) -> list[str]:
        return [self.calibration.text] if self.calibration.text else []
