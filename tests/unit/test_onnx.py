"""ONNX export of every family, in stock onnxruntime and onnxruntime-genai, compared with torch."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import compress.export.onnx as export_onnx
import numpy as np
import onnx
import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Progress
from compress.export.onnx import build_float32, check_onnx, write_onnx
from compress.export.quantizers import BLOCK, quantizer
from compress.export.tensors import dequantize_nbits, onnx_errors
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.families import FAMILIES
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.runtime.engine import ScoringWindow
from compress.runtime.genai_engine import GenaiEngine
from compress.runtime.onnx_engine import PREFILL_CHUNK, OnnxEngine
from onnx.numpy_helper import to_array

quantize_int4, quantize_int8 = quantizer("int4").quantize, quantizer("int8").quantize
TOLERANCE = 1e-4  # nats, of every log-probability in float32
IDS = [(37 * i) % 450 + 3 for i in range(300)]
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + i / 16 for i in range(8)],
    "long_factor": [2 + i / 5 for i in range(8)],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "untied, multi-head, with biases": (
        "llama",
        {"tied": False, "kv_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "one key-value head, odd widths": ("llama", {"hidden": 80, "heads": 5, "kv_heads": 1, "intermediate": 72}),
    "llama3 rope": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "mistral's window": ("mistral", {"sliding_window": 8, "tied": False}),
    "linear rope": ("mistral", {"rope_parameters": LINEAR}),
    "qwen2's windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3 untied, linear rope": ("qwen3", {"tied": False, "rope_parameters": LINEAR}),
    "phi3 untied, window": ("phi3", {"tied": False, "sliding_window": 8}),
    "phi3 longrope": ("phi3", {"rope_parameters": LONG, "max_positions": 512, "original_max_position_embeddings": 256}),
    "gemma3 untied, stretched": (
        "gemma3_text",
        {
            "tied": False,
            "hidden": 96,
            "heads": 3,
            "kv_heads": 1,
            "query_pre_attn_scalar": 40,
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
            "layer_types": MIXED,
            "sliding_window": 8,
        },
    ),
}


def torch_logprobs(checkpoint: Path, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = load_model(checkpoint)(torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits, -1).numpy()


def differences(folder: Path, checkpoint: Path, ids: list[int]) -> list[float]:
    """The largest difference of a log-probability to torch's, in onnxruntime and in onnxruntime-genai."""
    expected, found = torch_logprobs(checkpoint, ids), []
    for engine_class in (OnnxEngine, GenaiEngine):
        with engine_class(folder, threads=1) as engine:
            scores = engine.score([ScoringWindow.of(ids)])[0]
        found.append(max(float(np.abs(s.logprobs - expected[s.position - 1]).max()) for s in scores))
    return found


@pytest.mark.parametrize("case", CASES)
def test_float32_predicts_what_torch_does(shaken, tmp_path, inline_builder, case):
    family, options = CASES[case]
    checkpoint = shaken(family, **options)
    write_onnx(checkpoint, tmp_path / "m", "fp32")
    ids = IDS[:100] if "longrope" not in case else IDS[:200]  # onnxruntime counts the whole text, not each chunk
    assert max(differences(tmp_path / "m", checkpoint, ids)) < TOLERANCE
    compared = list(onnx_errors(tmp_path / "m", checkpoint))
    assert len(compared) > 4 * 6 and max(error for *_, error in compared) == 0


@pytest.mark.parametrize("dropped", [[1], [0, 2], [1, 3]])
def test_pruned_gemma_keeps_its_windows(shaken, tmp_path, inline_builder, dropped):
    original = shaken("gemma3_text", layer_types=MIXED, sliding_window=8)
    model = load_model(original)
    drop_blocks(model, dropped)
    save_checkpoint(model, load_tokenizer(original), tmp_path / "pruned")
    write_onnx(tmp_path / "pruned", tmp_path / "m", "fp32")
    assert max(differences(tmp_path / "m", tmp_path / "pruned", IDS[:60])) < TOLERANCE


def test_chunks_and_cached_steps_make_the_same_logits(shaken, tmp_path, inline_builder):
    """A prompt longer than PREFILL_CHUNK; then token by token with the cache; then one step over dropped entries."""
    checkpoint = shaken()
    write_onnx(checkpoint, tmp_path / "m", "fp32")
    assert len(IDS) > PREFILL_CHUNK
    assert max(differences(tmp_path / "m", checkpoint, IDS)) < TOLERANCE
    expected = torch_logprobs(checkpoint, IDS[:40])
    with OnnxEngine(tmp_path / "m", threads=1) as engine:
        logits, past = engine.logits(IDS[:30])
        for position in range(30, 40):
            logits, past = engine.logits([IDS[position]], past)
            found = torch.log_softmax(torch.from_numpy(logits[-1]), -1).numpy()
            assert np.abs(found - expected[position]).max() < TOLERANCE
        assert past[0].shape == (1, 2, 40, 16)
        names = [value.name for value in engine._session.get_inputs()]
        assert names[:3] == ["input_ids", "attention_mask", "position_ids"] and "past_key_values.3.value" in names


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.001), ("int4", 0.15)])
@pytest.mark.parametrize("tied", [True, False])
def test_integers_stay_near_and_tied_embeddings_are_one_tensor(
    shaken, tmp_path, inline_builder, precision, limit, tied
):
    checkpoint = shaken(tied=tied)
    info = write_onnx(checkpoint, tmp_path / "m", precision)
    expected = torch_logprobs(checkpoint, IDS[:60])
    for engine_class in (OnnxEngine, GenaiEngine):
        with engine_class(tmp_path / "m", threads=1) as engine:
            scores = engine.score([ScoringWindow.of(IDS[:60])])[0]
        rows = [(expected[s.position - 1], s.logprobs) for s in scores]
        kl = [np.sum(np.exp(p) * (p - q)) for p, q in rows]
        assert 0 < np.mean(kl) < limit
    graph = onnx.load(str(tmp_path / "m" / "model.onnx"), load_external_data=False).graph
    matrices = [t.name for t in graph.initializer if len(t.dims) == 3 and t.dims[0] == 451]
    assert len(matrices) == (1 if tied else 2)
    assert sorted(info.files) == sorted(path.name for path in (tmp_path / "m").iterdir())
    assert info.bytes == sum(path.stat().st_size for path in (tmp_path / "m").iterdir())
    settings = json.loads((tmp_path / "m" / "genai_config.json").read_text())
    assert settings["model"]["decoder"]["num_hidden_layers"] == 4


def round_to_nearest(weight: np.ndarray) -> np.ndarray:
    """What the builder's own 4-bit quantizer does: each block's range in 15 equal steps."""
    x = weight.reshape(len(weight), -1, BLOCK)
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    step = (high - low) / 15
    zero = np.round(-low / step)
    return ((np.clip(np.round(x / step + zero), 0, 15) - zero) * step).reshape(weight.shape)


@pytest.fixture(scope="module")
def matrix() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    return random.standard_t(5, (96, 160)).astype(np.float32), random.lognormal(0, 1.5, 160).astype(np.float32)


def test_int4_beats_round_to_nearest(matrix):
    weight, importance = matrix

    def error(found: np.ndarray, by: np.ndarray | float = 1.0) -> float:
        return float((by * (found - weight) ** 2).sum())

    plain, weighted = quantize_int4(weight, None).dequantize(), quantize_int4(weight, importance).dequantize()
    assert error(plain) < 0.97 * error(round_to_nearest(weight))
    assert error(weighted, importance) < 0.8 * error(round_to_nearest(weight), importance)
    assert error(weighted, importance) < error(plain, importance)


def test_values_come_back_alike_by_both_readers(matrix):
    """160 columns are five blocks: the last zero point has a byte to itself."""
    weight, importance = matrix
    for made in (quantize_int4(weight, importance), quantize_int8(weight, None)):
        parts = [made.values, made.scales, made.zero_points]
        np.testing.assert_array_equal(dequantize_nbits(parts, made.bits, BLOCK, 160), made.dequantize())
    step = np.repeat(np.abs(weight.reshape(96, 5, BLOCK)).max(-1), BLOCK, axis=1) / 127
    assert (np.abs(quantize_int8(weight, None).dequantize() - weight) <= 0.5001 * step).all()
    zeros = quantize_int4(np.zeros((2, 64), np.float32), None)
    assert not zeros.dequantize().any()


def test_importance_reaches_the_matrix_it_belongs_to(tiny, tmp_path, inline_builder):
    importance = {"blk.2.ffn_down.weight": np.r_[np.full(48, 100.0), np.full(48, 0.01)].astype(np.float32)}
    weights: list[dict[str, np.ndarray]] = []
    for name, given in (("a", None), ("b", importance)):
        write_onnx(tiny(), tmp_path / name, "int4", imatrix=given)
        graph = onnx.load(str(tmp_path / name / "model.onnx")).graph
        weights.append({t.name: to_array(t) for t in graph.initializer if t.name.endswith("_Q4")})
    changed = [name for name in weights[0] if not np.array_equal(weights[0][name], weights[1][name])]
    assert changed == ["model.layers.2.mlp.down_proj.MatMul.weight_Q4"]


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "llama with rope scaling 'yarn' is not supported"),
        ("llama", {"rope_parameters": LINEAR}, "llama with rope scaling 'linear'"),
        ("llama", {"head_dim": 24}, "a multiple of 16 dimensions per head; this model rotates 24"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attention that is soft-capped"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention that looks ahead"),
        ("llama", {"quantization_config": {"bits": 4}}, "already quantized"),
        ("llama", {"model_type": "mamba"}, "'mamba' is not supported; supported: gemma3_text, llama"),
    ],
)
def test_what_the_builder_would_do_wrongly_is_refused(tiny, family, change, message):
    with pytest.raises(UserError, match=message):
        check_onnx(load_config(tiny(family)).to_dict() | change)


def test_float16_is_refused_with_the_reason(tiny):
    with pytest.raises(UserError, match="no float16 attention; there are: int4, int8, fp32"):
        check_onnx(load_config(tiny()), "fp16")


def test_a_failure_leaves_nothing(tiny, tmp_path, inline_builder, monkeypatch):
    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("compress.export.onnx.save_graph", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_onnx(tiny(), tmp_path / "m", "int4")
    assert not list(tmp_path.iterdir())
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        write_onnx(tiny(), tmp_path / "m", "int4")


def test_the_builders_process_makes_the_same_bytes_and_names_broken_weights(tiny, tmp_path, inline_builder):
    shutil.copytree(tiny(), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model builder could not export.*incomplete metadata"):
        build_float32([(tiny(), tmp_path / "a"), (tmp_path / "cut", tmp_path / "b")], Progress())
    export_onnx.build_float32([(tiny(), tmp_path / "c")], Progress())  # in this process
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name


def test_the_builders_process_dies_with_its_parent(tiny, tmp_path):
    script = (
        "import subprocess, sys; from pathlib import Path; import compress.export.onnx as o\n"
        "start = subprocess.Popen\n"
        "def popen(*a, **k):\n"
        "    process = start(*a, **k); print(process.pid, flush=True); return process\n"
        "o.subprocess.Popen = popen\n"
        "o.write_onnx(Path(sys.argv[1]), Path(sys.argv[2]), 'fp32')\n"
    )
    command = [sys.executable, "-c", script, str(tiny()), str(tmp_path / "m")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    for _ in range(600):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the builder lives on")
    assert not (tmp_path / "m").exists() and not list(tmp_path.rglob("model.onnx"))
