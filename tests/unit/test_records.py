"""Records of stages: what is written is read again, and what is damaged is named by file and key."""

from __future__ import annotations

import json

import pytest
from compress.core.errors import UserError
from compress.records.importance import CurvePoint, Healing, Importance
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
