"""Several processes that run one recipe, as `torchrun` and `accelerate launch` start them.

The two set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Training communicates over NCCL on GPUs and over
gloo on CPUs; information about the run is exchanged over gloo as JSON.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import UserError
from ..core.stage import Group

JOINING = timedelta(minutes=10)
TIMEOUT = timedelta(days=7)  # stages that are not shared may take long; a dead process is noticed at once anyway
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Settings of accelerate launch that the recipe or an option decides: (its value for "off", what to use instead).
FOREIGN = {
    "ACCELERATE_USE_FSDP": ("false", "--shard"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "--shard"),
    "ACCELERATE_MIXED_PRECISION": ("no", "--dtype"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "no compiler backend"),
    "ACCELERATE_USE_CPU": ("false", "--device cpu"),
}
Made = TypeVar("Made")


class Processes(Group):
    """The processes of a torch process group."""

    def __init__(self, rank: int, world: int, store: Any):
        self.rank, self.world, self.store = rank, world, store

    def gather(self, value: object) -> list[Any]:
        import torch
        import torch.distributed as dist

        own = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        width = int(max(sizes))
        texts = [torch.empty(width, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(texts, torch.nn.functional.pad(own, (0, width - len(own))))
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]

    def first_to_fail(self) -> bool:
        """Whether this process is the first to fail, and so the one that reports the error."""
        try:
            return self.store.add("compress/failed", 1) == 1
        except RuntimeError:  # the process that held the store has ended
            return False


def is_first() -> bool:
    """Whether this process is rank 0, which prints for the user."""
    return int(os.environ.get("WORLD_SIZE") or 1) <= 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def processes(device: str) -> Iterator[tuple[Group, str]]:
    """The run's processes and this one's device (`cuda` becomes the GPU of its local rank); one without a launcher.

    An error in one process ends all: the others cannot continue, and exit silently with code 2.
    Raises `UserError` for a device that several processes cannot use.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) <= 1:
        _check_launcher(device)
        yield Group(), device
        return
    group = _join(device)
    try:
        group.barrier()  # all have joined before any of them can raise
        _check_launcher(device)
        yield group, _own_device(device)
        group.barrier()
    except BaseException as error:
        if not group.first_to_fail():
            os._exit(2)
        if _is_lost(error):
            raise UserError(
                "another process of this run has failed; finished work is kept, and the same command resumes from "
                f"here ({_first_line(error)})"
            ) from error
        raise
    import torch.distributed as dist

    dist.destroy_process_group()


def in_turn(group: Group, make: Callable[[], Made]) -> Made:
    """Run `make` on rank 0, then, once its caches exist, on the other ranks; its result on each."""
    if group.rank > 0:
        group.barrier()
    result = make()
    if group.rank == 0:
        group.barrier()
    return result


def check_shared(folder: Path, group: Group) -> None:
    """Create the folder; `UserError` unless all processes see it."""
    if group.world == 1:
        return
    if group.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".seen-{group.share(secrets.token_hex(8))}"
    if group.rank == 0:
        file.touch()
    group.barrier()
    seen_by = group.gather([socket.gethostname(), file.exists()])
    if group.rank == 0:
        file.unlink()
    blind = [f"process {rank} on {host}" for rank, (host, seen) in enumerate(seen_by) if not seen]
    if blind:
        raise UserError(
            f"{', '.join(blind)}: does not see the folder {folder.resolve()} of process 0 on {seen_by[0][0]}; "
            "put --runs on a file system that all processes share"
        )


def check_same(what: str, value: object, group: Group) -> None:
    """`UserError` unless all processes have the same value."""
    values = group.gather(value)
    other = next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None)
    if other is not None:
        raise UserError(
            f"processes 0 and {other} differ in {what}: {values[0]} and {values[other]}; "
            "start all of them with the same command, recipe, files and versions"
        )


def _join(device: str) -> Processes:
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start several processes "
            "with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    gpu = device.startswith("cuda") and torch.cuda.is_available()
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=JOINING)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=PrefixStore("compress", store),
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"cannot reach the run's other processes at {place}: {_first_line(error)}") from error
    return Processes(rank, world, store)


def _check_launcher(device: str) -> None:
    for name, (no, own) in FOREIGN.items():
        asked = os.environ.get(name, no)
        if asked.lower() != no and not (name == "ACCELERATE_USE_CPU" and device == "cpu"):
            raise UserError(
                f"accelerate launch sets {name}={asked}, which compress decides itself: use {own}, and launch with "
                "--mixed_precision no --dynamo_backend no and only the options that set processes and machines"
            )


def _own_device(device: str) -> str:
    import torch

    if device == "cpu":
        return device
    local = int(os.environ["LOCAL_RANK"])
    if device != "cuda":
        raise UserError(f"--device {device}: with several processes use cpu, or cuda (the GPU of each local rank)")
    if local >= torch.cuda.device_count():
        raise UserError(
            f"--device cuda: there are more processes on {socket.gethostname()} than its "
            f"{torch.cuda.device_count()} GPUs; start one per GPU"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _is_lost(error: BaseException) -> bool:
    """Whether this is torch's error for a lost process."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
