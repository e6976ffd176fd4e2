"""`manifest.json` of a bundle."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from ..kv.settings import HeadSettings
from .record import Entry, Record


class Verification(Entry):
    """An artifact against the checkpoint it was made from, in the stock runtime."""

    runtime: str = Field(description="the runtime")
    positions: int = Field(description="number of positions compared")
    perplexity: float = Field(description="perplexity of the probe text in the runtime")
    checkpoint_perplexity: float = Field(description="perplexity of the same text in torch")
    kl: float = Field(description="mean KL(checkpoint ‖ artifact) in nats")
    top1_agreement: float = Field(description="share of positions where both predict the same token")
    tensor_error: float = Field(description="largest relative error of a row of weights")
    graph_kl: float | None = Field(
        default=None, description="KL of the graph at high precision: F16 in llama.cpp, fp32 in ONNX Runtime"
    )
    kv_kl: float | None = Field(
        default=None, description="for an int8 cache: KL of the float32 graph with that cache, on a long text"
    )
    retaining_agreement: float | None = Field(
        default=None, description="lowest correlation, over blocks, of retaining scores with the checkpoint's"
    )


class TrainedScales(Entry):
    """Scales that were trained by KL to the checkpoint, the integer codes fixed."""

    steps: int = Field(description="steps of the training")
    step: int = Field(description="step whose scales the file has; 0: those of rounding, as none had a lower KL")
    held_out_tokens: int = Field(description="number of held-out tokens")
    held_out_kl_before: float = Field(
        description="mean KL(checkpoint ‖ weights of the file) before training, in torch, in nats, mean over depths"
    )
    held_out_kl: float = Field(description="the same with the scales that the file has")
    moved: float = Field(description="largest change of a row of weights, as a share of its norm")


class ArtifactEntry(Entry):
    """One exported model, at one depth."""

    role: str = Field(description="gguf-TYPE or onnx-PRECISION, followed by @DEPTH below the greatest depth")
    format: Literal["gguf", "onnx"] = Field(description="file format")
    type: str = Field(description="GGUF type or ONNX precision, or the size that was asked for")
    depth: int = Field(description="number of blocks")
    path: str = Field(description="path in the bundle of the .gguf file (the first part of several) or ONNX folder")
    bytes: int = Field(description="size of all files read at this depth; depths share most of it")
    parameters: int = Field(description="number of weights at this depth")
    bits_per_weight: float = Field(description="average over the tensors")
    kv: str | None = Field(default=None, description="type of the runtime's keys and values: float32, int8 or f16")
    kv_bytes_per_token: int | None = Field(default=None, description="size of keys and values per token of context")
    verification: Verification = Field(description="comparison with the checkpoint")
    trained_scales: TrainedScales | None = Field(default=None, description="scales trained after rounding")


class FamilyEntry(Entry):
    """What the depths of one type take on disk together."""

    format: Literal["gguf", "onnx"] = Field(description="file format")
    type: str = Field(description="GGUF type or ONNX precision, or the size that was asked for")
    depths: list[int] = Field(description="numbers of blocks")
    bytes: int = Field(description="size on disk, hard links counted once")
    bytes_without_links: int = Field(description="size after copying with a tool that does not keep hard links")


class HeadFiles(Entry):
    """Where a bundle holds its retaining heads."""

    path: str = Field(description="path in the bundle of the heads as safetensors")
    gguf: str = Field(description="path in the bundle of the heads as GGUF")
    width: int = Field(description="hidden width of a head")


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
    path: str = Field(description="path in the bundle")
    bytes: int = Field(description="size")
    sha256: str = Field(description="hash")
    link: str | None = Field(default=None, description="earlier file in the list that this is a hard link to")


class BundleManifest(Record):
    """The record of a bundle."""

    FILE: ClassVar[str] = "manifest.json"
    TITLE: ClassVar[str] = "a bundle's manifest"
    INDENT: ClassVar[int] = 2
    ASCII: ClassVar[bool] = False
    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[2] = Field(default=2, description="version of this format")
    name: str = Field(description="the model's name")
    family: str = Field(description="model_type of the configuration")
    parameters: int = Field(description="parameters of the whole model")
    depths: list[int] = Field(description="numbers of blocks that it can run at, ascending")
    kept_blocks: list[int] = Field(description="indices of its blocks in the unpruned model")
    importance_matrix: bool = Field(description="whether rounding was weighted by an importance matrix")
    artifacts: list[ArtifactEntry] = Field(description="one entry per type and depth, deepest first")
    families: list[FamilyEntry] = Field(default_factory=list, description="types with several depths")
    retaining: RetainingEntry | None = Field(default=None, description="retaining heads")
    provenance: dict[str, Any] = Field(
        default_factory=dict, description="stages that it was made by, and the unpruned model"
    )
    files: list[FileEntry] = Field(description="all files of the bundle")

    def contents(self) -> dict[str, Any]:
        """The file's contents, without null values."""
        return self.model_dump(exclude_none=True)
