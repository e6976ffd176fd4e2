"""The recipe's `prune` section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializationInfo, field_serializer, model_validator

from ..core.stage import Section
from .heals import HEALS
from .heals.linear import LinearHeal
from .metrics import METRICS, Metric
from .metrics.angular import Angular
from .searches import SEARCHES, Scored
from .searches.window import Window

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


if TYPE_CHECKING:
    from .heals import Heal as AnyHeal
    from .metrics import Metric as AnyMetric
    from .searches import Search as AnySearch
else:
    AnyMetric, AnySearch, AnyHeal = METRICS.union(), SEARCHES.union(), HEALS.union()
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
    importance: AnyMetric = Field(
        default_factory=Angular,
        description=f"what blocks are compared by where search is window or lowest: {METRICS.listed()}",
    )
    position: Literal["last", "all"] = Field(
        default="all", description="measured on every token, or on the last token of each row"
    )
    search: AnySearch = Field(default_factory=Window, description=f"how blocks are chosen: {SEARCHES.listed()}")
    heal: AnyHeal = Field(default_factory=LinearHeal, description=f"how the gap is closed: {HEALS.listed()}")
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

    @field_serializer("importance")
    def _short(self, metric: Metric, info: SerializationInfo) -> str | dict[str, Any]:
        """A metric without options is written as its name."""
        written = metric.model_dump(mode=info.mode)
        return metric.kind if written.keys() == {"kind"} else written

    def input_files(self) -> list[str]:
        return [self.calibration.text] if self.calibration.text else []
