"""A family that differs from Llama by its names is one record: Seed-OSS, which is not built in, the whole way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.core.gguf_header import read_header
from compress.export.gguf import write_gguf
from compress.export.onnx import write_onnx
from compress.export.tensors import LIMITS, gguf_errors, onnx_errors
from compress.modeling.blocks import Decoder, drop_blocks, kept_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.families import FAMILIES, Family, Gguf, Onnx
from compress.modeling.geometry import geometry_of
from compress.modeling.load import load_model, load_tokenizer, resolve
from compress.modeling.random import random_checkpoint
from compress.runtime.engine import ScoringWindow
from compress.runtime.llamacpp_engine import LlamaCppEngine
from compress.runtime.onnx_engine import OnnxEngine

NAME = "seed_oss"
SEED_OSS = Family(NAME, "SeedOssConfig", "SeedOssForCausalLM", Gguf(NAME), Onnx("Qwen2ForCausalLM"))
IDS = [(37 * i) % 450 + 3 for i in range(48)]


@pytest.fixture
def pruned(monkeypatch, tmp_path):
    """A checkpoint of a family that was unknown until its record came, without block 1 of four, and its model."""
    with pytest.raises(UserError, match="no random model of family 'seed_oss'"):
        random_checkpoint(tmp_path / "base", NAME)
    monkeypatch.setitem(FAMILIES, NAME, SEED_OSS)
    random_checkpoint(tmp_path / "base", NAME)
    model = load_model(tmp_path / "base")
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=random)
    drop_blocks(model, [1])
    save_checkpoint(model, load_tokenizer(tmp_path / "base"), tmp_path / "pruned")
    return tmp_path / "pruned"


@torch.no_grad()
def logprobs(model: Any) -> np.ndarray:
    return torch.log_softmax(model(torch.tensor([IDS])).logits[0], -1).numpy()


def test_its_blocks_are_dropped_saved_and_loaded(pruned):
    model = load_model(pruned)
    assert type(model).__name__ == "SeedOssForCausalLM" and kept_blocks(model.config) == [0, 2, 3]
    decoder, ids = Decoder(model), torch.tensor([IDS])
    with decoder.projections() as qkv, decoder.mlp_addition(0) as added:
        decoder.hidden(input_ids=ids)
    assert {block: out.shape[-1] for block, out in qkv.items()} == dict.fromkeys(range(3), 128)
    assert added["mlp"].shape == (1, len(IDS), 64) and added["inner"].shape == (1, len(IDS), 96)
    assert geometry_of(model.config.to_dict()).kv_heads == 2


def test_llama_cpp_predicts_what_torch_does(pruned, tmp_path):
    write_gguf(pruned, tmp_path / "m.gguf", "F16")
    assert read_header(tmp_path / "m.gguf")["seed_oss.block_count"] == 3
    assert all(error < LIMITS[kind] for _, kind, error in gguf_errors(tmp_path / "m.gguf", pruned))
    with LlamaCppEngine(tmp_path / "m.gguf", threads=1, context=64, slots=1) as engine:
        scores = engine.score([ScoringWindow(IDS, [1, 7, 30, 47])])[0]
    expected = logprobs(load_model(pruned))
    for score in scores:
        assert np.abs(score.logprobs - expected[score.position - 1]).max() < 0.01  # float16


def test_its_gguf_file_is_read_back(pruned, tmp_path):
    write_gguf(pruned, tmp_path / "m.gguf", "F16")
    read = load_model(resolve(str(tmp_path / "m.gguf"), tmp_path / "cache"))
    assert type(read).__name__ == "SeedOssForCausalLM"
    assert np.abs(logprobs(read) - logprobs(load_model(pruned))).max() < 0.01  # float16


def test_onnx_runtime_predicts_what_torch_does(pruned, tmp_path, inline_builder):
    write_onnx(pruned, tmp_path / "m", "fp32")
    assert all(error < LIMITS[kind] for _, kind, error in onnx_errors(tmp_path / "m", pruned))
    with OnnxEngine(tmp_path / "m", threads=1) as engine:
        scores = engine.score([ScoringWindow.of(IDS)])[0]
    assert np.abs(np.stack([score.logprobs for score in scores]) - logprobs(load_model(pruned))[:-1]).max() < 2e-5
