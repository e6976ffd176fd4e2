"""Saving and loading the trained parameters: the best weights, and checkpoints to resume from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import get_rank
from torch.distributed.fsdp import FSDPModule

from ..core.errors import UserError
from .sharding import copy_whole, is_sharded, whole

WHOLE = "WHOLE"  # written last into a checkpoint; one without it was cut short and is not resumed from
WEIGHTS = "trainable.safetensors"


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, on the CPU. Those of a sharded module are gathered: all processes must call this,
    and rank 0 gets them."""
    state = {}
    if isinstance(module, FSDPModule):
        module.reshard()  # after a forward pass without backward, the root's weights are still gathered
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            value = whole(parameter)
            if not (is_sharded(module) and get_rank()):
                state[name] = value.cpu().contiguous()
    return state


def load_trainable(module: nn.Module, file: Path) -> None:
    """Load saved parameters; their names must be exactly those of the trained ones."""
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with safe_open(file, framework="pt") as saved:  # one at a time: several processes may read it at once
        if set(saved.keys()) != parameters.keys():
            raise UserError(f"{file} does not hold the parameters this recipe trains; delete its folder and run again")
        for name, parameter in parameters.items():
            copy_whole(parameter, saved.get_tensor(name))


def save_whole(state: dict[str, Tensor], file: Path) -> None:
    """Write safetensors atomically."""
    temporary = file.with_name(file.name + ".tmp")
    save_file(state, temporary)
    os.replace(temporary, file)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones, left by a kill, are removed."""
    checkpoints = []
    for path in folder.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            checkpoints.append(path)
        else:
            shutil.rmtree(path)
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
