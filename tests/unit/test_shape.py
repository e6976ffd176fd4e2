"""Shape and rotary settings of a configuration: transformers' object and a config.json's values say the same."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from compress.core.errors import UserError
from compress.modeling.families import FAMILIES, family_of, read_as
from compress.modeling.load import config_of, load_config
from compress.modeling.shape import (
    AttentionShape,
    by_length,
    llama3_slowdown,
    original_context,
    rope_kinds,
    rope_settings,
    rotated_size,
    scaled,
    sliding_blocks,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SIZES = {"num_attention_heads": 4, "num_hidden_layers": 4, "hidden_size": 64, "max_position_embeddings": 1024}
LLAMA = {"model_type": "llama", **SIZES}
PHI = {"model_type": "phi3", **SIZES}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = ["full_attention", "sliding_attention"] * 2
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_object_say_the_same(tiny, family):
    folder = tiny(family, kv_heads=2)
    config, values = load_config(folder), json.loads((folder / "config.json").read_text())
    assert AttentionShape.of(config) == AttentionShape.of(values) == AttentionShape(4, 2, 16)
    for read in (rope_kinds, rope_settings, rotated_size, original_context, by_length, scaled, sliding_blocks):
        assert read(config) == read(values), read
    assert family_of(config) is family_of(values) is FAMILIES[family]


def test_what_a_configuration_leaves_out_follows_from_the_rest():
    assert AttentionShape.of(LLAMA) == AttentionShape(4, 4, 16)
    assert AttentionShape.of({**LLAMA, "head_dim": None, "num_key_value_heads": 1}) == AttentionShape(4, 1, 16)
    assert AttentionShape.of({**LLAMA, "head_dim": 32}).qkv == 12 * 32
    assert rope_settings(LLAMA) == {"rope_type": "default", "rope_theta": 10000.0}
    assert not scaled(LLAMA) and original_context(LLAMA) == 1024


@pytest.mark.parametrize(
    "older",
    [
        {**LLAMA, "rope_theta": 5e5},
        {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {**PHI, "partial_rotary_factor": 0.5},
    ],
)
def test_older_rotary_settings_are_read_as_transformers_reads_them(older, tmp_path):
    config = config_of(copy.deepcopy({**older, "pad_token_id": 0}), tmp_path)
    for name in ("rope_type", "rope_theta", "factor"):
        assert rope_settings(older).get(name) == rope_settings(config).get(name)
    assert rotated_size(older) == rotated_size(config) == (8 if "partial_rotary_factor" in older else 16)


@pytest.mark.parametrize(
    ("values", "context"),
    [
        ({**LLAMA, "rope_parameters": LLAMA3}, 64),
        ({**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 256),
        # transformers takes these to start at max_position_embeddings where nothing else is named, whatever the factor
        ({**LLAMA, "rope_parameters": {**LONG, "factor": 4.0}}, 1024),
        ({**LLAMA, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 1024),
        ({**PHI, "rope_parameters": LONG, "original_max_position_embeddings": 512}, 512),
        ({**PHI, "original_max_position_embeddings": 512}, 512),
    ],
)
def test_the_context_before_scaling(values: dict[str, Any], context, tmp_path):
    assert original_context(values) == context
    config = config_of(
        {**values, "pad_token_id": 0, "rope_parameters": dict(values.get("rope_parameters") or {})}, tmp_path
    )
    assert original_context(config) == context
    if scaled(config) and rope_settings(config)["rope_type"] != "linear":
        assert rope_settings(config)["original_max_position_embeddings"] == context  # what transformers filled in


def test_llama3_slowdown_is_transformers(tmp_path):
    config = config_of({**LLAMA, "rope_parameters": dict(LLAMA3)}, tmp_path)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / llama3_slowdown(LLAMA3, 16), frequencies.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "slides"),
    [
        ({**LLAMA, "sliding_window": 8}, [False] * 4),  # Llama has no windows, whatever its config.json says
        ({**PHI, "sliding_window": 8}, [True] * 4),
        ({**PHI, "sliding_window": None}, [False] * 4),
        (
            {
                **SIZES,
                "model_type": "qwen2",
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            [False, True] * 2,
        ),
    ],
)
def test_which_blocks_slide(values, slides):
    assert sliding_blocks(values) == slides


def test_an_unknown_family_is_named():
    with pytest.raises(UserError, match=r"here is of family 'gpt2', which is not supported\. Supported families: g"):
        family_of({"model_type": "gpt2"}, "here")
    with pytest.raises(UserError, match=r"'gemma3' .load its text model instead"):
        family_of({"model_type": "gemma3"})
    assert read_as("gpt2") is None
    assert read_as("llama") is FAMILIES["llama"]  # not Mistral, whose files look the same


def test_records_and_shapes_load_without_torch():
    code = (
        "import sys, compress.modeling.families, compress.modeling.shape\n"
        "assert not {'torch', 'transformers', 'gguf', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
