"""The flagship recipes are what docs/explanation/pruning.md advises and fit a night of their machines, by plan; what
that plan counts is what the code does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.cli import main as cli
from compress.core.cost import PlannedFile, Setting
from compress.core.stage import Context, Inputs
from compress.core.work import Work
from compress.data.config import DatasetsConfig, VllmSettings
from compress.data.cost import vllm_rows
from compress.evaluation.config import BUILTIN, EvaluateConfig
from compress.export.config import ExportConfig
from compress.modeling.random import random_checkpoint
from compress.pipeline.plan import Plan, StagePlan, make_plan, read_geometry, settings
from compress.pipeline.plan.devices import DEVICES, GIB
from compress.pipeline.recipe import Recipe
from compress.pipeline.stages import STAGES
from compress.prune.config import PruneConfig
from compress.prune.cost import greedy_runs
from compress.prune.heals.refit import RefitHeal
from compress.prune.least_squares import Sums
from compress.prune.searches.greedy import Greedy
from compress.prune.stage import run
from compress.runtime.cost import SLOTS, artifact_bytes
from torch.utils.flop_counter import FlopCounterMode

FLAGSHIPS = ("llama8b_26L", "llama70b_64L")
NIGHT = 10 * 3600.0


def planned(name: str, device: str, *overrides: str, cards: int = 1) -> Plan:
    return make_plan(Recipe.load(name, list(overrides)), "bfloat16", Path("nowhere"), DEVICES[device], None, 1, cards)


def stages(plan: Plan) -> dict[str, StagePlan]:
    return {stage.name: stage for stage in plan.stages}


@pytest.mark.parametrize("name", FLAGSHIPS)
def test_flagships_do_what_our_findings_advise(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.prune is not None and recipe.evaluate is not None
    assert isinstance(recipe.prune.heal, RefitHeal)
    assert isinstance(recipe.prune.search, Greedy) and recipe.prune.search.copying > 0
    assert recipe.prune.position == "all" and recipe.prune.scores_healed  # unhealed, the search loses copying
    assert set(BUILTIN) <= set(recipe.evaluate.tasks)
    assert not recipe.evaluate.harness_tasks  # the extra is not everybody's
    data: Any = recipe.data
    assert isinstance(data.engine, VllmSettings) and all(part.rewrite is not None for part in data.parts)


def test_the_8b_recipe_is_a_night_on_one_24_gb_card() -> None:
    plan = planned("llama8b_26L", "rtx-4090")
    assert all(stage.fits and stage.need.needed <= 24 * GIB for stage in plan.stages)
    assert plan.seconds is not None and plan.seconds <= NIGHT
    found = stages(plan)
    assert all(stage.seconds for stage in plan.stages)  # none is left out
    assert found["evaluate"].need.scratch <= 20e9 and found["export"].need.scratch <= 27e9
    assert all(stage.need.host <= 32 * GIB for stage in plan.stages)
    without = planned("llama8b_26L", "rtx-4090", "data.engine=transformers", "data.batch=24")
    assert without.seconds is not None and plan.seconds < without.seconds <= NIGHT
    assert all(stage.fits for stage in without.stages)  # the way out that the recipe names


def test_the_70b_recipe_is_a_night_on_eight_80_gb_cards_and_their_processors() -> None:
    plan = planned("llama70b_64L", "h100-80g", cards=8)
    found = stages(plan)
    assert {name for name, stage in found.items() if stage.fits} == {"data", "distill"}
    for stage in plan.stages:
        assert stage.fits or (stage.beside is not None and stage.beside.memory <= 700e9)
    assert plan.seconds is not None and plan.seconds <= NIGHT
    assert found["evaluate"].need.scratch <= 70e9  # rivals: the unpruned model, quantized
    alone = stages(planned("llama70b_64L", "h100-80g"))
    seconds = found["distill"].seconds
    assert seconds and alone["distill"].seconds == pytest.approx(8 * seconds)
    assert alone["data"].seconds == found["data"].seconds  # vLLM has its four cards either way
    one = stages(planned("llama70b_64L", "h100-80g", "data.engine.gpus=1"))["data"]
    assert not one.fits  # 141 GB of weights


def test_the_plan_says_the_hours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["compress", "plan", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        return " ".join(capsys.readouterr().out.split())

    out = said("llama8b_26L", "--on", "rtx-4090")
    assert "every stage fits in 25.77 GB" in out and "total time on rtx-4090: 7 h" in out
    assert "host memory: prune 22.55 GB" in out and "13.80 GB" in out
    out = said("llama70b_64L", "--on", "h100-80g", "--cards", "8")
    assert "8 cards sharing data, distill and sort" in out
    assert "on the host CPU (--device cpu) it takes" in out
    out = said("tiny_random", "--on", "cpu-2core", "--set", "prune.search=beam")
    assert "total time on cpu-2core: unknown; the recipe does not determine it for prune" in out


# From docs/research/log.md, 2026-11-29, on two cores; `evaluate` is planned with answers as long as they may be.
@pytest.mark.parametrize(
    ("stage", "seconds", "least", "most"),
    [("data", 51, 0.85, 1.15), ("prune", 250, 0.85, 1.15), ("distill", 61, 0.85, 1.15), ("evaluate", 88, 0.85, 1.5)],
)
def test_the_default_recipes_times_are_near_what_was_measured(
    stage: str, seconds: int, least: float, most: float
) -> None:
    # As it was measured: conversations alone, 1,024 tokens per step, two GGUF types, no rivals.
    learned = ["data.rows=92", "data.prose=null", "data.length=512", "distill.accumulate=2"]
    recipe = Recipe.load("smollm2_135m_24L", [*learned, "export.gguf=[Q4_K_M, Q8_0]", "evaluate.rival=false"])
    plan = make_plan(recipe, "float32", Path("nowhere"), DEVICES["cpu-2core"])
    found = stages(plan)[stage].seconds
    assert found is not None and least <= found / seconds <= most


@pytest.mark.parametrize(("heal", "count"), [("none", 3), ("refit", 2)])
def test_a_greedy_search_runs_the_blocks_that_the_plan_counts(
    tiny: Callable[..., Path], tmp_path: Path, heal: str, count: int
) -> None:
    folder = tiny(blocks=8)
    (tmp_path / "text.txt").write_text("The tide comes in twice a day, and goes out again. " * 300)
    search = {"kind": "greedy", "copying": 0.5, "healed": False}
    calibration = {"tokens": 1024, "length": 64, "text": "text.txt", "scoring": 256, "held_out": 256}
    config = PruneConfig.model_validate({"blocks": count, "search": search, "heal": heal, "calibration": calibration})
    (tmp_path / "out").mkdir()
    run(config, Inputs(folder, folder), tmp_path / "out", Context(recipe_dir=tmp_path))
    passes = json.loads((tmp_path / "out" / "importance.json").read_text())["trials"]["passes"]
    runs, _ = greedy_runs(8, 7 if heal == "none" else 6, count)
    assert 0.75 <= passes / (runs / 8) <= 1.1  # less where cuts are given up early


def test_cuts_scored_as_healed_cost_statistics_in_the_machines_own_memory() -> None:
    shape = make_shape("llama8b_26L")
    at = Setting(shape, 26, "bfloat16", True, room=24 * GIB)
    healed, unhealed, window = (
        Recipe.load("llama8b_26L", overrides).section("prune")
        for overrides in ([], ["prune.search.healed=false"], ["prune.search=window"])
    )
    cost = STAGES["prune"].cost
    statistics = 7 * 32 * 4096**2 * 4
    held, less_held = (cost.need(config, at) for config in (healed, unhealed))
    assert held.needed < 24 * GIB and held.host > statistics > less_held.host
    there = replace(at, cuda=False)
    beside, less_beside = (cost.need(config, there) for config in (healed, unhealed))
    assert beside.needed > less_beside.needed and beside.parts["other"] > statistics and beside.host == 0
    more, less, least = (cost.work(config, at) for config in (healed, unhealed, window))
    assert more and less and least and more.double > 1.5 * less.double and least.flops < less.flops / 3


def make_shape(name: str) -> Any:
    return read_geometry(Recipe.load(name), Path("nowhere"))


def test_sums_of_a_refit_are_torchs_operations() -> None:
    tokens, features, hidden = 40, 24, 8
    sums = Sums.empty(features, hidden, torch.device("cpu"), diagonal=False)
    x, r, z = torch.randn(tokens, features), torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    # The counter knows the product, but not in place.
    known: Any = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        sums.add(x, r, z)
    assert counter.get_total_flops() == 2 * tokens * features * (features + 2 * hidden)


def test_llamacpp_costs_a_decoded_token_per_measured_position() -> None:
    """On the processors beside the card; so do the types of an export's check."""
    shape = make_shape("llama8b_26L")
    weights = artifact_bytes("Q4_K_M", shape.parameters(26))
    at = Setting(shape, 26, "bfloat16", True, room=24 * GIB, artifacts=(PlannedFile("gguf", "Q4_K_M", 26),))
    evaluate_work: Any = STAGES["evaluate"].cost.work
    values: dict[str, Any] = {"window": 512, "tokens": 4096, "speed": None, "rival": False}
    found = evaluate_work(EvaluateConfig.model_validate(values), at)
    assert found.host_read == pytest.approx(4096 / SLOTS * weights) and found.flops == 0
    twice = evaluate_work(EvaluateConfig.model_validate(values | {"tokens": 8192}), at)
    assert twice.host_read == 2 * found.host_read and twice.host_flops == 2 * found.host_flops
    tasks = values | {"tasks": ["builtin:copy"], "limit": 10, "max_tokens": 20}
    asked = evaluate_work(EvaluateConfig.model_validate(tasks), at)
    assert asked.host_read - found.host_read == pytest.approx(10 * 20 * weights, rel=0.01)  # and its cache
    assert evaluate_work(EvaluateConfig.model_validate(values | {"artifacts": False}), at) == Work()
    exported = STAGES["export"].cost.work(ExportConfig.model_validate({"gguf": ["Q4_K_M"]}), at)
    assert exported and exported.host_read > 192 / SLOTS * weights
    onnx = Setting(shape, 26, "bfloat16", True, artifacts=(PlannedFile("onnx", "int4", 26),))
    assert evaluate_work(EvaluateConfig.model_validate(values), onnx).host_read < found.host_read / 500  # whole texts


def test_every_checkpoint_that_is_measured_is_counted() -> None:
    def measured(*overrides: str, name: str = "llama8b_26L") -> tuple[int, ...]:
        return settings(Recipe.load(name, list(overrides)), make_shape(name), "bfloat16", True)[1].measured

    assert measured() == (32, 26, 26, 26, 26)  # pruned, healed, recovered, merged
    assert measured("merge=null") == (32, 26, 26, 26)
    assert measured("prune.heal=none", "merge=null", "distill=null") == (32, 26)
    assert measured(name="smollm2_135m_sorted") == (30, 24, 24, 12, 16, 20, 24)  # and each depth


def test_the_plan_knows_what_writes() -> None:
    """vLLM fills its share of a card and writes as many rows as its cache holds; llama.cpp works beside the card."""
    shape = make_shape("llama8b_26L")
    at = Setting(shape, 26, "bfloat16", True, room=24 * GIB)

    cost = STAGES["data"].cost

    def part(*overrides: str) -> tuple[DatasetsConfig, Any, Any]:
        config: Any = Recipe.load("llama8b_26L", list(overrides)).section("data")
        return config, cost.need(config, at), cost.work(config, at)

    config, held, work = part()
    assert isinstance(config.engine, VllmSettings) and held.peak == pytest.approx(0.9 * 24 * GIB)
    rows = vllm_rows(config, config.engine, at)
    cached = rows * shape.kv_bytes(768 + 128 + 192, 2)
    assert cached <= held.parts["kv"] < cached * (rows + 1) / rows
    assert vllm_rows(config.model_copy(update={"batch": 8}), config.engine, at) == 8
    half, half_held, _ = part("data.engine.memory=0.5")
    assert half_held.needed > 24 * GIB  # 12 of 24 GB do not hold 16 GB of weights
    assert vllm_rows(half, half.engine, at) == 1  # type: ignore[arg-type]
    _, beside, slow = part("data.engine={kind: llama.cpp, gguf: base.gguf}")
    assert set(beside.parts) == {"runtime"} and beside.host > 8.03e9
    assert slow.flops == slow.read == 0 and slow.host_flops == pytest.approx(work.flops)
    card = DEVICES["rtx-4090"]
    assert card.seconds(slow, "bfloat16") > 10 * card.seconds(work, "bfloat16")
    plain = config.model_copy(update={"sets": [part.model_copy(update={"rewrite": None}) for part in config.sets]})
    assert cost.work(plain, at) == Work()


def test_an_engine_that_is_not_there_is_told_before_the_model_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_checkpoint(tmp_path / "base", "llama")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 3)
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: base\n"
        "data: {source: dataset, path: a.jsonl, rewrite: general, engine: {kind: llama.cpp, gguf: base.gguf}}\n"
    )
    (tmp_path / "base.gguf").write_bytes(b"GGUF")

    def fetched(*_: Any, **__: Any) -> Path:
        raise AssertionError("the model was fetched")

    monkeypatch.setattr("compress.modeling.load.resolve", fetched)
    arguments = ["compress", "run", str(tmp_path / "r.yaml"), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--set", "data.engine=vllm"])
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and "use --set data.engine=transformers" in said.out + said.err


@pytest.mark.parametrize(
    "source", ["{source: magpie, rows: 512, batch: 256}", "{source: texts, rows: 512, batch: 256}"]
)
def test_the_plan_knows_what_writes_self_data(source: str, tmp_path: Path) -> None:
    at = Setting(make_shape("llama8b_26L"), 32, "bfloat16", True, room=24 * GIB)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\nmodel: random:llama\ndata: {source}\n")
    cost = STAGES["data"].cost

    def part(*overrides: str) -> tuple[Any, Any, Any]:
        config: Any = Recipe.load(str(recipe), list(overrides)).section("data")
        return cost.need(config, at), cost.work(config, at), cost.cards(config, 8)

    plain, work, cards = part()
    assert cards == 8 and plain.parts["kv"] > 0 and plain.host == 0
    vllm, faster, _ = part("data.engine=vllm")
    assert vllm.peak == pytest.approx(0.9 * 24 * GIB) and faster.flops == pytest.approx(work.flops)
    _, shared, cards = part("data.engine={kind: vllm, gpus: 4}")
    assert cards == 1 and shared.flops == pytest.approx(work.flops / 4)
    beside, slow, cards = part("data.engine={kind: llama.cpp, gguf: base.gguf}")
    assert cards == 1 and set(beside.parts) == {"runtime"} and beside.host > 8.03e9
    assert slow.flops == 0 and slow.host_flops == pytest.approx(work.flops)
