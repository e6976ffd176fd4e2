"""The recipe's `merge` section: mergekit's own keys, with variants' names as models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator

from ..core.stage import Section
from ..core.suggest import did_you_mean

FORMAT = 1
START = "start"  # the model that all variants were trained from
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Scalar = bool | int | float | str


class Conditional(Section):
    """A value for the tensors whose names contain `filter`; for all tensors without one."""

    value: Scalar | list[Scalar] = Field(description="one value, or a gradient of values from first to last block")
    filter: str | None = Field(default=None, description="part of a tensor's name, such as self_attn; *: all")


Setting = Scalar | list[Scalar] | Conditional | list[Conditional]
Parameters = dict[str, Setting]


class MergeInput(Section):
    """A model to merge, with its own parameters."""

    model: str = Field(description="a variant's name, or `start`: the model that all variants were trained from")
    parameters: Parameters = Field(default_factory=dict, description="this model's own, such as weight and density")


class MergeConfig(Section):
    """Merging the variants with mergekit; the merge is evaluated beside them."""

    method: str = Field(
        description="a merge_method of mergekit: slerp, linear, ties, dare_ties, model_stock, karcher …"
    )
    models: Annotated[list[MergeInput], Field(min_length=1)] | None = Field(
        default=None, description="variants to merge, in this order, each with its own parameters; default: all"
    )
    base_model: str | None = Field(
        default=None,
        description="a variant, or `start`: the model that all were trained from; default: as the method needs",
    )
    parameters: Parameters = Field(default_factory=dict, description="for the method and for every model, such as t")
    dtype: Dtype = Field(default="float32", description="dtype to compute in")
    out_dtype: Dtype | None = Field(default=None, description="dtype to save; default: the variants' own")
    select: Literal["best", "merge"] = Field(
        default="best", description="best: keep the best of the merge and its parents; merge: always keep the merge"
    )
    by: Literal["kl", "perplexity"] = Field(default="kl", description="held-out metric that `best` compares by")

    @field_validator("models")
    @classmethod
    def _different(cls, value: list[MergeInput] | None) -> list[MergeInput] | None:
        names = [entry.model for entry in value or []]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is named twice")
        return value

    def among(self, names: Sequence[str]) -> Self:
        """The section with its models filled in: all of `names` if it lists none."""
        return self if self.models else self.model_copy(update={"models": [MergeInput(model=name) for name in names]})

    def beside(self, sections: Mapping[str, Any]) -> Self:
        return self.among(_variants(sections))

    def misfits(self, sections: Mapping[str, Any]) -> Iterable[tuple[tuple[str | int, ...], str]]:
        names = _variants(sections)
        if names:
            yield from self.unknown_names(names)
        elif "distill" in sections:
            yield (), "it needs distill.variants: two or more students to merge"

    def unknown_names(self, names: Sequence[str]) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """(path of keys, error) for every model name that is not among `names`."""
        asked: list[tuple[tuple[str | int, ...], str]] = [
            (("models", i, "model"), entry.model) for i, entry in enumerate(self.models or [])
        ]
        if self.base_model is not None:
            asked.append((("base_model",), self.base_model))
        known = [*names, START]
        for path, name in asked:
            if name not in known:
                yield path, f"no variant is named {name!r}{nearest(name, known)}"


def _variants(sections: Mapping[str, Any]) -> list[str]:
    """The names of the students that a recipe trains."""
    return [variant.name for variant in getattr(sections.get("distill"), "variants", None) or ()]


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for an unknown name: the closest known one as a question, or else all of them."""
    return did_you_mean(name, known) or f"; there are: {', '.join(known)}"
