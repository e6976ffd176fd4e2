"""The export stage: one bundle with every artifact written, opened in its runtime, and compared."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.stage import WORK, Context, Inputs
from ..modeling.load import load_config
from .config import ExportConfig
from .gguf import check_gguf
from .job import ExportJob, chosen_depths
from .onnx import check_onnx

BUNDLE = "bundle"


def check(config: ExportConfig, base: Path, context: Context) -> None:
    """Refuse models that GGUF or ONNX cannot represent, before any work is done."""
    model = load_config(base)
    if config.gguf:
        _check_format(lambda: check_gguf(base), "ONNX", lambda: check_onnx(model))
    for precision in config.onnx:
        _check_format(partial(check_onnx, model, precision), "GGUF", lambda: check_gguf(base))
    if config.depths and config.depths[-1] > model.num_hidden_layers:
        raise UserError(
            f"export.depths asks for {config.depths[-1]} blocks, but {base} has only {model.num_hidden_layers}"
        )


def _check_format(check: Callable[[], None], other: str, check_other: Callable[[], None]) -> None:
    """Raise a format's refusal, saying whether the other format supports the model."""
    try:
        check()
    except UserError as error:
        try:
            check_other()
        except UserError as theirs:
            raise UserError(f"{error}. {other} is not possible either: {theirs}") from error
        raise UserError(f"{error}. Export {other} instead") from error


def run(config: ExportConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `bundle/`; after a kill, artifacts that were verified are kept."""
    provenance: dict[str, Any] = {
        # The folder of a stage is named after its fingerprint.
        "stages": {name: folder.name.rpartition("-")[2] for name, folder in inputs.stages.items()},
        "base": inputs.name,
        "base_blocks": load_config(inputs.base).num_hidden_layers,
    }
    work = out_dir / WORK
    work.mkdir(exist_ok=True)
    name = f"{plain_name(inputs.name)}-{_blocks(inputs.model)}L"
    job = ExportJob(inputs.model, out_dir / BUNDLE, work, config, context, name, inputs)
    return job.run(provenance)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    config: ExportConfig,
    context: Context,
    name: str | None = None,
    rows: Path | None = None,
) -> dict[str, Any]:
    """Export any checkpoint into the bundle `out`, which must not exist yet (an unfinished one is resumed).

    `rows` is a data stage's folder, for an importance matrix and for training scales.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; give another --out, or remove it")
    for keys, problem in config.unweighted(rows is not None):
        raise UserError(f"export.{keys[0]}: {problem}")
    if config.train_scales and rows is None:
        raise UserError("training scales needs rows to learn from: give a data stage's folder (--rows)")
    check(config, checkpoint, context)
    chosen_depths(config, checkpoint)
    unfinished = out.with_name(f".{out.name}.partial")
    work = unfinished / WORK
    work.mkdir(parents=True, exist_ok=True)
    bundle = unfinished / BUNDLE
    inputs = Inputs(checkpoint, checkpoint, {} if rows is None else {"data": rows})
    metrics = ExportJob(checkpoint, bundle, work, config, context, name or checkpoint.name, inputs).run({})
    if out.exists():
        out.rmdir()
    bundle.rename(out)
    shutil.rmtree(unfinished)
    return metrics


def plain_name(model: str) -> str:
    """A model's name without its owner, and without the type that a GGUF file's name ends in."""
    name = model.rsplit("/", 1)[-1]
    return re.sub(r"(?<=.)[.-](F16|BF16|F32|I?Q\d\w*)$", "", name, flags=re.IGNORECASE)


def _blocks(checkpoint: Path) -> int:
    return load_config(checkpoint).num_hidden_layers
