"""How work is dealt out to several processes, and what they refuse; here they are threads, or none are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from compress.core.errors import UserError
from compress.core.stage import Context, Group
from compress.data.parts import in_rounds
from compress.distill import stage
from compress.distill.config import DistillConfig
from compress.pipeline.group import processes
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import Recipe
from compress.training.order import BatchOrder
from torch.utils.data import BatchSampler


class Threads(Group):
    """A group whose processes are threads."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, values: list[Any]):
        self.rank, self.world, self.meet, self.values = rank, world, barrier, values

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.meet.wait(10)
        found = list(self.values)
        self.meet.wait(10)
        return found


def together(world: int, work: Callable[[Group], Any]) -> list[Any]:
    """What `work` gives in each thread of a group."""
    barrier, values, found = threading.Barrier(world), [None] * world, [None] * world

    def run(rank: int) -> None:
        found[rank] = work(Threads(rank, world, barrier, values))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(
    ("options", "world", "dtype", "message"),
    [
        ({"tune": "full"}, 1, "float32", "needs several processes"),
        ({}, 2, "float32", r"of which distill\.tune: lora has few"),
        ({"tune": "full", "optimizer": "adamw_8bit"}, 2, "float32", "use adamw"),
        ({"tune": "full", "objective": "kd", "on_policy": {}}, 2, "float32", "leave distill.on_policy out"),
        ({"tune": "full"}, 2, "float16", "use --dtype bfloat16"),
    ],
)
def test_what_cannot_be_sharded_is_refused(options: Any, world: int, dtype: str, message: str) -> None:
    group = Threads(0, world, threading.Barrier(1), [])
    with pytest.raises(UserError, match=f"--shard .*{message}"):
        stage.check(DistillConfig(**options), Path(), Context(dtype=dtype, group=group, shard=True))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_batch_is_drawn_once_and_read_in_order_by_all(tmp_path: Path, world: int) -> None:
    drawn: list[tuple[int, int]] = []

    def rounds(count: int) -> list[Any]:
        def work(group: Group) -> list[Any]:
            def draw(number: int) -> list[dict[str, Any]]:
                drawn.append((number, group.rank))
                return [{"id": 10 * number + i, "text": "ä"} for i in range(2)]

            return list(in_rounds(tmp_path, count, group, draw))

        return together(world, work)

    expected = [[{"id": 10 * n, "text": "ä"}, {"id": 10 * n + 1, "text": "ä"}] for n in range(7)]
    assert rounds(7) == [expected] * world
    assert sorted(drawn) == [(n, n % world) for n in range(7)]
    names = [f"{n:05d}.jsonl" for n in range(7)]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    drawn.clear()
    (tmp_path / names[4]).unlink()  # as after a kill
    (tmp_path / names[5]).unlink()
    world = 2 if world == 1 else world - 1  # and with another number of processes
    assert rounds(7) == [expected] * world
    assert sorted(number for number, _ in drawn) == [4, 5]


def dealt(count: int, world: int, rank: int, epoch: int) -> list[int]:
    """The batches one process gets, as Accelerate deals them out."""
    order = BatchOrder(count, world, seed=5)
    order.set_epoch(epoch)
    batches = BatchSampler(order, batch_size=1, drop_last=False)
    return [number for batch in BatchSamplerShard(batches, world, rank) for number in batch or ()]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 12, 13])
def test_steps_have_the_same_batches_with_any_number_of_processes(count: int, world: int) -> None:
    accumulate = 2 * world
    for epoch in (0, 3):
        reference = SeedableRandomSampler(range(count), data_seed=5)
        reference.set_epoch(epoch)
        whole = list(reference)
        assert dealt(count, 1, 0, epoch) == whole
        shares = [dealt(count, world, rank, epoch) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1  # none waits for another
        for step in range(-(-count // accumulate)):
            own = slice(step * accumulate // world, (step + 1) * accumulate // world)
            numbers = sorted(n for share in shares for n in share[own] if n != count)  # `count` is the blank one
            assert numbers == sorted(whole[step * accumulate : (step + 1) * accumulate])


def test_steps_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    config = DistillConfig(accumulate=6)
    for world in (1, 2, 3, 6):
        stage.check(config, tmp_path, Context(group=Threads(0, world, threading.Barrier(1), [])))
    with pytest.raises(
        UserError, match=r"distill\.accumulate is 6, .* the 4 processes that share each step; make it a multiple"
    ):
        stage.check(config, tmp_path, Context(group=Threads(0, 4, threading.Barrier(1), [])))


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes("meteor") as (group, device):
        assert (group.rank, group.world, group.gather(3), group.share("x"), device) == (0, 1, [3], "x", "meteor")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: start"), processes("cpu"):
        pass


@pytest.mark.parametrize(
    ("name", "value", "device", "use"),
    [
        ("ACCELERATE_USE_FSDP", "true", "cpu", "--shard"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "cpu", "--dtype"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "cpu", "no compiler backend"),
        ("ACCELERATE_USE_CPU", "true", "cuda", "--device cpu"),
    ],
)
def test_what_accelerate_would_do_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, device: str, use: str
) -> None:
    for other, no in (("ACCELERATE_USE_FSDP", "false"), ("ACCELERATE_DYNAMO_BACKEND", "NO")):
        monkeypatch.setenv(other, no)
    with processes(device):
        pass
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"sets {name}={value}, .* use {use}"), processes(device):
        pass


def test_a_plan_of_shards_is_smaller_by_what_is_spread(tmp_path: Path) -> None:
    def memory(shards: int, *overrides: str) -> int:
        plan = make_plan(Recipe.load("llama8b_26L", list(overrides)), "bfloat16", tmp_path, shards=shards)
        return next(stage.need.peak for stage in plan.stages if stage.name == "distill")

    one, two, eight = (memory(shards, "distill.tune=full", "distill.teacher=copy") for shards in (1, 2, 8))
    spread = 16 * 6.72e9  # weights, gradients and Adam's states, in float32
    assert two - eight == pytest.approx(spread * (1 / 2 - 1 / 8), rel=1e-3)
    assert eight < one / 3
    with pytest.raises(UserError, match="only full tuning can be sharded"):
        memory(2)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
