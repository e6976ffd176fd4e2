"""Writing a bundle's common files and its manifest."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..runtime.bundle import MANIFEST, FileEntry, Manifest
from ..stage import sha256, write_whole

COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Size:
    """How large one depth of one type is by itself."""

    bytes: int  # of all that is read for it
    parameters: int
    bits_per_weight: float  # of the tensors; a GGUF's vocabulary is not counted


def copy_model_files(checkpoint: Path, bundle: Path) -> None:
    """Configuration, tokenizer and chat template, as they are."""
    for name in COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, bundle / name)


def list_files(bundle: Path) -> list[FileEntry]:
    """Every file but the manifest, in order, with its hash; of a file with several names the later ones say so."""
    found: list[FileEntry] = []
    names: dict[tuple[int, int], FileEntry] = {}
    for file in sorted(file for file in bundle.rglob("*") if file.is_file() and file != bundle / MANIFEST):
        path, state = file.relative_to(bundle).as_posix(), file.stat()
        first = names.get((state.st_dev, state.st_ino))
        if first is None:
            entry = FileEntry(path=path, bytes=state.st_size, sha256=sha256(file))
            names[state.st_dev, state.st_ino] = entry
        else:
            entry = first.model_copy(update={"path": path, "link": first.path})
        found.append(entry)
    return found


def disk_bytes(folder: Path) -> tuple[int, int]:
    """What a folder's files take, hard links counted once, and what they would take as copies."""
    states = [file.stat() for file in folder.rglob("*") if file.is_file()]
    once = {(state.st_dev, state.st_ino): state.st_size for state in states}
    return sum(once.values()), sum(state.st_size for state in states)


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write manifest.json; with it the bundle is complete."""
    text = json.dumps(manifest.model_dump(exclude_none=True), indent=2, ensure_ascii=False) + "\n"
    write_whole(bundle / MANIFEST, text)
