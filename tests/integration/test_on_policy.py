"""Rows that the student writes itself: what it writes, what is learned of them, and that a kill changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs, Progress
from compress.data.chat import Encoded, load_encoded
from compress.data.packing import Batch, assemble, pack, unpack
from compress.data.rows import Row, write_rows
from compress.distill import stage
from compress.distill.config import DistillConfig
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from compress.pipeline.recipe import Recipe
from compress.records.curves import TrainingStep, student_lines
from compress.sort import stage as sort_stage
from compress.sort.config import SortConfig
from compress.training.on_policy import Steps, StudentRows, prompt_length
from transformers import Trainer

SEED, LENGTH, NEW = 7, 64, 9
LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "dropout": 0.2}
OWN: dict[str, Any] = {"share": 0.5, "max_tokens": NEW, "temperature": 0, "refresh": 3, "batch": 4}
WORDS = "the way of many people is which model time and look so é 42".split()


class World:
    """A base model, the same without one block, and a data stage's folder: conversations and two texts."""

    def __init__(self, killer: Callable[[int], Progress], base: Path, folder: Path):
        self.killer, self.folder, self.base, self.runs = killer, folder, base, 0
        model = load_model(base)
        drop_blocks(model, [1])
        save_checkpoint(model, load_tokenizer(base), folder / "pruned")
        draw = random.Random(3)

        def said(*span: int) -> str:
            return " ".join(draw.choices(WORDS, k=draw.randrange(*span)))

        def row(number: int) -> Row:
            split = "heldout" if number % 4 == 0 else "train"
            if number % 8 == 1:
                return Row(number, split, text=said(20, 30))
            turns = [said(2, 6), said(4, 12)] * (1 + number % 2)
            roles = ["user", "assistant"] * 2
            talk = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
            return Row(number, split, talk)

        (folder / "data").mkdir()
        write_rows(folder / "data", [row(number) for number in range(24)])
        self.inputs = Inputs(base, folder / "pruned", {"data": folder / "data"})
        self.rows = load_encoded(folder / "data", load_tokenizer(base), "train", LENGTH)

    def __call__(self, *, out: Path | None = None, calls: int = 0, **options: Any) -> dict[str, Any]:
        self.runs += 1
        self.out = out or self.folder / f"out{self.runs}"
        self.out.mkdir(exist_ok=True)
        plain = {"objective": "kd", "tune": LORA, "lr": 1e-2, "length": LENGTH, "max_steps": 6, "accumulate": 2}
        plain |= {"eval_every": 3, "save_every": 2, "on_policy": OWN}
        config, context = (
            DistillConfig.model_validate(plain | options),
            Context(seed=SEED, progress=self.killer(calls)),
        )
        stage.check(config, self.base, context)
        return stage.run(config, self.inputs, self.out, context)

    def steps(self) -> list[TrainingStep]:
        return [line for line in student_lines(self.out / "curves.jsonl") if isinstance(line, TrainingStep)]


@pytest.fixture(scope="module")
def world(
    killer: Callable[[int], Progress], tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> World:
    base = tiny(blocks=4, hidden=32, heads=2, kv_heads=1, intermediate=64, tied=False, seed=2)
    return World(killer, base, tmp_path_factory.mktemp("own"))


@torch.no_grad()
def greedy(model: Any, prompt: list[int], stop: frozenset[int]) -> list[int]:
    """The likeliest tokens one after another, the whole text read again for each."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + NEW, LENGTH) and (len(ids) == len(prompt) or ids[-1] not in stop):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Batch, Batch]]:
    """Step, batch and what it became, of everything that is replaced."""
    found: list[tuple[int, Batch, Batch]] = []
    plain = StudentRows.replaced

    def keep(rows: StudentRows, batch: Batch, step: int) -> Batch:
        found.append((step, batch, plain(rows, batch, step)))
        return found[-1][2]

    monkeypatch.setattr(StudentRows, "replaced", keep)
    return found


def flat(batch: Batch) -> list[Encoded]:
    return [row for rows in unpack(batch) for row in rows]


@pytest.mark.parametrize(
    "options",
    [{"teacher": "shared"}, {"tune": "full", "lr": 3e-2, "learn": "all"}],
    ids=["lora", "full"],
)
def test_the_student_of_the_moment_writes_the_share(
    world: World, monkeypatch: pytest.MonkeyPatch, seen: list[Any], options: dict[str, Any]
) -> None:
    """Every answer is what a plain greedy loop writes with the weights at the last refresh; all else is as it was."""
    expected: dict[int, dict[tuple[int, int], list[int]]] = {}
    plain = StudentRows.prepare

    def write(rows: StudentRows, step: int, model: Any) -> None:
        if step % OWN["refresh"] == 0:
            expected[step] = {key: greedy(model, prompt, rows.stop) for key, prompt in rows.prompts.items()}
        plain(rows, step, model)

    monkeypatch.setattr(StudentRows, "prepare", write)
    metrics = world(**options)
    prompts = {row.row: prompt_length(row) for row in world.rows}
    written, per_step = [], [0] * 6
    for step, before, after in seen:
        for old, new in zip(flat(before), flat(after), strict=True):
            assert (new.row, new.start) == (old.row, old.start)
            if new != old:
                size = prompts[old.row]
                answer = expected[step - step % 3][old.row, old.start]
                assert new.input_ids == old.input_ids[:size] + answer
                assert new.loss_mask == old.loss_mask[:size] + [True] * len(answer)
                written.append(answer)
            per_step[step] += sum(new.loss_mask)
    assert [line.tokens for line in world.steps()] == per_step
    assert metrics["on_policy"] == {"rows": len(written), "tokens": sum(map(len, written))}
    assert expected[0] != expected[3]  # the weights have changed, and what they write
    assert not (world.out / WORK / "on_policy").exists()


def test_a_step_is_the_mean_divergence_over_what_was_written(world: World, seen: list[Any]) -> None:
    """Loss by plain models, a row at a time; an epoch has exactly the share, and the next one other rows."""
    objective = {"kind": "kd", "divergence": "reverse"}
    world(objective=objective, tune="full", accumulate=99, max_steps=2, lr=1e-9)
    student, teacher = load_model(world.inputs.model), load_model(world.base)
    chosen: list[set[int]] = [set(), set()]
    totals, counts = [0.0, 0.0], [0, 0]
    for step, before, after in seen:
        for old, new in zip(flat(before), flat(after), strict=True):
            if new != old:
                chosen[step].add(old.row)
            at = [t for t in range(1, len(new.input_ids)) if new.loss_mask[t]]
            with torch.no_grad():
                q, p = (
                    model(torch.tensor([new.input_ids])).logits[0, [t - 1 for t in at]].double().log_softmax(-1)
                    for model in (student, teacher)
                )
            totals[step] += float((q.exp() * (q - p)).sum())
            counts[step] += len(at)
    assert [len(rows) for rows in chosen] == [len(world.rows) // 2] * 2 and chosen[0] != chosen[1]
    assert [line.tokens for line in world.steps()] == counts
    assert [line.loss for line in world.steps()] == pytest.approx(
        [total / count for total, count in zip(totals, counts, strict=True)], rel=1e-4
    )


@pytest.mark.parametrize("options", [{"teacher": "shared"}, {"tune": "full"}], ids=["lora", "full"])
def test_a_killed_run_ends_with_the_same_bytes(
    world: World, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Resumed within the steps of a refresh, where the weights that wrote are gone, and before a refresh."""
    started: list[str | None] = []
    plain = Trainer.train

    def note(self: Any, resume_from_checkpoint: str | None = None) -> Any:
        started.append(resume_from_checkpoint and Path(resume_from_checkpoint).name)
        return plain(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(Trainer, "train", note)
    options = options | {"max_steps": 8, "on_policy": OWN | {"temperature": 1.0}}
    metrics = world(**options)
    whole, out = world.out, world.folder / f"killed-{'full' if 'tune' in options else 'lora'}"
    for calls in (4, 6):  # the first call tells where the run starts, each further one ends a step
        with pytest.raises(KeyboardInterrupt):
            world(out=out, calls=calls, **options)
    again = world(out=out, **options)
    assert started == [None, None, "checkpoint-2", "checkpoint-6"]
    for name in ("model/model.safetensors", "curves.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    del metrics["seconds_training"], again["seconds_training"]
    assert again == metrics


@pytest.mark.parametrize("kind", ["sort", "rounded"])
def test_other_trainings_have_such_rows_too(world: World, seen: list[Any], tmp_path: Path, kind: str) -> None:
    """Several depths, of which the deepest writes; and weights that are rounded, which write as they are."""
    keys = {"objective": "kd", "length": LENGTH, "max_steps": 2, "accumulate": 2, "on_policy": OWN}
    if kind == "sort":
        config = SortConfig.model_validate(keys | {"depths": [1, 3]})
        (tmp_path / WORK).mkdir()
        figures = sort_stage.run(config, world.inputs, tmp_path, Context(seed=SEED))
    else:
        figures = world(**keys, tune={"kind": "lora", "rank": 4, "quantize_as": "Q4_0", "quantize_after": 0})
    replaced = sum(new != old for _, before, after in seen for old, new in zip(flat(before), flat(after), strict=True))
    assert figures["on_policy"]["rows"] == replaced > 0


def test_the_prompt_is_what_stands_before_the_last_answer() -> None:
    talk = Encoded(list(range(9)), [False, False, True, True, False, False, True, True, True])
    assert prompt_length(talk) == 6
    assert prompt_length(Encoded([1, 2, 3], [False, False, True])) == 2
    assert prompt_length(Encoded(list(range(10)), [False] + [True] * 9)) == 5  # a text: its first half
    assert prompt_length(Encoded([1, 2], [False, True])) == 1


def test_a_batch_is_assembled_again_from_its_rows(world: World) -> None:
    for batch in pack(world.rows, LENGTH, 2, 0, grouped=True):
        again = assemble(unpack(batch), LENGTH, 0)
        for name, value in vars(batch).items():
            torch.testing.assert_close(vars(again)[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_steps_of_an_epoch_have_every_batch_once(world_size: int) -> None:
    steps = Steps(batches=7, per_step=4, world=world_size, seed=3)
    assert steps.per_epoch == 2 and [steps.epoch(step) for step in range(5)] == [0, 0, 1, 1, 2]
    first, last = steps.of(1, [2]), steps.of(1, [3])
    assert (len(first), len(last)) == (4, 3) and sorted(first + last) == list(range(7))
    assert steps.of(1, [2, 3]) == first + last != steps.of(0, [0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "kd", "teacher": "cached"}, "has yet to write, which teacher: cached cannot have; choose"),
        ({"objective": "sft"}, "on_policy with objective: sft would teach the student its own mistakes; choose"),
        ({}, "on_policy with objective: asft would teach"),
        ({"objective": "kd", "variants": [{"name": "a"}, {"name": "b", "objective": "dft"}]}, "objective: dft would"),
        ({"objective": "kd", "on_policy": {"share": 0}}, "on_policy.share"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(options: dict[str, Any], message: str) -> None:
    section = {"on_policy": {}} | options
    with pytest.raises(UserError, match=message):
        Recipe.from_dict({"name": "r", "model": "random:llama", "data": {"source": "magpie"}, "distill": section})
