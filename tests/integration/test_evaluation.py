"""Perplexity, agreement and tasks against slow, obvious references on tiny random models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs
from compress.data.chat import Encoded
from compress.evaluation import stage as evaluation_stage
from compress.evaluation.config import EvaluateConfig
from compress.evaluation.generation import Exercise
from compress.evaluation.language import (
    BaseLogProbs,
    log_probs,
    measure_base,
    measure_engine,
    measure_model,
    targets,
    text_windows,
)
from compress.evaluation.suite import MeasuredModel
from compress.evaluation.tasks import (
    ChoiceQuestion,
    choice_scores,
    engine_scores,
    read_questions,
    read_task,
    run_task,
    split_tokens,
)
from compress.modeling.blocks import record_depths
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from compress.records.importance import Importance

TEXT = "The library opens at nine. Anna returned three books, paid a fine and walked home along the river. " * 6


def silent(n: int = 1, note: str = "") -> None:
    return None


@pytest.fixture(scope="module")
def pair(tiny) -> tuple[Any, Any, Any]:
    """Two different models of one vocabulary, and their tokenizer."""
    first, second = tiny(seed=1), tiny(seed=2, blocks=3)
    return load_model(first), load_model(second), load_tokenizer(first)


@pytest.fixture
def rows(pair, tmp_path) -> list[Encoded]:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    found = text_windows(pair[2], tmp_path / "text.txt", None, 150, 450)
    found[1] = Encoded(found[1].input_ids, [i % 3 == 0 for i in range(150)])  # a mask as conversations have it
    return found


@torch.no_grad()
def slow_figures(base: Any, model: Any, rows: list[Encoded]) -> dict[str, float]:
    """Token by token, in float64, from whole logits."""
    nll, kl, agree, count = 0.0, 0.0, 0, 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        p = base(ids).logits[0].double().log_softmax(-1)
        q = model(ids).logits[0].double().log_softmax(-1)
        for t in range(1, len(row.input_ids)):
            if row.loss_mask[t]:
                nll -= float(q[t - 1, row.input_ids[t]])
                kl += float((p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum())
                agree += int(p[t - 1].argmax() == q[t - 1].argmax())
                count += 1
    return {"perplexity": math.exp(nll / count), "kl_to_base": kl / count, "top1_agreement": agree / count}


def written(base: Any, rows: list[Encoded], folder: Path) -> BaseLogProbs:
    positions = sum(len(targets(row)) for row in rows)
    reference = BaseLogProbs(folder / "base.float16", positions, base.config.vocab_size)
    assert not reference.complete
    reference.write(log_probs(base, rows, silent))
    assert reference.complete
    return reference


def test_figures_match_the_slow_reference(pair, rows, tmp_path):
    base, model, _ = pair
    reference = written(base, rows, tmp_path)
    assert sum(len(targets(row)) for row in rows) > 128  # more than one chunk
    found, slow = measure_model(model, rows, reference, silent), slow_figures(base, model, rows)
    # Half precision is kept of the base's whole distributions; its first choices and what follows are kept exactly.
    assert found["kl_to_base"] == pytest.approx(slow["kl_to_base"], rel=1e-4)
    assert found == pytest.approx(slow | {"kl_to_base": found["kl_to_base"]}, rel=1e-5)
    assert measure_base(reference, rows) == pytest.approx(slow_figures(base, base, rows), rel=1e-5, abs=1e-9)
    itself = measure_model(base, rows, reference, silent)
    assert (
        itself["kl_to_base"] is not None and 0 <= itself["kl_to_base"] < 1e-6
    )  # what rounding to half precision makes of none
    assert itself["top1_agreement"] == 1


def test_a_base_takes_two_bytes_per_log_probability_and_comes_whole_or_not_at_all(pair, rows, tmp_path):
    base, _, _ = pair
    reference = written(base, rows, tmp_path)
    positions, vocab = reference.shape
    assert reference.file.stat().st_size == 2 * positions * vocab
    logs = torch.cat([logs for logs, _ in log_probs(base, rows, silent)])
    known = reference.open()
    assert (known.top == logs.argmax(-1).numpy()).all()
    kept = torch.from_numpy(known[0:positions])
    assert kept.exp().sum(-1) == pytest.approx(1, abs=1e-5)
    assert (kept - logs).abs().max() < 2**-11 * logs.abs().max() + 1e-3
    impossible = logs[:2].clone()
    impossible[:, 0] = -torch.inf  # no half-precision number, and none that arithmetic could go on with
    other = BaseLogProbs(tmp_path / "other.float16", 2, vocab)
    other.write(iter([(impossible, torch.tensor([1, 2]))]))
    assert (other.open()[0:2][:, 0] < -5e4).all()
    other.beside.unlink()
    assert not other.complete


def test_artifacts_get_the_figures_of_the_model_they_hold(pair, rows, tmp_path, torch_engine):
    base, model, _ = pair
    reference = written(base, rows, tmp_path)
    expected = measure_model(model, rows, reference, silent)
    totals = measure_engine(torch_engine(model), rows, reference, None, silent)
    assert totals.metrics() == pytest.approx(expected, rel=1e-4)
    assert len(totals.kls) == totals.tokens and sum(totals.kls) == pytest.approx(totals.kl)
    listed = measure_engine(torch_engine(model), rows, reference, 20, silent).metrics()
    assert listed["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert listed["top1_agreement"] == expected["top1_agreement"]
    assert 0 < listed["kl_to_base"] < expected["kl_to_base"]  # the unlisted tokens count as one: a lower bound


def test_without_a_base_there_is_no_agreement(pair, rows):
    found = measure_model(pair[0], rows, None, silent)
    assert (found["kl_to_base"], found["top1_agreement"]) == (None, None)


def test_text_windows(pair, tmp_path):
    tokenizer, file = pair[2], tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    whole = tokenizer(TEXT, add_special_tokens=False).input_ids
    windows = text_windows(tokenizer, file, None, 64, 200)
    assert [len(row.input_ids) for row in windows] == [64, 64, 64]
    assert [t for row in windows for t in row.input_ids] == whole[:192]
    assert [targets(row) for row in windows] == [list(range(1, 64))] * 3
    short = text_windows(tokenizer, file, None, 100_000, 50)  # a window longer than the text
    assert [row.input_ids for row in short] == [whole[:50]]
    file.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="too short"):
        text_windows(tokenizer, file, None, 64, 200)
    with pytest.raises(UserError, match="name a text file"):
        text_windows(tokenizer, None, None, 64, 200)


@torch.no_grad()
def slow_choice(model: Any, tokenizer: Any, row: ChoiceQuestion, number: int) -> float:
    """One choice by itself, no cache: the log-likelihood of all tokens that the other choices do not share."""
    prompt, endings = split_tokens(tokenizer, row)
    ids = prompt + endings[number]
    logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logs[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))


QUESTIONS = [
    ChoiceQuestion("What is water?", ["a liquid", "a colour of the evening sky", "no", "stone"], 0),
    ChoiceQuestion("Which letter comes first?", ["A", "B"], 0),
    ChoiceQuestion("Who walked home along the river in winter?", ["Anna", "nobody at all, as far as is known"], 1),
]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.question)
def test_choices_are_scored_as_if_each_ran_alone(pair, question, torch_engine):
    model, _, tokenizer = pair
    expected = [slow_choice(model, tokenizer, question, i) for i in range(len(question.choices))]
    assert choice_scores(model, tokenizer, question) == pytest.approx(expected, abs=1e-4)
    assert engine_scores(torch_engine(model), tokenizer, question) == pytest.approx(expected, abs=1e-4)


def test_prompt_and_endings_make_up_the_text(pair):
    tokenizer = pair[2]
    for question in QUESTIONS:
        prompt, endings = split_tokens(tokenizer, question)
        for choice, ending in zip(question.choices, endings, strict=True):
            assert ending
            assert prompt + ending == tokenizer(f"Question: {question.question}\nAnswer: {choice}").input_ids


def test_accuracy_counts_sums_and_sums_per_byte():
    rows = [
        ChoiceQuestion("q", ["short", "a much longer choice"], 0),
        ChoiceQuestion("q", ["short", "a much longer choice"], 1),
    ]
    # −4 nats over 5 bytes, −5 over 20: the sum prefers the first, the sum per byte the second.
    found = run_task(lambda row: [-4.0, -5.0], rows, silent)
    assert (found.metrics, found.n) == ({"accuracy": 0.5, "accuracy_norm": 0.5}, 2)
    assert (found.scores, found.value, found.chance) == ([0.0, 1.0], 0.5, 0.5)
    first = run_task(lambda row: [-4.0, -5.0], rows[:1], silent)
    assert (first.metrics, first.value) == ({"accuracy": 1.0, "accuracy_norm": 0.0}, 0.0)


def line(**changes: object) -> str:
    return json.dumps({"question": "q", "choices": ["a", "b", "c"], "answer": 1} | changes)


def test_tasks_are_read(tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_text("\n".join([line(), "", line(answer="C"), line(answer="a"), line()]), encoding="utf-8")
    assert [row.answer for row in read_questions(file)] == [1, 2, 0, 1]
    assert len(read_task(file, limit=2)) == 2


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[]",
        line(choices=["a"]),
        line(choices=["a", ""]),
        line(choices="abc"),
        line(answer=3),
        line(answer=-1),
        line(answer=True),
        line(answer="D"),
        line(question=None),
        json.dumps({"question": "q", "choices": ["a", "b"]}),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path, broken):
    file = tmp_path / "task.jsonl"
    file.write_text(f"{line()}\n{broken}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"task\.jsonl:2|line 2 of .*task\.jsonl"):
        read_task(file)


def test_a_task_without_rows_is_refused(tmp_path):
    (tmp_path / "task.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="no rows"):
        read_task(tmp_path / "task.jsonl")
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        read_task(tmp_path / "missing.jsonl")


PRUNED = Importance(
    blocks=4,
    dropped=[1],
    importance="angular",
    position="all",
    search="window",
    tokens=64,
    values=[0.1] * 4,
    distances={},
    trials={},
    curve=[],
    kept=[0, 2, 3],
    healing=[],
)


def test_the_stage_measures_each_model_once_and_goes_on_after_a_kill(tiny, tmp_path, monkeypatch):
    folder = tiny(seed=1)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "task.jsonl").write_text(f"{line()}\n{line()}\n", encoding="utf-8")
    prune = tmp_path / "prune-0123"
    prune.mkdir()
    PRUNED.write(prune)
    config = EvaluateConfig.model_validate(
        {"text": "text.txt", "tasks": ["task.jsonl"], "window": 64, "tokens": 128, "speed": None}
    )
    context, inputs, out = Context(recipe_dir=tmp_path), Inputs(folder, folder, {"prune": prune}), tmp_path / "out"
    out.mkdir()
    measured: list[str] = []
    original = evaluation_stage.Bench._torch

    def torch_once(bench: Any, subject: Any) -> MeasuredModel:
        if subject.role == "pruned" and "base" in measured and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        measured.append(subject.role)
        return original(bench, subject)

    killed: list[bool] = []
    monkeypatch.setattr(evaluation_stage.Bench, "_torch", torch_once)
    with pytest.raises(KeyboardInterrupt):
        evaluation_stage.run(config, inputs, out, context)
    evaluation_stage.run(config, inputs, out, context)
    assert measured == ["base", "pruned"]
    models = json.loads((out / "models.json").read_text())
    assert [m["role"] for m in models] == ["base", "pruned"]
    base, pruned = models
    assert base["kl_to_base"] == pytest.approx(0, abs=1e-9)
    assert pruned["blocks"] == base["blocks"] - 1
    assert pruned["kl_to_base"] > 0
    assert pruned["parameters"] < base["parameters"]
    task = pruned["tasks"]["task"]
    assert (task["n"], task["metric"], task["chance"]) == (2, "accuracy_norm", pytest.approx(1 / 3))
    assert task["difference"] == task["value"] - base["tasks"]["task"]["value"]
    assert "difference" not in base["tasks"]["task"]
    answers = [json.loads(row) for row in (out / "answers.jsonl").read_text().splitlines()]
    assert [(row["task"], row["model"], len(row["scores"])) for row in answers] == [
        ("task", "base", 2),
        ("task", "pruned", 2),
    ]
    assert (out / WORK / "base.float16").exists()


def test_a_sorted_model_is_measured_at_every_depth(tiny, tmp_path):
    """As the models that are cut off there; by the stage and by `compress eval`."""
    folder, sorted_folder = tiny(seed=1), tmp_path / "sort" / "model"
    other, tokenizer = load_model(tiny(seed=2)), load_tokenizer(folder)
    record_depths(other.config, [1, 3, 4])
    save_checkpoint(other, tokenizer, sorted_folder)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    config = EvaluateConfig.model_validate(
        {
            "text": str(tmp_path / "text.txt"),
            "window": 64,
            "tokens": 128,
            "speed": {"prompt_tokens": 4, "new_tokens": 2},
        }
    )
    out, context = tmp_path / "out", Context()
    out.mkdir()
    evaluation_stage.run(config, Inputs(folder, sorted_folder, {"sort": tmp_path / "sort"}), out, context)
    models = json.loads((out / "models.json").read_text())
    assert [(m["role"], m["blocks"]) for m in models] == [("base", 4), ("depth-1", 1), ("depth-3", 3), ("depth-4", 4)]
    base, rows = load_model(folder), text_windows(tokenizer, tmp_path / "text.txt", None, 64, 128)
    for found in models[1:]:
        cut = load_model(sorted_folder)
        cut.model.layers = cut.model.layers[: found["blocks"]]
        wanted = slow_figures(base, cut, rows)
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
        assert found["tokens_per_second"] > 0
        assert found["parameters"] == sum(p.numel() for p in cut.parameters())
    (tmp_path / "work").mkdir()
    again = evaluation_stage.evaluate_path(sorted_folder, config, context, folder, tmp_path / "work")
    assert [(m.role, m.perplexity) for m in again] == [(m["role"], m["perplexity"]) for m in models]


def test_missing_files_are_refused_before_any_work(tiny, tmp_path):
    with pytest.raises(UserError, match=r"evaluate\.text"):
        evaluation_stage.check(EvaluateConfig(text="none.txt"), tiny(), Context(recipe_dir=tmp_path))
    with pytest.raises(UserError, match=r"none\.jsonl"):
        evaluation_stage.check(EvaluateConfig(tasks=["none.jsonl"]), tiny(), Context(recipe_dir=tmp_path))


def test_task_files_are_read_literally(tmp_path):
    file = tmp_path / "in [a]" / "t*.jsonl"
    file.parent.mkdir()
    rows = [
        '{"question": "which\u2028word\x85", "choices": ["one", 0.10], "answer": 1}',
        "",
        '{"question": "x", "choices": ["a", "b"], "answer": "B"}',
    ]
    for begin, end in (("", "\n"), ("\ufeff", "\r\n")):
        file.write_bytes((begin + end.join(rows)).encode())
        found = read_task(file)
        assert [(q.question, q.choices, q.answer) for q in found if isinstance(q, ChoiceQuestion)] == [
            ("which\u2028word\x85", ["one", "0.10"], 1),
            ("x", ["a", "b"], 1),
        ]
    file.write_text('{"prompt": "how much", "answer": 1.50}')
    (exercise,) = read_task(file)
    assert isinstance(exercise, Exercise) and exercise.answer == "1.50"
    file.write_bytes('{"prompt": "x", "answer": "y"}'.encode("utf-16"))
    with pytest.raises(UserError, match=r"line 1 of .*t\*\.jsonl is not UTF-8 text: its byte order mark says UTF-16"):
        read_task(file)
    file.write_text(r'{"prompt": "bad \ud83d", "answer": "y"}')
    with pytest.raises(UserError, match="half of a surrogate pair"):
        read_task(file)
