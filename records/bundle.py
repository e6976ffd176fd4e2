"""`manifest.json` of a bundle."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from ..kv.settings import HeadSettings
from .record import Entry, Record


class Verification(Entry):
    """An artifact against the checkpoint it was made from, in the stock runtime."""

    runtime: str
    positions: int
    perplexity: float  # of the probe text, in the artifact
    checkpoint_perplexity: float  # the same in torch
    kl: float  # mean KL(checkpoint ‖ artifact), nats
    top1_agreement: float
    tensor_error: float  # largest relative error of a row of weights
    graph_kl: float | None = None  # the same KL of the graph at high precision: F16 in llama.cpp, fp32 in ONNX Runtime
    kv_kl: float | None = None  # of an int8 cache: the same KL of the float32 graph with it, on a long text
    retaining_agreement: float | None = None  # least correlation of a block's retaining scores with the checkpoint's


class TrainedScales(Entry):
    """Scales that were trained by KL to the checkpoint, the integer codes fixed."""

    steps: int  # of the training
    step: int  # whose scales the file has; 0: those of rounding, since none had a lower held-out KL
    held_out_tokens: int
    held_out_kl_before: float  # mean KL(checkpoint ‖ weights of the file) in torch, nats, mean over depths
    held_out_kl: float  # the same of the scales that the file has
    moved: float  # largest change of a row of weights, as a share of its norm


class ArtifactEntry(Entry):
    """One exported model, at one depth."""

    role: str  # gguf-TYPE or onnx-PRECISION; below the greatest depth with @DEPTH behind it
    format: Literal["gguf", "onnx"]
    type: str
    depth: int  # how many blocks it runs
    path: str  # within the bundle: of the .gguf file, the first part of one in several, or the ONNX folder
    bytes: int  # of all that is read for this depth; several depths share most of it
    parameters: int
    bits_per_weight: float
    kv: str | None = None  # how the runtime holds keys and values: float32, float16, int8
    kv_bytes_per_token: int | None = None  # of keys and values, per token of context
    verification: Verification
    trained_scales: TrainedScales | None = None


class FamilyEntry(Entry):
    """What the depths of one type take on disk together."""

    format: Literal["gguf", "onnx"]
    type: str
    depths: list[int]
    bytes: int  # hard links counted once
    bytes_without_links: int  # as after copying with a tool that does not keep links


class HeadFiles(Entry):
    """Where a bundle holds its retaining heads."""

    path: str  # within the bundle: the heads as safetensors
    gguf: str  # the same as a GGUF beside a model's
    width: int


class RetainingEntry(HeadSettings, HeadFiles):
    """Retaining heads, and how they were meant to be used."""

    @model_validator(mode="before")
    @classmethod
    def _every_setting_is_given(cls, values: object) -> object:
        """A recipe may leave settings out, a bundle may not: its heads were trained for one value of each."""
        missing = [name for name in HeadSettings.model_fields if isinstance(values, dict) and name not in values]
        if missing:
            raise ValueError(f"retaining lacks {', '.join(missing)}")
        return values


class FileEntry(Entry):
    path: str
    bytes: int
    sha256: str
    link: str | None = None  # the file before it in the list that this is another name of


class BundleManifest(Record):
    """The record of a bundle."""

    FILE: ClassVar[str] = "manifest.json"
    TITLE: ClassVar[str] = "a bundle's manifest"
    INDENT: ClassVar[int] = 2
    ASCII: ClassVar[bool] = False
    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[2] = 2
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

    def contents(self) -> dict[str, Any]:
        """The file's contents, without null values."""
        return self.model_dump(exclude_none=True)
