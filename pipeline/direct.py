"""`compress export` and `compress eval`: a stage's work on one checkpoint, without a recipe."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from rich.console import Console

from ..errors import UserError
from ..evaluation.config import EvaluateConfig
from ..export.config import ExportConfig
from ..stage import Context, Progress
from .inspection import check_weights


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
    checkpoint: str, out: Path, gguf: list[str], onnx: list[str], name: str | None, cache: Path, progress: Progress
) -> None:
    """Export one checkpoint into a new bundle."""
    config = _config(ExportConfig, {"gguf": gguf, "onnx": onnx})
    from ..export.stage import export_checkpoint
    from ..modeling.load import resolve
    from .runner import readable_errors

    folder = resolve(checkpoint, cache, progress=progress)
    check_weights(folder)
    with readable_errors(f"export, writing to {out}"):
        export_checkpoint(folder, out, config, Context(progress=progress), name)


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
    config = _config(EvaluateConfig, values)
    if text is None:
        raise UserError("name a text file to measure perplexity on: --text FILE")
    from ..evaluation.stage import check, evaluate_path
    from ..modeling.load import resolve

    context = Context(device=device, dtype=dtype, progress=progress)
    is_bundle = (Path(path) / "manifest.json").is_file()
    folder = Path(path) if is_bundle else resolve(path, cache, progress=progress)
    reference = resolve(base, cache, progress=progress) if base else None
    check_weights(folder)
    check(config, folder, context)
    with tempfile.TemporaryDirectory(prefix="compress-eval-") as work:
        entries = evaluate_path(folder, config, context, reference, Path(work))
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    from .report.schema import ModelEntry
    from .summary import model_table, show_tasks

    models = [ModelEntry.model_validate(entry) for entry in entries]
    console.print(model_table(models, str(path)))
    show_tasks(models, console)
