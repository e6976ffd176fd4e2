"""GGUF files of every family, opened in real llama.cpp and compared with torch."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.core.gguf_header import read_header
from compress.export.gguf import context_length, safe_name, write_gguf
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.families import FAMILIES
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.modeling.weights import count_parameters
from compress.runtime.engine import ScoringWindow
from compress.runtime.llamacpp_engine import LlamaCppEngine

TOLERANCE = 0.01  # nats, of every log-probability: llama.cpp keeps keys and values in float16
IDS = [(37 * i) % 450 + 3 for i in range(64)]
POSITIONS = [1, 2, 9, 20, 40, 63]
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + i / 16 for i in range(8)],
    "long_factor": [2 + i / 5 for i in range(8)],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {"tied": False}),
    "multi-head with biases": ("llama", {"kv_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "one key-value head": ("llama", {"hidden": 96, "heads": 3, "kv_heads": 1}),
    "rows no multiple of 32": ("llama", {"hidden": 80, "heads": 5, "kv_heads": 1, "intermediate": 72}),
    "llama3 rope": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "max_positions": 512},
    ),
    "wide heads": ("mistral", {"head_dim": 32}),
    "mistral's window": ("mistral", {"sliding_window": 64}),
    "qwen2 untied, multi-head": ("qwen2", {"tied": False, "kv_heads": 4}),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 32, "tied": False}),
    "phi3 untied, partly rotated": (
        "phi3",
        {"tied": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    ),
    "longrope, long": (
        "phi3",
        {"rope_parameters": LONG, "max_positions": 256, "original_max_position_embeddings": 32},
    ),
    "gemma3 untied": ("gemma3_text", {"tied": False, "layer_types": MIXED, "sliding_window": 8}),
    "gemma3's scale and cap": (
        "gemma3_text",
        {"query_pre_attn_scalar": 40, "final_logit_softcapping": 5.0, "layer_types": MIXED, "sliding_window": 8},
    ),
    "gemma3, stretched": (
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
            "layer_types": MIXED,
            "sliding_window": 8,
        },
    ),
}


def torch_logprobs(checkpoint: Path, ids: list[int] = IDS) -> np.ndarray:
    with torch.no_grad():
        logits = load_model(checkpoint)(torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits, -1).numpy()


def largest_difference(file: Path, expected: np.ndarray) -> float:
    with LlamaCppEngine(file, threads=1, context=len(IDS), slots=1) as engine:
        found = engine.score([ScoringWindow(IDS, POSITIONS)])[0]
    assert all(score.complete for score in found)
    return max(float(np.abs(score.logprobs - expected[score.position - 1]).max()) for score in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_predicts_in_llama_cpp_what_torch_does(shaken, tmp_path, family):
    checkpoint = shaken(family)
    info = write_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    assert largest_difference(tmp_path / "m.gguf", torch_logprobs(checkpoint)) < TOLERANCE
    assert info.bytes == (tmp_path / "m.gguf").stat().st_size
    assert 16 <= info.bits_per_weight < 16.5  # F16, and norms in F32
    assert info.fallbacks == 0


@pytest.mark.parametrize("case", CASES)
def test_variants_predict_in_llama_cpp_what_torch_does(shaken, tmp_path, case):
    family, options = CASES[case]
    checkpoint = shaken(family, **options)
    write_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    assert largest_difference(tmp_path / "m.gguf", torch_logprobs(checkpoint)) < TOLERANCE


@pytest.mark.parametrize("dropped", [[1], [0, 2], [1, 3]])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_models(shaken, tmp_path, family, dropped):
    """Gemma-3 with mixed layer types: after blocks went, the pattern of windows no longer repeats."""
    options = {"layer_types": MIXED, "sliding_window": 8} if family == "gemma3_text" else {}
    original = shaken(family, **options)
    model = load_model(original)
    drop_blocks(model, dropped)
    save_checkpoint(model, load_tokenizer(original), tmp_path / "pruned")
    write_gguf(tmp_path / "pruned", tmp_path / "m.gguf", "F16")
    assert largest_difference(tmp_path / "m.gguf", torch_logprobs(tmp_path / "pruned")) < TOLERANCE
    architecture = FAMILIES[family].gguf.architecture
    assert read_header(tmp_path / "m.gguf")[f"{architecture}.block_count"] == 4 - len(dropped)


def test_metadata(tiny, tmp_path):
    write_gguf(tiny(tied=False), tmp_path / "m.gguf", "Q4_K_M", name="Tiny")
    fields = read_header(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "general.file_type": 15,  # LLAMA_FTYPE_MOSTLY_Q4_K_M
        "general.quantization_version": 2,
        "llama.block_count": 4,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["llama.rope.freq_base"] == pytest.approx(load_config(tiny()).rope_parameters["rope_theta"])
    tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert tensors["output.weight"] == "Q8_0" and tensors["token_embd.weight"] == "Q5_0"
    assert tensors["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(("mix", "limit"), [("Q8_0", 0.01), ("Q6_K", 0.01), ("Q4_K_M", 0.2), ("Q4_0", 0.5)])
def test_quantized_mixes_load_and_stay_near(tiny, tmp_path, mix, limit):
    """Rows of 64 and 256: K-quants for some tensors, their fallbacks for the others."""
    checkpoint = tiny(hidden=64, intermediate=256)
    info = write_gguf(checkpoint, tmp_path / "m.gguf", mix)
    expected = torch_logprobs(checkpoint)
    with LlamaCppEngine(tmp_path / "m.gguf", threads=1, context=64, slots=1) as engine:
        scores = engine.score([ScoringWindow(IDS, POSITIONS)])[0]
    kl = [np.sum(np.exp(expected[s.position - 1]) * (expected[s.position - 1] - s.logprobs)) for s in scores]
    assert np.mean(kl) < limit
    kinds = set(info.tensor_types.values())
    if mix in ("Q4_K_M", "Q6_K"):
        assert info.fallbacks > 0 and kinds >= {"F32", "Q8_0", "Q6_K"}
    else:
        assert kinds <= {"F32", "Q8_0", mix}
    weights = sum(t.n_elements for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert weights == count_parameters(checkpoint)


def test_files_are_the_same_to_the_byte(tiny, tmp_path):
    matrix = {f"blk.{i}.ffn_down.weight": np.linspace(0.1, 5, 96, dtype=np.float32) for i in range(4)}
    for name, threads in (("a", 1), ("b", 2)):
        write_gguf(tiny(), tmp_path / f"{name}.gguf", "Q4_0", imatrix=matrix, threads=threads, name="x")
    write_gguf(tiny(), tmp_path / "plain.gguf", "Q4_0", name="x")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "a.gguf").read_bytes() != (tmp_path / "plain.gguf").read_bytes()


def test_context_ends_where_windows_that_llama_cpp_lacks_begin(tiny):
    assert context_length(load_config(tiny("mistral", sliding_window=64))) == 64
    assert context_length(load_config(tiny("phi3", sliding_window=1000))) == 512
    assert context_length(load_config(tiny("gemma3_text", sliding_window=8))) == 512
    slides = tiny("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert context_length(load_config(slides)) == 8


def test_names_do_not_make_llama_cpp_take_a_model_for_phi3(tiny, tmp_path):
    assert safe_name("distilled-from-Phi-3-mini", tiny()) == "distilled-from-Phi 3-mini"
    shutil.copytree(tiny(), tmp_path / "c")
    tokenizer = json.loads((tmp_path / "c" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 5, "content": "</s>", "rstrip": True, "special": True})
    (tmp_path / "c" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert safe_name("mine", tmp_path / "c") == "mine (Phi-3)"


def test_a_kill_leaves_no_file(tiny, tmp_path):
    """The writing process is killed while it writes a tensor; written again, the file is as if nothing had been."""
    script = (
        "import sys, time, compress.export.gguf as g\n"
        "read = g.GgufSource.read\n"
        "def slow(self, name, depth=None):\n"
        "    if name == 'blk.2.ffn_up.weight': print('there', flush=True); time.sleep(60)\n"
        "    return read(self, name, depth)\n"
        "g.GgufSource.read = slow\n"
        "g.write_gguf(g.Path(sys.argv[1]), g.Path(sys.argv[2]), 'F16', name='x')\n"
    )
    command = [sys.executable, "-c", script, str(tiny()), str(tmp_path / "m.gguf")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        os.kill(process.pid, signal.SIGKILL)
    assert [file.name for file in tmp_path.iterdir()] == [".m.gguf.partial"]
    write_gguf(tiny(), tmp_path / "m.gguf", "F16", name="x")
    write_gguf(tiny(), tmp_path / "again.gguf", "F16", name="x")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.gguf", "m.gguf"]


def test_a_full_disk_is_a_clear_message_and_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(UserError, match=r"the disk is full: .*m\.gguf needs 3\d\d,\d{3} bytes"):
        write_gguf(tiny(), tmp_path / "m.gguf", "F16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_broken_safetensors_are_named(tiny, tmp_path, damage):
    shutil.copytree(tiny(), tmp_path / "c")
    weights = tmp_path / "c" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1000] if damage == "cut" else b"\xff" * 8 + data[8:])
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        write_gguf(tmp_path / "c", tmp_path / "m.gguf", "F16")
    assert not (tmp_path / "m.gguf").exists()


def test_unsupported_things_are_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="'Q5_K_X' is not one of F16, BF16, Q8_0"):
        write_gguf(tiny(), tmp_path / "m.gguf", "Q5_K_X")
    dynamic = tiny(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    with pytest.raises(UserError, match="rope scaling 'dynamic' is not one of llama"):
        write_gguf(dynamic, tmp_path / "m.gguf", "F16")
    missing = tmp_path / "missing"
    shutil.copytree(tiny(blocks=3), missing)
    config = json.loads((missing / "config.json").read_text()) | {"num_hidden_layers": 4}
    (missing / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks 9 weights, blk\.3\."):
        write_gguf(missing, tmp_path / "m.gguf", "F16")
