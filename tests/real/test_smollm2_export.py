"""Bundles of the real SmolLM2."""

from __future__ import annotations

from typing import Any

import pytest
from compress.core.stage import Context
from compress.export.config import ExportConfig
from compress.export.stage import export_checkpoint
from compress.export.tensors import LIMITS
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from compress.runtime.bundle import read_bundle

VERIFY = {"tokens": 32, "window": 32}


def config(**values: Any) -> ExportConfig:
    return ExportConfig.model_validate({"verify": VERIFY, "threads": 1} | values)


@pytest.mark.real
def test_the_real_model_of_24_blocks(smollm2, tmp_path, inline_builder):
    """The limits are 1.5 to 2 times what an honest export makes."""
    model = load_model(smollm2)
    drop_blocks(model, range(13, 19))
    save_checkpoint(model, load_tokenizer(smollm2), tmp_path / "pruned")
    wanted = config(gguf=["Q4_K_M"], onnx=["int4"], kv="int8", verify={"tokens": 64, "window": 64})
    export_checkpoint(tmp_path / "pruned", tmp_path / "b", wanted, Context(), name="smollm2-24L")
    q4, int4 = read_bundle(tmp_path / "b").artifacts
    assert q4.verification.kl < 0.12 and int4.verification.kl < 0.5
    assert int4.verification.kv_kl is not None and int4.verification.kv_kl < 0.01
    assert (q4.kv_bytes_per_token, int4.kv_bytes_per_token) == (2 * 24 * 3 * 64 * 2, 2 * 24 * 3 * 64)
    assert 6.25 < q4.bits_per_weight < 6.35  # rows of 576: Q5_0 and Q8_0 in the place of Q4_K and Q6_K
    for kind, found in (("Q5_0", q4), ("int4", int4)):  # their rows have the largest errors
        assert LIMITS[kind] / 2 < found.verification.tensor_error < LIMITS[kind] / 1.4, kind


@pytest.mark.real
def test_four_depths_of_the_real_model(smollm2, tmp_path, inline_builder):
    """The goals of size, on weights of real proportions; 12 blocks of the 30 keep it short, and the share hard."""
    model = load_model(smollm2)
    drop_blocks(model, range(6, 24))
    save_checkpoint(model, load_tokenizer(smollm2), tmp_path / "pruned")
    wanted = config(gguf=["Q4_K_M"], onnx=["int4"], depths=[6, 8, 10, 12], verify={"tokens": 8, "window": 8})
    wanted = wanted.model_copy(update={"verify": wanted.verify.model_copy(update={"kl": {"Q4_K_M": 9.0, "int4": 9.0}})})
    export_checkpoint(tmp_path / "pruned", tmp_path / "b", wanted, Context(), name="smollm2-12L")
    manifest = read_bundle(tmp_path / "b")
    alone = {a.type: a.bytes for a in manifest.artifacts if "@" not in a.role}
    shares = {family.type: family.bytes / alone[family.type] for family in manifest.families}
    assert shares["Q4_K_M"] < 1.10 and shares["int4"] < 1.05
    assert len(manifest.artifacts) == 8
