"""The bundle: what a model is shipped as, and its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import UserError
from ..core.files import read_json, sha256

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
SMALL = 50 * 10**6  # bytes: tokenizers, configurations and templates are less, weights of real models more


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
    graph_kl: float | None = None  # the same KL of the graph at high precision: F16 in llama.cpp, fp32 in ONNX Runtime
    retaining_agreement: float | None = None  # least correlation of a block's retaining scores with the checkpoint's


class ArtifactEntry(_Model):
    """One exported model, at one depth."""

    role: str  # gguf-TYPE or onnx-PRECISION; below the greatest depth with @DEPTH behind it
    format: Literal["gguf", "onnx"]
    type: str
    depth: int  # how many blocks it runs
    path: str  # within the bundle: of the .gguf file, the first part of one in several, or the ONNX folder
    bytes: int  # of all that is read for this depth; several depths share most of it
    parameters: int
    bits_per_weight: float
    verification: Verification


class FamilyEntry(_Model):
    """What the depths of one type take on disk together."""

    format: Literal["gguf", "onnx"]
    type: str
    depths: list[int]
    bytes: int  # hard links counted once
    bytes_without_links: int  # as after copying with a tool that does not keep links


class RetainingEntry(_Model):
    """Retaining heads, and how they were meant to be used (`kv_budget`)."""

    path: str  # within the bundle: the heads as safetensors
    gguf: str  # the same as a GGUF beside a model's
    width: int
    budget: int
    chunk: int
    stabilizers: int
    local: int
    pool: int
    sinks: int


class FileEntry(_Model):
    path: str
    bytes: int
    sha256: str
    link: str | None = None  # the file before it in the list that this is another name of


class Manifest(_Model):
    """manifest.json."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    family: str
    parameters: int
    depths: list[int]  # numbers of blocks the bundle can run at
    kept_blocks: list[int]  # their numbers in the unpruned model
    importance_matrix: bool
    artifacts: list[ArtifactEntry]
    families: list[FamilyEntry] = Field(default_factory=list)  # types that were exported at several depths
    retaining: RetainingEntry | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)
    files: list[FileEntry]


def read_bundle(bundle: Path, *, hashes: bool = False) -> Manifest:
    """The manifest of a bundle whose files are all there and of their size.

    Those of up to 50 MB, or with `hashes` all of them, are unchanged to the last bit.

    Raises `UserError` naming what is missing or changed.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise UserError(f"{bundle} is no bundle: it has no {MANIFEST}")
    try:
        manifest = Manifest.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is not a bundle's manifest: {where}: {first['msg']}") from error
    compared: dict[tuple[int, int], str] = {}  # a file with several names, as depths share weights, is read once
    for entry in manifest.files:
        file = bundle / entry.path
        if not file.is_file():
            raise UserError(f"the bundle {bundle} lacks {entry.path}")
        state = file.stat()
        same = state.st_size == entry.bytes
        if same and (hashes or entry.bytes <= SMALL):
            key = state.st_dev, state.st_ino
            if key not in compared:
                compared[key] = sha256(file)
            same = compared[key] == entry.sha256
        if not same:
            raise UserError(f"{file} has changed since the bundle was made")
    return manifest
