"""The recipe's `distill` section."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ..core.stage import Section
from ..runtime.artifact_types import ARTIFACT_TYPES
from ..training.config import AnyObjective, Lora, Schedule, TrainingConfig, Tune

FORMAT = 1
RESERVED = ("start", "merge")  # names that a merge uses for the variants' common start and for its result


class Variant(Section):
    """One of several students: its name, and the keys in which it differs from the section."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="names its folder, and the model in `merge`")
    seed: int | None = Field(default=None, ge=0, description="random seed of its adapters and of the order of its rows")
    rows: tuple[float, float] = Field(
        default=(0.0, 1.0),
        description="the training rows it learns from: [from, to], as fractions of all rows in the data stage's order",
    )
    objective: AnyObjective | None = Field(default=None, description="overrides the section's")
    tune: Tune | None = Field(default=None, description="overrides the section's")
    epochs: float | None = Field(default=None, gt=0, description="overrides the section's epochs and max_steps")
    max_steps: int | None = Field(default=None, ge=1, description="overrides the section's")
    lr: float | None = Field(default=None, gt=0, description="overrides the section's")
    schedule: Schedule | None = Field(default=None, description="overrides the section's")
    warmup: float | None = Field(default=None, ge=0, lt=1, description="overrides the section's")

    @field_validator("rows")
    @classmethod
    def _some_rows(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("write the rows as [from, to] with 0 <= from < to <= 1, such as [0, 0.5]")
        return value


OVERRIDES = tuple(name for name in Variant.model_fields if name not in ("name", "seed", "rows"))


class Local(Section):
    """A phase before the others: the blocks around each gap learn the unpruned model's hidden states.

    Only these blocks run, so a token costs about a quarter of what it costs in distillation. The result of a gap is
    kept if held-out figures gain; otherwise it is undone.
    """

    reach: int = Field(default=2, ge=1, description="blocks that are trained on each side of a gap")
    epochs: float = Field(default=1.0, gt=0, description="passes over the training rows for each gap")
    tokens_per_step: int = Field(default=512, ge=8, description="tokens per optimizer step, prompts included")
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate; it rises, then falls as a cosine")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps over which the rate rises")


class DistillConfig(TrainingConfig):
    """Recovery: the pruned model is trained on rows with the unpruned one as its teacher."""

    stage: ClassVar[str] = "distill"

    local: Local | None = Field(
        default=None,
        description="first train the blocks around each gap alone, on the unpruned model's hidden states; {} for the "
        "defaults",
    )
    variants: list[Variant] | None = Field(
        default=None,
        description="several students, trained one after another; the one best by `select` is kept",
    )

    @field_validator("variants")
    @classmethod
    def _several_different(cls, value: list[Variant] | None) -> list[Variant] | None:
        if value is None:
            return None
        if len(value) < 2:
            raise ValueError("variants needs two or more entries; for a single student leave the key out")
        names = [variant.name for variant in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two variants are named {name!r}")
            if name in RESERVED:
                raise ValueError(f"a variant cannot be named {name!r}: that name is reserved for merges")
        for earlier, later in itertools.combinations(value, 2):
            if earlier.model_dump(exclude={"name"}) == later.model_dump(exclude={"name"}):
                raise ValueError(
                    f"{earlier.name} and {later.name} would be the same student; give one of them another seed"
                )
        return value

    def misfits(self, sections: Mapping[str, Any]) -> Iterable[tuple[tuple[str | int, ...], str]]:
        yield from super().misfits(sections)
        if self.local is not None and "prune" not in sections:
            yield ("local",), "it trains the blocks around the gaps that `prune` leaves; add `prune:`, or leave it out"
        tunes: list[tuple[tuple[str | int, ...], Tune | None]] = [(("tune",), self.tune)]
        tunes += [(("variants", number, "tune"), entry.tune) for number, entry in enumerate(self.variants or [])]
        for path, tune in tunes:
            if isinstance(tune, Lora) and tune.quantize_as:
                yield from (((*path, "quantize_as"), why) for why in _not_shipped(tune.quantize_as, sections))

    @property
    def students(self) -> Sequence[DistillConfig]:
        """The section for each student: one per variant, or the section itself."""
        return [self] if self.variants is None else [self.of(variant) for variant in self.variants]

    def of(self, variant: Variant) -> DistillConfig:
        """The section with a variant's overrides."""
        own = {name: value for name in OVERRIDES if (value := getattr(variant, name)) is not None}
        if "epochs" in own and "max_steps" not in own:
            own["max_steps"] = None
        return self.model_copy(update=own | {"variants": None})


def _not_shipped(kind: str, sections: Mapping[str, Any]) -> Iterator[str]:
    """Why a recipe's other sections would ship other weights than those trained as `kind`."""
    for stage in ("merge", "sort"):
        if stage in sections:
            yield f"what is trained as {kind} is changed by `{stage}:` before it is exported; leave one of them out"
    export = sections.get("export")
    if export is None:
        return
    listed = [*export.gguf, *export.onnx]
    if kind not in listed:
        yield f"{kind} is not exported (listed are {', '.join(listed)}); list it under export, or name one of these"
    elif export.imatrix is False and ARTIFACT_TYPES[kind].calibrated:
        yield f"training weighs the errors of {kind} by an importance matrix, and export.imatrix is false; remove that"
