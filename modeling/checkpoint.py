"""Saving checkpoints: what plain `AutoModelForCausalLM.from_pretrained` loads, with the same bytes each time."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .source import checkpoint_files

# Keys in which libraries note where they read a model from.
PLACES = ("_model_name_or_path", "_name_or_path", "name_or_path", "is_local", "local_files_only")


@contextlib.contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """transformers without its warnings, for as long as the context lasts.

    Unless `bars`, nothing at all is written to stderr meanwhile: some of transformers' bars obey no switch.
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


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights (safetensors), configuration, generation defaults and tokenizer into `folder`.

    The bytes depend on the weights and the configuration alone: no path and no time enters them.
    Raises `UserError` when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with quiet():
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"could not write the checkpoint to {folder}: {error.strerror or error}") from error
    for name in ("config.json", "tokenizer_config.json"):
        _strip(folder / name, PLACES)


def copy_companions(source: Path, folder: Path, dtype: str) -> None:
    """Copy all of a checkpoint but its weights: configuration (naming `dtype`), generation defaults and tokenizer."""
    for file in checkpoint_files(source):
        if file.suffix != ".safetensors" and not file.name.endswith(".safetensors.index.json"):
            shutil.copyfile(file, folder / file.name)
    _strip(folder / "tokenizer_config.json", PLACES)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
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
    except OSError:  # links are not to be had here, or not between these two places
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


class Tensors:
    """A checkpoint folder's tensors by name, read one at a time; nothing is held.

    Raises `KeyError` for a name that is not there.
    """

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self.files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                self.files |= dict.fromkeys(weights.keys(), file)

    def __getitem__(self, name: str) -> Any:
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as weights:
            return weights.get_tensor(name)


def count_parameters(checkpoint: Path, depth: int | None = None) -> int:
    """Parameters of a checkpoint folder (of its first `depth` blocks), tied weights once, from safetensors headers."""
    from safetensors import safe_open

    from .blocks import block_number

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    tied = config.get("tie_word_embeddings", False)
    total = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 - a safetensors handle is no dict
                beyond = depth is not None and (block_number(name) or 0) >= depth
                if not beyond and not (tied and name == "lm_head.weight"):
                    total += math.prod(weights.get_slice(name).get_shape())
    return total


def _strip(path: Path, keys: tuple[str, ...]) -> None:
    if path.exists():
        values = json.loads(path.read_text(encoding="utf-8"))
        _rewrite(path, values, {key: value for key, value in values.items() if key not in keys})


def _rewrite(path: Path, before: dict[str, Any], values: dict[str, Any]) -> None:
    if values != before:
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
