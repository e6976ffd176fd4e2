"""Training a few blocks of a student on the unpruned model's hidden states, exactly resumable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..core.errors import UserError
from ..core.stage import Context
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from ..training.order import BatchOrder
from ..training.schedule import warmed_cosine
from ..training.weights import save_whole
from .config import Local
from .states import read_states

GAP_WEIGHT, BEHIND_WEIGHT = 0.5, 1.0
BETAS, CLIP = (0.9, 0.95), 1.0
SAVE_EVERY = 25  # steps
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def state_error(hidden: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Mean of ‖h − t‖² / ‖t‖² over the positions (B, T) that are `real`; hidden and target (B, T, H)."""
    hidden, target = hidden.float()[real], target[real]
    return ((hidden - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)).mean()


class LocalTraining:
    """AdamW on the blocks before and behind a gap, whose weights are trained in float32."""

    def __init__(
        self, student: Decoder, blocks: tuple[list[int], list[int]], config: Local, folder: Path, context: Context
    ):
        self.student, (self.before, self.behind) = student, blocks
        self.config, self.folder, self.context = config, folder, context
        folder.mkdir(parents=True, exist_ok=True)
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for number in (*self.before, *self.behind):
            block = student.blocks[number].float()
            self.parameters |= {f"{number}.{name}": value for name, value in block.named_parameters()}
        self.start = {name: value.detach().clone() for name, value in self.parameters.items()}

    def steps(self, batches: int) -> int:
        return max(1, math.ceil(self.config.epochs * batches))

    def run(self, batches: Sequence[Batch], scale: float) -> None:
        """Train, from the last checkpoint if there is one. The targets are the states on disk times `scale`."""
        if self.trained_file.exists():
            self.restore(trained=True)
            return
        steps = self.steps(len(batches))
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.config.lr, betas=BETAS, weight_decay=0.0)
        done, order = self._resume(optimizer), self._order(len(batches), steps)
        with self.context.progress.bar("local training", steps) as advance:
            advance(done)
            for step in range(done, steps):
                for group in optimizer.param_groups:
                    group["lr"] = self.config.lr * warmed_cosine(step + 1, steps, self.config.warmup)
                number = order[step]
                loss = self._loss(batches[number], number, scale)
                if not torch.isfinite(loss):
                    raise UserError(
                        f"the loss is {loss.item()} at step {step + 1} of the local phase: training diverged. Lower "
                        f"distill.local.lr (it is {self.config.lr:g})"
                    )
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
                    self._save(optimizer, step + 1)
                advance(1, f"loss {loss.item():.4f}")
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        save_whole({name: value.detach().cpu() for name, value in self.parameters.items()}, self.trained_file)
        self.checkpoint.unlink(missing_ok=True)

    @torch.no_grad()
    def restore(self, *, trained: bool) -> None:
        """Set the blocks to their trained weights, or back to those they had."""
        values = load_file(self.trained_file) if trained else self.start
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    @property
    def trained_file(self) -> Path:
        return self.folder / "trained.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _order(self, batches: int, steps: int) -> list[int]:
        """The batch of each step: every epoch has an order of its own."""
        order = BatchOrder(batches, 1, self.context.seed)
        numbers: list[int] = []
        for epoch in range(math.ceil(steps / batches)):
            order.set_epoch(epoch)
            numbers += order
        return numbers[:steps]

    def _loss(self, batch: Batch, number: int, scale: float) -> Tensor:
        device = self.student.model.device
        states, batch = read_states(self.folder / "states", number, device), batch.to(device)
        real, positions = batch.segment_ids >= 0, batch.position_ids
        low = self.context.dtype == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            gap = self.student.run(states.start, self.before, positions)
            behind = self.student.run(gap, self.behind, positions)
        return GAP_WEIGHT * state_error(gap, states.gap * scale, real) + BEHIND_WEIGHT * state_error(
            behind, states.behind * scale, real
        )

    def _save(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        tensors = {"done": torch.tensor(step)}
        for name, parameter in self.parameters.items():
            moments: dict[str, Any] = optimizer.state[parameter]
            tensors[f"{name}/weight"] = parameter.detach().cpu()
            tensors |= {f"{name}/{key}": moments[key].cpu() for key in MOMENTS}
        save_whole(tensors, self.checkpoint)

    @torch.no_grad()
    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        if not self.checkpoint.exists():
            return 0
        saved = load_file(self.checkpoint)
        for name, parameter in self.parameters.items():
            parameter.copy_(saved[f"{name}/weight"])
            moments = {key: saved[f"{name}/{key}"] for key in MOMENTS}
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
            }
        return int(saved["done"])
