"""Retrieval from long prompts: the prompts, the judging, what is measured, and how it is reported."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compress.cli.main import app
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs
from compress.evaluation.config import EvaluateConfig, RetrievalConfig
from compress.evaluation.retrieval import Item, Retrieval, check, summarised
from compress.evaluation.retrieval_tasks import (
    Continuation,
    Filler,
    Reading,
    RetrievalQuestion,
    continuation,
    hide,
    keys,
    passkey,
)
from compress.evaluation.stage import checkpoints, evaluate_path, retrieving
from compress.evaluation.statistics import wilson
from compress.kv.settings import HeadSettings
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.modeling.random import build_tokenizer
from compress.modeling.retaining import RetainingHeads, save_heads
from compress.modeling.shape import AttentionShape
from compress.pipeline.report.html import render
from compress.pipeline.report.retrieval import heat_map, memory_plot, retrieval_lines
from compress.pipeline.report.schema import Report
from compress.records.models import ModelEntry
from pydantic import ValidationError
from typer.testing import CliRunner

TOKENIZER = build_tokenizer()
SMALL = {"lengths": [320], "depths": [0.2, 0.8], "budgets": [0.25], "rows": 1, "max_tokens": 4}


def silent(n: int = 1, note: str = "") -> None:
    return None


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "t.txt"
    draw = random.Random(1)
    words = "the way of many people is which model time and look so".split()
    file.write_text(" ".join(f"{' '.join(draw.choices(words, k=7)).capitalize()}." for _ in range(200)))
    return file


@pytest.fixture(scope="module")
def headed(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with random heads."""
    folder = tmp_path_factory.mktemp("headed") / "model"
    shutil.copytree(tiny(blocks=2, max_positions=1024), folder)
    torch.manual_seed(0)
    heads = RetainingHeads(2, AttentionShape.of(load_config(folder)), 16)
    save_heads(heads, HeadSettings(budget=64, chunk=64, stabilizers=16, local=48), folder)
    return folder


def test_a_pass_key_stands_where_it_should_in_a_prompt_of_the_length_asked_for():
    for length in (320, 600):
        for depth in (0.0, 0.3, 1.0):
            reading = passkey(TOKENIZER, Filler(None), length, depth, "seed")
            (question,) = reading.questions
            written = TOKENIZER.decode(question.ids)
            assert length - 60 < len(question.ids) <= length  # at most a sentence short
            assert written.count(question.number) == 2 and written.endswith("<|im_start|>assistant\n")
            paragraphs = written.split("\n\n")[1:-1]
            place = next(i for i, paragraph in enumerate(paragraphs) if question.number in paragraph)
            counts = [len(TOKENIZER(part)["input_ids"]) for part in paragraphs if question.number not in part]
            before = sum(counts[:place]) / sum(counts)
            assert abs(before - depth) < 0.15
            assert question.number in TOKENIZER.decode(question.answer_ids)


def test_the_same_seed_gives_the_same_prompts_and_another_others():
    made = [passkey(TOKENIZER, Filler(None), 320, 0.5, seed) for seed in ("a", "a", "b")]
    assert made[0] == made[1] != made[2]


def test_keys_asks_about_one_text_once_for_each_depth():
    reading = keys(TOKENIZER, Filler(None), 500, [0.9, 0.1, 0.5], "seed")
    prompts = [question.ids for question in reading.questions]
    common = next(i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    assert common > 400 and len({question.number for question in reading.questions}) == 3
    text = TOKENIZER.decode(prompts[0])
    places = [text.index(question.number) for question in reading.questions]
    assert places[1] < places[2] < places[0]
    with pytest.raises(UserError, match="takes at most 20 depths"):
        keys(TOKENIZER, Filler(None), 500, [i / 30 for i in range(30)], "seed")
    with pytest.raises(UserError, match="no room"):
        keys(TOKENIZER, Filler(None), 100, [0.5], "seed")


def test_facts_at_one_place_keep_their_order():
    sentences = [("a", 1), ("b", 1), ("c", 2)]
    assert hide(sentences, ["X", "Y"], [0.5, 0.5]) == "a b\n\nX\n\nY\n\nc"
    assert hide(sentences, ["X", "Y"], [1.0, 0.0]) == "Y\n\na b c\n\nX"
    assert hide([], ["X"], [0.5]) == "X"


def test_text_of_a_file_is_hidden_in_and_continued(text):
    filler = Filler(text.read_text())
    (question,) = passkey(TOKENIZER, filler, 400, 0.5, "seed").questions
    assert "people" in TOKENIZER.decode(question.ids) and "boat" not in TOKENIZER.decode(question.ids)
    ids = TOKENIZER(text.read_text())["input_ids"]
    found = continuation(TOKENIZER, ids, 300, 20, "seed")
    whole = found.ids + found.after
    assert len(found.ids) == 300 and len(found.after) == 20
    assert any(ids[i : i + 320] == whole for i in range(len(ids) - 319))
    with pytest.raises(UserError, match="longer text"):
        continuation(TOKENIZER, ids, len(ids), 1, "seed")
    with pytest.raises(UserError, match="fewer than two sentences"):
        Filler("One.")


def test_only_the_first_number_counts_digit_by_digit():
    question = RetrievalQuestion([], [], "04211", 0.5)
    assert question.is_right("It is 04211, not 5.") and question.is_right("04211")
    for wrong in ("", "4211", "042110", "5 or 04211", "0 4 2 1 1"):
        assert not question.is_right(wrong)


def test_every_policy_is_measured_and_full_is_the_model_itself(headed, text):
    config = RetrievalConfig.model_validate(
        SMALL
        | {"tasks": ["passkey", "keys", "continuation"], "text": str(text), "continued": 9}
        | {"policies": ["full", "retaining", "recent", "snapkv", "random", "oracle"]}
    )
    model = load_model(headed)
    retrieval = Retrieval(config, Context(), load_tokenizer(headed))
    measured = list(retrieval.run(model, headed, silent))
    assert [one.key for one in measured] == retrieval.names() and len(measured) == 4 * 6
    assert all(one.entries == (None if one.policy == "full" else 80) for one in measured)
    full = next(one for one in measured if one.task == "continuation")
    made = retrieval.made(Item("continuation", 320, 0, None))
    assert isinstance(made, Continuation)
    with torch.no_grad():
        logs = model(torch.tensor([made.ids + made.after])).logits[0, 319:-1].log_softmax(-1)
    wanted = -float(logs[range(9), made.after].sum())
    assert full.policy == "full" and full.nll == pytest.approx([wanted], rel=1e-5) and full.tokens == [9]
    others = [one for one in measured if one.task == "continuation"][1:]
    assert len({round(one.nll[0], 4) for one in others}) == 5
    assert all(one.bytes < full.bytes for one in others)
    # As large a budget as the prompt: every policy is the full cache.
    wide = Retrieval(config.model_copy(update={"budgets": [320.0]}), Context(), load_tokenizer(headed))
    for one in wide.run(model, headed, silent):
        if one.task == "continuation":
            assert one.nll == pytest.approx([wanted], rel=1e-5)


def read(retrieval: Retrieval, item: Item) -> Reading:
    made = retrieval.made(item)
    assert isinstance(made, Reading)
    return made


def test_the_nats_of_an_answer_are_the_models_own(headed):
    """Of each question by itself, whatever else was asked, and whatever was written."""
    model, config = load_model(headed), RetrievalConfig.model_validate(SMALL | {"policies": ["full"]})
    retrieval = Retrieval(config, Context(), TOKENIZER)
    measured = list(retrieval.run(model, None, silent))
    for item, one in zip(retrieval.items(), measured, strict=True):
        questions = read(retrieval, item).questions
        for question, nll, tokens in zip(questions, one.nll, one.tokens, strict=True):
            ids = torch.tensor([[*question.ids, *question.answer_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(question.ids) - 1 : -1]
            wanted = torch.nn.functional.cross_entropy(logits, ids[0, len(question.ids) :], reduction="sum")
            assert nll == pytest.approx(wanted.item(), rel=1e-4) and tokens == len(question.answer_ids)
    for cell in summarised(measured):
        own = [
            (nll, tokens)
            for one in measured
            for depth, nll, tokens in zip(one.depths, one.nll, one.tokens, strict=True)
            if (one.task, depth) == (cell.task, cell.depth)
        ]
        assert cell.nats == pytest.approx(sum(nll for nll, _ in own) / sum(tokens for _, tokens in own))


def test_a_perfect_model_finds_everything_and_the_share_has_its_interval(headed, monkeypatch):
    retrieval = Retrieval(RetrievalConfig.model_validate(SMALL | {"policies": ["full"]}), Context(), TOKENIZER)
    answers = iter([q.answer_ids for item in retrieval.items() for q in read(retrieval, item).questions])
    monkeypatch.setattr("compress.evaluation.kv_cache.KVCache.write", lambda *_: next(answers))
    cells = summarised(list(retrieval.run(load_model(headed), None, silent)))
    assert {(cell.task, cell.depth) for cell in cells} == {(t, d) for t in ("passkey", "keys") for d in (0.2, 0.8)}
    assert all((cell.value, cell.n) == (1.0, 1) and cell.low == wilson(1, 1).low for cell in cells)


def test_summaries_add_up(headed, text):
    values = SMALL | {"tasks": ["continuation"], "text": str(text), "rows": 3, "continued": 5, "policies": ["full"]}
    retrieval = Retrieval(RetrievalConfig.model_validate(values), Context(), TOKENIZER)
    measured = list(retrieval.run(load_model(headed), None, silent))
    (cell,) = summarised(measured)
    assert cell.value == pytest.approx(math.exp(sum(one.nll[0] for one in measured) / 15)) and cell.n == 3


def test_a_killed_run_goes_on_and_ends_the_same(headed, tmp_path):
    config = RetrievalConfig.model_validate(SMALL | {"policies": ["full", "recent"]})
    retrieval, model = Retrieval(config, Context(), TOKENIZER), load_model(headed)
    whole = retrieval.collect(model, None, tmp_path / "a.json", silent)

    class Killed(Exception):
        pass

    def stop(found: list) -> None:
        if len(found) == 2:
            raise Killed

    with pytest.raises(Killed):
        retrieval.collect(model, None, tmp_path / "b.json", silent, stop)
    assert len(json.loads((tmp_path / "b.json").read_text())) == 2
    again: list[int] = []
    assert retrieval.collect(model, None, tmp_path / "b.json", silent, lambda found: again.append(len(found))) == whole
    assert again == [3, 4, 5, 6]
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_settings_follow_the_heads_and_small_budgets():
    config = RetrievalConfig.model_validate({"budgets": [0.5, 96]})
    assert config.entries(0.5, 1000) == 500 and config.entries(96.0, 1000) == 96
    for wrong, why in (
        ({"tasks": ["continuation"]}, "needs a text"),
        ({"budgets": [1.5]}, "a whole number of entries"),
        ({"budgets": []}, "need budgets"),
        ({"lengths": [512, 512]}, "lengths has 512 twice"),
        ({"depths": [1.2]}, "less than or equal to 1"),
        ({"policies": ["best"]}, "policies"),
    ):
        with pytest.raises(ValidationError, match=why):
            RetrievalConfig.model_validate(wrong)
    with pytest.raises(UserError, match="does not exist"):
        check(RetrievalConfig.model_validate({"text": "missing.txt"}), Context(), TOKENIZER)


def test_the_stage_measures_checkpoints_that_have_heads(headed, tiny, text, tmp_path):
    base = tiny(blocks=2, max_positions=1024)
    config = EvaluateConfig(text=str(text), speed=None, retrieval=RetrievalConfig.model_validate(SMALL))
    plain = checkpoints(Inputs(base, base), Context())
    with pytest.raises(UserError, match="no checkpoint has retaining heads"):
        retrieving(config, plain)
    retain = tmp_path / "retain"
    retain.mkdir()
    (retain / "model").symlink_to(headed)
    found = retrieving(config, checkpoints(Inputs(base, base, {"retain": retain}), Context()))
    assert [(s.role, s.heads, s.retrieves) for s in found] == [("base", retain / "model", True)]
    both = retrieving(config, [replace(plain[0], role="base"), *found])
    assert [s.retrieves for s in both] == [False, True]
    (entry,) = evaluate_path(headed, config, Context(), None, tmp_path)
    assert len(entry.retrieval) == 2 * 2 * 4  # tasks, depths, policies
    assert {one.policy for one in entry.retrieval} == {"full", "retaining", "recent", "snapkv"}


def test_the_command_line_and_the_report_show_it(headed, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = [f"--retrieval={key}={json.dumps(value)}" for key, value in (SMALL | {"lengths": [320, 400]}).items()]
    result = CliRunner().invoke(app, ["eval", str(headed), "--text", str(text), "--tokens=64", "--json", *asked])
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)
    model = ModelEntry.model_validate(entry)
    assert {one.length for one in model.retrieval} == {320, 400}
    lines = retrieval_lines([model])
    assert [line.way for line in lines[:4]] == ["full", "retaining 0.25", "recent 0.25", "snapkv 0.25"]
    assert all(len(line.cells) == 2 and "%" in line.cells[0] for line in lines)
    nothing = {"measured_on": None, "importance": None, "data": None, "stages": [], "curves": [], "samples": []}
    nothing |= {"artifacts": [], "recipe": "", "versions": {}, "machine": {}}
    report = Report.model_validate({"name": "x", "base": "b", "models": [model], **nothing})
    page = render(report)
    assert "a bounded KV cache" in page and "snapkv 0.25" in page
    picture = heat_map(report, "keys")
    assert picture is not None and picture.count("<path") > 16 and "snapkv" in picture
    assert "budget 0.25" in (memory_plot(report) or "")
    empty = report.model_copy(update={"models": [model.model_copy(update={"retrieval": []})]})
    assert heat_map(empty, "keys") is None and memory_plot(empty) is None and "bounded KV" not in render(empty)
