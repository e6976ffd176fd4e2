"""The Python API: typed, lazy, and in every step what a recipe's stage does."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import compress.api as api
import pytest
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs, Progress
from compress.modeling.load import load_config, load_model
from compress.pipeline.options import checked
from compress.prune import stage
from compress.prune.config import PruneConfig
from compress.prune.heals.refit import RefitHeal

CALIBRATION = {"tokens": 256, "length": 32, "scoring": 32, "held_out": 32, "batch": 2}
NAMES = "Recipe run plan load_model prune heal distill merge export evaluate Session".split()


def test_importing_it_imports_no_torch():
    """Nor does anything that it names; and it imports only what is asked for."""
    code = (
        "import sys, compress.api as api\n"
        "assert 'pydantic' not in sys.modules, 'importing it costs nothing'\n"
        "for name in api.__all__: getattr(api, name)\n"
        "assert not {'torch', 'transformers', 'datasets', 'onnx'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_type_checkers_and_python_see_the_same():
    """The imports for type checkers, the table that is imported from, and __all__."""
    tree = ast.parse(Path(str(api.__file__)).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    static = {
        (alias.name, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert static == set(api._MODULES.items())
    assert set(api.__all__) == set(api._MODULES) >= set(NAMES)
    assert all(getattr(api, name).__doc__ for name in api.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        api.prun  # noqa: B018


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def pruned(tiny: Callable[..., Path], talks: Path, work: Path) -> api.PruneResult:
    return api.prune(
        tiny(), work / "pruned", rows=talks, runs=work, blocks=1, heal=RefitHeal(), calibration=CALIBRATION
    )


def test_a_step_is_what_the_stage_does(pruned, tiny, talks, work, tmp_path):
    """The same bytes, and a manifest that says from what."""
    config = checked(PruneConfig, {"blocks": 1, "heal": "refit", "calibration": CALIBRATION})
    stage.run(config, Inputs(tiny(), tiny(), {"data": talks}), tmp_path, Context())
    weights = "model/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (pruned.folder / weights).read_bytes()
    assert pruned.metrics["blocks"] == 4 and len(pruned.dropped) == 1
    manifest = pruned.manifest
    assert manifest.stage == "prune" and manifest.base.source == str(tiny())
    assert manifest.config["heal"]["kind"] == "refit" and pruned.seconds > 0
    assert weights in manifest.files
    assert api.inspect(pruned.folder).kind == "stage"
    assert [path.name for path in work.iterdir() if path.name.endswith(".partial")] == []


def test_healing_a_cut_gives_the_model_that_pruning_with_that_heal_does(pruned, tiny, talks, work):
    bare = api.prune(tiny(), work / "bare", rows=talks, runs=work, blocks=1, heal="none", calibration=CALIBRATION)
    healed = api.heal(bare.model, work / "healed", "refit", base=tiny(), rows=talks, runs=work, calibration=CALIBRATION)
    if bare.dropped == pruned.dropped:
        ours, theirs = load_model(healed.model).state_dict(), load_model(pruned.model).state_dict()
        assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert healed.metrics["dropped"] == bare.dropped
    with pytest.raises(UserError, match="has every block of"):
        api.heal(tiny(), work / "whole", base=tiny(), rows=talks, runs=work, calibration=CALIBRATION)


def test_distilled_sorted_and_merged(pruned, tiny, talks, work):
    how = {
        "base": tiny(),
        "rows": talks,
        "runs": work,
        "max_steps": 2,
        "length": 32,
        "tune": {"kind": "lora", "rank": 2},
    }
    students = [api.distill(pruned.model, work / f"student-{seed}", seed=seed, **how) for seed in (1, 2)]
    assert students[0].metrics["steps"] == 2 and (students[0].folder / "curves.jsonl").is_file()
    merged = api.merge([student.model for student in students], work / "merged", set=["parameters.t=0.3"], runs=work)
    assert load_config(merged).num_hidden_layers == 3
    found = api.sort(pruned.model, work / "sorted", depths=[2, 3], **how)
    assert found.metrics["depths"] == [2, 3]
    entries = api.evaluate(found.model, base=tiny(), rows=talks, runs=work, speed=None, tokens=64)
    assert [entry.role for entry in entries] == ["base", "depth-2", "depth-3"]
    assert entries[0].kl_to_base == 0 and entries[1].perplexity > 1
    assert {entry.tokens_per_second for entry in entries} == {None}  # null turns off what is done by default


def test_a_killed_step_goes_on_and_other_settings_begin_anew(tiny, talks, work, killer):
    how = {"rows": talks, "runs": work, "blocks": 1, "calibration": CALIBRATION}
    with pytest.raises(KeyboardInterrupt):
        api.prune(tiny(), work / "killed", on_progress=killer(1), **how)
    assert not (work / "killed").exists()
    (begun,) = work.glob(".killed-*.partial")
    assert api.prune(tiny(), work / "killed", **how).manifest.resumed
    assert not begun.exists()
    with pytest.raises(UserError, match="killed exists already"):
        api.prune(tiny(), work / "killed", **how)


def test_a_bundle_is_exported_opened_and_measured(tiny, work, inline_builder):
    manifest = api.export(
        tiny(initializer_range=0.3),
        work / "bundle",
        gguf=["F16"],
        onnx=["fp32"],
        depths=[2, 4],
        name="tiny",
        runs=work,
        verify={"tokens": 16, "window": 16},
    )
    assert manifest.depths == [2, 4] and {a.type for a in manifest.artifacts} == {"F16", "fp32"}
    with api.Session(work / "bundle", "onnx", depth=2) as session:
        said: list[str] = []
        answer = session.generate("the way", max_tokens=5, raw=True, on_text=said.append)
        assert answer.usage.depths == {2: answer.usage.completion_tokens}
        assert answer.text == "".join(said) and answer.finish in ("stop", "length")
        assert session.generate("the way", max_tokens=5, raw=True, depth=4).usage.depths.keys() == {4}
    with pytest.raises(UserError, match="there is no depth 3 here"):
        api.Session(work / "bundle", depth=3)
    with pytest.raises(UserError, match=r"there is no engine 'onxx'.*did you mean 'onnx'"):
        api.Session(work / "bundle", "onxx")


def test_a_run_and_what_it_hands_back(work):
    events: list[api.ProgressEvent] = []
    how = {"set": ["data.rows=12", "distill.max_steps=2"], "runs": work / "runs", "until": "distill"}
    recipe = api.Recipe.load("tiny_random")
    dry = api.dry_run(recipe, **how)
    assert [stage.state for stage in dry.stages] == ["to do"] * 3
    result = api.run(recipe, **how, on_progress=events.append)
    assert result.made == ("data", "prune", "distill") == tuple(result.stages)
    assert result.model == result.stages["distill"] / "model" and result.bundle is None
    assert result.report_file.is_file() and result.report.name == "tiny-random"
    assert any(event.done and event.label for event in events) and any(event.note for event in events)
    again = api.run("tiny_random", **how)
    assert again.made == () and again.stages == result.stages
    rows = api.collect_rows("random:llama", work / "rows", runs=work / "runs", **recipe_section(recipe, "data"))
    assert rows.metrics["rows"] > 0


def recipe_section(recipe: api.Recipe, name: str) -> dict[str, object]:
    return recipe.section(name).model_dump() | {"rows": 12}


def test_a_plan_has_units():
    plan = api.plan("tiny_random", set=["prune.blocks=3"], device="cpu-2core", memory="24GB")
    assert plan.blocks == (8, 5) and plan.memory == 24 * 10**9
    assert {stage.name for stage in plan.stages} >= {"data", "export"} and plan.disk > 0
    with pytest.raises(UserError, match="rtx-4090"):
        api.plan("tiny_random", device="rtx4090")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda out: api.prune("random:llama", out, block=1),
            "prune.block: unknown key 'block'; did you mean 'blocks'?",
        ),
        (lambda out: api.prune("random:llama", out, blocks="one"), "prune.blocks: "),
        (lambda out: api.prune("random:llama", out, PruneConfig(blocks=1), blocks=2), "give a PruneConfig or its keys"),
        (lambda out: api.collect_rows("random:llama", out, source="magpei"), "did you mean 'magpie'"),
        (lambda out: api.distill("x", out, base="y", rows="z", objective="asfd"), "did you mean 'asft'"),
        (lambda out: api.export("random:llama", out, gguf=["Q4_K_N"]), "gguf.0: must be .*did you mean 'Q4_K_M'"),
        (lambda out: api.evaluate("random:llama", text="t", windw=1), "unknown key 'windw'; did you mean 'window'"),
        (lambda out: api.prune("random:llama", out, blocks=1, rows="nowhere"), "rows: nowhere does not exist"),
        (lambda out: api.run("tiny_rndom"), "did you mean 'tiny_random'"),
        (lambda out: api.run("tiny_random", dtype="flot32"), "did you mean 'float32'"),
        (lambda out: api.run("tiny_random", until="distil", runs=out), "did you mean 'distill'"),
        (lambda out: api.load_model("no such/model/x"), "does not exist"),
    ],
)
def test_wrong_options_are_explained_before_any_work(call, message, tmp_path, monkeypatch):
    def idle(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compress.modeling.load.resolve", idle)
    with pytest.raises(UserError, match=message) as refused:
        call(tmp_path / "out")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_a_recipe_of_python_values(tmp_path):
    keys = {"name": "cut", "model": "random:llama", "prune": {"blocks": 2, "heal": RefitHeal()}}
    recipe = api.Recipe.from_dict(keys, tmp_path)
    assert recipe.order == ("prune",) and recipe.folder == tmp_path
    assert recipe.changed(["prune.blocks=1"]).prune == checked(PruneConfig, {"blocks": 1, "heal": "refit"})
    with pytest.raises(UserError) as refused:
        api.Recipe.from_dict(keys | {"prun": {}, "prune": {"block": 1}})
    lines = str(refused.value).splitlines()
    assert lines == [
        "recipe has 2 problems:",
        "  recipe: prune.block: unknown key 'block'; did you mean 'blocks'?",
        "  recipe: prun: unknown key 'prun'; did you mean 'prune'?",
    ]


def test_models_are_loaded_where_they_are_asked_for(tiny, work):
    model = api.load_model(tiny(), runs=work)
    assert (model.blocks, str(model)) == (4, str(tiny())) and "network" not in vars(model)
    assert model.parameters == sum(p.numel() for p in model.network.parameters())
    assert model.tokenizer("the way")["input_ids"]


def test_progress_may_be_an_object_or_a_function():
    from compress.pipeline.progress import as_progress

    progress, events = Progress(), []
    assert as_progress(progress) is progress
    with as_progress(events.append).bar("b", 3) as advance:
        advance()
        advance(2, "loss 1")
    assert events == [api.ProgressEvent("b", 1, 3), api.ProgressEvent("b", 3, 3, "loss 1")]


def test_a_recipe_built_from_sections_is_the_one_of_a_file(tmp_path: Path) -> None:
    built = api.Recipe(name="cut", model="random:llama", prune=api.PruneConfig(blocks=1))
    read = api.Recipe.from_dict({"name": "cut", "model": "random:llama", "prune": {"blocks": 1}})
    assert built.order == read.order == ("prune",) and built.prune == read.prune
    assert built.changed(["prune.blocks=2", "export.gguf=[Q8_0]"]).order == ("prune", "export")
    plans = [api.plan(recipe, runs=tmp_path) for recipe in (built, read)]
    assert plans[0].stages == plans[1].stages and plans[0].stages[0].need.peak > 0
