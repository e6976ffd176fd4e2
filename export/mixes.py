"""The mixes of llama-quantize: which type each tensor of a dense model gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from ..runtime.artifact_types import GGUF_TYPES

# The type of most tensors, where it is not the mix's own name without its last letter.
_MOST = {"Q2_K": Type.Q2_K, "IQ3_XS": Type.IQ3_S, "IQ3_M": Type.IQ3_S, "IQ2_S": Type.IQ2_XS, "IQ2_M": Type.IQ2_S}


def _most(mix: str) -> Type:
    return _MOST.get(mix) or (Type[mix] if mix in Type.__members__ else Type[mix.rpartition("_")[0]])


# Recipe name -> (what general.file_type says, the type most tensors get: Q4_K of the mix Q4_K_M)
FILE_TYPES: dict[str, tuple[LlamaFileType, Type]] = {
    name: (LlamaFileType[f"MOSTLY_{name}"], _most(name)) for name in GGUF_TYPES
}
# For rows that are no multiple of a type's block: the nearest type with blocks of 32.
FALLBACKS = {
    **dict.fromkeys((Type.Q2_K, Type.Q3_K), Type.Q4_0),
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
    **dict.fromkeys((Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S), Type.IQ4_NL),
    **dict.fromkeys((Type.IQ3_XXS, Type.IQ3_S, Type.IQ4_XS), Type.IQ4_NL),
}
FUSED_OR_V = ("attn_v", "attn_qkv")
LOWEST = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
SMALL = ("IQ2_S", "IQ2_M")  # those whose larger tensors are IQ3_S instead of Q2_K


@dataclass(frozen=True)
class MixedModel:
    """What llama-quantize's rules go by."""

    blocks: int  # in this file
    tied: bool = True  # the embedding is also the output
    importance: bool = False  # an importance matrix is given
    queries: int = 1  # heads that share a key head
    is_70b: bool = False  # llama.cpp takes it for a model of 70B (80 blocks), whose small attn_v get more bits


def tensor_type(name: str, shape: Sequence[int], mix: str, model: MixedModel) -> Type:
    """The type llama-quantize gives a tensor in a mix.

    `name` is llama.cpp's, `shape` is (rows, columns) or (size,).
    """
    if not is_matrix(name, shape):
        return Type.F32
    default = FILE_TYPES[mix][1]
    if default in (Type.F16, Type.BF16):
        return default
    return fitting(_wanted(name, shape[-1], mix, default, model), shape[-1])


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is quantized at all; norms, biases and rope factors are not."""
    return len(shape) > 1 and name.endswith(".weight") and not name.endswith("_norm.weight")


def fitting(wanted: Type, columns: int) -> Type:
    """The type itself, its fallback, or F16 for rows that fit no block."""
    for kind in (wanted, FALLBACKS.get(wanted, wanted)):
        if columns % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return Type.F16


def _wanted(name: str, columns: int, mix: str, default: Type, model: MixedModel) -> Type:
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        return _head(columns, mix, default)
    if name == "token_embd.weight":
        return _embedding(mix, default)
    if not name.startswith("blk."):
        return default
    block, part = int(name.split(".")[1]), name.split(".")[2]
    if mix in LOWEST:
        found = _lowest(part, block, mix, model)
    elif part in FUSED_OR_V:
        found = _values(block, mix, model)
        if model.is_70b and (found or default) in (Type.Q3_K, Type.Q4_K):
            found = Type.Q5_K
    elif part == "ffn_down":
        found = _down(block, mix, model)
    elif part == "attn_output":
        found = _OUTPUTS.get(mix)
    else:
        found = _inputs(part, block, mix, model)
    return found or default


def _head(columns: int, mix: str, default: Type) -> Type:
    if columns % GGML_QUANT_SIZES[default][0] or default == Type.Q8_0:
        return Type.Q8_0
    return Type.Q5_K if mix in (*LOWEST, "IQ3_XXS") else Type.Q6_K


def _embedding(mix: str, default: Type) -> Type:
    if mix in (*SMALL, "IQ3_XXS"):
        return Type.IQ3_S
    return Type.Q2_K if mix in LOWEST else default


def _lowest(part: str, block: int, mix: str, model: MixedModel) -> Type | None:
    """Blocks' matrices in mixes of one and two bits."""
    larger = Type.IQ3_S if mix in SMALL else Type.Q2_K
    if part in FUSED_OR_V:
        return Type.Q4_K if model.queries >= 4 else larger
    if part == "ffn_down":
        return larger if block < model.blocks // 8 else None
    if part == "attn_output":
        return Type.IQ3_S if mix in SMALL else Type.IQ2_XXS if mix in ("IQ1_S", "IQ1_M") else None
    return None


def _values(block: int, mix: str, model: MixedModel) -> Type | None:
    """attn_v, or the queries, keys and values in one."""
    if model.queries >= 4:
        if mix in ("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"):
            return Type.Q4_K
        if mix in ("IQ4_NL", "IQ4_XS"):
            return Type.Q5_K
    match mix:
        case "Q2_K":
            return Type.Q3_K
        case "IQ3_XXS":
            return Type.IQ3_XXS if model.importance else Type.IQ3_S
        case "IQ3_M":
            return Type.Q4_K
        case "Q3_K_M":
            return Type.Q5_K if block < 2 else Type.Q4_K
        case "Q3_K_L":
            return Type.Q5_K
        case "Q4_K_S":
            return Type.Q5_K if block < 4 else None
        case "Q4_K_M" | "Q5_K_M":
            return Type.Q6_K if _more_bits(block, model.blocks) else None
    return None


def _down(block: int, mix: str, model: MixedModel) -> Type | None:
    first = block < model.blocks // 8
    match mix:
        case "Q2_K":
            return Type.Q3_K
        case "Q2_K_S" | "IQ3_M":
            return Type.Q4_K if first else None
        case "IQ3_XXS" if not model.importance:
            return Type.Q4_K if first else Type.Q3_K
        case "Q3_K_M":
            return Type.Q5_K if block < model.blocks // 16 else Type.Q4_K
        case "Q3_K_L":
            return Type.Q5_K
        case "Q4_K_M" | "Q5_K_M":
            return Type.Q6_K if _more_bits(block, model.blocks) else None
        case "IQ4_NL" | "IQ4_XS" if not model.importance:
            return Type.Q5_K if first else None
        case "Q4_K_S":
            return Type.Q5_K if first else None
        case "Q4_0" | "Q5_0" if model.importance and first:
            return Type.Q4_1 if mix == "Q4_0" else Type.Q5_1
    return None


_OUTPUTS = {
    "Q2_K": Type.Q3_K,
    "IQ3_XXS": Type.IQ3_S,
    "Q3_K_M": Type.Q4_K,
    "Q3_K_L": Type.Q5_K,
    "IQ3_M": Type.Q4_K,
}


def _inputs(part: str, block: int, mix: str, model: MixedModel) -> Type | None:
    """Queries, keys, gate and up."""
    if part in ("attn_q", "attn_k"):
        return {"IQ3_XS": Type.IQ3_XXS, "IQ3_XXS": Type.IQ2_S}.get(mix)
    if part in ("ffn_gate", "ffn_up") and mix == "IQ3_XS":
        return Type.IQ3_XXS if model.blocks // 8 <= block < 7 * model.blocks // 8 else None
    return None


def _more_bits(block: int, blocks: int) -> bool:
    """The first and last eighth of the blocks, and every third between."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2
