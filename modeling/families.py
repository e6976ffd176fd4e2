"""Every supported model family as one record: what the toolkit must know about it and cannot read elsewhere.

A record holds names, types and flags; the code that uses them is shared by all families. A family that differs from a
supported one only in its names needs a record in `FAMILIES` and nothing else. Defaults are Llama's.
Classes are named, not imported: neither torch nor transformers is loaded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..core.errors import UserError
from .types import ConfigLike

# Weights that go by the same names in all families.
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCKS = "model.layers"
PER_BLOCK: Mapping[str, type] = {"layer_types": str}


@dataclass(frozen=True)
class Block:
    """Names of the modules of a decoder block, as paths inside it."""

    attention: str = "self_attn"
    # Query, key and value projections, in this order; a single name where one projection gives all three.
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    qk_norms: tuple[str, str] | None = None  # norms of each head's queries and keys, before rotary positions
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # or a single name: gate and up in one matrix
    mlp_out: str = "mlp.down_proj"
    # Norms of the outputs of attention and MLP, applied before these are added to the residual stream. Without them any
    # linear map of the MLP's output can be fused into `mlp_out`; with them only a scale per channel can, into the
    # norm's weight.
    added_norms: tuple[str, str] | None = None


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp stores and runs a family."""

    architecture: str
    ropes: tuple[str, ...] = ("default", "linear", "yarn")  # kinds of rotary positions that its graph computes
    adjacent_pairs: bool = False  # it rotates adjacent pairs: rows of queries and keys are reordered for it
    # Sliding windows: "none", not supported for this architecture; "one", the file names the window, but all blocks see
    # everything; "blocks", each block slides or not, and sliding ones have rotary positions of their own.
    windows: Literal["none", "one", "blocks"] = "none"
    original_context: bool = False  # its files name the context before rotary scaling even if nothing is scaled
    query_scale: bool = False  # it scales attention by a rule of its own: the difference goes into the query norms
    # Whether it treats a model of 80 blocks as a 70B, whose value matrices get fewer bits: never, with grouped queries,
    # or always.
    is_70b: Literal["never", "grouped", "always"] = "never"
    # Settings that give projections biases, all of them or none → those projections, by llama.cpp's names.
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Onnx:
    """How onnxruntime-genai's model builder exports a family, and how Optimum reads the graph."""

    architecture: str  # the name that the builder knows
    ropes: tuple[str, ...] = ("default", "linear")  # built as transformers computes them; others silently are not
    # What Optimum reads of the configuration for the shape of the cache; it guesses the rest.
    optimum_head_dim: bool = False
    optimum_kv_heads: bool = True


@dataclass(frozen=True)
class Family:
    """A family of models."""

    model_type: str
    config_class: str  # of transformers, as is the next
    model_class: str
    gguf: Gguf
    onnx: Onnx | None  # None: the builder does not have it
    block: Block = Block()
    norm_offset: int = 0  # norms multiply by this + weight
    # Settings with an entry per block, and the type of an entry; settings that are a block's number, from which on
    # blocks are of another kind.
    per_block: Mapping[str, type] = field(default_factory=lambda: PER_BLOCK)
    block_numbers: tuple[str, ...] = ()
    # Blocks that slide their attention over `sliding_window`: none, all, or those that `layer_types` says.
    windows: Literal["none", "all", "by type"] = "none"
    activations: tuple[str, ...] = ("silu", "swish")  # names of the function that the runtimes' MLPs compute
    head_dim: bool = True  # the size of a head is a setting of its own
    partial_rotary: bool = False  # only a part of each head may be rotated
    softcap: bool = False  # `final_logit_softcapping` bounds the logits


_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_LLAMA_ROPES = ("default", "linear", "yarn", "llama3", "longrope")
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaConfig",
            "LlamaForCausalLM",
            Gguf(
                "llama",
                _LLAMA_ROPES,
                adjacent_pairs=True,
                is_70b="grouped",
                biases={"attention_bias": _ATTENTION, "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")},
            ),
            Onnx("LlamaForCausalLM", ("default", "llama3")),
        ),
        Family(
            "mistral",
            "MistralConfig",
            "MistralForCausalLM",
            Gguf("llama", _LLAMA_ROPES, adjacent_pairs=True, is_70b="grouped"),
            Onnx("MistralForCausalLM"),
            windows="all",
        ),
        Family(
            "qwen2",
            "Qwen2Config",
            "Qwen2ForCausalLM",
            Gguf("qwen2", is_70b="always"),
            Onnx("Qwen2ForCausalLM"),
            block_numbers=("max_window_layers",),
            windows="by type",
            head_dim=False,
        ),
        Family(
            "qwen3",
            "Qwen3Config",
            "Qwen3ForCausalLM",
            Gguf("qwen3", biases={"attention_bias": _ATTENTION}),
            Onnx("Qwen3ForCausalLM"),
            block=Block(qk_norms=_QK_NORMS),
            block_numbers=("max_window_layers",),
            windows="by type",
        ),
        Family(
            "phi3",
            "Phi3Config",
            "Phi3ForCausalLM",
            Gguf("phi3", ("default", "longrope"), windows="one", original_context=True),
            Onnx("Phi3ForCausalLM", ("default", "longrope"), optimum_kv_heads=False),
            block=Block(qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)),
            windows="all",
            head_dim=False,
            partial_rotary=True,
        ),
        Family(
            "gemma3_text",
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            Gguf("gemma3", windows="blocks", query_scale=True),
            Onnx("Gemma3ForCausalLM", optimum_head_dim=True),
            block=Block(qk_norms=_QK_NORMS, added_norms=("post_attention_layernorm", "post_feedforward_layernorm")),
            norm_offset=1,
            windows="by type",
            activations=("gelu_pytorch_tanh",),
            softcap=True,
        ),
    )
}


def family_of(config: ConfigLike, where: object = "the model") -> Family:
    """The family of a configuration: transformers' object, or the values of a config.json.

    Raises `UserError` naming `where` if it is not supported.
    """
    name = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    if not isinstance(name, str) or name not in FAMILIES:
        hint = " (load its text model instead)" if name == "gemma3" else ""
        raise UserError(
            f"{where} is of family {name!r}{hint}, which is not supported. "
            f"Supported families: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[name]


def block_number(name: str) -> int | None:
    """The number of the block that a weight belongs to; None for embedding, final norm and head."""
    prefix = f"{BLOCKS}."
    return int(name.removeprefix(prefix).split(".", 1)[0]) if name.startswith(prefix) else None


def read_as(architecture: str) -> Family | None:
    """The family that a GGUF file of llama.cpp's `architecture` is read as; the first if there are several."""
    return next((family for family in FAMILIES.values() if family.gguf.architecture == architecture), None)
