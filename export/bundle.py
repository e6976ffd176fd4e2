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
    """Every file but the manifest, in order, with its hash."""
    found = sorted(file for file in bundle.rglob("*") if file.is_file() and file != bundle / MANIFEST)
    return [
        FileEntry(path=file.relative_to(bundle).as_posix(), bytes=file.stat().st_size, sha256=sha256(file))
        for file in found
    ]


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write manifest.json; with it the bundle is complete."""
    text = json.dumps(manifest.model_dump(), indent=2, ensure_ascii=False) + "\n"
    write_whole(bundle / MANIFEST, text)
