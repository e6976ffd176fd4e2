"""The recipe's `distill` section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, field_validator

from ..core.stage import Section
from ..training.config import AnyObjective, Schedule, TrainingConfig, Tune

FORMAT = 1
RESERVED = ("start", "merge")  # in a merge these are the model that all variants start from, and the result


class Variant(Section):
    """One of several students: its name, and what differs from the rest of the section."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="names its folder, and the model in `merge`")
    seed: int | None = Field(default=None, ge=0, description="of the order of its rows and its adapters")
    rows: tuple[float, float] = Field(
        default=(0.0, 1.0),
        description="which training rows it learns from: [from, to], as shares of them in the data stage's order",
    )
    objective: AnyObjective | None = Field(default=None, description="as in the section")
    tune: Tune | None = Field(default=None, description="as in the section")
    epochs: float | None = Field(default=None, gt=0, description="comes before the section's max_steps")
    max_steps: int | None = Field(default=None, ge=1, description="as in the section")
    lr: float | None = Field(default=None, gt=0, description="as in the section")
    schedule: Schedule | None = Field(default=None, description="as in the section")
    warmup: float | None = Field(default=None, ge=0, lt=1, description="as in the section")

    @field_validator("rows")
    @classmethod
    def _some_rows(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("write the rows as [from, to] with 0 <= from < to <= 1, such as [0, 0.5]")
        return value


OVERRIDES = tuple(name for name in Variant.model_fields if name not in ("name", "seed", "rows"))


class DistillConfig(TrainingConfig):
    """Recovery: the pruned model learns from what the unpruned one wrote, and from its distributions."""

    stage: ClassVar[str] = "distill"

    variants: list[Variant] | None = Field(
        default=None,
        description="several students, trained one after another; `select` chooses the one that goes on",
    )

    @field_validator("variants")
    @classmethod
    def _several_different(cls, value: list[Variant] | None) -> list[Variant] | None:
        if value is None:
            return None
        if len(value) < 2:
            raise ValueError("variants are two or more; for one student leave the key out")
        names = [variant.name for variant in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two variants are named {name!r}")
            if name in RESERVED:
                raise ValueError(f"no variant can be named {name!r}: in a merge that name means something else")
        for i, one in enumerate(value):
            for other in value[:i]:
                if one.model_dump(exclude={"name"}) == other.model_dump(exclude={"name"}):
                    raise ValueError(f"{other.name} and {one.name} would be the same student; give one another seed")
        return value

    @property
    def students(self) -> Sequence[DistillConfig]:
        """The section as it is for each student: for each variant, or for the one there is."""
        return [self] if self.variants is None else [self.of(variant) for variant in self.variants]

    def of(self, variant: Variant) -> DistillConfig:
        """The section as it is for one variant."""
        own = {name: value for name in OVERRIDES if (value := getattr(variant, name)) is not None}
        if "epochs" in own and "max_steps" not in own:
            own["max_steps"] = None
        return self.model_copy(update=own | {"variants": None})
