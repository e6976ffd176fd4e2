"""Tasks whose answer is written: what counts as right, and that checkpoints and artifacts write the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Context
from compress.evaluation import builtin
from compress.evaluation.config import BUILTIN, EvaluateConfig
from compress.evaluation.generation import (
    Exercise,
    Prompt,
    contains,
    is_right,
    judge,
    number,
    prepare,
    stops,
    write_with_engine,
    write_with_model,
)
from compress.evaluation.suite import EnginePlayer, Suite, TorchPlayer
from compress.evaluation.tasks import read_questions, read_task
from compress.export.gguf import write_gguf
from compress.modeling.load import load_model, load_tokenizer
from compress.runtime.open import open_engine
from pydantic import ValidationError


def silent(n: int = 1, note: str = "") -> None:
    return None


@pytest.mark.parametrize(
    ("written", "answer", "right", "within"),
    [
        ("42", "42", True, True),
        ("The answer is 42.", "42", True, True),
        ("40 + 2 = 42", " 42 ", True, True),
        ("42, not 43", "42", False, True),
        ("$1,234.50", "1234.5", True, True),
        ("about 1,234", "$1,234", True, True),
        ("10-4", "4", True, True),
        ("x = -4", "-4", True, True),
        ("-4", "4", False, False),
        ("142", "42", False, False),
        ("4.20", "4.2", True, True),
        ("none", "42", False, False),
        ("", "42", False, False),
        ('"Apple  river"\n', "apple river", True, True),
        ("apple river stone", "apple river", False, True),
        ("pineapple river", "apple river", False, False),
        ("Sure! Apple river.", "apple river", False, True),
        ("C++", "C", False, True),
        ("", "apple", False, False),
        ("3 apples", "3 apples", True, True),
    ],
)
def test_what_counts_as_right(written, answer, right, within):
    assert is_right(written, answer) == right
    assert contains(written, answer) == within


def test_numbers():
    assert [number(text) is not None for text in ("7", "-7.5", "1,000", "$3", "50 %", ".5", "7 apples", "", "x")] == (
        [True] * 6 + [False] * 3
    )


def test_only_the_first_line_counts_without_a_template():
    exercises = [Exercise("p", "7"), Exercise("p", "7")]
    one, whole = Prompt([1], True), Prompt([1], False)
    found = judge(exercises, [one, whole], ["\n 7\n9", " 7\n9"])
    assert found.scores == [1.0, 0.0]
    assert found.metrics == {"exact_match": 0.5, "contains": 1.0}
    assert (found.kind, found.metric, found.chance, found.n) == ("generation", "exact_match", 0.0, 2)


@pytest.fixture(scope="module")
def model(shaken) -> tuple[Path, Any, Any]:
    folder = shaken(initializer_range=0.4)  # so that its likeliest token is not always the one that ends a turn
    return folder, load_model(folder), load_tokenizer(folder)


def slow_greedy(model: Any, tokenizer: Any, prompt: Prompt, max_tokens: int) -> str:
    """Token by token, one row at a time, the whole text through the model each time."""
    ids = list(prompt.ids)
    for _ in range(max_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops(tokenizer):
            break
        ids.append(token)
    return tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True)


def test_checkpoints_and_artifacts_write_what_greedy_decoding_writes(model, tmp_path, torch_engine):
    folder, torch_model, tokenizer = model
    rows = [Exercise(f"the number {i} of all the people" * (1 + i % 3), "x") for i in range(6)]
    prompts = [prepare(tokenizer, row, None) for row in rows]
    assert not prompts[0].one_line and len({len(p.ids) for p in prompts}) == 3
    expected = [slow_greedy(torch_model, tokenizer, prompt, 12) for prompt in prompts]
    assert len(set(expected)) > 1
    counted: list[int] = []
    written = write_with_model(torch_model, tokenizer, prompts, 12, 4, lambda n=1, note="": counted.append(n))
    assert written == expected and counted == [4, 2]
    assert write_with_engine(torch_engine(torch_model), tokenizer, prompts, 12, silent) == expected
    write_gguf(folder, tmp_path / "m.gguf", "F16")
    with open_engine(tmp_path / "m.gguf", threads=1, context=256) as engine:
        begun = [slow_greedy(torch_model, tokenizer, prompt, 2) for prompt in prompts]  # then float16 goes astray
        assert write_with_engine(engine, tokenizer, prompts, 2, silent) == begun


def test_prompts_are_the_models_own_turns(model):
    tokenizer = model[2]
    turn = tokenizer.decode(prepare(tokenizer, Exercise("how many", "1"), None).ids)
    assert turn == "<|im_start|>user\nhow many<|im_end|>\n<|im_start|>assistant\n"
    plain = prepare(tokenizer, Exercise("how many", "1"), False)
    assert plain.one_line and tokenizer.decode(plain.ids) == "how many"
    shown = Exercise("how many", "1", (("and now", "2"),))
    before = "<|im_start|>user\nand now<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    assert tokenizer.decode(prepare(tokenizer, shown, None).ids) == before + turn
    assert tokenizer.decode(prepare(tokenizer, shown, False).ids) == "and now\n2\n\nhow many\n"
    assert set(tokenizer.all_special_ids) <= stops(tokenizer)


def eval_sum(asked: str) -> int:
    return sum(int(part) for part in asked.removeprefix("What is ").removesuffix("?").split(" + "))


def test_builtin_tasks_are_the_same_everywhere_and_for_every_limit():
    for task in BUILTIN:
        rows = builtin.exercises(task, None)
        assert rows == builtin.exercises(task, None) and len(rows) == builtin.BUILTIN_ROWS
        assert rows[:5] == builtin.exercises(task, 5)
        assert len({row.prompt for row in rows}) > (40 if task == "builtin:addition" else 60)  # of 81 sums
    first = builtin.exercises("builtin:addition", 1)[0]
    assert (first.prompt, first.answer) == ("What is 6 + 7?", "13")  # whatever the machine and Python's version
    for row in builtin.exercises("builtin:addition", 40):
        assert eval_sum(row.prompt) == int(row.answer) and len(row.examples) == 3
        assert all(is_right(said, str(eval_sum(asked))) for asked, said in row.examples)
    for row in builtin.exercises("builtin:copy", 40):
        assert row.prompt == f"Repeat: {row.answer}" and len(row.answer.split()) == 4
        assert all(asked == f"Repeat: {said}" and said != row.answer for asked, said in row.examples)
    assert builtin.MAKERS.keys() == set(BUILTIN)


def test_written_answers_are_read(tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_text('{"prompt": "1 + 1 =", "answer": 2}\n\n{"prompt": "say a", "answer": "a"}\n', encoding="utf-8")
    assert read_task(file) == [Exercise("1 + 1 =", "2"), Exercise("say a", "a")]
    with pytest.raises(UserError, match="not multiple choice"):
        read_questions(file)


@pytest.mark.parametrize(
    "broken",
    [
        {"prompt": "a"},
        {"prompt": "", "answer": "b"},
        {"prompt": "a", "answer": ""},
        {"prompt": "a", "answer": True},
        {"prompt": "a", "answer": ["b"]},
        {"prompt": "a", "answer": 0, "choices": ["a", "b"]},
        {"question": "a", "choices": ["a", "b"], "answer": 0},
    ],
    ids=str,
)
def test_a_broken_row_is_named_by_its_line(tmp_path, broken):
    file = tmp_path / "task.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n' + json.dumps(broken) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"task\.jsonl:2"):
        read_task(file)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ["builtin:copi"]}, "no such built-in task; there are: builtin:copy"),
        ({"tasks": ["a/task.json"]}, "a task is a .jsonl file"),
        ({"tasks": ["a/t.jsonl", "b/t.jsonl"]}, "two tasks are called t"),
        ({"tasks": ["builtin:copy"], "harness": {"folder": "x"}}, "no task is an lm-eval task"),
    ],
)
def test_wrong_tasks_are_refused_with_the_recipe(values, message):
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig.model_validate(values)


def test_the_suite_runs_local_and_builtin_tasks_alike_for_both(model, tmp_path, torch_engine):
    _, torch_model, tokenizer = model
    (tmp_path / "t.jsonl").write_text('{"question": "q", "choices": ["a", "b b"], "answer": 1}\n', encoding="utf-8")
    config = EvaluateConfig(tasks=["builtin:copy", "t.jsonl", "builtin:addition"], limit=3, max_tokens=5)
    suite = Suite(config, Context(recipe_dir=tmp_path), tokenizer)
    prompts = [prepare(tokenizer, row, None) for row in builtin.exercises("builtin:copy", 3)]
    assert suite.longest() == max(len(prompt.ids) for prompt in prompts) + 5
    found = suite.run("base", TorchPlayer(torch_model, tokenizer))
    assert list(found) == ["builtin:copy", "t", "builtin:addition"]
    assert [(o.kind, o.metric, o.n) for o in found.values()] == [
        ("generation", "exact_match", 3),
        ("choice", "accuracy_norm", 1),
        ("generation", "exact_match", 3),
    ]
    assert suite.run("x", EnginePlayer(torch_engine(torch_model), tokenizer)) == found


def test_a_template_that_is_not_there_is_refused(model):
    tokenizer = load_tokenizer(model[0])
    tokenizer.chat_template = None
    assert prepare(tokenizer, Exercise("a", "b"), None).one_line
    with pytest.raises(UserError, match="no chat template"):
        prepare(tokenizer, Exercise("a", "b"), True)
