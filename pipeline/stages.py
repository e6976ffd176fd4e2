"""Which stages there are, where their code is, and which earlier stages each one reads. No torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ..core.cost import StageCost


@dataclass(frozen=True)
class StageSpec:
    """One stage of the pipeline: the recipe's section of that name."""

    name: str
    package: str  # below compress; its modules `config` and `stage` are used
    reads: tuple[str, ...]  # earlier stages whose output it depends on, where the recipe has them
    needs: tuple[str, ...] = ()  # of those, the ones it cannot do without
    parallel: bool = False  # several processes share its work; else the first does it and the others wait
    makes_model: bool = False  # leaves a checkpoint folder in `model`, which the stages behind it go on from

    @property
    def format(self) -> int:
        return importlib.import_module(f"..{self.package}.config", __package__).FORMAT

    @property
    def cost(self) -> StageCost[Any]:
        """What the stage says that it takes."""
        return importlib.import_module(f"..{self.package}.cost", __package__).COST

    def module(self) -> Any:
        """The stage's code; imports torch."""
        return importlib.import_module(f"..{self.package}.stage", __package__)


STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec("data", "data", (), parallel=True),
        StageSpec("prune", "prune", ("data",), makes_model=True),
        StageSpec("distill", "distill", ("data", "prune"), needs=("data",), parallel=True, makes_model=True),
        StageSpec("merge", "merge", ("data", "prune", "distill"), needs=("data", "distill"), makes_model=True),
        StageSpec(
            "sort",
            "sort",
            ("data", "prune", "distill", "merge"),
            needs=("data",),
            parallel=True,
            makes_model=True,
        ),
        StageSpec("retain", "retain", ("data", "prune", "distill", "merge", "sort"), makes_model=True),
        StageSpec("export", "export", ("data", "prune", "distill", "merge", "sort", "retain")),
        StageSpec("evaluate", "evaluation", ("data", "prune", "distill", "merge", "sort", "retain", "export")),
    )
}
