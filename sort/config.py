"""The recipe's `sort` section."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from ..training.config import Lora, TrainingConfig

FORMAT = 1


class SortConfig(TrainingConfig):
    """Sorted training (SoFT, arXiv 2309.08968): the first d blocks, with the shared norm and head, become a model of
    their own for each depth d. All of them learn from the unpruned model."""

    stage: ClassVar[str] = "sort"
    sorts: ClassVar[bool] = True

    depths: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        description="numbers of blocks to run at, ascending; the last must be all of the model's blocks at this stage"
    )
    weights: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = Field(
        default=None, description="loss weight of each depth, in the order of `depths`; null: equal weights"
    )
    sample: int | None = Field(
        default=None,
        ge=1,
        description="depths that learn from each response token: the deepest and randomly chosen others; null: all",
    )

    @field_validator("depths")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value:
            raise ValueError(f"write the depths in ascending order, each once: {sorted(set(value))}")
        return value

    @model_validator(mode="after")
    def _fits_the_depths(self) -> Self:
        count = len(self.depths)
        if self.weights is not None and len(self.weights) != count:
            raise ValueError(f"weights has {len(self.weights)} numbers for {count} depths; give one for each")
        if self.sample is not None and not min(2, count) <= self.sample <= count:
            raise ValueError(
                f"sample is {self.sample}: of {count} depths, {min(2, count)} to {count} can learn from a token (the "
                "deepest and at least one other)"
            )
        if isinstance(self.tune, Lora) and self.tune.quantize_as:
            raise ValueError("tune.quantize_as is for distill alone: here every depth would have a rounding of its own")
        return self

    @property
    def passes(self) -> int:
        return self.sample or len(self.depths)

    def depth_weights(self, blocks: int) -> dict[int, float]:
        given = self.weights or [1.0] * len(self.depths)
        return {depth: weight / sum(given) for depth, weight in zip(self.depths, given, strict=True)}
