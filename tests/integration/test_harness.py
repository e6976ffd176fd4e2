"""lm-eval's tasks, on local task files: against our own figures, in checkpoints and artifacts, and what is refused."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from compress.core.errors import UserError
from compress.core.stage import Context
from compress.evaluation import stage as evaluation_stage
from compress.evaluation.config import EvaluateConfig
from compress.evaluation.harness import _together
from compress.evaluation.statistics import TaskOutcome
from compress.evaluation.suite import EnginePlayer, Suite, TorchPlayer
from compress.modeling.load import load_model, load_tokenizer

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
SHOTS = "fewshot_split: test\nnum_fewshot: 1\n"
WRITTEN = """
output_type: generate_until
doc_to_text: "{{question}} is"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [" the"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
WORDS = "water people number place time word day look part sound work use".split()


def rows() -> list[dict[str, Any]]:
    """Questions whose choices differ in length, two to four of them."""
    found = []
    for i in range(24):
        choices = [" ".join(WORDS[(i + j * 3 + k) % 12] for k in range(1 + (i + j) % 3)) for j in range(2 + i % 3)]
        found.append({"question": f"what {WORDS[i % 12]} is there of {WORDS[(5 * i) % 12]}", "choices": choices})
        found[-1]["answer"] = i % len(choices)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    (folder / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()[:9]), encoding="utf-8")
    kinds = {"choice": CHOICE, "shots": CHOICE + SHOTS, "written": WRITTEN, "rolling": ROLLING, "half": CHOICE}
    (folder / "yaml").mkdir()
    for name, text in kinds.items():
        data = "../half.jsonl" if name == "half" else "../arc.jsonl"  # relative to the task file
        (folder / "yaml" / f"{name}.yaml").write_text(TASK.format(name=f"my_{name}", data=data) + text)
    (folder / "yaml" / "group.yaml").write_text("group: my_group\ntask: [my_choice, my_half]\n")
    (folder / "yaml" / "absent.yaml").write_text(TASK.format(name="my_absent", data="none.jsonl") + CHOICE)
    return folder


@pytest.fixture(scope="module")
def model(shaken) -> tuple[Path, Any, Any]:
    folder = shaken(initializer_range=0.4)
    return folder, load_model(folder), load_tokenizer(folder)


def suite(home: Path, tokenizer: Any, *tasks: str, **options: Any) -> Suite:
    config = EvaluateConfig.model_validate({"tasks": tasks, "harness": {"folder": "yaml"}} | options)
    return Suite(config, Context(seed=7, recipe_dir=home), tokenizer)


def test_accuracies_are_those_of_our_own_task_on_the_same_rows(home, model, torch_engine, capfd):
    _, torch_model, tokenizer = model
    tasks = suite(home, tokenizer, "my_choice", "arc.jsonl")
    for player in (TorchPlayer(torch_model, tokenizer), EnginePlayer(torch_engine(torch_model), tokenizer)):
        found = tasks.run("base", player)
        theirs, ours = found["my_choice"], found["arc"]
        assert (theirs.metric, theirs.kind, theirs.n) == ("acc_norm", "choice", 24)
        assert theirs.scores == ours.scores and 0 < sum(ours.scores) < 24
        assert theirs.metrics["acc"] == ours.metrics["accuracy"]
        assert theirs.metrics["acc_norm"] == ours.metrics["accuracy_norm"] == theirs.value
        assert theirs.metrics["acc"] != theirs.metrics["acc_norm"]
        assert theirs.chance == pytest.approx(ours.chance) and 1 / 4 < ours.chance < 1 / 2
    assert capfd.readouterr() == ("", "")


def test_every_kind_of_request_is_answered_by_artifacts_as_by_checkpoints(home, model, torch_engine):
    _, torch_model, tokenizer = model
    tasks = suite(home, tokenizer, "my_written", "my_rolling", "my_shots", limit=5)
    expected = tasks.run("base", TorchPlayer(torch_model, tokenizer))
    found = tasks.run("artifact", EnginePlayer(torch_engine(torch_model), tokenizer))
    assert found["my_written"] == expected["my_written"]
    assert found["my_shots"] == expected["my_shots"]
    assert tasks.run("again", TorchPlayer(torch_model, tokenizer))["my_shots"] == expected["my_shots"]
    rolling = expected["my_rolling"]
    assert found["my_rolling"].value == pytest.approx(rolling.value, rel=1e-4)
    assert (rolling.scores, rolling.metric, rolling.higher_is_better) == ([], "word_perplexity", False)
    written = expected["my_written"]
    assert (written.kind, written.metric, written.n, written.chance) == ("generation", "exact_match", 5, 0.0)


def test_written_answers_stop_where_the_task_says(home, model, torch_engine):
    _, torch_model, tokenizer = model
    from compress.evaluation.harness_models import EngineLM, checkpoint_lm
    from lm_eval.api.instance import Instance

    settings = [
        {"until": ["e"], "max_gen_toks": 12},
        {"until": [], "max_gen_toks": 5},
        {"until": "\n", "max_gen_toks": 3},
    ]
    requests = [Instance("generate_until", {}, (row["question"], s), 0) for row in rows()[:3] for s in settings]
    theirs = checkpoint_lm(torch_model, tokenizer, 80, 2).generate_until(requests, disable_tqdm=True)
    ours = EngineLM(torch_engine(torch_model), tokenizer, 80).generate_until(requests)
    assert ours == theirs and any(ours)
    assert not any("e" in text for text in ours[::3])


def test_long_texts_lose_their_beginning_alike(home, model, torch_engine):
    _, torch_model, tokenizer = model
    from compress.evaluation.harness_models import EngineLM, checkpoint_lm
    from lm_eval.api.instance import Instance

    pairs = [("people " * 40, " water"), ("a", " b c d"), ("", "the people"), ("x " * 5, " water is " * 30)]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    theirs = checkpoint_lm(torch_model, tokenizer, 24, 2).loglikelihood(requests[:3], disable_tqdm=True)
    ours = EngineLM(torch_engine(torch_model), tokenizer, 24).loglikelihood(requests[:3], disable_tqdm=True)
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, abs=1e-3) and greedy == expected_greedy


def test_groups_are_one_line_of_all_their_questions(home, model):
    _, torch_model, tokenizer = model
    tasks = suite(home, tokenizer, "my_group", "my_choice", "my_half")
    found = tasks.run("base", TorchPlayer(torch_model, tokenizer))
    group, whole, half = found["my_group"], found["my_choice"], found["my_half"]
    assert group.scores == whole.scores + half.scores and group.n == 33
    assert group.value == pytest.approx((whole.value * 24 + half.value * 9) / 33)
    assert group.chance == pytest.approx((whole.chance * 24 + half.chance * 9) / 33)
    other = TaskOutcome("generation", "exact_match", [1.0], 1.0, 1)
    with pytest.raises(UserError, match="list them one by one"):
        _together("mixed", [whole, other])


def test_what_cannot_be_run_is_refused_before_any_work(home, model, monkeypatch):
    folder, _, tokenizer = model
    context = Context(recipe_dir=home)
    with pytest.raises(UserError, match=r"could not load my_absent .*none\.jsonl"):
        suite(home, tokenizer, "my_absent")
    with pytest.raises(UserError, match=r"harness\.folder: .* does not exist"):
        suite(home, tokenizer, "my_choice", harness={"folder": "none"})
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    config = EvaluateConfig(tasks=["arc_easy"])
    with pytest.raises(UserError, match=r"arc_easy needs lm-eval.*pip install 'llm-compress\[eval\]'"):
        evaluation_stage.check(config, folder, context)


def test_unknown_names_and_data_out_of_reach(home, model, monkeypatch):
    """lm-eval's own list, of which one task is asked for without a connection."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no task 'arc_esay'; the nearest are arc_easy"):
        suite(home, model[2], "arc_esay", harness={})
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="could not load arc_easy"):
        suite(home, model[2], "arc_easy", harness={})


def test_lm_eval_leaves_logging_as_it_was(home, model):
    before = logging.getLogger().level
    suite(home, model[2], "my_choice")
    assert logging.getLogger().level == before


def test_folders_and_data_files_may_have_any_name(tmp_path, model):
    _, torch_model, tokenizer = model
    folder = tmp_path / "in [a] *?" / "tasks [t]"
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows()[:5])
    for name, file in (("one", "q[1].jsonl"), ("two", "q*.jsonl"), ("plain", "plain.jsonl")):
        (folder / file).write_text(text if file != "q*.jsonl" else text * 2, encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASK.format(name=f"my_{name}", data=json.dumps(file)) + CHOICE)
    config = EvaluateConfig.model_validate(
        {"tasks": ["my_one", "my_two", "my_plain"], "harness": {"folder": "tasks [t]"}}
    )
    found = Suite(config, Context(seed=7, recipe_dir=folder.parent), tokenizer).run(
        "base", TorchPlayer(torch_model, tokenizer)
    )
    assert [found[name].n for name in ("my_one", "my_two", "my_plain")] == [5, 10, 5]
