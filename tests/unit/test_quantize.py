"""Tensor types against llama-quantize's rules, and ggml's quantizers against bounds and gguf-py's dequantization."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from compress.export.mixes import FILE_TYPES, MixedModel, tensor_type
from compress.export.quantize import WEIGHTED, Type, quantize, row_bytes

# A SmolLM2-135M of 24 blocks: rows of 576 = 18 · 32 are no multiple of 256, rows of 1536 (ffn_down) are.
SMOLLM2 = {
    "attn_q": (576, 576),
    "attn_k": (192, 576),
    "attn_v": (192, 576),
    "attn_output": (576, 576),
    "ffn_gate": (1536, 576),
    "ffn_up": (1536, 576),
    "ffn_down": (576, 1536),
}
# A Llama-3.2-1B: every row is a multiple of 256.
LLAMA = {
    "attn_q": (2048, 2048),
    "attn_k": (512, 2048),
    "attn_v": (512, 2048),
    "attn_output": (2048, 2048),
    "ffn_gate": (8192, 2048),
    "ffn_up": (8192, 2048),
    "ffn_down": (2048, 8192),
}
# llama.cpp's use_more_bits: the first eighth, the last eighth, and every third between.
MORE_OF_24 = {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}
MORE_OF_16 = {0, 1, 4, 7, 10, 13, 14, 15}


def types_of(part: str, shape: tuple[int, ...], mix: str, blocks: int, **options: Any) -> list[str]:
    model = MixedModel(blocks, **options)
    return [tensor_type(f"blk.{i}.{part}.weight", shape, mix, model).name for i in range(blocks)]


@pytest.mark.parametrize(
    ("mix", "narrow", "wide", "embedding"),
    [
        ("F16", "F16", "F16", "F16"),
        ("Q8_0", "Q8_0", "Q8_0", "Q8_0"),
        ("Q4_0", "Q4_0", "Q4_0", "Q8_0"),
        ("Q6_K", "Q8_0", "Q6_K", "Q8_0"),
    ],
)
def test_even_mixes_of_the_24_block_smollm2(mix, narrow, wide, embedding):
    """One type throughout; K-quants of rows of 576 become their fallbacks of 32."""
    for part, shape in SMOLLM2.items():
        assert set(types_of(part, shape, mix, 24)) == {wide if part == "ffn_down" else narrow}, part
    found = tensor_type("token_embd.weight", (49152, 576), mix, MixedModel(24)).name
    assert found == embedding


def test_q4_k_m_of_the_24_block_smollm2():
    for part, shape in SMOLLM2.items():
        found = types_of(part, shape, "Q4_K_M", 24)
        if part == "ffn_down":  # 1536 = 6 · 256
            expected = ["Q6_K" if i in MORE_OF_24 else "Q4_K" for i in range(24)]
        elif part == "attn_v":  # Q6_K falls back to Q8_0, Q4_K to Q5_0
            expected = ["Q8_0" if i in MORE_OF_24 else "Q5_0" for i in range(24)]
        else:
            expected = ["Q5_0"] * 24
        assert found == expected, part
    assert tensor_type("token_embd.weight", (49152, 576), "Q4_K_M", MixedModel(24)) == Type.Q8_0


def test_q4_k_m_where_rows_fit():
    for part, shape in LLAMA.items():
        more = MORE_OF_16 if part in ("attn_v", "ffn_down") else set()
        assert types_of(part, shape, "Q4_K_M", 16) == ["Q6_K" if i in more else "Q4_K" for i in range(16)], part


def test_a_pruned_model_counts_its_own_blocks():
    """12 of 16 blocks: the eighth is 1, so the rules are not those of the unpruned model cut short."""
    found = types_of("ffn_down", (2048, 8192), "Q4_K_M", 12)
    assert [i for i, kind in enumerate(found) if kind == "Q6_K"] == [0, 3, 6, 9, 10, 11]


def test_fused_attention_counts_as_attn_v():
    found = types_of("attn_qkv", (9216, 3072), "Q4_K_M", 24)
    assert {i for i, kind in enumerate(found) if kind == "Q6_K"} == MORE_OF_24


@pytest.mark.parametrize(
    ("mix", "tied_embedding", "embedding", "head"),
    [
        ("F16", "F16", "F16", "F16"),
        ("Q8_0", "Q8_0", "Q8_0", "Q8_0"),
        ("Q4_0", "Q6_K", "Q4_0", "Q6_K"),
        ("Q4_K_M", "Q6_K", "Q4_K", "Q6_K"),
        ("Q6_K", "Q6_K", "Q6_K", "Q6_K"),
    ],
)
def test_heads_get_more_bits_and_embeddings_only_when_they_are_heads(mix, tied_embedding, embedding, head):
    shape = (128256, 2048)
    assert tensor_type("token_embd.weight", shape, mix, MixedModel(16)).name == tied_embedding
    assert tensor_type("token_embd.weight", shape, mix, MixedModel(16, tied=False)).name == embedding
    assert tensor_type("output.weight", shape, mix, MixedModel(16, tied=False)).name == head


def test_importance_guards_the_first_ffn_down_of_q4_0():
    found = types_of("ffn_down", (2048, 8192), "Q4_0", 16, importance=True)
    assert found == ["Q4_1"] * 2 + ["Q4_0"] * 14
    assert types_of("ffn_down", (2048, 8192), "Q4_0", 16) == ["Q4_0"] * 16
    assert types_of("ffn_up", (8192, 2048), "Q4_0", 16, importance=True) == ["Q4_0"] * 16


def test_which_blocks_get_more_bits_in_q3_k_m_and_q4_k_s():
    """llama.cpp counts attn_v by number, two and four of them, and ffn_down by sixteenths and eighths."""
    shape = (2048, 8192)
    assert types_of("attn_v", shape, "Q3_K_M", 32) == ["Q5_K"] * 2 + ["Q4_K"] * 30
    assert types_of("ffn_down", shape, "Q3_K_M", 32) == ["Q5_K"] * 2 + ["Q4_K"] * 30
    assert types_of("attn_v", shape, "Q4_K_S", 32) == ["Q5_K"] * 4 + ["Q4_K"] * 28
    assert types_of("ffn_down", shape, "Q4_K_S", 32) == ["Q5_K"] * 4 + ["Q4_K"] * 28
    assert types_of("attn_k", shape, "Q3_K_M", 32) == ["Q3_K"] * 32


@pytest.mark.parametrize(
    ("mix", "narrow", "wide"),
    [
        ("Q2_K", "Q3_K", "Q4_K"),
        ("Q2_K_S", "Q2_K", "Q4_K"),
        ("IQ3_S", "IQ3_S", "Q4_K"),
        ("IQ4_XS", "IQ4_XS", "Q5_K"),
        ("IQ2_XS", "Q2_K", "Q4_K"),
        ("IQ2_M", "IQ3_S", "Q4_K"),
        ("Q4_K_M", "Q4_K", "Q4_K"),
    ],
)
def test_attn_v_that_four_queries_share_gets_more_bits(mix, narrow, wide):
    """Of block 7 of 32, which no other rule treats better."""
    name, shape = "blk.7.attn_v.weight", (512, 2048)
    for queries, expected in ((3, narrow), (4, wide)):
        assert tensor_type(name, shape, mix, MixedModel(32, importance=True, queries=queries)).name == expected


def test_iq4_and_iq3_xxs_need_less_with_an_importance_matrix():
    down = (2048, 8192)
    assert types_of("ffn_down", down, "IQ4_XS", 16) == ["Q5_K"] * 2 + ["IQ4_XS"] * 14
    assert types_of("ffn_down", down, "IQ4_XS", 16, importance=True) == ["IQ4_XS"] * 16
    assert types_of("attn_v", (512, 2048), "IQ3_XXS", 16, importance=True) == ["IQ3_XXS"] * 16


def test_a_70b_gives_its_small_attn_v_more_bits():
    found = types_of("attn_v", (1024, 8192), "Q4_K_M", 80, is_70b=True)
    assert set(found) == {"Q5_K", "Q6_K"}
    assert types_of("attn_k", (1024, 8192), "Q4_K_M", 80, is_70b=True) == ["Q4_K"] * 80
    assert types_of("attn_v", (1024, 8192), "Q3_K_S", 80, is_70b=True) == ["Q5_K"] * 80
    assert types_of("attn_v", (1024, 8192), "IQ2_XS", 80, is_70b=True, importance=True) == ["Q2_K"] * 80


@pytest.mark.parametrize("mix", FILE_TYPES)
def test_norms_biases_and_rope_factors_stay_float32(mix):
    for name in ("blk.0.attn_norm.weight", "blk.0.attn_q.bias", "output_norm.weight", "rope_freqs.weight"):
        assert tensor_type(name, (2048,), mix, MixedModel(16)) == Type.F32
    assert tensor_type("blk.0.attn_q_norm.weight", (128,), mix, MixedModel(16)) == Type.F32


@pytest.mark.parametrize("mix", [mix for mix in FILE_TYPES if mix not in ("F16", "BF16")])
def test_rows_no_multiple_of_32_stay_f16(mix):
    assert types_of("attn_q", (80, 80), mix, 4) == ["F16"] * 4
    # llama.cpp first wants Q8_0 of such an embedding; its blocks are 32 wide as well.
    assert tensor_type("token_embd.weight", (512, 80), mix, MixedModel(4)) == Type.F16


# Root mean square of the rounding error, as a share of the values', for normally distributed values.
BOUNDS = {"F16": 3e-4, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_0": 0.05, "Q5_1": 0.05, "Q5_K": 0.045}
BOUNDS |= {"Q4_0": 0.1, "Q4_1": 0.095, "Q4_K": 0.085, "IQ4_NL": 0.085, "IQ4_XS": 0.085, "MXFP4": 0.13, "BF16": 0.002}
BOUNDS |= {"Q3_K": 0.17, "Q2_K": 0.33, "IQ3_S": 0.18, "IQ3_XXS": 0.23}


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)


def relative_error(found: np.ndarray, values: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    return float(np.sqrt((weights * (found - values) ** 2).sum() / (weights * values**2).sum()))


@pytest.mark.parametrize("kind", BOUNDS)
def test_quantized_values_come_back(matrix, kind):
    packed = quantize(matrix, Type[kind])
    assert packed.shape == (64, row_bytes(Type[kind], 512))
    error = relative_error(gguf.dequantize(packed, Type[kind]), matrix)
    assert BOUNDS[kind] / 3 < error < BOUNDS[kind]


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_0", "Q4_0", "Q6_K", "Q4_1"])
def test_importance_lowers_the_error_where_it_weighs(matrix, kind):
    importance = np.random.default_rng(2).lognormal(0, 2, 512).astype(np.float32)
    plain, weighted = (gguf.dequantize(quantize(matrix, Type[kind], i), Type[kind]) for i in (None, importance))
    assert relative_error(weighted, matrix, importance) < 0.95 * relative_error(plain, matrix, importance)
    assert relative_error(weighted, matrix) < 2 * relative_error(plain, matrix)


def test_types_of_one_and_two_bits_need_an_importance(matrix):
    """Without one, ggml would end the process."""
    for kind in WEIGHTED:
        with pytest.raises(ValueError, match=f"{kind.name} needs an importance"):
            quantize(matrix, kind)


def test_bytes_do_not_depend_on_threads(matrix, monkeypatch):
    whole = quantize(matrix, Type.Q4_K, threads=1)
    monkeypatch.setattr("compress.export.quantize.ROWS_AT_ONCE", 5 * 512)  # 12 pieces of 5 rows and one of 4
    assert np.array_equal(quantize(matrix, Type.Q4_K, threads=4), whole)


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_float_types_are_conversions(matrix, kind):
    found = quantize(matrix, Type[kind]).view(np.float32 if kind == "F32" else np.float16)
    assert np.array_equal(found, matrix.astype(found.dtype))


def test_wrong_shapes_are_refused(matrix):
    with pytest.raises(ValueError, match="rows of 80 cannot be Q4_K"):
        quantize(matrix[:, :80], Type.Q4_K)
    with pytest.raises(ValueError, match="importance has shape"):
        quantize(matrix, Type.Q4_K, np.ones(3, np.float32))
