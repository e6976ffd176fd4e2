"""Training retaining heads: one frozen forward pass per row, in which every block's head learns on the spot."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...errors import UserError
from ...modeling.blocks import AttentionShape, Decoder
from ...modeling.retaining import RetainingHeads
from ...modeling.retaining_labels import BlockLabels, detrended, label_row
from ...stage import Advance, write_whole
from ..recorder import read_lines
from ..weights import save_whole
from .config import RetainConfig
from .rows import LongRow, Rows

SHARE = 4  # recall is measured at a budget of the prompt's so-manieth part
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by its names
STATE, CURVES = "heads.safetensors", "curves.jsonl"


def block_loss(scores: Tensor, labels: Tensor, smooth: float, blocks: int) -> Tensor:
    """One block's share of the loss, from scores and labels (N, G): the mean smooth-L1 error, over the number of
    blocks; and `smooth` times the mean squared difference of neighbours' scores."""
    loss = nn.functional.smooth_l1_loss(scores, labels) / blocks
    if len(scores) > 1:
        loss = loss + smooth * (scores[1:] - scores[:-1]).square().mean()
    return loss


def kept_share(scores: Tensor, labels: Tensor, budget: int) -> float:
    """Of the `budget` positions with the greatest labels, the share that are among the `budget` with the greatest
    scores; (N, G) each, the mean over heads."""
    wanted = torch.zeros_like(labels, dtype=torch.bool).scatter_(0, labels.topk(budget, 0).indices, True)
    return wanted.gather(0, scores.topk(budget, 0).indices).float().mean().item()


def learning_rate(config: RetainConfig, step: int) -> float:
    """The rate of step `step`, counted from 1: it rises evenly, then falls evenly to nothing, which no step has."""
    rising = max(1, round(config.warmup * config.steps))
    if step <= rising:
        return config.lr * step / rising
    return config.lr * (config.steps + 1 - step) / (config.steps + 1 - rising)


def fresh_heads(decoder: Decoder, width: int, seed: int) -> RetainingHeads:
    """Heads before any training, float32; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RetainingHeads(decoder.num_blocks, AttentionShape.of(decoder.config), width)


@dataclass
class Trainer:
    """Heads, their optimizer, and what has been written down."""

    decoder: Decoder
    heads: RetainingHeads
    config: RetainConfig
    rows: Rows
    work: Path
    advance: Advance
    optimizer: torch.optim.AdamW = field(init=False)
    step: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.heads.to(self.decoder.embedding.weight.device).float()
        self.optimizer = torch.optim.AdamW(
            self.heads.parameters(),
            lr=self.config.lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
        )

    def train(self) -> None:
        """Train to the last step, from the last checkpoint if there is one; `curves.jsonl` has a line per step, and one
        per measurement."""
        self._load()
        self.advance(self.step)
        note = self._measure() if self.step == 0 else _described(self.measurements()[-1])
        while self.step < self.config.steps:
            row = self.rows.train(self.step)
            loss = self._learn(row)
            self._line({"loss": loss, "lr": learning_rate(self.config, self.step), "tokens": row.prompt})
            last = self.step == self.config.steps
            if self.step % self.config.eval_every == 0 or last:
                note = self._measure()
            if self.step % self.config.save_every == 0 or last:
                self._save()
            self.advance(1, f"loss {loss:.3f}  {note}")

    def measurements(self) -> list[dict[str, Any]]:
        """What has been measured on the held-out rows."""
        return [line for line in read_lines(self.work / CURVES) if "eval_loss" in line]

    def _learn(self, row: LongRow) -> float:
        """One step on one row; its loss."""
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []

        def learn(seen: BlockLabels) -> None:
            with torch.enable_grad():
                loss = self._loss(self._scores(seen), self._labels(seen))
                loss.backward()
            losses.append(loss.detach())

        label_row(self.decoder, row.ids, row.prompt, learn)
        total = torch.stack(losses).sum().item()
        if not math.isfinite(total):
            raise UserError(f"the loss is {total} at step {self.step}: training diverged; lower retain.lr")
        nn.utils.clip_grad_value_(self.heads.parameters(), self.config.clip)
        self.optimizer.step()
        return total

    def _scores(self, seen: BlockLabels) -> Tensor:
        return self.heads.score(seen.block, seen.inputs[seen.first :])

    def _labels(self, seen: BlockLabels) -> Tensor:
        labels = seen.labels[seen.first :]
        return detrended(labels) if self.config.labels == "detrended" and len(labels) else labels

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return block_loss(scores, labels, self.config.smooth, self.decoder.num_blocks)

    def _measure(self) -> str:
        """Measure on the held-out rows and write it down; in words."""
        losses, shares = [], []

        def look(seen: BlockLabels) -> None:
            scores, labels = self._scores(seen), self._labels(seen)
            losses.append(self._loss(scores, labels).item())
            shares.append(kept_share(scores, labels, -(-len(scores) // SHARE)))

        for row in self.rows.heldout:
            label_row(self.decoder, row.ids, row.prompt, look)
        found = {"eval_loss": sum(losses) / len(self.rows.heldout), "eval_recall": sum(shares) / len(shares)}
        self._line(found)
        return _described(found)

    def _line(self, values: dict[str, Any]) -> None:
        with (self.work / CURVES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")

    def _save(self) -> None:
        """Heads and moments in one file, which is whole or not there."""
        state = {}
        for name, parameter in self.heads.named_parameters():
            state[name] = parameter.detach().cpu().contiguous()
            for moment in MOMENTS:
                state[f"{moment}.{name}"] = self.optimizer.state[parameter][moment].cpu().contiguous()
        save_whole(state | {"step": torch.tensor(self.step)}, self.work / STATE)

    def _load(self) -> None:
        """Go on from the checkpoint; curves of steps after it are forgotten."""
        file = self.work / STATE
        if file.exists():
            with safe_open(file, framework="pt") as saved, torch.no_grad():
                self.step = int(saved.get_tensor("step"))
                for name, parameter in self.heads.named_parameters():
                    parameter.copy_(saved.get_tensor(name))
                    moments = {moment: saved.get_tensor(f"{moment}.{name}").to(parameter.device) for moment in MOMENTS}
                    self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        keep = [line for line in read_lines(self.work / CURVES) if line["step"] <= self.step > 0]
        write_whole(self.work / CURVES, "".join(json.dumps(line) + "\n" for line in keep))


def _described(found: dict[str, Any]) -> str:
    return f"held-out loss {found['eval_loss']:.3f}, kept {100 * found['eval_recall']:.0f} %"
