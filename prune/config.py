"""The recipe's `prune` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..core.stage import Section

FORMAT = 2


class Calibration(Section):
    """The tokens on which importance is measured, cuts are scored and healing is fitted."""

    tokens: int = Field(
        default=16384, ge=16, description="how many tokens of the data stage's training rows, or of `text`"
    )
    length: int = Field(default=512, ge=8, description="tokens per packed row")
    batch: int = Field(default=4, ge=1, description="packed rows per forward pass")
    text: str | None = Field(default=None, description="a text file to calibrate on instead of the data stage's rows")
    scoring: int = Field(
        default=4096,
        ge=2,
        description="of these tokens, how many cuts are scored on (greedy, beam, auto; perplexity, kl, taylor)",
    )
    held_out: int = Field(
        default=4096,
        ge=2,
        description="of these tokens, how many greedy, beam and auto keep back to compare what they found on",
    )


class Lowest(Section):
    """The least important blocks, anywhere."""

    kind: Literal["lowest"] = "lowest"


class Window(Section):
    """The best run of adjacent blocks (arXiv 2403.17887)."""

    kind: Literal["window"] = "window"


class Scored(Section):
    """Cuts are tried out on the scoring rows."""

    score: Literal["kl", "perplexity"] = Field(
        default="kl", description="what a cut is scored by: KL(unpruned ‖ cut), or the perplexity of the rows"
    )
    healed: bool | None = Field(
        default=None, description="score cuts as linear healing would leave them; null: if the recipe heals at all"
    )
    copying: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the rows cuts are tried on in which a text is read twice, so that cuts which can no "
        "longer copy from what they have read score worse",
    )
    guard: bool = Field(
        default=True, description="take the angular window or the lowest influence where held-out rows find it better"
    )


class Greedy(Scored):
    """Block by block, each time the one that costs least (as SLEB, arXiv 2402.09025)."""

    kind: Literal["greedy"] = "greedy"


class Beam(Scored):
    """The best few cuts of each size, then exchanges of a dropped block for a kept one."""

    kind: Literal["beam"] = "beam"
    width: int = Field(default=3, ge=1, description="cuts kept of each size")
    patience: int = Field(
        default=1, ge=0, description="rounds of exchanges that may go by without held-out rows finding the cut better"
    )


class NoHeal(Section):
    """Leave the gap as it is."""

    kind: Literal["none"] = "none"


class LeastSquares(Section):
    """Fitted by ridge regression, the ridge chosen by held-out rows."""

    ridge: list[Annotated[float, Field(ge=0)]] = Field(
        default=[1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        min_length=1,
        description="candidates for the ridge, as a share of the features' mean square; held-out rows choose",
    )
    held_out: float = Field(default=0.125, gt=0, le=0.5, description="share of calibration rows that choose the ridge")


class LinearHeal(LeastSquares):
    """A least-squares map over the gap, fused into the preceding `down_proj` (ReplaceMe, arXiv 2505.02819)."""

    kind: Literal["linear"] = "linear"
    toward: Literal["zero", "identity"] = Field(
        default="identity",
        description="what the ridge shrinks the map towards: zero (as published) or leaving the MLP as is",
    )


class CosineHeal(LeastSquares):
    """The same map for the cosine objective (ReplaceMe), by a few rounds of weighted least squares."""

    kind: Literal["cosine"] = "cosine"
    iterations: int = Field(default=4, ge=1, description="rounds, each one pass; the best counts")


class PatchHeal(LeastSquares):
    """A scale per channel in a rotated basis, fused as far as it can be (LinearPatch, arXiv 2505.24680)."""

    kind: Literal["patch"] = "patch"


class RefitHeal(LeastSquares):
    """The preceding `down_proj` fitted anew on what it is given, each token's error weighed by its length."""

    kind: Literal["refit"] = "refit"
    scale: bool = Field(default=True, description="let the stream behind the gap change its scale, which is free")


def _named(value: Any) -> Any:
    """`heal: linear` is short for `heal: {kind: linear}`."""
    return {"kind": value} if isinstance(value, str) else value


HealConfig = NoHeal | LinearHeal | CosineHeal | PatchHeal | RefitHeal
SearchConfig = Window | Lowest | Greedy | Beam
Heal = Annotated[HealConfig, Field(discriminator="kind"), BeforeValidator(_named)]
Search = Annotated[SearchConfig, Field(discriminator="kind"), BeforeValidator(_named)]
Share = Annotated[float, Field(gt=0, le=1)]


class Goal(Section):
    """What `blocks: auto` is after: exactly one of these."""

    perplexity: Annotated[float, Field(ge=1)] | None = Field(
        default=None, description="drop as many blocks as leave the healed perplexity within so many times the base's"
    )
    size: Share | None = Field(
        default=None, description="drop as few blocks as bring the weights down to this share of the unpruned model's"
    )
    latency: Share | None = Field(
        default=None, description="the same for the time per generated token, measured where the run is"
    )
    at_most: int | None = Field(default=None, ge=1, description="never drop more; null: half of the blocks")

    @model_validator(mode="after")
    def _one(self) -> Goal:
        if sum(value is not None for value in (self.perplexity, self.size, self.latency)) != 1:
            raise ValueError("give exactly one of perplexity, size and latency")
        return self


class PruneConfig(Section):
    """Which blocks go, and how the gap is closed."""

    blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        description="how many blocks to drop; auto: as the goal asks for"
    )
    goal: Goal | None = Field(default=None, description="for blocks: auto; null: perplexity within 1.2 × the base's")
    importance: Literal["angular", "influence", "magnitude", "taylor", "perplexity", "kl"] = Field(
        default="angular",
        description="for search: window and lowest. angular: arccos of the cosine between the hidden states around the "
        "blocks (arXiv 2403.17887); influence: one minus that cosine (ShortGPT, arXiv 2403.03853); magnitude: the "
        "length of what blocks add; taylor: gradient × weight (arXiv 2402.02834); perplexity, kl: without the blocks",
    )
    position: Literal["last", "all"] = Field(
        default="all", description="measured on every token, or on the last token of each row"
    )
    search: Search = Field(
        default_factory=Window,
        description="window: the best run of adjacent blocks; lowest: the least important blocks, anywhere; "
        "greedy, beam: cuts tried out",
    )
    heal: Heal = Field(
        default_factory=LinearHeal, description="how the gap is closed: linear, cosine, patch, refit or none"
    )
    calibration: Calibration = Field(default_factory=Calibration, description="the tokens to measure and heal on")

    @model_validator(mode="after")
    def _goal_of_auto(self) -> PruneConfig:
        if self.goal is not None and self.blocks != "auto":
            raise ValueError("a goal is for blocks: auto; give the one or the other")
        return self

    @property
    def splits(self) -> bool:
        """Whether scoring and held-out rows are kept apart from those that healing is fitted on."""
        return self.blocks == "auto" or isinstance(self.search, Scored)

    @property
    def copying(self) -> float:
        """The share of scoring and held-out rows in which a text is read twice."""
        return self.search.copying if isinstance(self.search, Scored) else 0.0

    @property
    def scores_healed(self) -> bool:
        """Whether a search scores cuts as healed."""
        wanted = self.search.healed if isinstance(self.search, Scored) else None
        return self.heal.kind != "none" if wanted is None else wanted

    def input_files(self) -> list[str]:
        return [self.calibration.text] if self.calibration.text else []
