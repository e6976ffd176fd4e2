"""Training retaining heads: the loss, the schedule, a whole step, resuming, and what the stage leaves."""

from __future__ import annotations

import contextlib
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.data.rows import Row, write_rows
from compress.distill.retaining import stage, train
from compress.distill.retaining.config import RetainConfig, head_width
from compress.distill.retaining.rows import LongRow, Rows
from compress.distill.retaining.train import Trainer, block_loss, fresh_heads, kept_share, learning_rate
from compress.errors import UserError
from compress.modeling.blocks import Decoder
from compress.modeling.load import load_model, load_tokenizer
from compress.modeling.random import FAMILY_CLASSES
from compress.modeling.retaining import RetainingSettings, load_heads, read_settings
from compress.modeling.retaining_labels import detrended, label_row
from compress.pipeline.plan.geometry import Geometry
from compress.pipeline.plan.memory import Setting, stage_memory
from compress.pipeline.plan.work import stage_work
from compress.pipeline.recipe import load_recipe
from compress.pipeline.runner import Options, execute, plan_run
from compress.pipeline.summary import finish
from compress.stage import WORK, Context, Inputs, Progress
from rich.console import Console
from torch import nn

SHORT: dict[str, Any] = {
    "steps": 6, "length": 480, "width": 16, "lr": 5e-3, "heldout": 2, "eval_every": 3, "save_every": 2,
}  # fmt: skip


def config(**options: Any) -> RetainConfig:
    return RetainConfig.model_validate(SHORT | options)


def curves(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file): (folder / file).read_bytes() for file in files if WORK not in file.parts}


def run(out: Path, base: Path, talks: Path, **options: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return stage.run(config(**options), Inputs(base, base, {"data": talks}), out, Context(seed=7))


def slow_loss(scores: list[list[list[float]]], labels: list[list[list[float]]], smooth: float) -> float:
    """The published formula: scores and labels by block, position and head."""
    errors, smoothness = [], 0.0
    for own, wanted in zip(scores, labels, strict=True):
        squares = []
        for k, row in enumerate(own):
            for j, score in enumerate(row):
                off = abs(score - wanted[k][j])
                errors.append(off * off / 2 if off < 1 else off - 0.5)
                if k + 1 < len(own):
                    squares.append((score - own[k + 1][j]) ** 2)
        smoothness += sum(squares) / len(squares)
    return sum(errors) / len(errors) + smooth * smoothness


def test_the_loss_is_the_published_one():
    torch.manual_seed(0)
    scores, labels = 3 * torch.randn(4, 11, 2), 3 * torch.randn(4, 11, 2)
    found = sum(block_loss(s, y, 0.0025, 4).item() for s, y in zip(scores, labels, strict=True))
    assert found == pytest.approx(slow_loss(scores.tolist(), labels.tolist(), 0.0025), rel=1e-5)
    assert block_loss(scores[0, :1], labels[0, :1], 0.5, 1).isfinite()  # one token has no neighbour


def test_the_rate_rises_for_two_thirds_and_falls():
    published = RetainConfig()
    rates = [learning_rate(published, step) for step in range(1, 3001)]
    assert rates[1999] == max(rates) == 5e-4 and rates[0] == 5e-4 / 2000
    assert rates[999] == pytest.approx(2.5e-4) and rates[-1] == pytest.approx(5e-4 / 1001)
    assert all(a < b for a, b in pairwise(rates[:2000]))
    assert all(a > b for a, b in pairwise(rates[1999:]))
    assert learning_rate(RetainConfig(steps=1), 1) == 5e-4 == learning_rate(RetainConfig(steps=2, warmup=0.0), 1)


def test_the_share_kept_is_that_of_the_greatest_labels():
    torch.manual_seed(1)
    scores, labels = torch.randn(40, 3), torch.randn(40, 3)
    shares = []
    for head in range(3):
        best, kept = (set(sorted(range(40), key=lambda k: -values[k, head])[:10]) for values in (labels, scores))
        shares.append(len(best & kept) / 10)
    assert kept_share(scores, labels, 10) == pytest.approx(sum(shares) / 3)
    assert kept_share(labels, labels, 10) == 1.0


@pytest.mark.parametrize("labels", ["published", "detrended"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_step_is_that_of_the_whole_loss_at_once(shaken, tmp_path, family, labels):
    """Blocks learn one after another in the pass; the step is that of one graph of all of them."""
    decoder = Decoder(load_model(shaken(family, sliding_window=16) if family == "gemma3_text" else shaken(family)))
    row = LongRow(torch.randint(3, 400, (60,), generator=torch.Generator().manual_seed(2)).tolist(), 50)
    options = config(steps=1, clip=0.002, lr=0.01, labels=labels)
    heads, slow = (fresh_heads(decoder, 16, 3) for _ in range(2))
    trainer = Trainer(decoder, heads, options, Rows(lambda _: row, [row]), tmp_path, lambda n=1, note="": None)
    trainer.train()
    seen: list[Any] = []
    label_row(decoder, row.ids, row.prompt, seen.append)
    scores = [slow.blocks[s.block](s.inputs[s.first :]) for s in seen]
    wanted = [s.labels[s.first :] if labels == "published" else detrended(s.labels[s.first :]) for s in seen]
    loss = torch.stack(
        [nn.functional.smooth_l1_loss(a, b) for a, b in zip(scores, wanted, strict=True)]
    ).mean() + 0.0025 * sum((a[1:] - a[:-1]).square().mean() for a in scores)
    (line,) = (line for line in curves(tmp_path) if "loss" in line)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5) and line["tokens"] == 50
    optimizer = torch.optim.AdamW(slow.parameters(), lr=0.01, betas=(0.9, 0.95))  # decay and the rest as torch has them
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in slow.parameters() if p.grad is not None])
    assert (gradients.abs() > 0.002).any(), "nothing to clip"
    for p in slow.parameters():
        assert p.grad is not None
        p.grad.clamp_(-0.002, 0.002)
    optimizer.step()
    fresh = fresh_heads(decoder, 16, 3).state_dict()
    for (name, one), other in zip(heads.state_dict().items(), slow.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
        assert not torch.equal(one, fresh[name])
    if family == "gemma3_text":
        assert seen[0].first == 50 - 16 + 1 and seen[5 % len(seen)].first >= 0


@pytest.mark.parametrize("family", sorted(FAMILY_CLASSES))
def test_heads_learn_in_every_family(tiny, talks, tmp_path, family):
    base = tiny(family)
    # Of a random model's labels, distance is what can be learned.
    options = {"budget": 77, "stabilizers": 3, "chunk": 50, "local": 9, "labels": "published"}
    found = run(tmp_path, base, talks, steps=12, eval_every=6, **options)
    assert found["last"]["eval_loss"] < 0.6 * found["before"]["eval_loss"]
    model = tmp_path / "model"
    heads = load_heads(model, load_model(model).config)
    assert heads.width == found["width"] == 16
    assert found["trainable_parameters"] == sum(p.numel() for p in heads.parameters())
    assert all(p.dtype == torch.float32 for p in heads.parameters())
    assert read_settings(model) == RetainingSettings(77, 50, 3, 9)
    inside = content(model)
    assert content(base).items() <= inside.items()  # the model itself is as it was
    assert inside.keys() - content(base).keys() == {"retaining/heads.safetensors", "retaining/settings.json"}
    assert (model / "model.safetensors").samefile(base / "model.safetensors")
    lines = curves(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, 12]
    assert all(math.isfinite(line["loss"]) and 0 < line["tokens"] < 480 for line in lines if "loss" in line)


def test_heads_find_what_answers_attend_to(tiny, talks, tmp_path):
    found = run(tmp_path, tiny(), talks, steps=50, eval_every=50, width=64, lr=0.01)
    assert found["before"]["eval_recall"] < 0.35  # a quarter, by chance
    assert found["last"]["eval_recall"] > 0.4


@pytest.mark.parametrize("dead", [1, 4, 5], ids=["before any checkpoint", "at a checkpoint", "after one"])
def test_a_killed_training_ends_with_the_same_bytes(tiny, talks, tmp_path, monkeypatch, dead):
    base, calls = tiny(), 0
    run(tmp_path / "whole", base, talks)

    def fatal(self: Trainer, row: LongRow) -> float:
        if self.step == dead:
            raise KeyboardInterrupt
        nonlocal calls
        calls += 1
        return learn(self, row)

    learn = Trainer._learn
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_learn", fatal)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", base, talks)
    work = tmp_path / "killed" / WORK
    with (work / "curves.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut short
    bars: list[int] = []

    class Bars(Progress):
        def bar(self, label: str, total: int | None = None) -> Any:
            return contextlib.nullcontext(lambda n=1, note="": bars.append(n))

    context = Context(seed=7, progress=Bars())
    stage.run(config(), Inputs(base, base, {"data": talks}), tmp_path / "killed", context)
    assert bars[0] == dead // 2 * 2 and sum(bars) == 6  # it went on from the checkpoint
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_the_seed_decides(tiny, talks, tmp_path):
    run(tmp_path / "a", tiny(), talks, steps=2)
    (tmp_path / "b").mkdir()
    inputs = Inputs(tiny(), tiny(), {"data": talks})
    stage.run(config(steps=2), inputs, tmp_path / "b", Context(seed=8))
    a, b = (content(tmp_path / name) for name in "ab")
    assert a["model/retaining/heads.safetensors"] != b["model/retaining/heads.safetensors"]
    assert a["curves.jsonl"] != b["curves.jsonl"]


def test_divergence_and_half_precision(tiny, talks, tmp_path, monkeypatch):
    (tmp_path / "half").mkdir()
    inputs = Inputs(tiny(), tiny(), {"data": talks})
    found = stage.run(config(steps=3), inputs, tmp_path / "half", Context(seed=7, dtype="bfloat16"))
    assert math.isfinite(found["last"]["eval_loss"])
    monkeypatch.setattr(train, "block_loss", lambda scores, *_: scores.sum() * math.nan)
    with pytest.raises(UserError, match=r"loss is nan at step 1: training diverged; lower retain\.lr"):
        run(tmp_path / "bad", tiny(), talks)


def test_what_is_refused_before_any_work(tiny, tmp_path):
    context = Context(recipe_dir=tmp_path)
    stage.check(config(length=512), tiny(), context)
    with pytest.raises(UserError, match=r"retain\.length is 600, but the model was trained for 512 positions"):
        stage.check(config(length=600), tiny(), context)
    with pytest.raises(UserError, match=r"retain\.rows\.path: there is no file .*none\.jsonl"):
        stage.check(config(rows={"path": "none.jsonl"}), tiny(), context)
    assert RetainConfig().longest(8192) == 8192 and RetainConfig().longest(1 << 17) == 10240
    assert [head_width(None, hidden) for hidden in (4096, 576, 64)] == [1024, 192, 64] and head_width(5, 576) == 5


def test_links_lead_to_files_and_older_heads_stay_behind(tiny, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "out"
    (cache / "retaining").mkdir(parents=True)
    (cache / "retaining" / "heads.safetensors").touch()
    for file in tiny().iterdir():
        (cache / file.name).symlink_to(file)
    stage.link_model(cache, out)
    assert content(out) == content(tiny()) and not any(file.is_symlink() for file in out.iterdir())


RECIPE = """
name: long
model: random:llama
seed: 3
data: {source: dataset, path: talks.jsonl, length: 128}
retain: {steps: 2, length: 480, width: 8, heldout: 1, eval_every: 2}
"""


def problems(folder: Path, text: str) -> str:
    file = folder / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(str(file))
    return str(error.value)


def test_a_recipe_needs_something_to_make_rows_of(tmp_path):
    alone = "name: x\nmodel: random:llama\nretain: {steps: 2}\n"
    assert "retain: it makes its rows of the data stage's, and there is none" in problems(tmp_path, alone)
    message = problems(tmp_path, "name: x\nmodel: random:llama\nretain: {rows: {path: a.jsonl, text: t}}\n")
    assert "retain.rows" in message and "prompts with answers" in message
    late = RECIPE + "sort: {depths: [4, 8]}\n"
    assert "the stage retain reads what sort makes, so sort must come before it" in problems(tmp_path, late)
    assert "stabilizers (64) are part of the budget (32)" in problems(tmp_path, alone.replace("steps: 2", "budget: 32"))
    (tmp_path / "r.yaml").write_text(alone.replace("steps: 2", "rows: {path: a.jsonl}"))
    assert load_recipe(str(tmp_path / "r.yaml")).section("retain").input_files() == ["a.jsonl"]


def test_a_recipe_runs_and_runs_again(tmp_path):
    talk = [{"prompt": f"What is part {n} of the work?", "response": f"It is word {n}. One more."} for n in range(16)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    (tmp_path / "long.yaml").write_text(RECIPE)
    planned = plan_run(load_recipe(str(tmp_path / "long.yaml")), Options(tmp_path / "runs"))
    execute(planned, Progress())
    finish(planned, Console(quiet=True), len(planned.pending))
    assert not plan_run(load_recipe(str(tmp_path / "long.yaml")), Options(tmp_path / "runs")).pending
    (folder,) = (tmp_path / "runs" / "long").glob("retain-*")
    assert not (folder / WORK).exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["metrics"]["steps"] == 2 and manifest["planned_memory_bytes"]
    page = (tmp_path / "runs" / "long" / "report.html").read_text()
    assert "Retaining heads on held-out rows" in page and "held-out loss" in page


def test_the_plan_counts_heads_and_rows(tiny):
    model = json.loads((tiny() / "config.json").read_text())
    at = Setting(Geometry.of(model), 4, "float32")
    short, long = (config(length=length) for length in (256, 512))
    heads = fresh_heads(Decoder(load_model(tiny())), 16, 0)
    found = stage_memory("retain", short, at)
    assert found.disk == found.parts["adapters"] == 4 * sum(p.numel() for p in heads.parameters())
    assert stage_memory("retain", long, at).parts["activations"] == 2 * found.parts["activations"]
    works = [stage_work("retain", section, at, None) for section in (short, long)]
    assert works[0] is not None and works[1] is not None and works[1].flops > 2 * works[0].flops
    assert stage_work("retain", config(rows={"path": "a.jsonl"}), at, None) is None  # nobody knows how long they are
    assert RetainConfig().longest(at.shape.positions) == 512


def test_a_data_stage_of_texts_for_a_model_without_chat(tiny, tmp_path):
    base, texts = tmp_path / "base", tmp_path / "texts"
    stage.link_model(tiny(), base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (base / "tokenizer_config.json").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert load_tokenizer(base).chat_template is None
    texts.mkdir()
    write_rows(
        texts, [Row(i, "heldout" if i % 4 == 0 else "train", text=f"The way of time {i}. " * 9) for i in range(8)]
    )
    found = run(tmp_path / "out", base, texts, steps=2)
    assert found["steps"] == 2
