"""The local phase: which blocks it trains, on which states, what its guard undoes, and that a kill changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs, Progress
from compress.data.packing import Batch
from compress.data.repeated import read_twice, repeated_halves
from compress.data.rows import Row, write_rows
from compress.distill import guard, local, local_training, stage
from compress.distill.config import DistillConfig
from compress.distill.guard import Divergences
from compress.distill.local_training import state_error
from compress.distill.states import read_states, surroundings, write_states
from compress.modeling.blocks import Decoder, drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from compress.pipeline.recipe import Recipe
from compress.prune.healing import heal
from compress.prune.heals.refit import RefitHeal
from safetensors.torch import load_file
from torch import Tensor

SEED, LENGTH, WORDS = 7, 64, "the way of many people is which model time and look so é 42".split()
LOCAL = {"epochs": 6.0, "tokens_per_step": 128, "lr": 3e-3, "reach": 1}


class World:
    """A base of six blocks, the same without blocks 1 and 3 (and healed), and a data stage's folder."""

    def __init__(self, killer: Callable[[int], Progress], base: Path, folder: Path):
        self.killer, self.folder, self.base, self.runs = killer, folder, base, 0
        for name, dropped in (("one", [2]), ("two", [1, 3])):
            model = load_model(base)
            drop_blocks(model, dropped)
            save_checkpoint(model, load_tokenizer(base), folder / name)
        draw = random.Random(3)

        def talk() -> list[dict[str, str]]:
            turns = [" ".join(draw.choices(WORDS, k=draw.randrange(*span))) for span in ((2, 6), (4, 22))]
            return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)]

        (folder / "data").mkdir()
        write_rows(folder / "data", [Row(i, "heldout" if i % 4 == 0 else "train", talk()) for i in range(24)])

    def __call__(self, cut: str = "one", out: Path | None = None, calls: int = 0, **options: Any) -> dict[str, Any]:
        self.runs += 1
        self.out = out or self.folder / f"out{self.runs}"
        self.out.mkdir(exist_ok=True)
        plain = {"objective": "kd", "tune": {"kind": "lora", "rank": 2}, "lr": 1e-5, "length": LENGTH, "max_steps": 1}
        config = DistillConfig.model_validate(plain | {"local": LOCAL} | options)
        inputs = Inputs(self.base, self.folder / cut, {"data": self.folder / "data"})
        return stage.run(config, inputs, self.out, Context(seed=SEED, progress=self.killer(calls)))

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def world(
    killer: Callable[[int], Progress], tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> World:
    base = tiny(blocks=6, hidden=32, heads=2, kv_heads=1, intermediate=64, seed=2)
    return World(killer, base, tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module")
def plain(world: World) -> dict[str, Tensor]:
    """Recovered without the phase."""
    world(local=None)
    return world.tensors()


def moved_norms(world: World, cut: str) -> set[int]:
    """Blocks whose norms changed; LoRA leaves norms alone, so that these are the local phase's."""
    old = load_file(world.folder / cut / "model.safetensors")
    new = world.tensors()
    return {int(n.split(".")[2]) for n in old if n.endswith("layernorm.weight") and not torch.equal(old[n], new[n])}


def packed() -> Batch:
    """Two rows in one sequence, with padding at its end."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 200, (1, 16), generator=draw)
    positions = torch.tensor([[*range(9), *range(5), *range(2)]])
    segments = torch.tensor([[0] * 9 + [1] * 5 + [-1] * 2])
    return Batch(ids, positions, segments, segments >= 0, torch.full((1, 16, 2), -1))


@pytest.mark.parametrize(
    ("dropped", "blocks", "reach", "expected"),
    [
        ([3, 4], 8, 2, [((1, 2), (5, 6))]),
        ([1], 8, 2, [((0,), (2, 3))]),
        ([6], 8, 2, [((4, 5), (7,))]),
        ([2, 4], 8, 2, [((0, 1), (3,)), ((3,), (5, 6))]),
        ([2, 5], 8, 1, [((1,), (3,)), ((4,), (6,))]),
    ],
)
def test_surroundings_stop_at_the_next_gap(
    dropped: list[int], blocks: int, reach: int, expected: list[tuple[tuple[int, ...], ...]]
) -> None:
    assert [(around.before, around.behind) for around in surroundings(dropped, blocks, reach)] == expected


def test_states_are_those_of_the_unpruned_model(world: World, tmp_path: Path) -> None:
    """Row by row through transformers' own forward pass, without packing."""
    batch, model = packed(), load_model(world.base)
    write_states(Decoder(model), surroundings([2], 6, 1)[0], [batch], tmp_path, Progress())
    states = read_states(tmp_path, 0, "cpu")
    for place in (slice(0, 9), slice(9, 14)):
        layers = model(input_ids=batch.input_ids[:, place], output_hidden_states=True).hidden_states
        for state, layer in ((states.start, 1), (states.gap, 3), (states.behind, 4)):
            torch.testing.assert_close(state[:, place], layers[layer].bfloat16().float(), rtol=0.01, atol=0.01)


def test_behind_an_earlier_gap_the_students_own_stream_enters(world: World, tmp_path: Path) -> None:
    batch, base, pruned = packed(), load_model(world.base), load_model(world.folder / "two")
    around = surroundings([1, 3], 6, 1)[1]
    write_states(Decoder(base), around, [batch], tmp_path, Progress(), Decoder(pruned), [0, 2, 4, 5])
    states = read_states(tmp_path, 0, "cpu")
    for place in (slice(0, 9), slice(9, 14)):
        own = pruned(input_ids=batch.input_ids[:, place], output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(states.start[:, place], own.bfloat16().float(), rtol=0.01, atol=0.01)


def test_the_error_is_relative_and_leaves_padding_out() -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, target = torch.randn(2, 1, 4, 3, generator=draw)
    real = torch.tensor([[True, True, False, True]])
    slow = [
        sum((a - b) ** 2 for a, b in zip(h, t, strict=True)) / sum(b**2 for b in t)
        for h, t, r in zip(hidden[0].tolist(), target[0].tolist(), real[0].tolist(), strict=True)
        if r
    ]
    assert state_error(hidden, target, real).item() == pytest.approx(sum(slow) / 3, rel=1e-5)


@pytest.mark.parametrize(("cut", "trained"), [("one", {1, 2}), ("two", {0, 1, 2})])
def test_only_the_blocks_around_the_gaps_are_trained_and_gain(world: World, cut: str, trained: set[int]) -> None:
    metrics = world(cut)
    assert all(gap["kept"] and gap["kl_after"] < gap["kl_before"] for gap in metrics["local"])
    assert [gap["first"] for gap in metrics["local"]] == {"one": [2], "two": [1, 3]}[cut]
    # Distillation starts where the phase ended: its held-out figure before the first step is the phase's last.
    assert metrics["before"]["eval_kl"] == pytest.approx(metrics["local"][-1]["kl_after"], rel=1e-4)
    assert moved_norms(world, cut) == trained


@pytest.mark.parametrize(
    "after", [Divergences(2.0, 0.5), Divergences(1.0, 0.5), Divergences(0.5, 1.1)], ids=["kl", "equal", "repeated"]
)
def test_what_loses_is_undone_to_the_byte(
    world: World, plain: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, after: Divergences
) -> None:
    figures = iter([Divergences(1.0, 1.0), after])
    monkeypatch.setattr(guard.Guard, "measure", lambda *_: next(figures))
    metrics = world()
    assert [gap["kept"] for gap in metrics["local"]] == [False]
    assert all(torch.equal(value, plain[name]) for name, value in world.tensors().items())


def test_a_killed_phase_ends_with_the_same_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while states are written, between checkpoints, behind one, in the second gap and while the model is
    saved."""
    monkeypatch.setattr(local_training, "SAVE_EVERY", 2)
    metrics = world("two")
    whole, out = world.tensors(), world.folder / "killed"
    for calls in (2, 9, 12, 25, 31):
        with pytest.raises(KeyboardInterrupt):
            world("two", out, calls)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(local, "save_checkpoint", stop)
        world("two", out)
    again = world("two", out)
    assert again["local"] == metrics["local"]
    assert all(torch.equal(value, whole[name]) for name, value in world.tensors().items())
    assert not list((out / WORK / "local").glob("gap-*/states"))


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_shared_teacher_starts_from_the_phases_model(world: World) -> None:
    copied = world(teacher="copy", max_steps=2, lr=1e-3)
    expected = world.tensors()
    shared = world(teacher="shared", max_steps=2, lr=1e-3)
    assert shared["before"]["eval_kl"] == pytest.approx(copied["before"]["eval_kl"], rel=1e-4)
    for name, value in world.tensors().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_scale_of_a_healed_stream_is_read_from_its_blocks(tiny: Callable[..., Path], family: str) -> None:
    base = load_model(tiny(family, blocks=5, hidden=32, heads=2, kv_heads=1, intermediate=64, seed=3))
    healed = load_model(tiny(family, blocks=5, hidden=32, heads=2, kv_heads=1, intermediate=64, seed=3))
    [record] = heal(healed, [2], [packed(), packed()], RefitHeal())
    drop_blocks(healed, [2])
    assert record.scale != 1
    assert Decoder(healed).adds_scaled(2, Decoder(base), 3) == pytest.approx(1 / record.scale, rel=1e-4)
    assert Decoder(healed).adds_scaled(0, Decoder(base), 0) == pytest.approx(1, rel=1e-6)


def test_repeated_halves_are_what_read_twice_fills() -> None:
    batch = packed()
    [twice] = read_twice([batch], 1.0)
    mask = repeated_halves(batch)[0].tolist()
    assert mask == [False] * 4 + [True] * 4 + [False] + [False] * 2 + [True] * 2 + [False] * 3
    ids = twice.input_ids[0].tolist()
    assert ids[4:8] == ids[:4] and ids[11:13] == ids[9:11]


def test_a_model_without_gaps_is_refused(world: World) -> None:
    with pytest.raises(UserError, match="no block was dropped; leave it out"):
        local.check_local(DistillConfig(), world.base, world.base)


def test_a_cut_at_the_end_is_refused(world: World, tmp_path: Path) -> None:
    model = load_model(world.base)
    drop_blocks(model, [5])
    save_checkpoint(model, None, tmp_path)
    with pytest.raises(UserError, match="kept blocks on both sides of every gap"):
        local.check_local(DistillConfig(), world.base, tmp_path)


def test_a_recipe_without_prune_is_refused() -> None:
    with pytest.raises(UserError, match=r"distill\.local.*add `prune:`"):
        Recipe.from_dict({"name": "r", "model": "m", "data": {"source": "magpie"}, "distill": {"local": {}}})
