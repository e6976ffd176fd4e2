"""Records of stages: what is written is read again, and what is damaged is named by file and key."""

from __future__ import annotations

import json

import pytest
from compress.core.errors import UserError
from compress.records.curves import TrainingStep, append_line, head_lines, student_lines, write_lines
from compress.records.figures import DataFigures, DistillFigures, EvaluateFigures, SortFigures
from compress.records.importance import CurvePoint, Healing, Importance
from compress.records.manifest import StageManifest
from compress.records.merge import Merged, MergeRecord
from compress.records.models import ModelEntry, Models, RetrievalResult, TaskResult
from compress.records.record import Record
from compress.records.students import HeldOutDepth, HeldOutFigures, VariantFigures, Variants

HELD = {"step": 3, "eval_loss": 1.5, "eval_kl": 0.25, "eval_perplexity": 4.0}
VARIANT = {"name": "ä", "seed": 1, "rows": [0.0, 0.5], "objective": "kd", "steps": 4, "trainable_parameters": 8}
VARIANT |= {"before": HELD, "last": HELD, "best": HELD, "target_tokens": 5, "train_tokens": 6}


def importance() -> Importance:
    return Importance(
        blocks=3,
        dropped=[1],
        importance="angular",
        position="all",
        search="greedy",
        tokens=64,
        values=[0.5, 0.25, 1.0],
        distances={"all": {"angular": [[0.5, 0.25, 1.0]]}},
        trials={"passes": 2.5, "rounds": [{"dropped": [1], "score": 3.0}]},
        curve=[
            CurvePoint(
                dropped=[1], pruned=9.0, healed=5.0, pruned_ratio=2.0, healed_ratio=1.25, size=0.75, latency=None
            )
        ],
        kept=[0, 2],
        healing=[Healing(0, (1, 1), 0.1, {"0.1": 0.5}, 0.75, 64)],
    )


def variants() -> Variants:
    return Variants(length=64, batch=2, chosen="ä", variants=[VariantFigures.model_validate(VARIANT)])


def merge() -> MergeRecord:
    models = [Merged(name="merge", merged=False, eval_kl=0.5, eval_perplexity=4.0)]
    return MergeRecord(config={"method": "slerp", "models": [{"model": "a"}]}, chosen="merge", models=models)


def models() -> Models:
    task = TaskResult(kind="choice", metric="accuracy_norm", value=0.5, n=4, chance=0.25, metrics={"accuracy": 0.5})
    found = RetrievalResult(
        task="keys",
        length=64,
        depth=0.5,
        policy="recent",
        budget=0.25,
        entries=16,
        kv_bytes=9,
        n=1,
        value=1.0,
        nats=2.0,
    )
    figures = {"role": "base", "runtime": "torch", "blocks": 3, "parameters": 9, "bytes": 36, "perplexity": 4.0}
    return Models([ModelEntry(**figures, positions=7, tasks={"t": task}, retrieval=[found])])


@pytest.mark.parametrize("record", [importance(), variants(), merge(), models()], ids=lambda record: record.FILE)
def test_what_is_written_is_read_again(record: Record, tmp_path):
    record.write(tmp_path)
    again = type(record).read(tmp_path)
    assert again == record
    before = (tmp_path / record.FILE).read_bytes()
    again.write(tmp_path)
    assert (tmp_path / record.FILE).read_bytes() == before


def test_files_have_their_keys_in_order_and_none_that_was_not_given(tmp_path):
    variants().write(tmp_path)
    text = (tmp_path / "variants.json").read_text(encoding="ascii")  # other characters as \uXXXX
    values = {"length": 64, "batch": 2, "chosen": "ä", "variants": [VARIANT]}
    assert text == json.dumps(values, indent=1) + "\n"
    models().write(tmp_path)
    text = (tmp_path / "models.json").read_text()
    (entry,) = json.loads(text)
    assert "top1_agreement" not in entry and "low" not in entry["tasks"]["t"]
    assert text == json.dumps([entry], indent=2) + "\n"
    importance().write(tmp_path)
    values = json.loads((tmp_path / "importance.json").read_text())
    assert values["curve"][0]["latency"] is None and "guard" not in values["trials"]


def test_depths_are_written_where_there_are_some():
    depths = [HeldOutDepth(depth=2, loss=1.0, kl=0.5, perplexity=4.0)]
    assert "eval_depths" not in HeldOutFigures.model_validate(HELD).model_dump()
    assert list(HeldOutFigures(**HELD, eval_depths=depths).model_dump()) == [*HELD, "eval_depths"]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda values: values.pop("dropped"), r"dropped: Field required"),
        (lambda values: values["dropped"].append("x"), r"dropped\.1: Input should be a valid integer"),
        (lambda values: values.update(later=1), r"later: Extra inputs are not permitted"),
        (lambda values: values["curve"][0].pop("size"), r"curve\.0\.size: Field required"),
        (lambda values: values["healing"][0].pop("gap"), r"healing\.0\.gap"),
        (lambda values: values["trials"].update(passes=[]), r"trials\.passes"),
    ],
)
def test_damage_and_other_versions_are_named_by_file_and_key(tmp_path, damage, what):
    importance().write(tmp_path)
    file = tmp_path / "importance.json"
    values = json.loads(file.read_text())
    damage(values)
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"importance\.json is not a prune stage's record of this version: {what}"):
        Importance.read(tmp_path)


def test_a_file_that_is_no_object_is_named(tmp_path):
    (tmp_path / "importance.json").write_text("[]")
    with pytest.raises(UserError, match=r"importance\.json is not a prune stage's record of this version: its content"):
        Importance.read(tmp_path)
    with pytest.raises(UserError, match=r"merge\.json does not exist"):
        MergeRecord.read(tmp_path)
    assert MergeRecord.read_if_there(tmp_path) is None and MergeRecord.read_if_there(None) is None


STEP = {"step": 1, "epoch": 0.5, "loss": 1.5, "nll": 2.5, "lr": 1e-4, "tokens": 7}


def test_curves_are_read_as_they_were_written(tmp_path):
    """Keys in their order, none that was not given, and nothing of a line that a kill cut short."""
    depth = {"depth": 2, "loss": 1.0, "kl": 0.5, "perplexity": 4.0}
    steps = [HELD, STEP, STEP | {"step": 2, "kl": 0.25, "depths": [depth]}, HELD | {"step": 4, "eval_depths": [depth]}]
    heads = [{"step": 0, "eval_loss": 3.0, "eval_recall": 0.5}, {"step": 1, "loss": 2.0, "lr": 1e-3}]
    heads.append({"step": 1, "eval_loss": 2.5})
    file = tmp_path / "curves.jsonl"
    for lines, read in ((steps, student_lines), (heads, head_lines)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        file.write_text(text + '{"step": 9')
        found = read(file)
        write_lines(file, found)
        assert file.read_text() == text
    student = [HeldOutFigures.model_validate(HELD), TrainingStep.model_validate(STEP)]
    file.unlink()
    assert student_lines(file) == []
    for line in student:
        append_line(file, line)
    assert student_lines(file) == student
    for damaged in (STEP | {"later": 1}, {"step": 1}):
        file.write_text(json.dumps(HELD) + "\n" + json.dumps(damaged) + "\n")
        with pytest.raises(UserError, match=r"line 2 of .*curves\.jsonl is not one of this version"):
            student_lines(file)


COUNTS = {"rows": 2, "train": 1, "heldout": 1, "seen": 4, "dropped": {"empty": 2}, "cut": 0, "kept_share": 0.5}
COUNTS |= {"tokens": 9, "targets": 5}
REWRITTEN = {"asked": 2, "origins": {"gold": 1}, "taken_share": 0.5, "gold_kept": {"differs": 1}}
STUDENT = {key: value for key, value in VARIANT.items() if key not in ("name", "seed", "rows")}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (DataFigures, COUNTS),
        (DataFigures, {**COUNTS, "rewritten": REWRITTEN, "tokens_per_second": 7.5}),
        (SortFigures, {"depths": [1, 2], **STUDENT}),
        (DistillFigures, {**STUDENT, "chosen": "b", "variants": {"b": STUDENT}}),
        (EvaluateFigures, {"models": 3, "tokens": 99, "text": "held-out self-data"}),
    ],
)
def test_metrics_have_their_keys_in_order_and_none_that_was_not_given(kind, values):
    assert json.dumps(kind.model_validate(values).model_dump()) == json.dumps(values)


def test_metrics_of_another_version_name_the_stage_and_the_key():
    values = {
        "stage": "evaluate", "fingerprint": "0a1b2c3d4e5f6a7b", "format": 1, "config": {}, "inputs": {},
        "base": {"source": "x", "fingerprint": "y"}, "seed": 0, "device": "cpu", "processes": 1, "versions": {},
        "machine": {}, "seconds": 1.0, "resumed": False, "peak_memory_bytes": 1, "peak_cuda_bytes": None,
    }  # fmt: skip
    manifest = StageManifest.model_validate({**values, "metrics": {"models": 1, "tokens": 5}})
    with pytest.raises(UserError, match=r"manifest of evaluate-0a1b2c3d4e5f .* metrics\.text: Field required; run the"):
        manifest.figures(EvaluateFigures)
    assert manifest.chosen is None
