"""The stages, in order, and where their code is. No torch.

A stage is its folder (core/stage.py says what is in it), one line in `STAGES`, and one field of `Recipe`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

from ..core.cost import StageCost


@dataclass(frozen=True)
class StageSpec:
    """One stage of the pipeline: the recipe's section of that name."""

    name: str
    package: str  # below compress; its modules `config`, `cost` and `stage` are used
    needs: tuple[str, ...] = ()  # earlier stages that it requires
    parallel: bool = False  # whether several processes share its work; else rank 0 does it and the others wait
    makes_model: bool = False  # whether it writes a checkpoint folder `model`, which later stages start from
    pages: tuple[str, ...] = ()  # files of its folder that the run completes later: their hashes are not kept
    reads: tuple[str, ...] = ()  # all earlier stages; it depends on the output of those that the recipe has

    @property
    def format(self) -> int:
        return importlib.import_module(f"..{self.package}.config", __package__).FORMAT

    @property
    def cost(self) -> StageCost[Any]:
        """The stage's estimates."""
        return importlib.import_module(f"..{self.package}.cost", __package__).COST

    def module(self) -> Any:
        """The stage's code; imports torch."""
        return importlib.import_module(f"..{self.package}.stage", __package__)


def in_order(*stages: StageSpec) -> dict[str, StageSpec]:
    """Stages by name; each reads all that come before it."""
    names = [spec.name for spec in stages]
    return {spec.name: replace(spec, reads=tuple(names[:number])) for number, spec in enumerate(stages)}


STAGES = in_order(
    StageSpec("data", "data", parallel=True),
    StageSpec("prune", "prune", makes_model=True),
    StageSpec("distill", "distill", needs=("data",), parallel=True, makes_model=True),
    StageSpec("merge", "merge", needs=("data", "distill"), makes_model=True),
    StageSpec("sort", "sort", needs=("data",), parallel=True, makes_model=True),
    StageSpec("retain", "retain", makes_model=True),
    StageSpec("export", "export", pages=("bundle/README.md",)),
    StageSpec("evaluate", "evaluation"),
)
