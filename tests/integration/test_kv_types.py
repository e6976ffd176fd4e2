"""Keys and values as q8_0 in llama.cpp, against torch with the same numbers rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compress import api
from compress.cli import main as cli
from compress.core.errors import UserError
from compress.core.stage import Context
from compress.export.config import ExportConfig
from compress.export.gguf import write_gguf
from compress.export.stage import export_checkpoint
from compress.kv.settings import KvBudget
from compress.modeling.load import load_model
from compress.runtime.bundle import read_bundle
from compress.runtime.engine import ScoringWindow
from compress.runtime.llamacpp_engine import LlamaCppEngine
from compress.runtime.session import Session, choose_engine
from transformers.models.llama import modeling_llama

IDS = [(37 * i + i * i // 7) % 251 + 5 for i in range(48)]


@pytest.fixture(scope="module")
def checkpoint(shaken) -> Path:
    """Two blocks with one KV head of 32."""
    return shaken(blocks=2, heads=2, kv_heads=1, initializer_range=0.3)


@pytest.fixture(scope="module")
def heads_of_32(checkpoint, tmp_path_factory) -> Path:
    """A bundle of that model, F16."""
    out = tmp_path_factory.mktemp("kv") / "bundle"
    export_checkpoint(checkpoint, out, ExportConfig(gguf=["F16"]), Context(), "tiny")
    return out


def file_of(bundle: Path) -> Path:
    return bundle / read_bundle(bundle).artifacts[0].path


def rounded(values: torch.Tensor) -> torch.Tensor:
    """As q8_0 has them: along the last dimension, in blocks of 32."""
    packed = gguf.quantize(np.ascontiguousarray(values.numpy()), gguf.GGMLQuantizationType.Q8_0)
    return torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0).copy()).view_as(values)


@torch.no_grad()
def logs(checkpoint: Path) -> np.ndarray:
    logits = load_model(checkpoint)(torch.tensor([IDS])).logits[0, :-1]
    return logits.double().log_softmax(-1).numpy()


def engine_logs(file: Path, kv_type: str) -> np.ndarray:
    with LlamaCppEngine(file, threads=1, context=64, slots=1, kv_type=kv_type) as engine:
        (scores,) = engine.score([ScoringWindow(IDS, range(1, len(IDS)))])
    return np.stack([score.logprobs for score in scores]).astype(np.float64)


def test_the_cache_is_rounded_as_torch_would_round_it(checkpoint, heads_of_32, monkeypatch):
    whole, turn = logs(checkpoint), modeling_llama.apply_rotary_pos_emb

    def turned(*given: Any, **how: Any) -> tuple[torch.Tensor, ...]:
        return tuple(rounded(part) for part in turn(*given, **how))  # queries too: llama.cpp multiplies integers

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned)
    attention = modeling_llama.LlamaAttention.forward

    def attend(self: Any, *given: Any, **how: Any) -> Any:
        hook = self.v_proj.register_forward_hook(lambda _module, _inputs, output: rounded(output))
        try:
            return attention(self, *given, **how)
        finally:
            hook.remove()

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", attend)
    expected, found = logs(checkpoint), engine_logs(file_of(heads_of_32), "q8_0")

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(np.square(a - b).mean()))

    assert apart(engine_logs(file_of(heads_of_32), "f16"), whole) < 0.2 * apart(expected, whole)
    assert apart(found, expected) < 0.7 * min(apart(found, whole), apart(expected, whole))


def test_a_session_writes_with_it(heads_of_32):
    with (
        Session(heads_of_32, kv_type="q8_0", threads=1) as session,
        LlamaCppEngine(file_of(heads_of_32), threads=1, kv_type="q8_0") as engine,
        LlamaCppEngine(file_of(heads_of_32), threads=1) as plain,
    ):
        from compress.runtime.generator import Request, RequestWork

        texts = [list(session.tokens(Request(IDS[start:], 12, 2), RequestWork())) for start in range(8)]
        assert texts == [list(engine.generate(IDS[start:], 12)) for start in range(8)]
        assert texts != [list(plain.generate(IDS[start:], 12)) for start in range(8)]


def test_bench_measures_it_and_says_what_a_token_takes(heads_of_32):
    found = api.bench(heads_of_32, kv_type="q8_0", prompt_tokens=8, new_tokens=4, repeat=1)
    (depth,) = found.depths
    assert found.kv_type == "q8_0" and depth.engine == "llama.cpp"
    assert depth.kv_bytes_per_token == 2 * 2 * 34  # keys and values of two blocks, a block of q8_0 each


def test_which_engine():
    budget = KvBudget(1024)
    assert [choose_engine(None, kv, kind) for kv in (None, budget) for kind in (None, "q8_0")] == [
        None,
        "llama.cpp",
        "onnx",
        "llama.cpp",
    ]
    assert choose_engine("onnx", budget, None) == "onnx"
    with pytest.raises(UserError, match=r"--kv-type is for llama\.cpp; an ONNX artifact's keys and values are as"):
        choose_engine("onnx", None, "q8_0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-type", "q8"], "--kv-type q8: llama.cpp holds keys and values as f16 or q8_0; did you mean 'q8_0'?"),
        (["--kv-type", "q8_0", "--engine", "onnx"], "--kv-type is for llama.cpp"),
    ],
)
def test_what_cannot_be_is_one_line(heads_of_32, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", str(heads_of_32), "--prompt", "a", "--max-tokens", "2", *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_heads_that_are_no_blocks_are_refused(shaken, tmp_path):
    write_gguf(shaken(blocks=2), tmp_path / "a.gguf", "F16")
    with pytest.raises(UserError, match=r"--kv-type q8_0: its blocks are of 32 numbers, and the heads of .* have 16"):
        LlamaCppEngine(tmp_path / "a.gguf", kv_type="q8_0")
