"""The recipe's `export` section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from ..core.stage import Section
from ..runtime.artifact_types import GGUF_TYPES, ONNX_TYPES

FORMAT = 4
if TYPE_CHECKING:
    GgufType = OnnxPrecision = str
else:
    GgufType, OnnxPrecision = Literal[tuple(GGUF_TYPES)], Literal[tuple(ONNX_TYPES)]


class Verify(Section):
    """How exported files are compared with the checkpoint in the stock runtimes."""

    tokens: int = Field(default=192, ge=8, description="positions whose next-token distributions are compared")
    window: int = Field(default=96, ge=8, description="tokens per probe text")
    kl: dict[GgufType | OnnxPrecision, float] = Field(
        default_factory=dict,
        description="limit on the mean KL(checkpoint ‖ artifact) per type, such as {Q4_K_M: 0.05}; overrides defaults",
    )


class ExportConfig(Section):
    """Which artifacts the bundle holds, and how they are quantized and checked."""

    gguf: list[GgufType] = Field(default_factory=list, description=f"GGUF types: {', '.join(GGUF_TYPES)}")
    onnx: list[OnnxPrecision] = Field(default_factory=list, description=f"ONNX precisions: {', '.join(ONNX_TYPES)}")
    depths: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        min_length=1,
        description="depths to export, in blocks, ascending and ending with all blocks, such as [12, 18, 24]; null: "
        "the depths the model was trained for, else its full depth alone",
    )
    imatrix: bool | None = Field(
        default=None,
        description="weight rounding errors by an importance matrix from the data stage's rows; null: if there is one",
    )
    imatrix_tokens: int = Field(default=8192, ge=64, description="tokens the importance matrix is computed from")
    verify: Verify = Field(default_factory=Verify, description="comparison with the checkpoint; always runs")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: all cores")

    @model_validator(mode="after")
    def _something(self) -> ExportConfig:
        if not self.gguf and not self.onnx:
            raise ValueError("name at least one type under gguf or onnx")
        for values in (self.gguf, self.onnx):
            if len(set(values)) != len(values):
                raise ValueError(f"{values} lists a type twice")
        if self.depths is not None and sorted(set(self.depths)) != self.depths:
            raise ValueError(f"depths {self.depths} must be in ascending order, each once")
        return self
