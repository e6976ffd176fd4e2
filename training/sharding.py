"""Full tuning of models that do not fit one GPU: weights, gradients and optimizer states are sharded over the processes
(FSDP2, arXiv 2304.11277).

The model is sharded block by block before the Trainer sees it, so that no GPU ever holds all of it; the Trainer then
leaves its placement alone. Weights are gathered while they are in use, and freed again.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.stage import Context, Group

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

SCHEDULER = "scheduler.json"


def sharded(make: Callable[[], Any], context: Context) -> Any:
    """A student sharded over the run's processes: each block is one unit, the rest another; blocks compute in the run's
    dtype.

    `make` builds the whole model, in float32 on the CPU. The processes of a machine do so one at a time, so that host
    memory has to hold a single model.
    """
    group, device_type = context.group, context.device.partition(":")[0]
    mesh = init_device_mesh(device_type, (group.world,))
    hosts = group.gather(socket.gethostname())
    turn = hosts[: group.rank].count(hosts[group.rank])
    student = None
    for now in range(max(Counter(hosts).values())):
        if now == turn:
            student = make()
            _shard(student, mesh, None if context.dtype == "float32" else getattr(torch, context.dtype))
        group.barrier()
    return student


def _shard(student: Any, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    parts = [*student.decoder.blocks, student]
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy)
        part.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")  # gloo cannot average
    student.is_distributed_loading_by_transformers = True  # the Trainer's mark of a model that it must not wrap


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def whole(parameter: Tensor) -> Tensor:
    """A parameter, gathered if it is sharded; all processes must call it."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy_whole(parameter: Tensor, value: Tensor) -> None:
    """Copy a full tensor, which all processes hold, into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def save_optimizer(optimizer: Optimizer, scheduler: LRScheduler, folder: Path, group: Group) -> None:
    """Write this process's shard of the optimizer's state; rank 0 also writes the scheduler's."""
    state = optimizer.state_dict()["state"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{number}.{name}": _local(value) for number, entry in state.items() for name, value in entry.items()},
        folder / _file(group),
    )
    if group.rank == 0:
        write_json(folder / SCHEDULER, scheduler.state_dict())


def load_optimizer(optimizer: Optimizer, scheduler: LRScheduler, folder: Path, group: Group) -> None:
    """Read what `save_optimizer` wrote. Raises `UserError` if another number of processes wrote it."""
    if not (folder / _file(group)).exists():
        raise UserError(
            f"{folder} was written with another --shard setting or number of processes than this run's "
            f"{group.world}; resume with the same, or delete it to start over"
        )
    parameters = [parameter for part in optimizer.param_groups for parameter in part["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / _file(group)).items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = _placed(value, parameters[int(number)])
    scheduler.load_state_dict(read_json(folder / SCHEDULER))
    parts = optimizer.state_dict()["param_groups"]
    for part, rate in zip(parts, scheduler.get_last_lr(), strict=True):
        part["lr"] = rate
    optimizer.load_state_dict({"state": state, "param_groups": parts})


def _file(group: Group) -> str:
    return f"optimizer-{group.rank}-of-{group.world}.safetensors"


def _local(value: Tensor) -> Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach().cpu().clone().contiguous()


def _placed(value: Tensor, parameter: DTensor) -> Tensor:
    """A shard of a state as a distributed tensor; counters (0-dimensional) are the same in all processes."""
    if value.ndim == 0:
        return value
    value = value.to(parameter.device)
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
