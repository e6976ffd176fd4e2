"""A checkpoint folder that every library reads the same way: the model's files and nothing else.

Users' folders hold more than a model: a vendor's copy of the weights, an adapter that transformers would attach
automatically, chat templates in any of three historical places, a configuration that another tool left half changed.
Libraries that read such a folder differently build different models. So it is not used in place, but replaced by a
plain folder of links to its files, with the corrections applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.chat_templates import (
    MORE_TEMPLATES,
    TEMPLATE,
    TOKENIZER_CONFIG,
    chat_templates,
    template_files,
)
from ..core.files import json_text, read_json_if_there, write_whole
from ..core.stage import Progress
from .checkpoint import made_once
from .config import CONFIG, read_config
from .soundness import check_checkpoint, decide_tied
from .source import IMPORTANCE, checkpoint_files, hash_json
from .weights import ADAPTER_CONFIG, INDEX, SINGLE, weight_files

FORMAT = 1  # of the folders made here


def plain_folder(folder: Path, cache: Path, progress: Progress) -> Path:
    """The checkpoint folder itself if it is plain, else a plain one in `cache`, of links to its files.

    Corrections are noted. Raises `UserError` for a folder that is not the model its configuration describes.
    """
    values, notes = read_config(folder)
    changes, more = _settled(folder, values)
    notes += more
    files = {file.name: file for file in checkpoint_files(folder)}
    strays = _strays(folder, files)
    notes += strays
    for note in notes:
        progress.note(f"{folder.name}: {note}")
    if not notes and not changes:
        check_checkpoint(folder)
        return folder

    def make(partial: Path) -> None:
        _link(folder, partial, files)
        _write(partial, changes | {CONFIG: json_text(values)})

    place = made_once(cache / f"{folder.name}-plain-{_key(folder)}", make)
    check_checkpoint(place)
    return place


def _key(folder: Path) -> str:
    """Changes whenever a file of the folder does."""
    states = [(file, file.stat()) for file in sorted(folder.rglob("*")) if file.is_file()]
    listed = [[str(file), state.st_size, state.st_mtime_ns] for file, state in states]
    return hash_json([FORMAT, str(folder.resolve()), listed])[:12]


def _settled(folder: Path, values: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Files to write instead of the folder's own, and notes; `values` of config.json are changed in place."""
    from .load import config_of

    changes: dict[str, str] = {}
    notes: list[str] = []
    config = config_of(values, folder)
    tied = decide_tied(folder, config)
    if tied != bool(config.tie_word_embeddings):
        values["tie_word_embeddings"] = tied
        notes.append(
            "config.json says that the head is tied to the embedding (tie_word_embeddings), but lm_head.weight differs "
            "from the embedding: lm_head.weight is used"
        )
    templates = chat_templates(folder)
    if templates and not (folder / TEMPLATE).is_file():
        changes |= template_files(templates)
        settings = read_json_if_there(folder / TOKENIZER_CONFIG)
        if settings.pop("chat_template", None) is not None:
            changes[TOKENIZER_CONFIG] = json_text(settings)
    return changes, notes


def _strays(folder: Path, files: Mapping[str, Path]) -> list[str]:
    """Notes on weights and adapters in the folder that libraries could mistake for part of the model."""
    notes = []
    if (folder / ADAPTER_CONFIG).is_file():
        notes.append(
            f"the folder's adapter ({ADAPTER_CONFIG}) is not applied; to include it, merge it into the model first "
            "(peft's merge_and_unload)"
        )
    weights = {file.name for file in weight_files(folder)}
    others = sorted(f.name for f in folder.iterdir() if f.suffix == ".safetensors" and f.name not in weights)
    others = [name for name in others if not name.startswith("adapter_")]
    if others:
        shown = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
        decides = INDEX if (folder / INDEX).is_file() else SINGLE
        notes.append(f"{shown} {'is' if len(others) == 1 else 'are'} ignored: the weights are read from {decides}")
    return notes


def _link(folder: Path, place: Path, files: Mapping[str, Path]) -> None:
    for name, file in files.items():
        (place / name).symlink_to(file.resolve())
    for name in ("retaining", IMPORTANCE, MORE_TEMPLATES):
        if (folder / name).is_dir():
            (place / name).symlink_to((folder / name).resolve(), target_is_directory=True)


def _write(place: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        file = place / name
        file.unlink(missing_ok=True)  # a link; the original is not touched
        if not file.parent.is_dir():
            file.parent.mkdir()
        write_whole(file, text)
