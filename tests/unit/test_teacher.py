"""The three teachers: what each one says, that they teach the same, and what the cache holds."""

from __future__ import annotations

import gc
import json
import random
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs, Progress
from compress.data.chat import Encoded, load_encoded
from compress.data.config import TeacherConfig
from compress.data.packing import Batch, pack
from compress.data.rows import read_rows
from compress.data.teacher_cache import TeacherCache, write_teacher
from compress.distill import stage
from compress.distill.config import DistillConfig
from compress.distill.variants import plan_jobs
from compress.modeling.agreement import States, response_positions
from compress.modeling.blocks import Decoder, drop_blocks, kept_blocks
from compress.modeling.changes import find_changes
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import Recipe
from compress.training import run as training
from compress.training import students
from compress.training.config import Copy, Lora
from compress.training.shared import SharedTeacher
from compress.training.teacher import CopyTeacher
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

LENGTH, SEED = 64, 7
LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 12.0}
WORDS = "the way of many people is which model time and look so é 42".split()
MIXED = ["sliding_attention", "full_attention"] * 3
WINDOWED = {"sliding_window": 8, "layer_types": MIXED}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": WINDOWED | {"use_sliding_window": True, "max_window_layers": 0},
    "phi3": {},
    "gemma3_text": WINDOWED,
}


def prune(base: Path, folder: Path, dropped: list[int], scale: float | None = 0.8, dtype: str = "float32") -> Path:
    """The base without some blocks, healed as heal/refit.py does: a new map before the first gap, all that is added
    behind it times one number."""
    model = load_model(base, dtype)
    decoder = Decoder(model)
    shape = (decoder.hidden_size,) if not decoder.can_fuse_after_mlp else (decoder.hidden_size,) * 2
    noise = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    values = decoder.fused(min(dropped) - 1, noise + (torch.eye(shape[0]) if len(shape) == 2 else 1))
    for block in range(max(dropped) + 1, decoder.num_blocks) if scale else []:
        values |= decoder.rescaled(block, scale or 1)
    for parameter, value in values.items():
        parameter.data = value.to(parameter)
    drop_blocks(model, dropped)
    save_checkpoint(model, load_tokenizer(base), folder)
    return folder


def batches(seed: int = 0, count: int = 5) -> list[Batch]:
    draw = random.Random(seed)
    rows = [[draw.randrange(3, 300) for _ in range(draw.randrange(12, 40))] for _ in range(count)]
    return pack([Encoded(row, [i % 3 != 0 for i in range(len(row))]) for row in rows], 48, 2, 9)


def restless(shared: SharedTeacher) -> None:
    """As if it had been trained: adapters that do something, in training mode."""
    random = torch.Generator().manual_seed(3)
    for parameter in shared.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    shared.model.train()


def snapshot(model: nn.Module) -> list[Any]:
    """All that a teacher's pass could leave changed."""
    inner: Any = model
    config = {key: value for key, value in inner.config.to_dict().items()}
    parts: list[Any] = [config, [id(block) for block in inner.base_model.model.model.layers]]
    for name, module in model.named_modules():
        parts.append((name, id(module), module.training, getattr(module, "layer_idx", None)))
        parts.append(getattr(module, "disable_adapters", None))
    for name, parameter in model.named_parameters():
        parts.append((name, id(parameter), parameter.data_ptr(), parameter.requires_grad, parameter.dtype))
    return parts


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_weights_are_the_base_and_the_student(shaken: Callable[..., Path], tmp_path: Path, family: str) -> None:
    base = shaken(family, blocks=6, **FAMILIES[family])
    pruned = prune(base, tmp_path / "pruned", [2, 3])
    shared = SharedTeacher(base, pruned, Lora(rank=4), Context(seed=SEED))
    model, student = load_model(base), load_model(pruned)
    with torch.no_grad():
        for batch in batches():
            found = shared.decoder.hidden(**batch.model_inputs())
            torch.testing.assert_close(found, Decoder(student).hidden(**batch.model_inputs()), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(found, shared.hidden(batch), atol=1e-2)
    assert kept_blocks(shared.decoder.config) == [0, 1, 4, 5]
    restless(shared)
    before = snapshot(shared.model)
    for batch in batches(1):
        with torch.no_grad():
            wanted = Decoder(model).hidden(**batch.model_inputs())
        found = shared.hidden(batch)
        assert torch.equal(found, wanted) and not found.requires_grad
    with pytest.raises(KeyboardInterrupt), shared.on():
        assert shared.decoder.num_blocks == 6 and not torch.is_grad_enabled()
        raise KeyboardInterrupt
    assert snapshot(shared.model) == before and torch.is_grad_enabled()
    assert torch.equal(shared.head.weight, model.lm_head.weight)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_only_what_healing_made_anew_is_held_twice(shaken: Callable[..., Path], tmp_path: Path, family: str) -> None:
    base = shaken(family, blocks=6, **FAMILIES[family])
    changes = find_changes(base, prune(base, tmp_path / "pruned", [2, 3]))
    layers = [f"model.layers.{i}." for i in (4, 5)]
    if family == "llama":
        down = "model.layers.1.mlp.down_proj."
        assert changes.replaced.keys() == {down + "weight", down + "bias"}
        assert changes.scaled.keys() == {
            f"{layer}{name}" for layer in layers for name in ("self_attn.o_proj", "mlp.down_proj")
        }
        assert list(changes.scaled.values()) == pytest.approx([0.8] * 4, rel=1e-6)
    else:  # norms, which are small
        names = {f"{x}{y}_layernorm.weight" for x in layers for y in ("post_attention", "post_feedforward")}
        assert changes.replaced.keys() == names | {"model.layers.1.post_feedforward_layernorm.weight"}
        assert not changes.scaled
    shared = SharedTeacher(base, tmp_path / "pruned", Lora(rank=4), Context())
    assert shared.held_twice == sum(value.numel() for value in changes.replaced.values())
    with shared.on():
        everything = {id(p): p.numel() for p in shared.decoder.model.parameters()}
    everything |= {id(p): p.numel() for p in shared.model.parameters()}
    adapters = sum(p.numel() for p in shared.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in load_model(base).parameters())
    assert sum(everything.values()) == whole + adapters + shared.held_twice


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_no_multiple_is_held_twice(tiny: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    base = tiny(blocks=4)
    pruned = prune(base, tmp_path / "pruned", [2], dtype=dtype)
    assert len(find_changes(base, pruned, dtype).scaled) == 2
    model = load_model(pruned, dtype)
    model.model.layers[2].self_attn.o_proj.weight.data[3, 5] *= 1.05
    save_checkpoint(model, load_tokenizer(base), pruned)
    changes = find_changes(base, pruned, dtype)
    assert changes.scaled.keys() == {"model.layers.3.mlp.down_proj"} and changes.dropped == [2]
    assert changes.replaced.keys() == {"model.layers.1.mlp.down_proj.weight", "model.layers.3.self_attn.o_proj.weight"}
    nothing = find_changes(base, base, dtype)
    assert (nothing.dropped, nothing.replaced, nothing.scaled) == ([], {}, {})


def test_a_model_that_was_pruned_before_is_shared_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    first = prune(tiny(blocks=6), tmp_path / "first", [1, 2])
    second = prune(first, tmp_path / "second", [2])  # block 4 of the six
    changes = find_changes(first, second)
    assert changes.dropped == [2]
    shared = SharedTeacher(first, second, Lora(rank=4), Context())
    batch = batches()[0]
    with torch.no_grad():
        assert torch.equal(shared.hidden(batch), Decoder(load_model(first)).hidden(**batch.model_inputs()))
        found = shared.decoder.hidden(**batch.model_inputs())
        wanted = Decoder(load_model(second)).hidden(**batch.model_inputs())
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_healed_weights_are_quantized_with_the_others(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny(blocks=4)
    pruned = prune(base, tmp_path / "pruned", [2], scale=None)
    shared = SharedTeacher(base, pruned, Lora(rank=4, quantize_base="nf4"), Context(seed=SEED))
    config = DistillConfig.model_validate({"tune": LORA | {"quantize_base": "nf4"}})
    student = students.build_student(config, Inputs(base, pruned), Context(seed=SEED))
    teacher = CopyTeacher(base, Copy(quantize="nf4"), Context())
    batch = batches()[0]
    with torch.no_grad():
        assert torch.equal(shared.hidden(batch), teacher.hidden(batch))
        assert torch.equal(shared.decoder.hidden(**batch.model_inputs()), student(**batch.model_inputs())[-1])
    restless(shared)
    before = snapshot(shared.model)
    assert torch.equal(shared.hidden(batch), teacher.hidden(batch)) and snapshot(shared.model) == before


class World:
    """A base model, the same without two blocks, and a data stage's folder; runs the stage into fresh folders."""

    def __init__(self, killer: Callable[[int], Progress], base: Path, folder: Path, talks: Path):
        self.killer = killer
        self.folder, self.base, self.runs = folder, base, 0
        shutil.copytree(talks, folder / "data")
        (folder / "data" / WORK).mkdir()
        self.inputs = Inputs(base, prune(base, folder / "pruned", [2, 3]), {"data": folder / "data"})
        self.vocabulary = load_model(base).config.vocab_size

    def data(self, k: int) -> Path:
        """The data stage's folder with a teacher of k tokens."""
        folder = self.folder / f"data{k}"
        if not folder.exists():
            shutil.copytree(self.folder / "data", folder)
            tokenizer, rows = load_tokenizer(self.base), read_rows(folder)
            write_teacher(TeacherConfig(top_k=k), self.base, rows, tokenizer, LENGTH, folder, Context())
        return folder

    def __call__(self, k: int = 0, *, out: Path | None = None, calls: int = 0, **options: Any) -> list[dict[str, Any]]:
        """The curves."""
        self.runs += 1
        self.out = out or self.folder / f"out{self.runs}"
        self.out.mkdir(exist_ok=True)
        plain = {"objective": {"kind": "asft", "kl_weight": 0.7}, "tune": LORA, "lr": 1e-2, "length": LENGTH}
        plain |= {"max_steps": 6, "accumulate": 2, "eval_every": 3, "save_every": 2, "select": "last"}
        inputs = Inputs(self.base, self.inputs.model, {"data": self.data(k) if k else self.folder / "data"})
        config = DistillConfig.model_validate(plain | options)
        stage.run(config, inputs, self.out, Context(seed=SEED, progress=self.killer(calls)))
        return [json.loads(line) for line in (self.out / "curves.jsonl").read_text().splitlines()]

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def world(
    killer: Callable[[int], Progress],
    tiny: Callable[..., Path],
    talks: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    base = tiny(blocks=6, hidden=32, heads=2, kv_heads=1, intermediate=48, seed=2)
    return World(killer, base, tmp_path_factory.mktemp("teacher"), talks)


def column(curves: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in curves if name in line]


def same(world: World, one: dict[str, Any], other: dict[str, Any], rel: float) -> None:
    """Both ways learn the same, step by step, to a relative tolerance; weights to ten times that of their change."""
    old = load_file(world.inputs.model / "model.safetensors")
    curves, weights = [], []
    for options in (one, other):
        curves.append(world(**options))
        weights.append(world.weights())
    for name in ("loss", "nll", "kl", "eval_loss", "eval_kl", "eval_perplexity"):
        assert column(curves[0], name) == pytest.approx(column(curves[1], name), rel=rel)
    assert len(column(curves[0], "loss")) == 6 and len(column(curves[0], "eval_kl")) == 3
    assert column(curves[0], "eval_kl")[-1] < 0.9 * column(curves[0], "eval_kl")[0]
    for name, weight in weights[0].items():
        assert (weight - weights[1][name]).norm() <= 10 * rel * (weights[1][name] - old[name]).norm()


@pytest.mark.parametrize("tune", [{}, {"dropout": 0.2}, {"quantize_base": "nf4"}], ids=["plain", "dropout", "nf4"])
def test_shared_teaches_what_a_copy_teaches(world: World, tune: dict[str, Any]) -> None:
    copy = {"kind": "copy", "quantize": tune.get("quantize_base")}
    same(world, {"teacher": "shared", "tune": LORA | tune}, {"teacher": copy, "tune": LORA | tune}, 1e-5)


def test_the_whole_vocabulary_from_the_cache_teaches_what_a_copy_teaches(world: World) -> None:
    same(world, {"teacher": "cached", "k": world.vocabulary}, {"teacher": "copy"}, 1e-3)  # float16


def test_few_tokens_from_the_cache_never_say_more_than_a_copy(world: World) -> None:
    options: dict[str, Any] = {"objective": "kd", "max_steps": 1}
    whole = world(**options)
    found = [world(k, teacher="cached", **options) for k in (1, 4, 64, world.vocabulary)]
    first = [column(curves, "kl")[0] for curves in found]
    assert 0 < first[0] < first[1] < first[2] < first[3] * (1 + 1e-4)
    assert first[3] == pytest.approx(column(whole, "kl")[0], rel=1e-3)
    for curves in found:  # measured by the unpruned model itself, whatever the cache holds
        assert column(curves, "eval_kl")[0] == column(whole, "eval_kl")[0]
    learned = world(16, teacher="cached", objective="kd", max_steps=16)
    assert column(learned, "eval_kl")[-1] < 0.8 * column(learned, "eval_kl")[0]


@pytest.mark.parametrize("bits", [None, "nf4"])
@pytest.mark.parametrize("teacher", ["shared", "copy"])
def test_recomputed_activations_are_the_students(world: World, teacher: str, bits: str | None) -> None:
    """Blocks run again in the backward pass, when the teacher's pass is over."""
    tune = LORA | {"quantize_base": bits}
    lines = [world(teacher=teacher, tune=tune, gradient_checkpointing=on, max_steps=3) for on in (False, True)]
    for name in ("loss", "kl", "eval_kl"):
        assert column(lines[0], name) == pytest.approx(column(lines[1], name), rel=1e-5)


@pytest.mark.parametrize(("teacher", "k"), [("shared", 0), ("cached", 8)])
def test_a_killed_run_ends_with_the_same_bytes(world: World, teacher: str, k: int) -> None:
    options: dict[str, Any] = {"teacher": teacher, "tune": LORA | {"dropout": 0.2}}
    world(k, **options)
    whole, out = world.out, world.folder / f"killed-{teacher}"
    for calls in (4, 3):
        with pytest.raises(KeyboardInterrupt):
            world(k, out=out, calls=calls, **options)
    world(k, out=out, **options)
    for name in ("curves.jsonl", "model/model.safetensors", "model/config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("teacher", ["shared", "cached"])
def test_an_objective_without_a_teacher_has_none(world: World, teacher: str) -> None:
    """The data stage need not have written one."""
    curves, plain = world(teacher=teacher, objective="dft", max_steps=2), world(objective="dft", max_steps=2)
    assert curves == plain and not column(curves, "kl") and column(curves, "eval_kl")


@pytest.mark.parametrize(
    ("teacher", "tune"), [("cached", "lora"), ("cached", "full"), ("shared", "lora"), ("copy", "lora")]
)
def test_nothing_of_the_unpruned_model_stays_that_is_not_needed(
    world: World, monkeypatch: pytest.MonkeyPatch, teacher: str, tune: str
) -> None:
    copies: list[Any] = []

    class Watched(CopyTeacher):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            copies.append(weakref.ref(self.decoder.model))

    monkeypatch.setattr(students, "CopyTeacher", Watched)
    config = DistillConfig.model_validate({"teacher": teacher, "tune": tune, "length": LENGTH})
    inputs = Inputs(world.base, world.inputs.model, {"data": world.data(4)})
    (job,) = plan_jobs(config, world.folder / "out", Context())
    train, held = (
        training.pack_rows(
            config, load_encoded(world.data(4), load_tokenizer(world.base), split, LENGTH), load_tokenizer(world.base)
        )
        for split in training.SPLITS
    )
    preparation = students.Preparation(inputs, held, Context())
    student, held_by, held_out = preparation.student(job, train, [])
    del preparation
    assert held_by is not None and held_by.anchor(
        train[0], response_positions(train[0].input_ids, train[0].loss_mask)[0]
    )
    heads = {anchor.head.weight.data_ptr() for anchor in held_out.anchors}
    assert (heads == {student.decoder.head_weight.data_ptr()}) is (tune == "lora")
    assert [copy() is not None for copy in copies] == {"cached": [False], "copy": [True], "shared": []}[teacher]


@pytest.mark.parametrize("teacher", ["shared", "cached", "copy"])
def test_the_best_weights_are_merged_with_no_other_model_held(
    world: World, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    """A head that is still held would hold all of the file that it is mapped from."""
    merge, merged = training.best_model, []

    def alone(*args: Any) -> Any:
        merged.append(sum(isinstance(thing, States) for thing in gc.get_objects()))
        return merge(*args)

    monkeypatch.setattr(training, "best_model", alone)
    world(k=4 if teacher == "cached" else 0, teacher=teacher, max_steps=1)
    assert merged == [0]


def test_what_cannot_be_had_is_refused(world: World) -> None:
    with pytest.raises(ValidationError, match=r"shared needs LoRA.*choose teacher: copy or cached"):
        DistillConfig.model_validate({"teacher": "shared", "tune": "full"})
    with pytest.raises(UserError, match=r"distill.teacher: cached needs the data stage's teacher cache.*data.teacher"):
        world(teacher="cached")
    folder = world.data(2)
    broken = world.folder / "broken"
    shutil.copytree(folder, broken)
    (broken / "teacher" / "tokens.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=r"teacher is broken .*run the data stage again"):
        TeacherCache(broken)
    np.save(broken / "teacher" / "tokens.npy", np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="teacher is broken"):
        TeacherCache(broken)


def test_the_plan_knows_what_each_teacher_takes(tmp_path: Path) -> None:
    def plan(*overrides: str) -> dict[str, Any]:
        loaded = Recipe.load("llama8b_26L", ["data.teacher.top_k=64", *overrides])
        return {planned.name: planned.need for planned in make_plan(loaded, "bfloat16", tmp_path).stages}

    adapters = "distill.tune={kind: lora, rank: 8}"
    found = {way: plan(f"distill.teacher={way}", adapters)["distill"] for way in ("copy", "shared", "cached")}
    assert [stage.note.rpartition(": ")[2] for stage in found.values()] == list(found)
    student, healed, whole = 6.72e9 * 2, 4096 * 14336 * 2, 8.03e9 * 2
    assert found["copy"].peak - found["shared"].peak == pytest.approx(student - healed, rel=0.01)
    alone = found["copy"].peak - whole
    assert found["cached"].peak == pytest.approx(max(alone, whole), rel=0.02)  # whole: the look at held-out rows
    small = plan("distill.teacher=cached", "distill.batch=1", "distill.tune.quantize_base=nf4")["distill"]
    assert small.peak - small.parts["runtime"] == pytest.approx(whole, rel=0.01)
    assert plan("distill.objective=sft", "distill.teacher=copy")["distill"].note.endswith("teacher: none")
    data = plan()["data"]
    assert data.disk == 16000 * 768 * (64 * 4 + 65 * 2 + 8) and data.peak > whole
    assert plan("data.teacher=null")["data"].disk == 0
