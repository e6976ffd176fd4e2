"""The settings of a KV cache of fixed size (Locret, arXiv 2410.01805).

`HeadSettings` are what retaining heads were trained for: keys of a recipe's `retain` section, the `settings.json`
beside the heads in a checkpoint or bundle, and numbers in the bundle's manifest. `KvBudget` are what one cache
runs with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.stage import Section
from ..core.suggest import did_you_mean

FOLDER, SETTINGS = "retaining", "settings.json"  # in a checkpoint or bundle with retaining heads
GGUF = "heads.gguf"  # the heads as llama.cpp's runtime reads them, in a bundle's FOLDER
Positions = Literal["true", "contiguous"]


class HeadSettings(Section):
    """The settings that retaining heads were trained for; each can be overridden at run time."""

    budget: int = Field(
        default=1024, ge=1, description="keys and values kept per block and KV head, unless chosen at run time"
    )
    chunk: int = Field(
        default=256, ge=1, description="tokens of a prompt read between evictions, unless chosen at run time"
    )
    stabilizers: int = Field(default=64, ge=0, description="newest tokens of a chunk, which are always kept")
    local: int = Field(default=100, ge=1, description="last tokens of a prompt, which are read last and kept")
    pool: int = Field(
        default=9,
        ge=1,
        description="a token's score is averaged over this many neighbours, centred on it; published: 1",
    )
    sinks: int = Field(default=4, ge=0, description="first tokens of a text, which are always kept; published: 0")

    @model_validator(mode="after")
    def _stabilizers_fit(self) -> Self:
        if self.stabilizers > self.budget:
            raise ValueError(
                f"stabilizers ({self.stabilizers}) are part of the budget ({self.budget}): lower them or raise it"
            )
        return self

    @field_validator("pool")
    @classmethod
    def _odd(cls, pool: int) -> int:
        if pool % 2 == 0:
            raise ValueError(f"{pool} neighbours have no centre; write an odd number")
        return pool

    def numbers(self) -> dict[str, int]:
        """These six values by name, also from a section with more keys."""
        return {name: getattr(self, name) for name in HeadSettings.model_fields}

    def write(self, model: Path) -> None:
        """Write them beside the heads of a checkpoint."""
        write_json(model / FOLDER / SETTINGS, self.numbers())


def read_settings(model: Path) -> HeadSettings:
    """The settings of the heads in a checkpoint or bundle. `UserError` for a missing or broken file."""
    file = model / FOLDER / SETTINGS
    try:
        values = read_json(file)
        return HeadSettings(**{name: int(values[name]) for name in HeadSettings.model_fields})
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the retaining heads' settings in {file}: {error}") from error


@dataclass(frozen=True)
class KvBudget:
    """How one cache reads a prompt, and what it holds per block and KV head. `UserError` for invalid combinations."""

    budget: Annotated[int | None, Field(description="entries held before the local tail; null: all")]
    chunk: Annotated[int, Field(description="tokens read between evictions")] = 256
    stabilizers: Annotated[int, Field(description="newest entries kept at each eviction")] = 64
    local: Annotated[int, Field(description="last tokens of a prompt, read after all evictions")] = 100
    policy: Annotated[str, Field(description="eviction policy")] = "retaining"
    evict_decoding: Annotated[
        bool, Field(description="true: also evict while generating, to at most budget + local entries")
    ] = False
    positions: Annotated[
        Positions, Field(description="true, or contiguous: kept entries are rotated again to 0, 1, 2, …")
    ] = "true"
    pool: Annotated[int, Field(description="for retaining heads: neighbours that a score is averaged over; odd")] = 1
    sinks: Annotated[int, Field(description="for retaining heads: first tokens of a text, which are always kept")] = 0

    def __post_init__(self) -> None:
        from .policies import policy  # numpy, which reading a recipe does not need

        policy(self.policy)
        if self.positions not in get_args(Positions):
            known = get_args(Positions)
            options = f"{', '.join(known)}{did_you_mean(self.positions, known)}"
            raise UserError(f"there are no KV positions {self.positions!r}; there are: {options}")
        if self.chunk < 1 or self.local < 0 or self.stabilizers < 0:
            raise UserError("a KV budget needs a chunk of 1 token or more, and no negative numbers")
        if self.budget is not None and self.budget < max(1, self.stabilizers):
            raise UserError(
                f"a KV budget of {self.budget} has no room for {self.stabilizers} stabilizers, which are part of it: "
                "raise the budget or lower the stabilizers (--kv-stabilizers)"
            )
        if self.evict_decoding and (self.budget is None or self.local < 1):
            raise UserError(
                "eviction while decoding needs a budget, and a local tail of 1 token or more (--kv-budget, --kv-local)"
            )


def choose_budget(bundle: Path, budget: int, **values: Any) -> KvBudget:
    """A budget for a bundle; where `values` are None, the heads' settings apply, else the defaults.

    `UserError` where the policy needs heads and the bundle has none.
    """
    from .policies import make

    given = {key: value for key, value in values.items() if value is not None}
    if (bundle / FOLDER / SETTINGS).is_file():
        made_for = read_settings(bundle).numbers()
        return replace(KvBudget(None), **(made_for | given | {"budget": budget}))
    settings = KvBudget(budget, **given)
    if "heads" in make(settings).needs:
        raise UserError(
            f"{bundle} has no retaining heads to choose what to keep: train them with a recipe's `retain` "
            "section, or choose --kv-policy recent or random"
        )
    return settings
