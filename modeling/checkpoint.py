"""Saving checkpoints that plain `AutoModelForCausalLM.from_pretrained` loads, with the same bytes each time."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from ..core.errors import UserError
from ..core.files import read_json, write_json
from .source import checkpoint_files
from .types import CausalModel, ModelTokenizer
from .weights import INDEX, SINGLE

SHARD = 2 << 30  # bytes of weights in a file
# Keys in which libraries record where they read a model from.
PLACES = ("_model_name_or_path", "_name_or_path", "name_or_path", "is_local", "local_files_only")


@contextlib.contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Silence transformers' warnings inside the context.

    Unless `bars`, nothing at all is written to stderr meanwhile: some of its progress bars cannot be switched off.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", FutureWarning)
            if not bars:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logging.set_verbosity(level)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder in a cache that runs may share: filled by `make` if missing, completely or not at all."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                partial = folder.with_name(f"{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.replace(folder)
    return folder


def save_checkpoint(model: CausalModel | None, tokenizer: ModelTokenizer | None, folder: Path) -> None:
    """Write weights (safetensors), configuration, generation defaults and tokenizer into `folder`; a model or tokenizer
    that is None is left out.

    The bytes depend only on the weights and the configuration, not on paths or times.
    Raises `UserError` when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with quiet():
            if model is not None:
                model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"could not write the checkpoint to {folder}: {error.strerror or error}") from error
    for name in ("config.json", "tokenizer_config.json"):
        _strip(folder / name, PLACES)


def write_shards(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], NDArray[np.float32]]
) -> None:
    """Write float32 weights, read one by one, as safetensors in `folder`: one file, or shards of `SHARD` bytes with
    their index. Raises `UserError` when the disk is full."""
    from safetensors.numpy import save_file

    shards: list[list[str]] = [[]]
    room = SHARD
    for name in sorted(shapes):
        size = 4 * math.prod(shapes[name])
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(names, file)
        try:
            save_file({name: read(name) for name in names}, folder / file, metadata={"format": "pt"})
        except OSError as error:
            raise UserError(f"could not write {folder / file}: {error.strerror or error}") from error
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(4 * math.prod(s) for s in shapes.values())}, "weight_map": where}
        write_json(folder / INDEX, index)


def copy_companions(source: Path, folder: Path, dtype: str) -> None:
    """Copy all of a checkpoint but its weights: configuration (naming `dtype`), generation defaults and tokenizer."""
    for file in checkpoint_files(source):
        if file.suffix != ".safetensors" and not file.name.endswith(".safetensors.index.json"):
            shutil.copyfile(file, folder / file.name)
    _strip(folder / "tokenizer_config.json", PLACES)
    values = read_json(source / "config.json")
    changed = {key: value for key, value in values.items() if key not in PLACES}
    changed["torch_dtype" if "torch_dtype" in values else "dtype"] = dtype
    _rewrite(folder / "config.json", values, changed)


def link_files(source: Path, folder: Path) -> None:
    """Make `folder` hold the same files and folders as `source`, by hard links where the file system has them, else by
    copies."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, copy_function=lambda old, new: link_file(Path(old), Path(new)))


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name by a hard link where the file system has them, else by a copy."""
    try:
        os.link(source, target)
    except OSError:  # no hard links here, or not between these two file systems
        shutil.copyfile(source, target)


def can_link(folder: Path) -> bool:
    """Whether the file system of a folder has hard links."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        file = Path(place) / "a"
        file.touch()
        try:
            os.link(file, file.with_name("b"))
        except OSError:
            return False
        return True


def _strip(path: Path, keys: tuple[str, ...]) -> None:
    if path.exists():
        values = read_json(path)
        _rewrite(path, values, {key: value for key, value in values.items() if key not in keys})


def _rewrite(path: Path, before: dict[str, Any], values: dict[str, Any]) -> None:
    if values != before:
        write_json(path, values)
