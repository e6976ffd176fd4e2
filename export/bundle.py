"""The bundle: what a model is shipped as, and its manifest. Reading one needs no torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError
from ..modeling.source import hash_file

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Verification(_Model):
    """An artifact against the checkpoint it was made from, in the stock runtime."""

    runtime: str
    positions: int
    perplexity: float  # of the probe text, in the artifact
    checkpoint_perplexity: float  # the same in torch
    kl: float  # mean KL(checkpoint ‖ artifact), nats
    top1_agreement: float
    tensor_error: float  # largest relative error of a row of weights


class ArtifactEntry(_Model):
    """One exported model."""

    role: str  # gguf-TYPE or onnx-PRECISION
    format: Literal["gguf", "onnx"]
    type: str
    path: str  # of the .gguf file or the ONNX folder, within the bundle
    bytes: int
    bits_per_weight: float
    verification: Verification


class FileEntry(_Model):
    path: str
    bytes: int
    sha256: str


class Manifest(_Model):
    """manifest.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    family: str
    parameters: int
    depths: list[int]  # numbers of blocks the bundle can run at
    kept_blocks: list[int]  # their numbers in the unpruned model
    importance_matrix: bool
    artifacts: list[ArtifactEntry]
    provenance: dict[str, Any] = Field(default_factory=dict)
    files: list[FileEntry]


def copy_model_files(checkpoint: Path, bundle: Path) -> None:
    """Configuration, tokenizer and chat template, as they are."""
    for name in COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, bundle / name)


def list_files(bundle: Path) -> list[FileEntry]:
    """Every file but the manifest, in order, with its hash."""
    found = sorted(file for file in bundle.rglob("*") if file.is_file() and file != bundle / MANIFEST)
    return [
        FileEntry(path=file.relative_to(bundle).as_posix(), bytes=file.stat().st_size, sha256=hash_file(file))
        for file in found
    ]


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write manifest.json; with it the bundle is complete."""
    temporary = bundle / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(manifest.model_dump(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(bundle / MANIFEST)


def read_bundle(bundle: Path, *, hashes: bool = False) -> Manifest:
    """The manifest of a bundle whose files are all there; with `hashes`, unchanged to the last bit.

    Raises `UserError` naming what is missing or changed.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise UserError(f"{bundle} is no bundle: it has no {MANIFEST}")
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a bundle's manifest: {str(error).splitlines()[0]}") from error
    for entry in manifest.files:
        file = bundle / entry.path
        if not file.is_file():
            raise UserError(f"the bundle {bundle} lacks {entry.path}")
        if file.stat().st_size != entry.bytes or (hashes and hash_file(file) != entry.sha256):
            raise UserError(f"{file} has changed since the bundle was made")
    return manifest
