"""The merge stage: what is measured, which model goes on, resuming, and the whole chain through the runner."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compress.api import inspect
from compress.cli import main as cli
from compress.cli.inspect_table import inspection_table
from compress.core.cost import Need
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs, Progress
from compress.data.chat import load_encoded
from compress.evaluation.stage import checkpoints
from compress.merge import measure, stage
from compress.merge.config import MergeConfig
from compress.modeling.load import load_tokenizer
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import Recipe
from compress.pipeline.runner import Options, execute, plan_run
from compress.pipeline.summary import finish
from compress.records.merge import MergeRecord
from compress.records.students import HeldOutFigures, VariantFigures, Variants
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

WEIGHT = {"weight": 1.0}
SIZES: dict[str, Any] = {"blocks": 3, "hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 48}


def section(method: str, **options: Any) -> MergeConfig:
    return MergeConfig.model_validate({"method": method} | options)


def content(folder: Path) -> dict[str, bytes]:
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file): (folder / file).read_bytes() for file in files if WORK not in file.parts}


def variant(name: str) -> VariantFigures:
    held = HeldOutFigures(step=1, eval_loss=1.0, eval_kl=0.5, eval_perplexity=4.0)
    return VariantFigures(
        name=name,
        seed=1,
        rows=(0.0, 1.0),
        objective="kd",
        steps=1,
        trainable_parameters=1,
        before=held,
        last=held,
        best=held,
        target_tokens=1,
        train_tokens=1,
    )


@pytest.fixture(scope="module")
def world(tiny: Callable[..., Path], talks: Path, tmp_path_factory: Any) -> Inputs:
    """A base model and a distill folder whose two variants lie on either side of the base: their mean is nearly it."""
    root = tmp_path_factory.mktemp("merge-stage")
    base, distill = tiny(**SIZES), root / "distill"
    plain, draw = load_file(base / "model.safetensors"), torch.Generator().manual_seed(9)
    noise = {name: 0.05 * torch.randn(tensor.shape, generator=draw) for name, tensor in sorted(plain.items())}
    for folder, scale in (
        (root / "prune", 1.5),
        (distill / "variants" / "a", 1.0),
        (distill / "variants" / "b", -0.9),
    ):
        shutil.copytree(base, folder / "model")
        moved = {name: tensor + scale * noise[name] for name, tensor in plain.items()}
        save_file(moved, folder / "model" / "model.safetensors", {"format": "pt"})
    Variants(length=64, batch=2, chosen="b", variants=[variant("a"), variant("b")]).write(distill)
    shutil.copytree(distill / "variants" / "b" / "model", distill / "model")
    return Inputs(base, distill / "model", {"data": talks, "prune": root / "prune", "distill": distill})


def run(config: MergeConfig, inputs: Inputs, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    (out / WORK).mkdir(exist_ok=True)
    return stage.run(config, inputs, out, Context(seed=7, progress=progress or Progress()))


@torch.no_grad()
def figures(folder: Path, inputs: Inputs) -> dict[str, float]:
    """KL to the base and perplexity over held-out response tokens, row by row, without packing or chunks."""
    model, base = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, inputs.base))
    kl, nll, count = 0.0, 0.0, 0
    for row in load_encoded(inputs.stages["data"], load_tokenizer(inputs.base), "heldout", 64):
        ids = torch.tensor([row.input_ids])
        at = [t for t in range(1, len(row.input_ids)) if row.loss_mask[t]]
        log_m, log_b = (m(ids).logits[0].double().log_softmax(-1)[[t - 1 for t in at]] for m in (model, base))
        kl += float((log_b.exp() * (log_b - log_m)).sum())
        nll -= float(log_m[range(len(at)), ids[0, at]].sum())
        count += len(at)
    return {"eval_kl": kl / count, "eval_perplexity": math.exp(nll / count)}


GOOD = {"parameters": WEIGHT}  # halfway, nearly the base
BAD = {
    "models": [{"model": "a", "parameters": {"weight": 3.0}}, {"model": "b", "parameters": {"weight": -2.0}}]
}  # far out


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (GOOD, "merge"),
        (BAD, "b"),
        (BAD | {"by": "perplexity"}, None),
        (BAD | {"select": "merge"}, "merge"),
        (GOOD | {"models": [{"model": "b"}, {"model": "start"}]}, None),
    ],
)
def test_the_better_of_the_merge_and_its_parents_goes_on(
    noted: Callable[[], Any],
    world: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    chosen: str | None,
) -> None:
    passes: list[Path] = []
    plain = measure.unpruned
    monkeypatch.setattr(stage, "unpruned", lambda folder, *args: passes.append(folder) or plain(folder, *args))
    progress = noted()
    metrics = run(section("linear", **options), world, tmp_path / "out", progress)
    distill = world.stages["distill"]
    folders = {"merge": tmp_path / "out" / WORK / "merged", "start": world.stages["prune"] / "model"}
    folders |= {name: distill / "variants" / name / "model" for name in ("a", "b")}
    names = ["merge", "a", "b"] + (["start"] if "start" in json.dumps(options) else [])
    found = {entry["name"]: entry for entry in metrics["models"]}
    assert list(found) == names and passes == [world.base]
    for name in names:
        wanted = figures(folders[name], world)
        assert {key: found[name][key] for key in wanted} == pytest.approx(wanted, rel=1e-4)
    key = f"eval_{options.get('by', 'kl')}"
    best = min(names, key=lambda name: found[name][key])
    assert metrics["chosen"] == ("merge" if options.get("select") == "merge" else best)
    assert chosen is None or metrics["chosen"] == chosen
    kept = folders[metrics["chosen"]]
    assert content(tmp_path / "out" / "model") == content(kept)
    assert (tmp_path / "out" / "model" / "model.safetensors").samefile(kept / "model.safetensors")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model", "merge.json", WORK}
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (record["chosen"], record["models"]) == (metrics["chosen"], metrics["models"])
    asked = [entry["model"] for entry in record["config"]["models"]]
    assert [entry["name"] for entry in record["models"] if entry["merged"]] == sorted(asked)
    verdict = "the linear merge" if metrics["chosen"] == "merge" else f"{metrics['chosen']}, which is better than"
    assert f"selected: {verdict}" in progress.texts[-1]


def test_a_killed_stage_goes_on_and_two_places_have_the_same_bytes(
    world: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = section("dare_ties", parameters={"weight": 0.5, "density": 0.7})
    elsewhere = tmp_path / "elsewhere"
    moved = {name: shutil.copytree(folder, elsewhere / name) for name, folder in world.stages.items()}
    base = shutil.copytree(world.base, elsewhere / "base")
    whole = run(config, Inputs(base, moved["distill"] / "model", moved), tmp_path / "whole")
    merged: list[str] = []
    plain = {
        name: getattr(stage, name) for name in ("merge_weights", "copy_companions", "heldout_figures", "link_files")
    }

    class Stop(KeyboardInterrupt):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    def stop_at_b(folder: Path, *args: Any) -> Any:
        return stop() if "b" in folder.parts else plain["heldout_figures"](folder, *args)

    monkeypatch.setattr(stage, "merge_weights", lambda *args: merged.append("") or plain["merge_weights"](*args))
    for name, replacement in (("copy_companions", stop), ("heldout_figures", stop_at_b), ("link_files", stop)):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(stage, name, replacement)
            run(config, world, tmp_path / "out")
    assert len(merged) == 2  # made once more, because it was not whole
    with monkeypatch.context() as patch:
        patch.setattr(stage, "unpruned", stop)  # everything has been measured
        again = run(config, world, tmp_path / "out")
    assert again == whole and content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_stage_without_variants_is_refused(world: Inputs, tmp_path: Path) -> None:
    inputs = Inputs(world.base, world.model, world.stages | {"distill": world.stages["prune"]})
    with pytest.raises(UserError, match="the distill stage trained no variants"):
        run(section("linear", parameters=WEIGHT), inputs, tmp_path / "out")


def test_a_merge_that_is_not_finite_is_an_error(world: Inputs, tmp_path: Path) -> None:
    config = section("linear", parameters={"weight": 3e38, "normalize": False})
    with pytest.raises(UserError, match=r"produced an unusable model; change merge\.parameters"):
        run(config, world, tmp_path / "out")


# The chain ----------------------------------------------------------------------------------------------------------

RECIPE = """
name: chain
model: MODEL
seed: 7
data: {source: texts, rows: 12, tokens: 24, heldout: 0.25}
prune: {blocks: 1, calibration: {tokens: 512, length: 64}}
distill:
  objective: kd
  tune: {kind: lora, rank: 4}
  lr: 0.02
  length: 64
  max_steps: 4
  eval_every: 4
  select: last
  variants:
  - {name: early, rows: [0, 0.5]}
  - {name: late, rows: [0.5, 1], seed: 8}
merge: {method: slerp, parameters: {t: 0.5}, select: merge}
export: {gguf: [F16], imatrix_tokens: 256, verify: {tokens: 24, window: 24}}
evaluate: {window: 64, tokens: 64, speed: null, artifacts: false}
"""


@pytest.fixture(scope="module")
def chain(tiny: Callable[..., Path], tmp_path_factory: Any) -> tuple[Path, Path]:
    """The recipe and the folder of its finished run."""
    root = tmp_path_factory.mktemp("chain")
    (root / "r.yaml").write_text(RECIPE.replace("MODEL", str(tiny(**SIZES))))
    planned = plan_run(Recipe.load(str(root / "r.yaml")), Options(root / "runs"))
    execute(planned, Progress())
    finish(planned, len(planned.pending))
    return root / "r.yaml", root / "runs" / "chain"


def only(run_folder: Path, stage_name: str) -> Path:
    (folder,) = run_folder.glob(f"{stage_name}-*")
    return folder


def test_the_merge_is_exported_measured_and_reported(chain: tuple[Path, Path]) -> None:
    folder = chain[1]
    merge, distill = only(folder, "merge"), only(folder, "distill")
    a, b, merged = (
        load_file(path / "model.safetensors")
        for path in (distill / "variants" / "early" / "model", distill / "variants" / "late" / "model", merge / "model")
    )
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(a[name], b[name]) and not torch.equal(a[name], merged[name])
    (file,) = (only(folder, "export") / "bundle" / "gguf").glob("*.gguf")
    exported = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    assert np.array_equal(exported["blk.0.ffn_down.weight"], merged[name].half().numpy())
    models = json.loads((only(folder, "evaluate") / "models.json").read_text())
    assert [entry["role"] for entry in models] == ["base", "pruned", "healed", "recovered", "merged"]
    report = json.loads((folder / "report.json").read_text())
    assert report["merge"] == json.loads((merge / "merge.json").read_text())
    assert report["variants"] == json.loads((distill / "variants.json").read_text())
    assert "Variants and their merge" in (folder / "report.html").read_text(encoding="utf-8")
    for variant in report["variants"]["variants"]:  # what training measured is what is measured of the saved model
        (saved,) = (entry for entry in report["merge"]["models"] if entry["name"] == variant["name"])
        assert saved["eval_kl"] == pytest.approx(variant["best"]["eval_kl"], rel=1e-3)
        assert saved["eval_perplexity"] == pytest.approx(variant["best"]["eval_perplexity"], rel=1e-3)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(inspection_table(inspect(merge)))
    assert re.search(r"selected\W+merge", console.export_text())
    for path in merge.rglob("*"):
        assert path.is_dir() or path.name == "manifest.json" or str(folder).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("override", "pending"),
    [
        ("seed=7", []),
        ("merge.parameters.t=0.25", ["merge", "export", "evaluate"]),
        ("distill.variants.1.lr=0.01", ["distill", "merge", "export", "evaluate"]),
    ],
)
def test_a_changed_key_makes_again_what_it_touches(chain: tuple[Path, Path], override: str, pending: list[str]) -> None:
    recipe, folder = chain
    planned = plan_run(Recipe.load(str(recipe), [override]), Options(folder.parent))
    assert [stage.spec.name for stage in planned.pending] == pending


def test_the_plan_counts_every_variant_and_the_merge(chain: tuple[Path, Path]) -> None:
    recipe, folder = chain

    def planned(*overrides: str) -> dict[str, Need]:
        made = make_plan(Recipe.load(str(recipe), overrides), "float32", folder.parent)
        return {stage.name: stage.need for stage in made.stages}

    plan, alone = planned(), planned("distill.variants=null", "merge=null")
    size = (only(folder, "merge") / "model" / "model.safetensors").stat().st_size
    assert plan["distill"].disk == 2 * alone["distill"].disk and plan["distill"].peak == alone["distill"].peak
    assert plan["merge"].disk == pytest.approx(size, rel=0.05) and plan["merge"].peak > plan["merge"].disk
    assert planned("distill.variants.1.tune=full")["distill"].peak > plan["distill"].peak


@pytest.mark.parametrize(("kept", "roles"), [("b", []), ("a", ["merged"]), ("merge", ["merged"])])
def test_evaluation_measures_what_the_merge_hands_on_once(
    world: Inputs, tmp_path: Path, kept: str, roles: list[str]
) -> None:
    """The distill stage's own choice is b."""
    shutil.copytree(world.model, tmp_path / "model")
    MergeRecord(config={"method": "linear", "models": []}, chosen=kept, models=[]).write(tmp_path)
    stages = {"distill": world.stages["distill"], "merge": tmp_path}
    found = checkpoints(Inputs(world.base, tmp_path / "model", stages), Context())
    assert [subject.role for subject in found] == ["base", "recovered", *roles]


# The command --------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", "merge", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_checkpoints_are_merged_by_hand(world: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (world.stages["distill"] / "variants" / name / "model" for name in "ab")
    pair = {"a": a, "b": b, "start": world.base}
    uneven = [{"model": "a"}, {"model": "b", "parameters": {"weight": 3.0}}]
    for number, (options, config) in enumerate(
        [
            ([], section("slerp", parameters={"t": 0.5})),
            (["--set", "parameters.t=0.3"], section("slerp", parameters={"t": 0.3})),
            (["--method", "linear"], section("linear", parameters=WEIGHT)),
            (
                ["--method", "linear", "--set", "models.1.parameters.weight=3"],
                section("linear", parameters=WEIGHT, models=uneven),
            ),
            (
                ["--method", "dare_ties", "--base", world.base, "--seed", 5, "--set", "parameters.density=0.5"],
                section("dare_ties", parameters=WEIGHT | {"density": 0.5}),
            ),
        ]
    ):
        assert command(monkeypatch, a, b, *options, "--out", tmp_path / f"cli{number}") == 0
        stage.merge_checkpoints(config.among(["a", "b"]), pair, tmp_path / f"api{number}", Context(seed=5))
        assert content(tmp_path / f"cli{number}") == content(tmp_path / f"api{number}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "slurp"], "mergekit has no method 'slurp'; did you mean 'slerp'"),
        (["--method", "ties"], "ties needs a base model; name the model that all were trained from (--base)"),
        (["--set", "t=0.5"], "t: unknown key 't'; "),
        (["--set", "parameters.tt=0.5"], "slerp has no parameter 'tt'"),
        (["--out", "."], "--out .: "),
    ],
)
def test_a_merge_by_hand_that_is_refused(
    world: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    a, b = (world.stages["distill"] / "variants" / name / "model" for name in "ab")
    assert command(monkeypatch, a, b, "--out", tmp_path / "m", *options) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "m").exists()
