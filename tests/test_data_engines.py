"""Engines: the same interface, and the same answers where nothing is left to chance."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.data.config import DatasetConfig, LlamaCppEngine, TransformersEngine, VllmEngine
from compress.data.engines import check_engine, open_engine, settle
from compress.data.sampling import LOOP, Sampled, Sampling, choose
from compress.data.stage import check, run
from compress.errors import UserError
from compress.export.gguf import write_gguf
from compress.modeling.load import load_model
from compress.stage import Context, Inputs

PROMPTS = [[1, 40, 41, 42, 43], [1, 40, 41], [1, 40, 41, 99, 98, 97, 96, 95], [1, 77]]


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path]) -> Path:
    return tiny(hidden=64, max_positions=1024)


@pytest.fixture(scope="module")
def gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "base.gguf"
    write_gguf(base, file, "F16")
    return file


def test_settle_cuts_where_sampling_would_have_stopped() -> None:
    assert settle([5, 6, 2, 7], {2}, 9) == Sampled([5, 6], ended=True)
    assert settle([5, 6, 7], {2}, 2) == Sampled([5, 6])
    assert settle([], {2}, 5) == Sampled([])
    assert settle([5] * (LOOP + 9) + [2], {2}, 99) == Sampled([5] * LOOP, looped=True)


def test_the_transformers_engine_is_the_sampler(base: Path) -> None:
    from compress.data.sampling import sample

    engine = open_engine(TransformersEngine(), base, Context(), 64, 4)
    how = Sampling(12, temperature=0.8, top_p=0.9)
    found = engine.sample(PROMPTS, [1, 2, 3, 4], how, stop={2}, banned=[0, 1])
    assert found == sample(load_model(base), PROMPTS, [1, 2, 3, 4], how, stop={2}, banned=[0, 1])
    engine.close()


def test_llamacpp_takes_the_likeliest_tokens_as_torch_does(base: Path, gguf: Path) -> None:
    how = Sampling(12, temperature=0)
    engine = open_engine(LlamaCppEngine(gguf=str(gguf), threads=1), base, Context(), 64, 2)
    try:
        found = engine.sample(PROMPTS, [1, 2, 3, 4], how, stop={2}, banned=[0, 1])
        longer = engine.sample(PROMPTS, [1, 2, 3, 4], how, stop=set(), banned=[0, 1, 2])
    finally:
        engine.close()
    torch_engine = open_engine(TransformersEngine(), base, Context(), 64, 2)
    assert found == torch_engine.sample(PROMPTS, [1, 2, 3, 4], how, stop={2}, banned=[0, 1])
    assert found == [Sampled([], ended=True)] * 4  # the random model's likeliest token ends its turn
    assert longer == torch_engine.sample(PROMPTS, [1, 2, 3, 4], how, stop=set(), banned=[0, 1, 2])
    assert [len(row.tokens) for row in longer] == [12] * 4 and len({tuple(row.tokens) for row in longer}) > 2


def test_llamacpp_draws_from_the_same_distribution(base: Path, gguf: Path) -> None:
    how = Sampling(1, temperature=0.7, top_p=0.6)
    with torch.inference_mode():
        logits = load_model(base)(torch.tensor([PROMPTS[0]])).logits[:, -1]
    points = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    expected = torch.bincount(choose(logits.expand(20000, -1), points, how), minlength=logits.shape[1]) / 20000
    engine = open_engine(LlamaCppEngine(gguf=str(gguf), threads=1), base, Context(), 32, 4)
    try:
        drawn = engine.sample([PROMPTS[0]] * 400, range(400), how, stop=set())
        same = engine.sample([PROMPTS[0]] * 50, range(50), how, stop=set())
    finally:
        engine.close()
    found = torch.bincount(torch.tensor([row.tokens[0] for row in drawn]), minlength=logits.shape[1]) / 400
    assert set(found.nonzero()[:, 0].tolist()) <= set(expected.nonzero()[:, 0].tolist())  # nothing beyond the nucleus
    assert (found - expected).abs().sum() / 2 < 0.15 and int((expected > 0).sum()) > 3
    # By their seeds, but for rounding, which depends on what else is computed at that moment.
    assert sum(a == b for a, b in zip(same, drawn, strict=False)) >= 40
    assert sum(a == b for a, b in zip(same, drawn[1:], strict=False)) < 25


def test_a_row_is_rewritten_by_llamacpp(base: Path, gguf: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"Name {i}", "response": "so it is"}) + "\n" for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    config = DatasetConfig.model_validate(
        {
            "source": "dataset",
            "path": "a.jsonl",
            "rewrite": {"kind": "general", "max_tokens": 16},
            "engine": {"kind": "llama.cpp", "gguf": str(gguf), "threads": 1},
        }
    )
    context = Context(3, recipe_dir=tmp_path)
    check(config, base, context)
    metrics = run(config, Inputs(base, base), tmp_path, context)
    assert metrics["rewritten"]["asked"] == 4 and set(config.input_files()) == {"a.jsonl", str(gguf)}


def test_another_models_file_and_broken_files_are_refused(
    base: Path, gguf: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"is not the recipe's model: it has 4 blocks of width 64 .* has 2 of width 64"):
        open_engine(LlamaCppEngine(gguf=str(gguf)), tiny(blocks=2), Context(), 32, 1)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[: gguf.stat().st_size // 2])
    with pytest.raises(UserError, match=r"broken\.gguf"):
        open_engine(LlamaCppEngine(gguf=str(broken)), base, Context(), 32, 1)
    with pytest.raises(UserError, match=r"data\.engine\.gguf: there is no file .*nowhere\.gguf; compress export"):
        check_engine(LlamaCppEngine(gguf="nowhere.gguf"), Context(recipe_dir=tmp_path))


def test_vllm_that_is_not_there(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vllm is not installed here \(pip install vllm\)"):
        check_engine(VllmEngine(), Context(device="cuda"))
    with pytest.raises(UserError, match="vllm cannot be imported"):
        open_engine(VllmEngine(), base, Context(), 32, 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"vllm needs a GPU and the run is on cpu; add --device cuda"):
        check_engine(VllmEngine(), Context())


def test_vllm_is_asked_for_what_sampling_says(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """Against a stand-in for the package: which arguments it gets, and what is made of its answers."""
    given: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any):
            given["model"] = options

        def generate(self, prompts: list[Any], parameters: list[Any], use_tqdm: bool) -> list[Any]:
            given["prompts"], given["parameters"] = prompts, parameters
            answers = [([5, 6, 2], "stop"), ([5, 6], "stop"), ([5] * 50, "length"), ([7, 8], "length")]
            outputs = [types.SimpleNamespace(token_ids=tokens, finish_reason=why) for tokens, why in answers]
            return [types.SimpleNamespace(outputs=[output]) for output in outputs]

    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = open_engine(VllmEngine(memory=0.5), base, Context(9, "cuda", "bfloat16"), 96, 4)
    found = engine.sample(PROMPTS, [11, 12, 13, 14], Sampling(50, 0.6, 0.95), stop={2}, banned=[0, 1])
    assert found == [
        Sampled([5, 6], ended=True),
        Sampled([5, 6], ended=True),
        Sampled([5] * LOOP, looped=True),
        Sampled([7, 8]),
    ]
    assert given["model"]["model"] == str(base) and given["model"]["max_model_len"] == 96
    assert given["model"]["gpu_memory_utilization"] == 0.5 and given["model"]["dtype"] == "bfloat16"
    assert [prompt["prompt_token_ids"] for prompt in given["prompts"]] == PROMPTS
    assert [options["seed"] for options in given["parameters"]] == [11, 12, 13, 14]
    assert given["parameters"][0] | {"seed": 0} == {
        "max_tokens": 50,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": -1,
        "seed": 0,
        "stop_token_ids": [2],
        "logit_bias": {0: -100.0, 1: -100.0},
        "detokenize": False,
    }
    engine.close()
