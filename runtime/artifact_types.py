"""The types of exported files, one line each: their size, and the limit on what rounding may cost. No torch.

A GGUF type that gives every tensor one type (or the nearest that fits) needs only its line; a mix also has its rule in
export/mixes.py. An ONNX precision's line names its quantizers, each a file in export/quantizers/.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArtifactType:
    """Properties of a type."""

    typical: float  # bits per weight of a file, scales and higher types for some tensors included
    most: float  # the same, for the check of free disk
    kl: float  # limit on the mean KL to the checkpoint: what rounding may cost
    calibrated: bool = True  # whether an importance matrix can weight rounding errors
    needs_importance: bool = False  # refused without an importance matrix
    retaining: float | None = None  # lowest correlation allowed of retaining scores, for types whose graphs have them
    blocks: str | None = None  # ONNX: quantizer of the blocks' matrices; None: float32
    head: str | None = None  # ONNX: quantizer of the output head and the embedding; None: float32

    @property
    def has_scales(self) -> bool:
        """Whether its weights are integers in blocks, with a scale each."""
        return self.typical < 16


# A SmolLM2-135M of 24 blocks, not yet recovered, has (without importance matrix) a mean KL of F16 1e-5, Q8_0 0.004,
# Q6_K 0.012, Q4_K_M 0.06, Q4_0 0.32, int4 0.31, int8 0.005, fp32 below 1e-6; worse models have more. Retaining heads
# are not quantized themselves, but read the outputs of quantized blocks. The limits of the other GGUF types are two to
# four times the KL estimated for the unpruned model (docs/research/export.md), more for types of two bits and below,
# which its rows of 576 mostly replace by larger ones.
GGUF_TYPES = {
    "F16": ArtifactType(16, 16, kl=0.001, calibrated=False),
    "BF16": ArtifactType(16, 16, kl=0.005, calibrated=False),
    "Q8_0": ArtifactType(8.5, 8.5, kl=0.02, calibrated=False),
    "Q6_K": ArtifactType(6.6, 8.5, kl=0.05),
    "Q5_K_M": ArtifactType(5.7, 7.5, kl=0.15),
    "Q5_K_S": ArtifactType(5.6, 7.5, kl=0.2),
    "Q5_1": ArtifactType(6.1, 7.5, kl=0.2),
    "Q5_0": ArtifactType(5.6, 7, kl=0.25),
    "Q4_K_M": ArtifactType(4.9, 6.5, kl=0.25),
    "Q4_K_S": ArtifactType(4.7, 6.5, kl=0.4),
    "Q4_1": ArtifactType(5.1, 6.5, kl=0.8),
    "Q4_0": ArtifactType(4.7, 6, kl=0.8),
    "IQ4_NL": ArtifactType(4.7, 6, kl=0.6),
    "IQ4_XS": ArtifactType(4.5, 6, kl=0.6),
    "Q3_K_L": ArtifactType(4.3, 6.5, kl=0.5),
    "Q3_K_M": ArtifactType(4.0, 6, kl=0.7),
    "Q3_K_S": ArtifactType(3.7, 6, kl=1.5),
    "Q2_K": ArtifactType(3.2, 5.5, kl=2),
    "Q2_K_S": ArtifactType(3.0, 5.5, kl=2, needs_importance=True),
    "IQ3_M": ArtifactType(3.8, 5.5, kl=0.8, needs_importance=True),
    "IQ3_S": ArtifactType(3.7, 5.5, kl=0.8, needs_importance=True),
    "IQ3_XS": ArtifactType(3.5, 5.5, kl=0.8, needs_importance=True),
    "IQ3_XXS": ArtifactType(3.3, 5.5, kl=1, needs_importance=True),
    "IQ2_M": ArtifactType(3.0, 5.5, kl=1.5, needs_importance=True),
    "IQ2_S": ArtifactType(2.8, 5.5, kl=1.5, needs_importance=True),
    "IQ2_XS": ArtifactType(2.6, 5.5, kl=2, needs_importance=True),
    "IQ2_XXS": ArtifactType(2.4, 5.5, kl=2.5, needs_importance=True),
    "IQ1_M": ArtifactType(2.2, 5.5, kl=4, needs_importance=True),
    "IQ1_S": ArtifactType(2.0, 5.5, kl=4, needs_importance=True),
}
ONNX_TYPES = {
    "int4": ArtifactType(5.7, 7, kl=0.8, retaining=0.5, blocks="int4", head="int8"),
    "int8": ArtifactType(9, 10, kl=0.02, retaining=0.95, blocks="int8", head="int8"),
    "fp32": ArtifactType(32, 32, kl=0.0001, calibrated=False, retaining=0.9999),
}
ARTIFACT_TYPES = GGUF_TYPES | ONNX_TYPES
# Types whose weights are each the nearest of a block's few values, so that training can round to them at every step
# (`tune.quantize_as`). Those of IQ1 to IQ3 are rounded in groups, by a search in a codebook.
NEAREST = tuple(
    name for name, kind in ARTIFACT_TYPES.items() if kind.has_scales and not name.startswith(("IQ1", "IQ2", "IQ3"))
)

# Bytes of one number of the keys and values that a runtime holds, by the cache's type: ONNX's float32 and int8, and
# llama.cpp's own names. q8_0 has blocks of 32 with a scale in half precision.
CACHE_BYTES = {"float32": 4.0, "int8": 1.0, "f16": 2.0, "q8_0": 34 / 32}
ONNX_CACHES = ("float32", "int8")  # chosen at export: `export.kv`
GGUF_CACHES = ("f16", "q8_0")  # chosen when a file is opened: `--kv-type`
GGUF_CACHE = GGUF_CACHES[0]
