"""The runtime engines against torch and against each other, and the arithmetic they share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.export.gguf import write_gguf
from compress.export.onnx import write_onnx
from compress.modeling.load import load_model, load_tokenizer
from compress.runtime import llamacpp_server as llamacpp
from compress.runtime.engine import (
    Distribution,
    ScoringWindow,
    distributions,
    divergence,
    log_softmax,
    perplexity,
    pick,
)
from compress.runtime.measure import measure
from compress.runtime.open import open_engine

# Runtime -> how far its log-probabilities may be from torch's: llama.cpp holds weights, keys and values in float16.
TOLERANCE = {"llama.cpp": 0.01, "onnxruntime": 1e-4, "onnxruntime-genai": 1e-4}
IDS = [(37 * i) % 450 + 3 for i in range(48)]
VOCABULARY = 451
CONTEXT = 96


class Artifacts(NamedTuple):
    checkpoint: Path
    gguf: Path
    onnx: Path

    def open(self, runtime: str):
        path = self.gguf if runtime == "llama.cpp" else self.onnx
        return open_engine(path, threads=1, context=CONTEXT, runtime=runtime)


@pytest.fixture(scope="module")
def artifacts(shaken, tmp_path_factory):
    """One tiny model in both formats, F16 and fp32; the ONNX one by the real builder process."""
    checkpoint, folder = shaken(), tmp_path_factory.mktemp("artifacts")
    write_gguf(checkpoint, folder / "m.gguf", "F16")
    write_onnx(checkpoint, folder / "onnx", "fp32")
    return Artifacts(checkpoint, folder / "m.gguf", folder / "onnx")


def test_weights_that_are_no_numbers_are_told(artifacts, tmp_path):
    file = tmp_path / "nan.gguf"
    shutil.copy(artifacts.gguf, file)
    reader = gguf.GGUFReader(file, "r+")
    (norm,) = (tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    norm.data[:] = np.nan
    reader.data.flush()
    with (
        open_engine(file, threads=1, context=CONTEXT) as engine,
        pytest.raises(UserError, match=r"nan\.gguf predicts NaN"),
    ):
        engine.score([ScoringWindow.of(IDS[:8])], 16)
    with pytest.raises(UserError, match="are NaN"):
        distributions(np.full((1, VOCABULARY), np.nan), IDS, [1])


@pytest.fixture(scope="module")
def expected(artifacts) -> np.ndarray:
    """(T, V): torch's log-probabilities of the next token."""
    with torch.no_grad():
        logits = load_model(artifacts.checkpoint)(torch.tensor([IDS])).logits[0]
    return torch.log_softmax(logits, -1).numpy()


@pytest.fixture(params=TOLERANCE)
def engine(request, artifacts):
    with artifacts.open(request.param) as opened:
        yield opened


def test_whole_vocabularies_are_torchs(engine, expected):
    windows = [ScoringWindow(IDS, [1, 2, 20, 47]), ScoringWindow(IDS[:10], []), ScoringWindow.of(IDS[:5], first=3)]
    done: list[int] = []
    scores = engine.score(windows, done=done.append)
    assert [[s.position for s in window] for window in scores] == [[1, 2, 20, 47], [], [3, 4]]
    assert sum(done) == 6
    for score in scores[0] + scores[2]:
        assert score.complete and np.array_equal(score.token_ids, np.arange(VOCABULARY))
        assert np.exp(score.logprobs.astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)
        row = expected[score.position - 1]
        assert np.abs(score.logprobs - row).max() < TOLERANCE[engine.runtime]
        assert score.target == IDS[score.position]
        assert score.target_logprob == pytest.approx(score.logprobs[score.target], abs=1e-4)
        assert score.top == row.argmax()


def test_top_k_is_the_head_of_the_whole(engine):
    positions = [3, 17, 40]
    whole = engine.next_token_logprobs(IDS, positions)
    for part, full in zip(engine.next_token_logprobs(IDS, positions, top_k=20), whole, strict=True):
        assert not part.complete and len(part.token_ids) == 20
        order = np.lexsort((full.token_ids, -full.logprobs))[:20]
        np.testing.assert_allclose(part.logprobs, full.logprobs[order], atol=2e-4)
        assert set(part.token_ids[:18]) <= set(order) and part.top == full.top
        assert part.target_logprob == pytest.approx(full.target_logprob, abs=1e-3)


def test_targets_that_are_pieces_of_characters(artifacts, expected):
    """llama.cpp's server reports no probabilities when it draws such a token; the engine finds them all the same."""
    tokenizer = load_tokenizer(artifacts.checkpoint)
    pieces = [i for i in range(VOCABULARY) if tokenizer.decode([i]) == "\ufffd"]
    assert len(pieces) > 100
    with artifacts.open("llama.cpp") as engine:
        for target in pieces[:12]:
            ids = [*IDS[:9], target]
            (whole,) = engine.next_token_logprobs(ids, [9])
            (few,) = engine.next_token_logprobs(ids, [9], top_k=3)  # the target is not among them
            assert target not in few.token_ids
            assert whole.target_logprob == pytest.approx(expected[8, target], abs=0.01)
            assert few.target_logprob == pytest.approx(expected[8, target], abs=0.01)


@pytest.mark.parametrize("length", [1, 9, 30])
def test_greedy_generation_is_torchs(engine, artifacts, length):
    with torch.no_grad():
        ids = torch.tensor([IDS[:length]])
        model: Any = load_model(artifacts.checkpoint)
        whole = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=-1)
    assert list(engine.generate(IDS[:length], 24)) == whole[0, length:].tolist()


def test_stop_tokens_end_and_are_not_yielded(engine):
    made = list(engine.generate(IDS[:9], 12))
    stop = made[5]
    assert list(engine.generate(IDS[:9], 12, stop=[stop])) == made[: made.index(stop)]
    assert list(engine.generate(IDS[:9], 0)) == []


def test_sampling_follows_its_seed_and_top_p(engine):
    def sample(seed: int, top_p: float = 1.0) -> list[int]:
        return list(engine.generate(IDS[:9], 10, temperature=1.5, seed=seed, top_p=top_p))

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) == 4
    assert sample(1, top_p=1e-6) == list(engine.generate(IDS[:9], 10))


def test_generation_ends_with_the_context(artifacts):
    with artifacts.open("llama.cpp") as engine:
        assert engine.context == CONTEXT
        assert len(list(engine.generate(IDS, 1000))) == CONTEXT - len(IDS) + 1
        with pytest.raises(UserError, match="a text of 100 tokens is longer than the model's context of 96"):
            engine.score([ScoringWindow.of([3] * 100)])


def test_texts_past_the_context_are_refused(engine):
    with pytest.raises(UserError, match=r"a text of 600 tokens is longer than the model's context"):
        engine.score([ScoringWindow.of([3] * 600)])
    for positions in ([0], [48], [5, 5], [9, 3]):
        with pytest.raises(ValueError, match="positions must ascend from 1 to 47"):
            engine.score([ScoringWindow(IDS, positions)])


def test_engines_close_at_once_and_twice(artifacts):
    """llama.cpp's server used to wait forever when it was closed before its loop had begun."""
    for runtime in TOLERANCE:
        engine = artifacts.open(runtime)
        engine.close()
        engine.close()


def test_llama_cpp_tokenizes_without_adding_anything(artifacts):
    text = "<|im_start|>user\nwhat would you say 123<|im_end|>"
    with artifacts.open("llama.cpp") as engine:
        assert (
            engine.tokenize(text) == load_tokenizer(artifacts.checkpoint)(text, add_special_tokens=False)["input_ids"]
        )


def test_broken_artifacts_are_named(artifacts, tmp_path):
    data = artifacts.gguf.read_bytes()
    cases = {
        "other": (b"something else", "is not a GGUF file"),
        "header": (data[:500], "header is damaged or cut off"),
        "old": (data[:4] + b"\x01" + data[5:], "GGUF version 1"),
        "cut": (data[:-5000], "llama.cpp cannot load .*tensor .* not within the file bounds"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_engine(tmp_path / f"{name}.gguf")
    with pytest.raises(UserError, match="does not exist"):
        open_engine(tmp_path / "nowhere.gguf")
    with pytest.raises(UserError, match="does not exist"):
        open_engine(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot be opened in onnxruntime: give a \.gguf file or an ONNX folder"):
        open_engine(artifacts.gguf, runtime="onnxruntime")


def test_a_late_reason_is_waited_for(tmp_path, monkeypatch):
    """llama.cpp's log has a thread of its own, which on a busy machine writes after loading has failed."""
    log = (tmp_path / "log").open("w+b")

    def write() -> None:
        for part in (b"tensors\nE load: error ", b"loading model: cut off\n", b"exiting\n"):
            time.sleep(0.15)
            os.write(log.fileno(), part)

    writer = threading.Thread(target=write)
    writer.start()
    assert "error loading model: cut off\n" in llamacpp._settled(log.fileno(), "error loading model: ")
    writer.join()
    monkeypatch.setattr(llamacpp, "LOG_SECONDS", 0.2)
    assert (
        llamacpp._settled(log.fileno(), "something else") == "tensors\nE load: error loading model: cut off\nexiting\n"
    )


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_broken_onnx_folders_are_named(artifacts, tmp_path, runtime):
    with pytest.raises(UserError, match=r"has no genai_config\.json"):
        open_engine(tmp_path, runtime=runtime)
    folder = tmp_path / "onnx"
    shutil.copytree(artifacts.onnx, folder)
    model = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(model[:2000])
    with pytest.raises(UserError, match="cannot load"):
        open_engine(folder, runtime=runtime)
    (folder / "model.onnx").write_bytes(model)
    weights = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot load"):
        open_engine(folder, runtime=runtime)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(UserError, match=r"lacks model\.onnx\.data"):
        open_engine(folder, runtime=runtime)
    (folder / "genai_config.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(UserError, match="is not a valid genai_config"):
        open_engine(folder, runtime=runtime)


def test_the_runtime_needs_no_torch(artifacts):
    script = (
        "import sys; from pathlib import Path; from compress.runtime.engine import ScoringWindow\n"
        "from compress.core import gguf_header\n"
        "from compress.runtime import engine, measure, open\n"
        "for path, runtime in zip(sys.argv[1:], (None, None, 'onnxruntime-genai')):\n"
        "    with open.open_engine(Path(path), 1, 64, runtime) as engine: engine.score([ScoringWindow.of([3, 4, 5])])\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))\n"
    )
    paths = [str(artifacts.gguf), str(artifacts.onnx), str(artifacts.onnx)]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""  # the runtimes write nothing to the terminal


def test_measuring(artifacts, tmp_path):
    for path, runtime in ((artifacts.gguf, None), (artifacts.onnx, None)):
        found = measure(path, prompt_tokens=16, new_tokens=4, threads=1, runtime=runtime)
        assert found.speed.prefill_tokens_per_second > 0 and found.speed.decode_tokens_per_second > 0
        assert 20e6 < found.peak_memory_bytes < 2e9
        assert found.load_seconds > 0
    with pytest.raises(UserError, match="does not exist"):
        measure(tmp_path / "nowhere.gguf")


def random_distribution(seed: int, top_k: int | None = None, scale: float = 2.0) -> Distribution:
    logits = np.random.default_rng(seed).normal(0, scale, (1, 500))
    return distributions(logits, [0, 7], [1], top_k)[0]


def test_divergence_of_whole_and_listed_distributions():
    reference = random_distribution(0)
    p, q = (torch.from_numpy(random_distribution(seed).logprobs).double() for seed in (0, 1))
    whole = divergence(reference, random_distribution(1))
    assert whole == pytest.approx(float(torch.sum(p.exp() * (p - q))), rel=1e-5)
    parts = [divergence(reference, random_distribution(1, k)) for k in (1, 16, 64, 256, 499)]
    assert all(a <= b + 1e-4 for a, b in zip(parts, [*parts[1:], whole], strict=True))  # lower bounds, ever closer
    assert parts[-1] == pytest.approx(whole, rel=0.01)
    assert divergence(reference, random_distribution(0, 64)) == pytest.approx(0, abs=1e-6)
    certain = Distribution(1, 7, -1e4, np.array([3, 4]), np.log(np.array([0.5, 0.5], np.float32)), False)
    assert divergence(reference, certain) > 10  # nearly all that the reference expects is impossible here
    with pytest.raises(ValueError, match="whole vocabulary"):
        divergence(random_distribution(0, 5), reference)


def test_shared_arithmetic():
    logits = np.array([[1000.0, 998.0, -1000.0]], np.float32)
    np.testing.assert_allclose(log_softmax(logits), torch.log_softmax(torch.from_numpy(logits), -1), atol=1e-6)
    scores = distributions(np.log([[0.5, 0.5], [0.125, 0.875]]), [0, 1, 0], [1, 2])
    assert perplexity(scores) == pytest.approx(4.0, rel=1e-6)  # √(2 · 8)
    random, odds = np.random.default_rng(0), np.log([0.5, 0.3, 0.15, 0.05])
    drawn = np.bincount([pick(odds, 1.0, 1.0, random) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.025)
    drawn = np.bincount([pick(odds, 1.0, 0.75, random) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, [0.625, 0.375, 0, 0], atol=0.025)
    assert pick(odds, 0.0, 1.0, random) == 0
    many = np.random.default_rng(1).normal(0, 1.5, 5000)  # a vocabulary that is not sorted whole
    chances = np.exp(many) / np.exp(many).sum()
    order = np.argsort(-chances)
    for top_p in (0.05, 0.5, 0.95):
        kept = set(order[: int(np.searchsorted(np.cumsum(chances[order]), top_p)) + 1].tolist())
        drawn = [pick(many, 1.0, top_p, random) for _ in range(2000)]
        assert set(drawn) <= kept and len(set(drawn)) > 0.4 * min(len(kept), 1000)
        assert np.mean([t == order[0] for t in drawn]) == pytest.approx(chances[order[0]] / top_p, abs=0.1)
