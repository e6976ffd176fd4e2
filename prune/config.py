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
    """The tokens for measuring importance, scoring cuts and fitting heals."""

    tokens: int = Field(
        default=16384, ge=16, description="number of tokens, from the data stage's training rows or from `text`"
    )
    length: int = Field(default=512, ge=8, description="tokens per packed row")
    batch: int = Field(default=4, ge=1, description="packed rows per forward pass")
    text: str | None = Field(default=None, description="a text file to calibrate on instead of the data stage's rows")
    rows: Literal["own", "all"] = Field(
        default="own",
        description="which of the data stage's rows: its source's own, or those beside them too (prose, drills); what "
        "healing was fitted on teaches less afterwards",
    )
    scoring: int = Field(
        default=4096,
        ge=2,
        description="how many of these tokens to score cuts on (greedy, beam, auto; perplexity, kl, taylor)",
    )
    held_out: int = Field(
        default=4096,
        ge=2,
        description="how many of these tokens to hold out for comparing results (greedy, beam, auto)",
    )


if TYPE_CHECKING:
    from .heals import Heal as AnyHeal
    from .metrics import Metric as AnyMetric
    from .searches import Search as AnySearch
else:
    AnyMetric, AnySearch, AnyHeal = METRICS.union(), SEARCHES.union(), HEALS.union()
Share = Annotated[float, Field(gt=0, le=1)]


class Goal(Section):
    """The goal of `blocks: auto`: exactly one of these."""

    perplexity: Annotated[float, Field(ge=1)] | None = Field(
        default=None,
        description="remove as many blocks as keep the healed perplexity within this multiple of the base's",
    )
    size: Share | None = Field(
        default=None, description="remove as few blocks as bring the weights down to this share of the unpruned model's"
    )
    latency: Share | None = Field(
        default=None,
        description="remove as few blocks as bring the time per generated token down to this share, measured on the "
        "machine of the run",
    )
    at_most: int | None = Field(
        default=None, ge=1, description="maximum number of blocks to remove; null: half of them"
    )

    @model_validator(mode="after")
    def _one(self) -> Goal:
        if sum(value is not None for value in (self.perplexity, self.size, self.latency)) != 1:
            raise ValueError("give exactly one of perplexity, size and latency")
        return self


class PruneConfig(Section):
    """Which blocks are removed, and how the gap is healed."""

    blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        description="number of blocks to remove; auto: as the goal requires"
    )
    goal: Goal | None = Field(default=None, description="for blocks: auto; null: perplexity within 1.2 × the base's")
    importance: AnyMetric = Field(
        default_factory=Angular,
        description=f"metric that ranks blocks for search: window and lowest: {METRICS.listed()}",
    )
    position: Literal["last", "all"] = Field(
        default="all", description="where importance is measured: on every token, or on the last token of each row"
    )
    search: AnySearch = Field(default_factory=Window, description=f"how blocks are chosen: {SEARCHES.listed()}")
    heal: AnyHeal = Field(default_factory=LinearHeal, description=f"how the gap is healed: {HEALS.listed()}")
    calibration: Calibration = Field(default_factory=Calibration, description="the tokens to measure and heal on")

    @model_validator(mode="after")
    def _goal_of_auto(self) -> PruneConfig:
        if self.goal is not None and self.blocks != "auto":
            raise ValueError("goal needs `blocks: auto`; set that, or remove goal")
        return self

    @property
    def splits(self) -> bool:
        """Whether scoring rows, held-out rows and the rows that heals are fitted on are disjoint."""
        return self.blocks == "auto" or isinstance(self.search, Scored)

    @property
    def copying(self) -> float:
        """The share of scoring and held-out rows in which a text is repeated."""
        return self.search.copying if isinstance(self.search, Scored) else 0.0

    @property
    def scores_healed(self) -> bool:
        """Whether the search scores cuts healed."""
        setting = self.search.healed if isinstance(self.search, Scored) else None
        return self.heal.kind != "none" if setting is None else setting

    @field_serializer("importance")
    def _short(self, metric: Metric, info: SerializationInfo) -> str | dict[str, Any]:
        """Serialize a metric without options as its name."""
        written = metric.model_dump(mode=info.mode)
        return metric.kind if written.keys() == {"kind"} else written

    def input_files(self) -> list[str]:
        return [self.calibration.text] if self.calibration.text else []
