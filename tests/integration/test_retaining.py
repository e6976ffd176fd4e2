"""Training retaining heads: the loss, the schedule, a whole step, resuming, and what the stage leaves."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.cost import Setting
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs, Progress
from compress.data.rows import Row, write_rows
from compress.kv.settings import HeadSettings, read_settings
from compress.modeling.blocks import Decoder
from compress.modeling.families import FAMILIES
from compress.modeling.geometry import geometry_of
from compress.modeling.load import load_model, load_tokenizer
from compress.modeling.retaining import RetainingHead, load_heads
from compress.modeling.retaining_labels import BlockLabels, detrended, label_row
from compress.pipeline.recipe import Recipe
from compress.pipeline.runner import Options, execute, plan_run
from compress.pipeline.summary import finish
from compress.retain import samples, stage, train
from compress.retain.config import RetainConfig, head_width, measured_after
from compress.retain.cost import COST
from compress.retain.rows import LongRow
from compress.retain.samples import Pairs, draw_pairs, keep_pairs, read_pairs
from compress.retain.train import (
    batches,
    block_loss,
    fresh_heads,
    kept_share,
    kept_shares,
    learn,
    learning_rate,
)
from torch import nn

SHORT: dict[str, Any] = {
    "rows": 4, "tokens": 64, "steps": 6, "batch": 64, "length": 480, "width": 16, "lr": 5e-3, "heldout": 2,
    "eval_every": 3,
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


def slow_loss(scores: list[Any], labels: list[Any], smooth: float) -> float:
    """The published formula: scores and labels by block, pair, token of the pair and head."""
    errors, smoothness = [], 0.0
    for own, wanted in zip(scores, labels, strict=True):
        squares = []
        for pair, asked in zip(own, wanted, strict=True):
            for place in (0, 1):
                for score, label in zip(pair[place], asked[place], strict=True):
                    off = abs(score - label)
                    errors.append(off * off / 2 if off < 1 else off - 0.5)
            squares += [(one - two) ** 2 for one, two in zip(*pair, strict=True)]
        smoothness += sum(squares) / len(squares)
    return sum(errors) / len(errors) + smooth * smoothness


def test_the_loss_is_the_published_one():
    torch.manual_seed(0)
    scores, labels = 3 * torch.randn(4, 11, 2, 3), 3 * torch.randn(4, 11, 2, 3)
    found = sum(block_loss(s, y, 0.0025, 4).item() for s, y in zip(scores, labels, strict=True))
    assert found == pytest.approx(slow_loss(scores.tolist(), labels.tolist(), 0.0025), rel=1e-5)


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


def test_pairs_are_neighbours_and_none_is_drawn_twice():
    draw = random.Random(0)
    for count, tokens in ((0, 8), (1, 8), (2, 8), (3, 8), (9, 8), (10, 100), (300, 64), (300, 65)):
        starts = draw_pairs(count, tokens, draw)
        places = [place for start in starts for place in (start, start + 1)]
        assert len(set(places)) == len(places) and places == sorted(places)
        assert all(0 <= place < count for place in places)
        assert (count - 1) // 2 <= len(starts) <= count // 2 or len(starts) == tokens // 2
    seen = {place for _ in range(50) for start in draw_pairs(21, 8, draw) for place in (start, start + 1)}
    assert seen == set(range(21))  # the first and the last too


@pytest.mark.parametrize("labels", ["published", "detrended"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_is_kept_of_a_row_is_what_the_model_gives(shaken, tmp_path, family, labels):
    decoder = Decoder(load_model(shaken(family, sliding_window=16) if family == "gemma3_text" else shaken(family)))
    row = LongRow(torch.randint(3, 400, (60,), generator=torch.Generator().manual_seed(2)).tolist(), 50)
    keep_pairs(decoder, row, tmp_path / "a", config(tokens=8, labels=labels), "row")
    keep_pairs(decoder, row, tmp_path / "b", config(tokens=8, labels=labels), "row")
    keep_pairs(decoder, row, tmp_path / "c", config(tokens=8, labels=labels), "another")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    seen: list[BlockLabels] = []
    label_row(decoder, row.ids, row.prompt, seen.append)
    firsts = set()
    for block in seen:
        wanted = block.labels[block.first :] if labels == "published" else detrended(block.labels[block.first :])
        inputs = block.inputs[block.first :].to(torch.bfloat16)
        pairs = read_pairs([tmp_path / "a", tmp_path / "c"], block.block)
        assert len(pairs) == 2 * 4
        for one, two in zip(pairs.inputs, pairs.labels, strict=True):
            (place,) = (k for k in range(len(inputs)) if torch.equal(inputs[k], one[0]))
            assert torch.equal(inputs[place + 1], one[1])
            torch.testing.assert_close(wanted[place : place + 2], two)
        firsts.add(block.first)
    assert firsts == ({50 - 16 + 1} if family == "gemma3_text" else {0})


def some_pairs(count: int, seed: int) -> Pairs:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 2, 24, generator=draw).to(torch.bfloat16)
    return Pairs(inputs, inputs[..., :3].float() + torch.randn(count, 2, 3, generator=draw))


def test_every_pair_is_drawn_as_often_as_any_other():
    drawn = [places.tolist() for places in batches(10, 4, 5, torch.Generator().manual_seed(0))]
    assert [len(places) for places in drawn] == [4] * 5
    flat = [place for places in drawn for place in places]
    assert sorted(flat[:10]) == sorted(flat[10:]) == [*range(10)] and flat[:10] != flat[10:]
    assert [len(places) for places in batches(3, 7, 2, torch.Generator().manual_seed(0))] == [7, 7]


def test_a_head_learns_as_torch_would_teach_it():
    """Steps of all pairs at once against torch's own optimizer, clamping and schedule."""
    asked = config(steps=4, batch=80, clip=0.003, lr=0.01, eval_every=3, warmup=0.5, smooth=0.1)
    head, slow = (RetainingHead(24, 3, 16) for _ in range(2))
    slow.load_state_dict(head.state_dict())
    train, held = some_pairs(40, 1), some_pairs(7, 2)
    curve = learn(head, train, held, asked, 5, "seed")

    def loss_of(pairs: Pairs) -> torch.Tensor:
        scores = slow.w2(nn.functional.silu(slow.w1(pairs.inputs.float())))
        error = nn.functional.smooth_l1_loss(scores, pairs.labels) / 5
        return error + 0.1 * (scores[:, 0] - scores[:, 1]).square().mean()

    optimizer = torch.optim.AdamW(slow.parameters(), lr=0.01, betas=(0.9, 0.95))  # decay and the rest as torch has them
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.5, 1.0, 2 / 3, 1 / 3, 0][step])
    losses, heldout, clipped = [], [loss_of(held).item()], False
    for step in range(1, 5):
        optimizer.zero_grad()
        loss = loss_of(train)
        loss.backward()
        for p in slow.parameters():
            assert p.grad is not None
            clipped |= bool((p.grad.abs() > 0.003).any())
            p.grad.clamp_(-0.003, 0.003)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
        if step in (3, 4):
            heldout.append(loss_of(held).item())
    assert clipped, "nothing to clip"
    assert curve.losses.tolist() == pytest.approx(losses, rel=1e-5)
    assert (
        curve.heldout.tolist() == pytest.approx(heldout, rel=1e-4) and len(heldout) == len(measured_after(asked)) == 3
    )
    for one, other in zip(head.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_the_best_head_on_held_out_pairs_is_kept():
    """Most held-out labels are turned round, so that learning soon makes the loss there greater."""
    train, held = some_pairs(60, 1), some_pairs(50, 2)
    turned = (torch.arange(50) % 3 > 0)[:, None, None]
    held = Pairs(held.inputs, torch.where(turned, -held.labels, held.labels))
    asked = config(steps=60, batch=120, lr=0.02, eval_every=5, warmup=0.0)
    torch.manual_seed(0)
    head = RetainingHead(24, 3, 16)
    curve = learn(head, train, held, asked, 1, "seed")
    assert curve.heldout.min() < curve.heldout[-1] - 0.1
    kept = block_loss(head(held.inputs.float()), held.labels, asked.smooth, 1).item()
    assert kept == pytest.approx(curve.heldout.min().item(), rel=1e-5)


def test_the_share_kept_of_whole_rows(tiny):
    decoder = Decoder(load_model(tiny()))
    rows = [LongRow(torch.randint(3, 400, (n,)).tolist(), n - 6) for n in (40, 61)]
    several = [fresh_heads(decoder, 8, seed) for seed in (1, 2)]
    slow: list[list[float]] = [[], []]
    for row in rows:
        seen: list[BlockLabels] = []
        label_row(decoder, row.ids, row.prompt, seen.append)
        for block in seen:
            for heads, own in zip(several, slow, strict=True):
                scores = heads.score(block.block, block.inputs)
                own.append(kept_share(scores, detrended(block.labels), math.ceil(len(scores) / 4)))
    assert kept_shares(decoder, rows, config(), *several) == pytest.approx([sum(own) / len(own) for own in slow])
    assert slow[0] != slow[1]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_heads_learn_in_every_family(tiny, talks, tmp_path, family):
    base = tiny(family)
    # Of a random model's labels, distance is what can be learned.
    options = {"budget": 77, "stabilizers": 3, "chunk": 50, "local": 9, "labels": "published"}
    found = run(tmp_path, base, talks, steps=30, eval_every=20, **options)
    assert found["after"]["eval_loss"] < 0.6 * found["before"]["eval_loss"]
    model = tmp_path / "model"
    heads = load_heads(model, load_model(model).config)
    assert heads.width == found["width"] == 16
    assert found["trainable_parameters"] == sum(p.numel() for p in heads.parameters())
    assert all(p.dtype == torch.float32 for p in heads.parameters())
    assert read_settings(model) == HeadSettings(budget=77, chunk=50, stabilizers=3, local=9)
    inside = content(model)
    assert content(base).items() <= inside.items()  # the model itself is as it was
    assert inside.keys() - content(base).keys() == {"retaining/heads.safetensors", "retaining/settings.json"}
    assert (model / "model.safetensors").samefile(base / "model.safetensors")
    lines = curves(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 20, 30]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert lines[0] == {"step": 0, **found["before"]}
    assert lines[-1]["eval_loss"] >= found["after"]["eval_loss"]  # a block's best, which need not be its last
    assert lines[-1]["eval_recall"] == found["after"]["eval_recall"]


def test_heads_find_what_answers_attend_to(tiny, talks, tmp_path):
    found = run(tmp_path, tiny(), talks, rows=24, tokens=256, steps=120, batch=512, width=64, lr=0.01)
    assert found["before"]["eval_recall"] < 0.35  # a quarter, by chance
    assert found["after"]["eval_recall"] > 0.4


@pytest.mark.parametrize(
    "dead", ["train-1.safetensors", "heldout-1.safetensors", "heads/0.safetensors", "heads/2.safetensors"]
)
def test_a_killed_training_ends_with_the_same_bytes(tiny, talks, tmp_path, monkeypatch, dead):
    base = tiny()
    run(tmp_path / "whole", base, talks)
    written: list[str] = []

    def fatal(state: dict[str, torch.Tensor], file: Path) -> None:
        if str(file).endswith(dead):
            file.with_name(file.name + ".tmp").write_bytes(b"cut short")
            raise KeyboardInterrupt
        written.append(file.name)
        save(state, file)

    save = samples.save_whole
    with monkeypatch.context() as patch:
        for module in (samples, train):
            patch.setattr(module, "save_whole", fatal)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", base, talks)
    again: list[str] = []

    def count(state: dict[str, torch.Tensor], file: Path) -> None:
        again.append(file.name)
        save(state, file)

    for module in (samples, train):
        monkeypatch.setattr(module, "save_whole", count)
    run(tmp_path / "killed", base, talks)
    assert len(written) + len(again) == 4 + 2 + 4 and not set(written) & set(again)  # rows, held-out ones, blocks
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
    assert math.isfinite(found["after"]["eval_loss"])
    monkeypatch.setattr(train, "block_loss", lambda scores, *_: scores.sum() * math.nan)
    with pytest.raises(UserError, match=r"not a number: training diverged; lower retain\.lr"):
        run(tmp_path / "bad", tiny(), talks)


def test_what_is_refused_before_any_work(tiny, tmp_path):
    context = Context(recipe_dir=tmp_path)
    stage.check(config(length=512), tiny(), context)
    with pytest.raises(UserError, match=r"retain\.length is 600, but the model was trained for 512 positions"):
        stage.check(config(length=600), tiny(), context)
    with pytest.raises(UserError, match=r"retain\.dataset\.path: .*none\.jsonl does not exist"):
        stage.check(config(dataset={"path": "none.jsonl"}), tiny(), context)
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
retain: {rows: 2, steps: 2, length: 480, width: 8, heldout: 1}
"""


def problems(folder: Path, text: str) -> str:
    file = folder / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        Recipe.load(str(file))
    return str(error.value)


def test_a_recipe_needs_something_to_make_rows_of(tmp_path):
    alone = "name: x\nmodel: random:llama\nretain: {steps: 2}\n"
    assert "retain: builds its rows from the data stage, which this recipe lacks: add `data:`" in problems(
        tmp_path, alone
    )
    message = problems(tmp_path, "name: x\nmodel: random:llama\nretain: {dataset: {path: a.jsonl, text: t}}\n")
    assert "retain.dataset" in message and "prompts with answers" in message
    late = RECIPE + "sort: {depths: [4, 8]}\n"
    assert "the stage retain reads the output of sort, so sort must come before it" in problems(tmp_path, late)
    assert "stabilizers (64) are part of the budget (32)" in problems(tmp_path, alone.replace("steps: 2", "budget: 32"))
    (tmp_path / "r.yaml").write_text(alone.replace("steps: 2", "dataset: {path: a.jsonl}"))
    assert Recipe.load(str(tmp_path / "r.yaml")).section("retain").input_files() == ["a.jsonl"]


def test_a_recipe_runs_and_runs_again(tmp_path):
    talk = [{"prompt": f"What is part {n} of the work?", "response": f"It is word {n}. One more."} for n in range(16)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    (tmp_path / "long.yaml").write_text(RECIPE)
    planned = plan_run(Recipe.load(str(tmp_path / "long.yaml")), Options(tmp_path / "runs"))
    execute(planned, Progress())
    finish(planned, len(planned.pending))
    assert not plan_run(Recipe.load(str(tmp_path / "long.yaml")), Options(tmp_path / "runs")).pending
    (folder,) = (tmp_path / "runs" / "long").glob("retain-*")
    assert not (folder / WORK).exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["metrics"]["steps"] == 2 and manifest["planned_memory_bytes"]
    page = (tmp_path / "runs" / "long" / "report.html").read_text()
    assert "Retaining heads on held-out rows" in page and "Kept of the best quarter" in page


def test_the_plan_counts_heads_and_rows(tiny):
    model = json.loads((tiny() / "config.json").read_text())
    at = Setting(geometry_of(model), 4, "float32")
    short, long = (config(length=length) for length in (256, 512))
    heads = fresh_heads(Decoder(load_model(tiny())), 16, 0)
    found = COST.need(short, at)
    assert found.disk == found.parts["adapters"] / 2 == 4 * sum(p.numel() for p in heads.parameters())
    assert COST.need(long, at).parts["activations"] == 2 * found.parts["activations"]
    many = COST.need(config(rows=100_000), at)  # a block's pairs are what is most: as they lie in memory
    pairs = Pairs(torch.zeros(32, 2, at.shape.qkv, dtype=torch.bfloat16), torch.zeros(32, 2, at.shape.kv_heads))
    assert many.parts["other"] == 100_002 * (pairs.inputs.nbytes + pairs.labels.nbytes)
    assert many.scratch == many.parts["other"] * at.kept
    works = [COST.work(section, at) for section in (short, long)]
    assert works[0] is not None and works[1] is not None and works[1].flops > 2 * works[0].flops
    assert COST.work(config(dataset={"path": "a.jsonl"}), at) is None  # nobody knows how long they are
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
