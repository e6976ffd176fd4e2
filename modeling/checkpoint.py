"""Saving checkpoints: what plain `AutoModelForCausalLM.from_pretrained` loads, with the same bytes each time."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bars and warnings, for as long as the context lasts."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # Some of its bars obey no switch; all of them go to stderr, where nothing of ours is written meanwhile.
        with contextlib.redirect_stderr(io.StringIO()):
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
        _strip(folder / name, ("_model_name_or_path", "_name_or_path", "name_or_path", "is_local", "local_files_only"))


def _strip(path: Path, keys: tuple[str, ...]) -> None:
    if not path.exists():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in keys}
    if kept != values:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
