"""Several students from one section: each is what it would be alone, the best goes on, each resumes by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs, Progress
from compress.data.chat import load_encoded
from compress.distill import stage
from compress.distill.config import DistillConfig
from compress.distill.variants import choose, plan_jobs
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from compress.records.students import HeldOutFigures
from compress.training import run as training
from compress.training import students
from compress.training.job import share
from pydantic import ValidationError
from transformers import Trainer

SECTION: dict[str, Any] = {
    "objective": "kd",
    "tune": {"kind": "lora", "rank": 2},
    "lr": 1e-2,
    "length": 64,
    "max_steps": 4,
    "accumulate": 2,
    "eval_every": 2,
    "save_every": 2,
}
A: dict[str, Any] = {"name": "a", "rows": [0, 0.5], "seed": 11}
B: dict[str, Any] = {"name": "b", "rows": [0.5, 1], "objective": "sft", "lr": 5e-3, "max_steps": 3}


def section(**options: Any) -> DistillConfig:
    return DistillConfig.model_validate(SECTION | options)


class Stop(KeyboardInterrupt):
    pass


def stop(*_: Any, **__: Any) -> None:
    raise Stop


class Notes(Progress):
    """Keeps the notes; raises at the n-th step of the bar that is labelled so."""

    def __init__(self, label: str = "", step: int = 0):
        self.notes: list[str] = []
        self.label, self.step = label, step

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Any:
        left = [self.step + 1 if label == self.label else 0]  # the first call tells where the run starts

        def advance(n: int = 1, note: str = "") -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Stop

        yield advance


@pytest.fixture(scope="module")
def inputs(tiny: Callable[..., Path], talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    base = tiny(blocks=4, hidden=32, heads=2, kv_heads=1, intermediate=48, seed=2)
    model = load_model(base)
    drop_blocks(model, [1])
    pruned = tmp_path_factory.mktemp("variants") / "pruned"
    save_checkpoint(model, load_tokenizer(base), pruned)
    return Inputs(base, pruned, {"data": talks})


def run(config: DistillConfig, inputs: Inputs, out: Path, seed: int = 7, progress: Progress | None = None) -> Any:
    out.mkdir(exist_ok=True)
    return stage.run(config, inputs, out, Context(seed=seed, progress=progress or Progress()))


def content(folder: Path) -> dict[str, bytes]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and WORK not in file.parts)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    """Figures without how long they took."""
    return {
        key: untimed(value) if isinstance(value, dict) else value
        for key, value in metrics.items()
        if key != "seconds_training"
    }


def test_each_variant_is_what_it_is_alone_and_the_best_goes_on(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    plain = students.hold_out
    monkeypatch.setattr(students, "hold_out", lambda *args: ran.append(args) or plain(*args))
    progress = Notes()
    metrics = run(
        section(variants=[A | {"rows": [0, 1]}, B | {"rows": [0, 1]}]), inputs, tmp_path / "v", progress=progress
    )
    assert len(ran) == 1  # the unpruned model's states on the held-out rows are computed once
    own = {"a": ({}, 11), "b": ({"objective": "sft", "lr": 5e-3, "max_steps": 3}, 7)}
    alone = {name: run(section(**options), inputs, tmp_path / name, seed) for name, (options, seed) in own.items()}
    for name in own:
        found = content(tmp_path / "v" / "variants" / name)
        assert found == content(tmp_path / name) and "model/model.safetensors" in found
        assert untimed(metrics["variants"][name]) == untimed(alone[name])
    best = min(alone, key=lambda name: alone[name]["best"]["eval_kl"])
    assert metrics["chosen"] == best and progress.notes[-1] == f"selected variant: {best} of 2"
    assert {key: metrics[key] for key in ("best", "objective", "steps")} == {
        key: alone[best][key] for key in ("best", "objective", "steps")
    }
    assert {path.name for path in (tmp_path / "v").iterdir()} == {
        "model",
        "curves.jsonl",
        "variants",
        "variants.json",
        WORK,
    }
    chosen = tmp_path / "v" / "variants" / best
    assert content(tmp_path / "v" / "model") == content(chosen / "model")
    assert (tmp_path / "v" / "model" / "model.safetensors").samefile(chosen / "model" / "model.safetensors")
    assert (tmp_path / "v" / "curves.jsonl").read_bytes() == (chosen / "curves.jsonl").read_bytes()
    record = json.loads((tmp_path / "v" / "variants.json").read_text())
    assert (record["length"], record["batch"], record["chosen"]) == (64, 1, best)
    assert [(v["name"], v["seed"], v["rows"], v["best"]) for v in record["variants"]] == [
        (name, seed, [0, 1], alone[name]["best"]) for name, (_, seed) in own.items()
    ]
    assert "seconds_training" not in json.dumps(record)


def test_slices_share_no_row_and_leave_none_out(inputs: Inputs, tmp_path: Path) -> None:
    parts = [("a", [0, 0.3]), ("b", [0.3, 0.55]), ("c", [0.55, 1])]
    config = section(variants=[{"name": name, "rows": rows} for name, rows in parts])
    jobs = plan_jobs(config, tmp_path, Context())
    assert [share(range(18), job) for job in jobs] == [list(range(5)), list(range(5, 10)), list(range(10, 18))]
    rows = load_encoded(inputs.stages["data"], load_tokenizer(inputs.model), "train", 64)
    batches = [training.load_batches(job, rows, load_tokenizer(inputs.model), 64) for job in jobs]
    tokens = [sum(len(row.input_ids) for row in part) for part in (rows[:5], rows[5:10], rows[10:])]
    assert [sum(batch.tokens for batch in part) for part in batches] == tokens
    with pytest.raises(UserError, match=r"variants: a has no rows: \[0\.0, 0\.3\] of 1 training rows; give it a wider"):
        share(range(1), jobs[0])


def test_a_killed_run_goes_on_with_the_variant_it_was_at(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = section(variants=[A, B], tune={"kind": "lora", "rank": 2, "dropout": 0.2})
    whole = run(config, inputs, tmp_path / "whole")
    out, started = tmp_path / "killed", []
    plain_train = Trainer.train

    def note_start(self: Any, resume_from_checkpoint: str | None = None) -> Any:
        started.append(resume_from_checkpoint and "/".join(Path(resume_from_checkpoint).parts[-3:]))
        return plain_train(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(Trainer, "train", note_start)
    for label, step in (("a: training", 3), ("b: training", 1), ("b: training", 3)):
        with pytest.raises(Stop):
            run(config, inputs, out, progress=Notes(label, step))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(stage, "link_files", stop)
        run(config, inputs, out)
    assert started == [None, "a/trainer/checkpoint-2", None, None, "b/trainer/checkpoint-2"]
    assert not list(out.glob(f"{WORK}/*/trainer"))  # optimizer states make room for the next variant
    with monkeypatch.context() as patch:
        patch.setattr(students.Preparation, "student", stop)  # with all of them finished no model is loaded
        again = run(config, inputs, out)
    assert len(started) == 5
    assert content(out) == content(tmp_path / "whole")
    assert untimed(again) == untimed(whole)


def test_the_figure_that_select_names_chooses() -> None:
    figures = {
        "a": HeldOutFigures(step=1, eval_loss=1.0, eval_kl=2.0, eval_perplexity=5.0),
        "b": HeldOutFigures(step=1, eval_loss=1.0, eval_kl=1.0, eval_perplexity=6.0),
        "c": HeldOutFigures(step=1, eval_loss=1.0, eval_kl=1.0, eval_perplexity=9.0),
    }
    found = {select: choose(section(select=select), figures) for select in ("kl", "perplexity", "loss", "last")}
    assert found == {"kl": "b", "perplexity": "a", "loss": "b", "last": "b"}


def test_what_a_variant_overrides() -> None:
    config = section(variants=[A | {"epochs": 2}, B, {"name": "c", "epochs": 3, "max_steps": 9, "tune": "full"}])
    assert config.variants is not None
    a, b, c = (config.of(variant) for variant in config.variants)
    assert (a.epochs, a.max_steps, a.objective.kind, a.variants) == (2, None, "kd", None)
    assert (b.epochs, b.max_steps, b.objective.kind, b.lr) == (None, 3, "sft", 5e-3)
    assert (c.epochs, c.max_steps, c.tune.kind, c.lr) == (3, 9, "full", 1e-2)
    assert b.model_copy(update={"objective": config.objective, "lr": 1e-2, "max_steps": 4}) == section()


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([A], "variants needs two or more entries; for a single student leave the key out"),
        ([A, A | {"seed": 3}], "two variants are named 'a'"),
        ([A, A | {"name": "b"}], "a and b would be the same student; give one of them another seed"),
        ([A, B | {"name": "start"}], "a variant cannot be named 'start'"),
        ([A, B | {"name": "merge"}], "a variant cannot be named 'merge'"),
        ([A, B | {"name": "../b"}], "should match pattern"),
        ([A, B | {"rows": [0.5, 0.5]}], r"\[from, to\] with 0 <= from < to <= 1"),
        ([A, B | {"rows": [0.5, 1.5]}], r"\[from, to\] with 0 <= from < to <= 1"),
        ([A, B | {"length": 32}], "Extra inputs are not permitted"),  # the held-out rows are the same for all
    ],
)
def test_variants_that_are_refused(variants: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(variants=variants)


def test_a_variant_tuned_in_full_cannot_share_its_weights_with_the_teacher() -> None:
    section(variants=[A, B], teacher="shared")
    with pytest.raises(ValidationError, match="teacher: shared needs LoRA"):
        section(variants=[A, B | {"tune": "full"}], teacher="shared")


@pytest.mark.parametrize("teacher", ["copy", "shared"])
def test_held_out_states_are_shared_by_students_that_run_the_unpruned_model_alike(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    """Of sft, kd and kd the first has no teacher beside it, and runs a copy."""
    ran: list[str] = []
    plain = students.hold_out

    def note(held: Any, way: Any, *where: Any) -> Any:
        ran.append(type(way).__name__)
        return plain(held, way, *where)

    monkeypatch.setattr(students, "hold_out", note)
    variants = [{"name": "a", "objective": "sft"}, {"name": "b"}, {"name": "c", "seed": 3}]
    metrics = run(section(variants=variants, teacher=teacher, max_steps=1), inputs, tmp_path / "v")
    assert ran == (["CopyTeacher"] if teacher == "copy" else ["CopyTeacher", "SharedTeacher"])
    before = [metrics["variants"][name]["before"]["eval_kl"] for name in "abc"]
    assert before == pytest.approx([before[0]] * 3, rel=1e-4)


def test_bits_of_a_variant_need_bitsandbytes(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = section(variants=[A, B | {"tune": {"kind": "lora", "quantize_base": "nf4"}}])
    with pytest.raises(UserError, match="distill: nf4 needs bitsandbytes"):
        stage.check(config, inputs.base, Context())
    stage.check(section(variants=[A, B]), inputs.base, Context())
