"""Tasks of lm-eval (extra `eval`), for checkpoints and artifacts.

One metric is reported per task: acc_norm, else acc, else exact_match, else the first that the task lists; for a task
with several filters (gsm8k), under its first one. A group or tag is one line, with equal weight for every question.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.extras import load_library
from ..core.files import check_folder_exists
from ..core.stage import Advance, Context
from ..core.suggest import similar
from ..modeling.checkpoint import quiet
from ..records.models import AnswerKind
from .config import EvaluateConfig
from .statistics import TaskOutcome, mean

if TYPE_CHECKING:
    from lm_eval.api.model import LM

PREFERRED = ("acc_norm", "acc", "exact_match")
BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # builders of `datasets` for local files
KINDS: dict[str, AnswerKind] = {"multiple_choice": "choice", "generate_until": "generation"}


def load_tasks(config: EvaluateConfig, context: Context) -> dict[str, list[Any]]:
    """lm-eval's task objects for each name of the recipe, with their data loaded.

    Raises `UserError` if lm-eval is missing, a name is unknown, or data cannot be loaded.
    """
    load_library(f"evaluate.tasks: {', '.join(config.harness_tasks)}", "lm_eval.tasks")
    folder = context.resolve(config.harness.folder) if config.harness.folder else None
    if folder is not None:
        check_folder_exists(folder, "evaluate.harness.folder: ")
    with quiet():
        manager = _manager(config.harness_tasks, folder)
        unknown = [name for name in config.harness_tasks if name not in manager.task_index]
        if unknown:
            raise UserError("evaluate.tasks: " + "; ".join(_unknown(name, manager.all_tasks) for name in unknown))
        return {name: _load(manager, name, folder, config) for name in config.harness_tasks}


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if folder is None:
        return _lm_evals_own()
    own = TaskManager(include_path=str(folder), include_defaults=False)
    return own if all(name in own.task_index for name in names) else TaskManager(include_path=str(folder))


@cache
def _lm_evals_own() -> Any:
    """lm-eval's own 15,000 tasks; cached, since reading them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _unknown(name: str, known: Sequence[str]) -> str:
    near = similar(name, known)[:3]
    return f"lm-eval has no task {name!r}" + (f"; the nearest are {', '.join(near)}" if near else "")


def _load(manager: Any, name: str, folder: Path | None, config: EvaluateConfig) -> list[Any]:
    # Data paths in task files are relative to the working directory.
    with contextlib.chdir(folder) if folder is not None else contextlib.nullcontext(), _literal_names(folder):
        try:
            tasks = list(manager.load([name])["tasks"].values())
        except Exception as error:  # from datasets, the Hub, YAML or the task's own code, without a common base class
            reason = str(error).strip().splitlines() or ["no reason given"]
            raise UserError(
                f"evaluate.tasks: lm-eval could not load {name} ({type(error).__name__}: {reason[0][:300]}); its data "
                "comes from the Hub unless its task file names local files"
            ) from error
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"evaluate.tasks: {task.task_name} runs model-written code, which compress does not do")
        given = task.get_config("num_fewshot")
        if given is None or (config.harness.fewshot is not None and given != 0):  # 0 in a task file is deliberate
            task.set_config("num_fewshot", config.harness.fewshot or 0)
    return tasks


@contextlib.contextmanager
def _literal_names(folder: Path | None) -> Iterator[None]:
    """`datasets` treats data file names as patterns. Inside, a name that is an existing file means that file, and no
    character of the folder's own path is special."""
    import datasets

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, data_files: Any = None, **options: Any) -> Any:
        if folder is not None and data_files is not None:
            data_files = _escaped(data_files, folder, local=path in BUILDERS)
        return original(path, name, data_files=data_files, **options)

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def _escaped(files: Any, folder: Path, *, local: bool) -> Any:
    """A task's data files, relative to the folder, escaped for `datasets`."""
    if isinstance(files, dict):
        return {split: _escaped(named, folder, local=local) for split, named in files.items()}
    if isinstance(files, list | tuple):
        return [_escaped(named, folder, local=local) for named in files]
    file = Path(folder.absolute(), files)
    if file.is_file():
        return glob.escape(str(file))
    if not local or "://" in files or Path(files).is_absolute():
        return files
    return f"{glob.escape(str(folder.absolute()))}/{files}"


def run_tasks(
    name: str, tasks: Sequence[Any], language_model: LM, config: EvaluateConfig, seed: int, advance: Advance
) -> TaskOutcome:
    """Run one task, or the tasks of one group, on one model.

    `language_model` is an `LM` of lm-eval; `advance` is called for every finished request.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks:
        task.set_fewshot_seed(seed)  # again for every model, so that all get the same examples
    with quiet(), _told(language_model, advance):
        try:
            results: Any = evaluate(
                language_model,
                {"tasks": {task.task_name: task for task in tasks}, "groups": {}, "group_map": {}},
                limit=config.limit,
                bootstrap_iters=0,
                apply_chat_template=config.harness.chat,
                fewshot_as_multiturn=config.harness.chat,
            )
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"evaluate.tasks: lm-eval could not run {name}: {type(error).__name__}: {error}") from error
    parts = [_outcome(task, results["samples"][task.task_name], results["results"][task.task_name]) for task in tasks]
    return parts[0] if len(parts) == 1 else _together(name, parts)


@contextlib.contextmanager
def _told(language_model: Any, advance: Advance) -> Iterator[None]:
    """Count finished requests: lm-eval reports each to its cache, which is replaced by a counter."""

    class Counter:
        def add_partial(self, *_: object) -> None:
            advance(1)

    before = language_model.cache_hook
    language_model.set_cache_hook(Counter())
    try:
        yield
    finally:
        language_model.set_cache_hook(before)


def _outcome(task: Any, samples: list[dict[str, Any]], results: dict[str, Any]) -> TaskOutcome:
    first = samples[0]["filter"]
    rows = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
    listed = [metric for metric in rows[0]["metrics"] if f"{metric},{first}" in results]
    metric = next((m for m in (*PREFERRED, *listed) if m in listed), None)
    if metric is None:
        raise UserError(f"evaluate.tasks: {task.task_name} has no numeric metric")
    values = [row[metric] for row in rows]
    simple = all(isinstance(value, bool | int | float) or hasattr(value, "__float__") for value in values)
    figures = {
        key.removesuffix(",none"): float(value)
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    scores = [float(value) for value in values] if simple else []
    value = float(results[f"{metric},{first}"])
    if scores and abs(mean(scores) - value) > 1e-6:  # aggregated differently, such as by a median
        scores = []
    kind = KINDS.get(task.OUTPUT_TYPE, "other")
    chance = _chance(task, rows) if kind == "choice" else {"generation": 0.0, "other": None}[kind]
    higher = task.higher_is_better().get(metric) is not False
    return TaskOutcome(kind, metric, scores, value, len(rows), chance, figures, higher)


def _chance(task: Any, rows: Sequence[dict[str, Any]]) -> float:
    return mean([1 / len(task.doc_to_choice(row["doc"])) for row in rows])


def _together(name: str, parts: Sequence[TaskOutcome]) -> TaskOutcome:
    """The outcome of a group, combined from its tasks."""
    metric, kind = parts[0].metric, parts[0].kind
    if any(not p.scores or p.metric != metric or p.kind != kind for p in parts):
        raise UserError(f"evaluate.tasks: the tasks of {name} have different metrics; list them one by one")
    scores = [score for part in parts for score in part.scores]
    n = len(scores)
    chances = [part.chance for part in parts]
    chance = None
    if all(c is not None for c in chances):
        chance = sum((c or 0.0) * p.n for c, p in zip(chances, parts, strict=True)) / n
    shared = [key for key in parts[0].metrics if all(key in part.metrics for part in parts)]
    figures = {key: sum(part.metrics[key] * part.n for part in parts) / n for key in shared}
    return TaskOutcome(kind, metric, scores, mean(scores), n, chance, figures, parts[0].higher_is_better)
