"""`compress export`, `compress merge` and `compress eval`: a stage's work on checkpoints, without a recipe."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from rich.console import Console
from ruamel.yaml.comments import CommentedMap

from ..core.errors import UserError
from ..core.stage import Context, Progress
from ..evaluation.config import EvaluateConfig
from ..export.config import ExportConfig
from ..merge.config import MergeConfig
from ..modeling.source import Source, parse_source
from ..pipeline.explain import readable_errors
from ..pipeline.places import bundle_name, check_file, check_folder, check_name, check_new
from ..records.bundle import BundleManifest
from ..records.models import Models


def _config(model: type[BaseModel], values: dict[str, Any]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            problems.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}")
        raise UserError("; ".join(problems).lstrip(": ")) from error


def export_command(
    checkpoint: str,
    out: Path,
    gguf: list[str],
    onnx: list[str],
    depths: list[str],
    name: str | None,
    cache: Path,
    progress: Progress,
) -> None:
    """Export one checkpoint into a new bundle."""
    config = _config(ExportConfig, {"gguf": gguf, "onnx": onnx, "depths": depths or None})
    if name is not None:
        check_name(name)
    check_new(out)
    (source,) = check_sources([checkpoint], cache)
    from ..export.stage import export_checkpoint
    from ..modeling.load import resolve

    name = name or bundle_name(source.name)
    folder = resolve(checkpoint, cache, progress=progress)
    with readable_errors(f"export, writing to {out}"):
        export_checkpoint(folder, out, config, Context(progress=progress), name)


def extract_command(bundle: Path, kind: str, depth: int | None, out: Path) -> str:
    """Write one depth of a bundle's type as a file or folder of its own; what became of its retaining heads, if any."""
    check_new(out)
    from ..export.extract import extract
    from ..runtime.bundle import read_bundle

    manifest = read_bundle(bundle, hashes=True)  # what is copied is what was verified
    with readable_errors(f"extract, writing to {out}"):
        artifact = extract(bundle, kind, depth, out)
    retaining = manifest.retaining
    if retaining is None:
        return ""
    if artifact.format == "gguf":
        return f"; the retaining heads are not in it, but in {bundle / retaining.gguf}"
    return "; it gives retaining scores"


def merge_command(
    checkpoints: list[str],
    out: Path,
    method: str,
    base: str | None,
    overrides: list[str],
    context: Context,
    cache: Path,
) -> None:
    """Merge checkpoints into a new folder; `overrides` are KEY=VALUE of a recipe's merge section.

    What the method must be told and is not told is even: t is 0.5, every weight 1.
    """
    check_new(out)
    check_sources([*checkpoints, *([base] if base else [])], cache)
    from ..merge.bridge import find_method
    from ..merge.stage import merge_checkpoints
    from ..modeling.load import resolve
    from ..pipeline.overrides import apply_override

    asked = {parameter.name for parameter in find_method(method).spec.parameters if parameter.required}
    even = {name: value for name, value in {"t": 0.5, "weight": 1.0}.items() if name in asked}
    models = [CommentedMap(model=name, parameters=CommentedMap()) for name in checkpoints]
    tree = CommentedMap(method=method, base_model=base, models=models, parameters=CommentedMap(even))
    for override in overrides:
        apply_override(tree, override, {})
    config = _config(MergeConfig, tree)
    names = [entry.model for entry in config.models or []]
    wanted = [*names, config.base_model] if config.base_model else names
    check_sources(wanted, cache)
    folders = {name: resolve(name, cache, progress=context.progress) for name in wanted}
    with readable_errors(f"merge, writing to {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        merge_checkpoints(config, folders, out, context)


def _retrieval(overrides: list[str]) -> dict[str, Any]:
    """KEY=VALUE of `evaluate.retrieval`; a text is a path as the command line has it."""
    from ..pipeline.overrides import apply_override

    tree = CommentedMap()
    for override in overrides:
        apply_override(tree, override, {})
    if isinstance(tree.get("text"), str):
        tree["text"] = str(Path(tree["text"]).resolve())
    return dict(tree)


def _check_eval(config: EvaluateConfig, text: Path, models: list[str], base: str | None, cache: Path) -> None:
    """Refuse texts, tasks and models that cannot be read, before any of them is worked on."""
    check_file(text, "--text")
    for task in config.tasks:
        if task.endswith(".jsonl"):
            check_file(Path(task), "--task")
    if config.harness.folder is not None and not Path(config.harness.folder).is_dir():
        raise UserError(f"--task-folder {config.harness.folder}: there is no such folder")
    if config.retrieval is not None and config.retrieval.text is not None:
        check_file(Path(config.retrieval.text), "--retrieval text")
    check_sources([*models, *([base] if base else [])], cache)


def check_sources(models: list[str], cache: Path) -> list[Source]:
    """The models' sources; `UserError` where one is not there, or would be converted where nothing can be written."""
    sources = [parse_source(model, Path.cwd()) for model in models]
    if any(source.kind in ("gguf", "random") for source in sources):
        check_folder(cache, "--runs")
    return sources


def eval_command(
    path: str,
    base: str | None,
    settings: dict[str, Any],
    device: str,
    dtype: str,
    cache: Path,
    progress: Progress,
    console: Console,
    as_json: bool,
) -> None:
    """Measure one checkpoint, or every artifact of one bundle."""
    text = settings["text"]
    values = settings | {"text": str(text.resolve()) if text else None}
    values["tasks"] = [str(Path(task).resolve()) if task.endswith(".jsonl") else task for task in settings["tasks"]]
    if "retrieval" in settings:
        values["retrieval"] = _retrieval(settings["retrieval"])
    config = _config(EvaluateConfig, values)
    if text is None:
        raise UserError("name a text file to measure perplexity on: --text FILE")
    is_bundle = (Path(path) / BundleManifest.FILE).is_file()
    _check_eval(config, text, [] if is_bundle else [path], base, cache)
    if is_bundle:
        from ..runtime.bundle import read_bundle

        read_bundle(Path(path), hashes=True)  # what is measured is what was verified
    from ..evaluation.stage import check, evaluate_path
    from ..modeling.load import resolve

    context = Context(device=device, dtype=dtype, progress=progress)
    folder = Path(path) if is_bundle else resolve(path, cache, progress=progress)
    reference = resolve(base, cache, progress=progress) if base else None
    check(config, folder, context)
    with tempfile.TemporaryDirectory(prefix="compress-eval-") as work:
        entries = evaluate_path(folder, config, context, reference, Path(work))
    if as_json:
        print(json.dumps(Models(entries).contents(), indent=2))
        return
    from ..pipeline.summary import model_table, show_retrieval, show_tasks

    console.print(model_table(entries, str(path)))
    show_tasks(entries, console)
    show_retrieval(entries, console)
