"""Sorted training: one pass for all depths against a model per depth, sampling, resuming, refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs, Progress
from compress.data.chat import load_encoded
from compress.data.config import TeacherConfig
from compress.data.rows import read_rows
from compress.data.teacher_cache import write_teacher
from compress.distill import stage as distill
from compress.distill.config import DistillConfig
from compress.modeling.blocks import Decoder, depths, drop_blocks, kept_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.pipeline import runner
from compress.pipeline.plan import StagePlan, make_plan, read_geometry
from compress.pipeline.recipe import Recipe
from compress.sort import stage
from compress.sort.config import SortConfig
from compress.training import train
from compress.training.config import Lora
from compress.training.depths import Depths
from compress.training.shared import SharedTeacher
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

LENGTH, SEED = 64, 7
LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 12.0}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}
MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {"tied": True},
    "llama-untied": {"tied": False},
    "llama-every-head-its-own": {"heads": 2, "kv_heads": 2},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"} | WINDOWS | {"use_sliding_window": True, "max_window_layers": 0},
    "qwen3": {"family": "qwen3"},
    "phi3": {"family": "phi3"},
    "gemma3_text": {"family": "gemma3_text"} | WINDOWS,
}


class World:
    """A base of six blocks, the same without the third, and a data stage's folder; runs stages into fresh folders."""

    def __init__(self, killer: Callable[[int], Progress], base: Path, folder: Path, talks: Path):
        self.killer = killer
        self.base, self.folder, self.runs = base, folder, 0
        model = load_model(base)
        drop_blocks(model, [2])
        save_checkpoint(model, load_tokenizer(base), folder / "pruned")
        shutil.copytree(talks, folder / "data")
        self.inputs = Inputs(base, folder / "pruned", {"data": folder / "data"})

    def __call__(
        self, *, out: Path | None = None, calls: int = 0, dtype: str = "float32", **options: Any
    ) -> dict[str, Any]:
        self.runs += 1
        self.out = out or self.folder / f"out{self.runs}"
        self.out.mkdir(exist_ok=True)
        plain = {"objective": "kd", "tune": LORA, "lr": 1e-2, "length": LENGTH, "max_steps": 6, "accumulate": 2}
        plain |= {"eval_every": 3, "save_every": 2} | options
        sorts = "depths" in options
        section = SortConfig.model_validate(plain) if sorts else DistillConfig.model_validate(plain)
        context = Context(seed=SEED, dtype=dtype, progress=self.killer(calls))
        module = stage if sorts else distill
        module.check(section, self.base, context)
        return module.run(section, self.inputs, self.out, context)

    def lines(self, key: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.out / "curves.jsonl").read_text().splitlines()]
        return [line for line in lines if key in line]

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def world(
    killer: Callable[[int], Progress],
    shaken: Callable[..., Path],
    talks: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    base = shaken(blocks=6, hidden=32, heads=2, kv_heads=1, intermediate=64, seed=2)
    return World(killer, base, tmp_path_factory.mktemp("sorted"), talks)


def cut(folder: Path, depth: int) -> Any:
    """The model of a folder as one of its first blocks alone."""
    model = load_model(folder)
    drop_blocks(model, range(depth, model.config.num_hidden_layers))
    return model


def response_terms(model: Any, teacher: Any, data: Path, tokenizer: Any) -> tuple[Tensor, Tensor, int]:
    """Sums of negative log-likelihoods and of KL(teacher ‖ model), row by row and in whole logits; and the tokens."""
    nll = kl = torch.zeros((), dtype=torch.float64)
    count = 0
    for row in load_encoded(data, tokenizer, "train", LENGTH):
        at = [t for t in range(1, len(row.input_ids)) if row.loss_mask[t]]
        ids = torch.tensor([row.input_ids])
        logs = [m(input_ids=ids).logits[0].double().log_softmax(-1)[[t - 1 for t in at]] for m in (model, teacher)]
        student, expected = logs[0], logs[1].detach()
        nll = nll - student[range(len(at)), ids[0, at]].sum()
        kl = kl + (expected.exp() * (expected - student)).sum()
        count += len(at)
    return nll, kl, count


def gradients(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Filled with the gradients of the last step."""
    found: dict[str, Tensor] = {}

    def keep(recorder: Any, *_: Any, **__: Any) -> None:
        named = recorder.trainer.student.model.named_parameters()
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    monkeypatch.setattr(train.Recorder, "on_pre_optimizer_step", keep)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_one_pass_is_a_model_per_depth(
    killer: Callable[[int], Progress],
    shaken: Callable[..., Path],
    talks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Loss, each depth's figures and all gradients, as of separate models cut off at each depth, run row by row."""
    sizes = {"family": "llama", "blocks": 6, "hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 64}
    world = World(killer, shaken(**sizes | MODELS[name]), tmp_path, talks)
    found = gradients(monkeypatch)
    weights = {1: 1.0, 3: 2.0, 5: 5.0}
    world(depths=list(weights), weights=list(weights.values()), tune="full", max_steps=1, accumulate=99, clip=1e9)
    (line,) = world.lines("loss")
    teacher, tokenizer = load_model(world.base), load_tokenizer(world.base)
    wanted: dict[str, Tensor] = {}
    total = 0.0
    for depth, own in zip(weights, line["depths"], strict=True):
        model = cut(world.inputs.model, depth)
        nll, kl, count = response_terms(model, teacher, world.inputs.stages["data"], tokenizer)
        loss = weights[depth] / 8 * kl / count
        loss.backward()
        total += float(loss.detach())
        expected = [float(kl.detach()) / count, math.exp(float(nll.detach()) / count)]
        assert own["depth"] == depth and [own["kl"], own["perplexity"]] == pytest.approx(expected, rel=1e-5)
        for parameter, value in model.named_parameters():
            wanted[parameter] = wanted.get(parameter, torch.zeros(())) + value.grad
    assert line["loss"] == pytest.approx(total, rel=1e-5) and line["tokens"] == count
    assert ("lm_head.weight" in wanted) is (name == "llama-untied")
    assert found.keys() == wanted.keys()
    for parameter, value in wanted.items():
        torch.testing.assert_close(found[parameter], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=parameter: n + m)


def test_the_checkpoint_runs_at_its_depths(world: World) -> None:
    """The best one is chosen by the mean over depths, its figures are those of the models cut off there."""
    metrics = world(depths=[1, 3, 5], max_steps=12)
    folder = world.out / "model"
    assert depths(load_config(folder)) == metrics["depths"] == [1, 3, 5]
    assert kept_blocks(load_config(folder)) == [0, 1, 3, 4, 5]
    measured = world.lines("eval_kl")
    assert [line["step"] for line in measured] == [0, 3, 6, 9, 12]
    for line in measured:
        assert line["eval_kl"] == pytest.approx(sum(own["kl"] for own in line["eval_depths"]) / 3)
        logs = [math.log(own["perplexity"]) for own in line["eval_depths"]]
        assert math.log(line["eval_perplexity"]) == pytest.approx(sum(logs) / 3)
    assert metrics["best"] == min(measured, key=lambda line: line["eval_kl"])
    first, last = measured[0]["eval_depths"], metrics["best"]["eval_depths"]
    assert all(own["kl"] < 0.8 * before["kl"] for own, before in zip(last, first, strict=True))
    assert first[0]["kl"] > first[-1]["kl"]
    rows = load_encoded(world.inputs.stages["data"], load_tokenizer(folder), "heldout", LENGTH)
    for own in last:
        model, nll, count = cut(folder, own["depth"]), 0.0, 0
        for row in rows:
            at = [t for t in range(1, len(row.input_ids)) if row.loss_mask[t]]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
            nll -= sum(float(logs[t - 1, row.input_ids[t]]) for t in at)
            count += len(at)
        assert own["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)


@pytest.mark.parametrize("tune", [LORA | {"dropout": 0.1}, "full"], ids=["lora", "full"])
def test_a_single_depth_is_plain_distillation(world: World, tune: Any) -> None:
    plain = world(tune=tune)
    weights, lines = world.weights, world.lines("step")
    found = world(depths=[5], tune=tune)
    assert world.weights.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in world.weights.items())
    assert [{k: v for k, v in line.items() if "depths" not in k} for line in world.lines("step")] == lines
    assert found["best"]["eval_kl"] == plain["best"]["eval_kl"]


def test_gradient_checkpointing_learns_the_same(world: World) -> None:
    lines = []
    for on in (False, True):
        world(depths=[1, 3, 5], gradient_checkpointing=on, tune="full", max_steps=3)
        lines.append([line["loss"] for line in world.lines("loss")])
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)


# The draw


@pytest.mark.parametrize(("passes", "tokens"), [(2, 10), (3, 11), (2, 1), (3, 0)])
def test_every_token_is_seen_by_the_deepest_and_by_so_many_others(passes: int, tokens: int) -> None:
    plan = Depths((2, 4, 6, 8), (0.1, 0.2, 0.3, 0.4), passes)
    drawn = plan.draw(tokens, 5)
    assert drawn.depth.shape == drawn.weight.shape == (passes, tokens)
    columns = drawn.depth.T.tolist()
    assert all(column[0] == 3 and len(set(column)) == passes for column in columns)
    counts = [sum(depth in column for column in columns) for depth in range(3)]
    assert max(counts) - min(counts) <= 1 and sum(counts) == tokens * (passes - 1)
    expected = torch.tensor([0.1, 0.2, 0.3, 0.4 * (passes - 1) / 3])[drawn.depth] * 3 / (passes - 1)
    torch.testing.assert_close(drawn.weight, expected)
    assert torch.equal(plan.draw(tokens, 5).depth, drawn.depth)
    if tokens > 1:
        assert not torch.equal(plan.draw(tokens, 6).depth, drawn.depth)


def test_the_draw_is_right_on_average() -> None:
    """The mean of the weights over many draws is the weight of each depth, at every token alike."""
    plan, draws = Depths((1, 2, 3), (0.2, 0.3, 0.5), 2), 4000
    total = torch.zeros(3, 4)
    for seed in range(draws):
        drawn = plan.draw(4, seed)
        total.index_put_((drawn.depth, torch.arange(4).expand(2, -1)), drawn.weight, accumulate=True)
    torch.testing.assert_close(total / draws, torch.tensor([[0.2], [0.3], [0.5]]).expand(-1, 4), rtol=0, atol=0.02)


def test_a_sampled_step_has_the_gradient_of_its_draw(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the weighted sum of separate models, token by token as drawn."""
    found, drawn = gradients(monkeypatch), []
    plain = train.DistillTrainer._objective

    def keep(trainer: Any, model: Any, batch: Any, positions: Tensor, targets: Tensor, anchor: Any, draw: Any) -> Any:
        if trainer.student.training:
            drawn.append((batch, positions, targets, draw))
        return plain(trainer, model, batch, positions, targets, anchor, draw)

    monkeypatch.setattr(train.DistillTrainer, "_objective", keep)
    options: dict[str, Any] = {"depths": [1, 3, 4, 5], "sample": 2, "objective": "sft", "tune": "full"}
    world(**options, max_steps=1, clip=1e9)
    models = [cut(world.inputs.model, depth) for depth in options["depths"]]
    count = sum(len(targets) for _, _, targets, _ in drawn)
    assert len(drawn) == 2 and not torch.equal(drawn[0][3].depth[:, :9], drawn[1][3].depth[:, :9])
    for batch, positions, targets, draw in drawn:
        for index, model in enumerate(models):
            share = torch.where(draw.depth == index, draw.weight, 0.0).sum(0)
            logits = model(**batch.model_inputs()).logits.flatten(0, 1)[positions]
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            ((nll * share).sum() / count).backward()
    for name, value in found.items():
        wanted = sum(dict(m.named_parameters())[name].grad for m in models if name in dict(m.named_parameters()))
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: n + m)


def test_every_batch_is_drawn_for_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    plain = Depths.draw
    monkeypatch.setattr(Depths, "draw", lambda plan, tokens, seed: seeds.append(seed) or plain(plan, tokens, seed))
    world(depths=[1, 3, 5], sample=2, max_steps=4)
    assert len(set(seeds)) == len(seeds) == 8  # two batches per step
    first = list(seeds)
    world(depths=[1, 3, 5], sample=2, max_steps=4)
    assert seeds == first * 2


@pytest.mark.parametrize("sample", [None, 2])
def test_a_killed_run_ends_with_the_same_bytes(world: World, sample: int | None) -> None:
    options = {"depths": [1, 3, 5], "sample": sample, "tune": LORA | {"dropout": 0.2, "train_norm": True}}
    metrics = world(**options, max_steps=7)
    whole, out = world.out, world.folder / f"killed-{sample}"
    for calls in (4, 3, 6):  # before the first checkpoint's end, after one, in the last step
        with pytest.raises(KeyboardInterrupt):
            world(**options, max_steps=7, out=out, calls=calls)
    again = world(**options, max_steps=7, out=out)
    for path in [*(whole / "model").iterdir(), whole / "curves.jsonl"]:
        assert path.read_bytes() == (out / path.relative_to(whole)).read_bytes(), path.name
    del metrics["seconds_training"], again["seconds_training"]
    assert again == metrics


# Teachers, and what is trained


@pytest.mark.parametrize("train_head", [False, True])
def test_the_teachers_teach_the_same(
    killer: Callable[[int], Progress], shaken: Callable[..., Path], talks: Path, tmp_path: Path, train_head: bool
) -> None:
    """Also where the student trains the norm and the head: the unpruned model's own stay what they were."""
    world = World(killer, shaken(blocks=6, hidden=32, heads=2, kv_heads=1, intermediate=64), tmp_path, talks)
    data, tokenizer = world.inputs.stages["data"], load_tokenizer(world.base)
    (data / WORK).mkdir()
    write_teacher(TeacherConfig(top_k=10**6), world.base, read_rows(data), tokenizer, LENGTH, data, Context())
    tune = LORA | {"train_norm": train_head, "train_head": train_head}
    lines, weights = {}, {}
    for teacher in ("copy", "shared", "cached"):
        world(depths=[1, 3, 5], sample=2, teacher=teacher, tune=tune, lr=1e-3)
        lines[teacher] = [own["kl"] for line in world.lines("loss") for own in line["depths"]]
        weights[teacher] = world.weights
    assert lines["shared"] == pytest.approx(lines["copy"], rel=1e-4)
    assert lines["cached"] == pytest.approx(lines["copy"], rel=2e-3)
    for name, value in weights["copy"].items():
        torch.testing.assert_close(weights["shared"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_trained_beside_adapters(
    killer: Callable[[int], Progress], shaken: Callable[..., Path], talks: Path, tmp_path: Path, tied: bool
) -> None:
    """What is saved is what was trained; a tied head is the embedding still, an untied one leaves it alone."""
    world = World(killer, shaken(blocks=6, hidden=32, heads=2, kv_heads=1, intermediate=64, tied=tied), tmp_path, talks)
    old = load_file(world.inputs.model / "model.safetensors")
    metrics = world(depths=[2, 5], tune=LORA | {"train_norm": True, "train_head": True})
    changed = {name for name, value in world.weights.items() if not torch.equal(value, old[name])}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert {name for name in changed if "_proj" not in name} == {"model.norm.weight", head}
    best = load_file(world.out / WORK / "best.safetensors")
    (saved,) = (value for name, value in best.items() if name.endswith(head))
    assert torch.equal(saved, world.weights[head])
    model = load_model(world.out / "model")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert metrics["best"]["eval_kl"] < metrics["before"]["eval_kl"]
    with torch.no_grad():  # the figures are the saved model's
        row = load_encoded(world.inputs.stages["data"], load_tokenizer(world.base), "heldout", LENGTH)[0]
        assert torch.isfinite(model(input_ids=torch.tensor([row.input_ids])).logits).all()


@pytest.mark.parametrize("bits", [None, "nf4"])
@pytest.mark.parametrize("teacher", ["copy", "shared"])
def test_what_is_trained_stays_float32_beside_smaller_weights(world: World, teacher: str, bits: str | None) -> None:
    """bfloat16 blocks, and blocks in 4 bits; it learns nearly what float32 does."""
    tune = LORA | {"train_norm": True, "train_head": True}
    options: dict[str, Any] = {"depths": [1, 3, 5], "teacher": teacher, "lr": 1e-3, "max_steps": 3}
    world(**options, tune=tune)
    wanted = [line["loss"] for line in world.lines("loss")]
    world(**options, tune=tune | {"quantize_base": bits}, dtype="bfloat16")
    lines = world.lines("loss")
    assert [line["loss"] for line in lines] == pytest.approx(wanted, rel=0.1 if bits is None else 0.5)
    best = load_file(world.out / WORK / "best.safetensors")
    assert {value.dtype for value in best.values()} == {torch.float32}
    assert {value.dtype for value in world.weights.values()} == {torch.bfloat16}
    measured = world.lines("eval_kl")
    assert measured[-1]["eval_kl"] < measured[0]["eval_kl"]


def test_a_shared_teacher_keeps_its_own_norm_and_head(world: World) -> None:
    tune = Lora(rank=4, train_norm=True, train_head=True)
    shared = SharedTeacher(world.base, world.inputs.model, tune, Context(seed=SEED))
    base, ids = load_model(world.base), torch.arange(3, 43).reshape(2, 20)
    trained = {p for p in shared.model.parameters() if p.requires_grad}
    assert shared.decoder.head_weight in trained and shared.decoder.embedding.weight in trained
    for parameter in trained:
        parameter.data += 0.1
    with shared.on():
        assert torch.equal(shared.decoder.head_weight, base.lm_head.weight)
        assert torch.equal(shared.decoder.hidden(input_ids=ids), Decoder(base).hidden(input_ids=ids))
    assert shared.held_twice == base.lm_head.weight.numel() + base.config.hidden_size


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": []}, "at least 1 item"),
        ({"depths": [0, 5]}, "greater than or equal to 1"),
        ({"depths": [3, 1, 5]}, r"ascending order, each once: \[1, 3, 5\]"),
        ({"depths": [3, 3, 5]}, r"ascending order, each once: \[3, 5\]"),
        ({"depths": [3, 5], "weights": [1.0]}, "1 numbers for 2 depths"),
        ({"depths": [3, 5], "weights": [1.0, 0.0]}, "greater than 0"),
        ({"depths": [1, 3, 5], "sample": 1}, "2 to 3 can learn"),
        ({"depths": [1, 3, 5], "sample": 4}, "2 to 3 can learn"),
        ({"depths": [5], "tune": "full", "teacher": "shared"}, "teacher: shared needs LoRA"),
        ({"depths": [5], "variants": []}, "Extra inputs"),
    ],
)
def test_sections_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SortConfig.model_validate(options)


def test_depths_that_the_model_has_not_are_refused_before_weights_are_read(world: World, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(world.inputs.model / name, tmp_path / name)  # no weights
    inputs = Inputs(world.base, tmp_path, world.inputs.stages)
    context = Context(seed=SEED)
    for wanted, message in (
        ([2, 4], r"ends with 4, but the model that is sorted has 5 blocks.*write \[\.\.\., 5\], or prune to 4 blocks"),
        ([2, 6], r"ends with 6, but the model that is sorted has 5 blocks.*write \[\.\.\., 5\]$"),
    ):
        with pytest.raises(UserError, match=message):
            stage.run(SortConfig(depths=wanted), inputs, tmp_path, context)
    with pytest.raises(UserError, match="7 blocks are asked for, but the unpruned model has 6"):
        stage.check(SortConfig(depths=[2, 7]), world.base, context)


def test_messages_name_the_section(world: World) -> None:
    with pytest.raises(UserError, match=r"Lower sort\.lr \(it is 1e\+20\) or raise sort\.warmup"):
        world(depths=[2, 5], lr=1e20, tune="full")


# In a recipe

SORTED = """name: x
model: random:llama
data: {source: magpie, rows: 24}
prune: {blocks: 2}
sort: {depths: [2, 4, 6], %s}
"""


def test_a_recipe_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """random:llama has eight blocks, six after pruning; the run, the dry one and the plan find what does not fit."""
    file = tmp_path / "r.yaml"
    file.write_text(SORTED % "lr: 0.001")
    assert Recipe.load(str(file)).order == ("data", "prune", "sort")
    monkeypatch.setattr("compress.modeling.load.load_model", lambda *_: pytest.fail("weights were read"))
    for wrong, message in (("sort.depths=[2, 4]", "ends with 4"), ("sort.depths=[2, 8]", "ends with 8")):
        loaded = Recipe.load(str(file), [wrong])
        with pytest.raises(UserError, match=message + ".*has 6 blocks"):
            runner.execute(runner.plan_run(loaded, runner.Options(tmp_path / "runs")), Progress())
        with pytest.raises(UserError, match=message + ".*has 6 blocks"):
            make_plan(loaded, "float32", tmp_path / "runs")
    make_plan(
        Recipe.load(str(file), ["sort.depths=[2, 4]", "prune.blocks=auto", "prune.goal={size: 0.5}"]),
        "float32",
        tmp_path,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SORTED % "teacher: cached, objective: kd", "cached reads predictions that the data stage stores"),
        (SORTED % "depth: 3", r"sort\.depth.*depths"),
        ("name: x\nmodel: random:llama\nsort: {depths: [8]}\n", "the stage sort needs a stage data before it"),
        (SORTED % "lr: 1" + "distill: {lr: 0.1}\n", "sort reads the output of distill"),
    ],
)
def test_recipes_that_cannot_work_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        Recipe.load(str(file))


def test_the_plan_counts_the_heads_of_all_depths_and_what_is_trained_beside(tmp_path: Path) -> None:
    """More depths are more passes through the head, and nothing else; a trained head has its moments."""
    file = tmp_path / "r.yaml"
    file.write_text(SORTED % "tune: {kind: lora, rank: 1}, max_steps: 1, accumulate: 1, eval_every: 1000, length: 64")
    text = "sort.depths=[1, 2, 4, 6]"
    shape = read_geometry(Recipe.load(str(file)), tmp_path)

    def stage_plan(*overrides: str) -> StagePlan:
        plan = make_plan(Recipe.load(str(file), overrides), "float32", tmp_path)
        return next(stage for stage in plan.stages if stage.name == "sort")

    three, two, four = stage_plan(), stage_plan("sort.sample=2"), stage_plan(text)
    head = 2 * 2 * shape.vocab * shape.hidden * 64  # forward, and backward to the states
    assert three.flops - two.flops == head
    assert stage_plan(text, "sort.sample=3").flops - stage_plan(text, "sort.sample=2").flops == head
    assert four.flops - three.flops > head  # the held-out rows are measured at every depth
    trained = stage_plan("sort.tune.train_head=true", "sort.tune.train_norm=true")
    parameters = shape.vocab * shape.hidden + shape.hidden
    assert trained.need.peak - three.need.peak == 16 * parameters  # themselves, gradients and two moments
