"""The runner: what a changed key touches, the order of stages, skipping, --from and --until, manifests."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compress.core.errors import UserError
from compress.core.stage import Progress
from compress.modeling.source import hash_file
from compress.pipeline.recipe import Recipe
from compress.pipeline.runner import Options, Run, execute, plan_run
from compress.pipeline.stages import STAGES, StageSpec
from compress.pipeline.store import lock
from safetensors.torch import load_file, save_file

ORDER = ("data", "prune", "distill", "export", "evaluate")


@pytest.fixture
def home(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with the tiny recipe over a local checkpoint, with a text file that calibration and evaluation read."""
    shutil.copytree(tiny(), tmp_path / "model")
    text = Path(Recipe.load("tiny_random").path).read_text(encoding="utf-8")
    text = text.replace("model: random:llama", "model: ./model").replace("tokens: 1024,", "tokens: 1024, text: c.txt,")
    (tmp_path / "r.yaml").write_text(text.replace("evaluate:\n", "evaluate:\n  text: e.txt\n"))
    (tmp_path / "c.txt").write_text("calibration")
    (tmp_path / "e.txt").write_text("evaluation")
    return tmp_path


DATA_FIGURES = {
    **dict.fromkeys(("rows", "train", "heldout", "seen", "cut", "tokens", "targets"), 1),
    "dropped": {},
    "kept_share": 1.0,
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the stages' work by writing one file; lists which were made."""
    log: list[str] = []

    def module(spec: StageSpec) -> Any:
        def run(config: Any, inputs: Any, out_dir: Path, context: Any) -> dict[str, Any]:
            log.append(spec.name)
            (out_dir / ".work").mkdir(exist_ok=True)
            if spec.name in ("prune", "distill"):
                shutil.copytree(inputs.model, out_dir / "model")
            stages = {name: folder.name for name, folder in inputs.stages.items()}
            (out_dir / "seen.json").write_text(json.dumps({"model": str(inputs.model), "stages": stages}))
            return DATA_FIGURES if spec.name == "data" else {"seed": context.seed}

        return SimpleNamespace(run=run, check=lambda config, base, context: log.append(f"check {spec.name}"))

    monkeypatch.setattr(StageSpec, "module", module)
    return log


def plan(home: Path, *overrides: str, **options: Any) -> Run:
    return plan_run(Recipe.load(str(home / "r.yaml"), overrides), Options(home / "runs", **options))


def prints(run: Run) -> dict[str, str]:
    return {stage.spec.name: stage.folder.fingerprint for stage in run.stages}


def changed(before: Run, after: Run) -> tuple[str, ...]:
    old, new = prints(before), prints(after)
    return tuple(name for name in new if new[name] != old[name])


@pytest.mark.parametrize(
    ("override", "touched"),
    [
        ("seed=8", ORDER),
        ("data.rows=25", ORDER),
        ("data.answer_top_p=0.5", ORDER),
        ("prune.blocks=1", ORDER[1:]),
        ("prune.heal=none", ORDER[1:]),
        ("prune.calibration.length=32", ORDER[1:]),
        ("distill.objective=kd", ORDER[2:]),
        ("distill.objective.kl_weight=0.1", ORDER[2:]),
        ("distill.tune.rank=8", ORDER[2:]),
        ("distill.lr=0.1", ORDER[2:]),
        ("export.gguf=[F16]", ORDER[3:]),
        ("export.verify.kl={Q8_0: 0.5}", ORDER[3:]),
        ("evaluate.tokens=99", ORDER[4:]),
        ("evaluate.speed.repeat=3", ORDER[4:]),
        ("evaluate.speed=null", ORDER[4:]),
        # what changes nothing: defaults spelt out, a shorthand spelt out, the name
        ("data.temperature=1", ()),
        ("distill.objective={kind: asft}", ()),
        ("prune.search=window", ()),
        ("name=other", ()),
    ],
)
def test_a_changed_key_touches_its_stage_and_what_follows(home, override, touched):
    assert changed(plan(home), plan(home, override)) == touched


def test_every_key_of_every_section_touches_its_stage(home):
    """No option may be left out of the fingerprint by accident."""
    before = prints(plan(home))
    for name in ORDER:
        section = plan(home).loaded.section(name)
        for key, value in section.model_dump(mode="json").items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                fraction = isinstance(value, float) and value <= 1
                after = prints(plan(home, f"{name}.{key}={value / 2 + 0.1 if fraction else value + 1}"))
                assert before[name] != after[name], f"{name}.{key}"


def test_comments_and_formatting_change_nothing_the_order_of_keys_neither(home):
    before = plan(home)
    text = (home / "r.yaml").read_text().replace("rows: 24\n", "rows:   24   # rows\n\n").replace("[Q8_0]", "['Q8_0']")
    (home / "r.yaml").write_text(
        "# a comment\n" + text.replace("  length: 64\n  accumulate: 2", "  accumulate: 2\n  length: 64")
    )
    assert changed(before, plan(home)) == ()


def test_weights_files_and_formats_enter(home, monkeypatch):
    before = plan(home)
    weights = home / "model" / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert changed(before, plan(home)) == ORDER
    weights.write_bytes(original)
    assert changed(before, plan(home)) == ()
    (home / "e.txt").write_text("evaluatioN")
    assert changed(before, plan(home)) == ORDER[4:]
    (home / "c.txt").write_text("calibratioN")
    assert changed(before, plan(home)) == ORDER[1:]
    (home / "e.txt").write_text("evaluation")
    (home / "c.txt").write_text("calibration")
    monkeypatch.setattr("compress.distill.config.FORMAT", 99)
    assert changed(before, plan(home)) == ORDER[2:]


def test_files_of_a_named_folder_count(home):
    (home / "tasks").mkdir()
    (home / "tasks" / "a.yaml").write_text("task: a\n")
    overrides = ("evaluate.tasks=[a]", "evaluate.harness.folder=tasks")
    before = plan(home, *overrides)
    assert changed(before, plan(home, *overrides)) == ()
    (home / "tasks" / "a.yaml").write_text("task: a  # changed\n")
    assert changed(before, plan(home, *overrides)) == ("evaluate",)
    with pytest.raises(UserError, match="which does not exist"):
        plan(home, "evaluate.tasks=[a]", "evaluate.harness.folder=none")


def test_where_a_recipe_runs_does_not_enter(home, tmp_path):
    before = plan(home)
    assert changed(before, plan(home, device="cuda")) == ()
    shutil.copytree(home, tmp_path / "elsewhere")
    assert changed(before, plan(tmp_path / "elsewhere")) == ()


def test_another_precision_is_another_run(home, made):
    execute(plan(home), Progress())
    other = plan(home, dtype="bfloat16")
    assert changed(plan(home), other) == ORDER and [stage.spec.name for stage in other.pending] == list(ORDER)
    made.clear()
    execute(other, Progress())
    assert made[5:] == list(ORDER)
    for dtype in ("float32", "bfloat16"):  # one beside the other, and each found again
        run = plan(home, dtype=dtype)
        assert run.pending == [] and {stage.folder.manifest().dtype for stage in run.stages} == {dtype}


@pytest.mark.parametrize("name", ["c.txt", "e.txt"])
def test_a_missing_input_file_is_named_before_any_work(home, name):
    (home / name).unlink()
    with pytest.raises(UserError, match=f"reads .*{name}, which does not exist"):
        plan(home)


def test_stages_run_in_order_are_checked_first_and_skipped_when_complete(home, made):
    execute(plan(home), Progress())
    assert made == [*(f"check {name}" for name in ORDER), *ORDER]
    made.clear()
    run = plan(home)
    assert run.pending == []
    execute(run, Progress())
    assert made == []
    execute(plan(home, "export.gguf=[F16]"), Progress())
    assert made == ["check export", "check evaluate", "export", "evaluate"]
    assert plan(home).pending == []  # what the other recipe made is beside it, not in its place


def test_each_stage_is_given_the_model_so_far_and_the_earlier_stages(home, made):
    run = plan(home)
    execute(run, Progress())
    seen = {s.spec.name: json.loads((s.folder.path / "seen.json").read_text()) for s in run.stages}
    folders = {s.spec.name: s.folder.path for s in run.stages}
    models = {"data": home / "model", "prune": home / "model", "distill": folders["prune"] / "model"}
    for number, name in enumerate(ORDER):
        assert seen[name]["model"] == str(models.get(name, folders["distill"] / "model"))
        assert seen[name]["stages"] == {other: folders[other].name for other in ORDER[:number]}


def test_until_and_from(home, made):
    execute(plan(home, until="prune"), Progress())
    assert made[2:] == ["data", "prune"]
    made.clear()
    execute(plan(home, until="export"), Progress())
    assert made[2:] == ["distill", "export"]
    made.clear()
    execute(plan(home, start="prune", until="distill"), Progress())
    assert made[2:] == ["prune", "distill"]
    made.clear()
    execute(plan(home, start="export"), Progress())
    assert made[2:] == ["export", "evaluate"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": "merge"}, "--until merge: the recipe has no such stage; it has data, prune"),
        ({"start": "prunne"}, "--from prunne: the recipe has no such stage"),
        ({"start": "export", "until": "prune"}, "--from export comes after --until prune"),
    ],
)
def test_stages_that_are_not_there(home, options, message):
    with pytest.raises(UserError, match=message):
        plan(home, **options)


def test_from_makes_again_from_scratch_and_an_interrupted_stage_goes_on(home, made, monkeypatch):
    run = plan(home, until="data")
    folder = run.stages[0].folder
    folder.partial.mkdir(parents=True)
    (folder.partial / "rows").write_text("begun")
    assert plan(home, until="data").pending and not folder.complete  # half a folder is not taken for a whole one
    execute(run, Progress())
    assert (folder.path / "rows").read_text() == "begun"
    assert folder.manifest().resumed
    execute(plan(home, until="data", start="data"), Progress())
    assert not (folder.path / "rows").exists() and not folder.manifest().resumed


def test_a_stage_that_was_only_not_renamed_is_not_made_again(home, made):
    run = plan(home, until="data")
    execute(run, Progress())
    folder = run.stages[0].folder
    folder.path.rename(folder.partial)
    made.clear()
    execute(plan(home, until="data"), Progress())
    assert made == ["check data"] and folder.complete


def test_a_failing_stage_keeps_what_it_had_and_gives_the_lock_back(home, made, monkeypatch):
    run = plan(home)

    def fail(*_: Any) -> None:
        raise UserError("no")

    original = StageSpec.module
    monkeypatch.setattr(
        StageSpec, "module", lambda spec: SimpleNamespace(run=fail) if spec.name == "prune" else original(spec)
    )
    with pytest.raises(UserError, match="no"):
        execute(run, Progress())
    assert [stage.spec.name for stage in plan(home).pending] == list(ORDER[1:])
    with lock(run.folder):
        pass


@pytest.mark.parametrize(
    "wrong", [{"until": "nothing"}, {"start": "nothing"}, {"start": "export", "until": "prune"}], ids=str
)
def test_a_wrong_command_leaves_all_that_was_made(home, made, wrong):
    execute(plan(home), Progress())
    folder = plan(home).folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError):
        plan(home, **wrong)
    with pytest.raises(UserError):
        plan(home, "export.gguf=[Q99]", start="data")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert plan(home).pending == []


def test_a_stage_made_again_that_fails_leaves_the_one_there_was(home, made, monkeypatch):
    execute(plan(home), Progress())

    def fail(config: Any, inputs: Any, out_dir: Path, context: Any) -> None:
        (out_dir / "half").write_text("x")
        raise OSError(errno.EIO, "Input/output error")

    original = StageSpec.module
    monkeypatch.setattr(
        StageSpec, "module", lambda spec: SimpleNamespace(run=fail) if spec.name == "export" else original(spec)
    )
    with pytest.raises(OSError, match="Input/output error"):
        execute(plan(home, start="export"), Progress())
    assert plan(home).pending == []  # the old ones, whole
    for stage in plan(home).stages:
        stage.folder.manifest()


def test_a_changed_byte_is_found_before_anything_is_built_on_it(home, made):
    execute(plan(home, until="prune"), Progress())
    file = plan(home).stages[1].folder.path / "seen.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"]")
    execute(plan(home, until="prune"), Progress())  # nothing is
    made.clear()
    with pytest.raises(UserError, match=r"prune-.*seen.json has changed since it was made; .*--from prune"):
        execute(plan(home), Progress())
    assert made == []


def test_damage_in_a_finished_stage_is_found_before_anything_is_built_on_it(home, made):
    execute(plan(home, until="prune"), Progress())
    (plan(home).stages[0].folder.path / "manifest.json").write_text("{")
    made.clear()
    with pytest.raises(UserError, match=r"data-.* is damaged .*--from data"):
        execute(plan(home), Progress())
    assert made == []
    execute(plan(home, start="data"), Progress())
    assert made[5:] == list(ORDER)


def test_the_manifest_says_where_a_stage_came_from(home, made):
    run = plan(home, "seed=11")
    execute(run, Progress())
    for stage in run.stages:
        manifest = json.loads((stage.folder.path / "manifest.json").read_text())
        assert manifest["stage"] == stage.spec.name
        assert manifest["fingerprint"] == stage.folder.fingerprint
        assert manifest["config"] == stage.config.model_dump(mode="json")
        reads = [name for name in STAGES[stage.spec.name].reads if name in ORDER]
        assert manifest["inputs"] == {name: prints(run)[name] for name in reads}
        assert manifest["base"] == {"source": "./model", "fingerprint": run.base}
        assert (manifest["seed"], manifest["device"], manifest["dtype"]) == (11, "cpu", "float32")
        assert manifest["metrics"] == (DATA_FIGURES if stage.spec.name == "data" else {"seed": 11})
        assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
        assert {"torch", "transformers", "onnxruntime"} <= manifest["versions"].keys()
        assert manifest["machine"]["cores"] == os.cpu_count()
        assert manifest["seconds"] >= 0
        assert manifest["peak_memory_bytes"] > 10_000_000
        for name, entry in manifest["files"].items():
            assert entry["sha256"] == hash_file(stage.folder.path / name)
    assert (run.folder / "recipe.yaml").read_text().endswith("# --set seed=11\n")


def test_two_runs_of_one_folder(home, made):
    run = plan(home)
    with lock(run.folder), pytest.raises(UserError, match=rf"in use by another run \(process {os.getpid()} on "):
        execute(run, Progress())
    assert made == []


def test_an_unusable_device_is_refused_before_any_work(home, made):
    with pytest.raises(UserError, match="--device meteor cannot be used here"):
        execute(plan(home, device="meteor"), Progress())
    assert made == []


def test_a_finished_run_prints_its_summary_without_torch(home, made):
    """As the command line does it: --dry-run shows what is to do, and a second run imports no torch."""
    execute(plan(home, until="data"), Progress())
    code = (
        "import sys\nfrom compress.cli.main import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), 'heavy'\n"
    )

    def command(*arguments: str) -> str:
        command = [sys.executable, "-c", code, "run", str(home / "r.yaml"), "--runs", str(home / "runs"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    states = [line for line in command("--dry-run").splitlines() if line.startswith("│")]
    assert ["complete" in line for line in states] == [True, False, False, False, False]
    assert "to do" in states[1]
    assert not any(stage.folder.partial.exists() for stage in plan(home).stages)
    assert str(home / "runs" / "tiny-random" / "report.html") in command("--until", "data")


def lose(model: Path) -> None:
    shutil.rmtree(model)


def drop_a_tensor(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def spoil_a_number(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.self_attn.q_proj.weight"][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def lose_the_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose, "the stage prune left no model"),
        (drop_a_tensor, r"the stage prune saved a model that cannot be used \(.*no model.layers.1.mlp.up_proj.weight"),
        (spoil_a_number, r"the stage prune saved .*model.layers.2.self_attn.q_proj.weight contains NaN or infinity"),
        (lose_the_tokenizer, "the stage prune saved a model that cannot be used .*tokenizer.json"),
    ],
)
def test_what_a_stage_saves_is_opened_before_it_counts_as_done(home, monkeypatch, damage, message):
    """No stage behind it goes on from an earlier model."""

    def module(spec: StageSpec) -> Any:
        def run(config: Any, inputs: Any, out_dir: Path, context: Any) -> dict[str, Any]:
            if spec.makes_model:
                shutil.copytree(inputs.model, out_dir / "model")
                damage(out_dir / "model")
            return {}

        return SimpleNamespace(run=run)

    monkeypatch.setattr(StageSpec, "module", module)
    with pytest.raises(UserError, match=message):
        execute(plan(home), Progress())
    folders = {path.name.split("-")[0] for path in (home / "runs" / "tiny-random").iterdir()}
    assert "data" in folders and not folders & {"prune", "distill", "export"}


def test_the_stages_whose_models_are_checked():
    assert [name for name, spec in STAGES.items() if spec.makes_model] == [
        "prune",
        "distill",
        "merge",
        "sort",
        "retain",
    ]
