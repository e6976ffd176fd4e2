"""Trains retaining heads, one block after another, on pairs of tokens sampled from all rows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.stage import Advance
from ..modeling.blocks import Decoder
from ..modeling.retaining import RetainingHeads
from ..modeling.retaining_labels import BlockLabels, label_row
from ..modeling.shape import AttentionShape
from ..records.curves import HeadLine, HeadStep, HeldOutHeads
from ..training.weights import save_whole
from .config import RetainConfig, measured_after
from .rows import LongRow
from .samples import Pairs, learned_labels, read_pairs

SHARE = 4  # recall is measured at a budget of a quarter of the prompt
MEASURED = 4096  # held-out pairs per forward pass


def block_loss(scores: Tensor, labels: Tensor, smooth: float, blocks: int) -> Tensor:
    """One block's share of the published loss, from scores and labels (P, 2, G) of pairs of neighbours: the mean
    smooth-L1 error, divided by the number of blocks, plus `smooth` times the mean squared difference between
    neighbours' scores."""
    error = nn.functional.smooth_l1_loss(scores, labels) / blocks
    return error + smooth * (scores[:, 1] - scores[:, 0]).square().mean()


def kept_share(scores: Tensor, labels: Tensor, budget: int) -> float:
    """Recall: the share of the `budget` positions with the highest labels that are among the `budget` with the highest
    scores; (N, G) each, averaged over heads."""
    important = torch.zeros_like(labels, dtype=torch.bool).scatter_(0, labels.topk(budget, 0).indices, True)
    return important.gather(0, scores.topk(budget, 0).indices).float().mean().item()


def kept_shares(
    decoder: Decoder, rows: Sequence[LongRow], config: RetainConfig, *several: RetainingHeads
) -> list[float]:
    """The recall of each row's best quarter for several sets of heads, averaged over rows, blocks and KV heads; one
    pass per row."""
    shares: list[list[float]] = [[] for _ in several]

    def look(seen: BlockLabels) -> None:
        labels = learned_labels(config, seen)
        for heads, own in zip(several, shares, strict=True):
            scores = heads.score(seen.block, seen.inputs[seen.first :])
            own.append(kept_share(scores, labels, -(-len(labels) // SHARE)))

    for row in rows:
        label_row(decoder, row.ids, row.prompt, look)
    return [sum(own) / len(own) for own in shares]


def learning_rate(config: RetainConfig, step: int) -> float:
    """The learning rate of step `step`, from 1: a linear warmup, then a linear decay that reaches 0 after the last."""
    rising = max(1, round(config.warmup * config.steps))
    if step <= rising:
        return config.lr * step / rising
    return config.lr * (config.steps + 1 - step) / (config.steps + 1 - rising)


def fresh_heads(decoder: Decoder, width: int, seed: int) -> RetainingHeads:
    """Untrained heads, float32; determined by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RetainingHeads(decoder.num_blocks, AttentionShape.of(decoder.config), width)


def batches(count: int, size: int, steps: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Indices of pairs, `size` per step: passes over all `count`, each in a new random order."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=draw)])
        yield order[:size]
        order = order[size:]


@dataclass(frozen=True)
class Curve:
    """A block's share of the loss: at every step, and on held-out pairs before the first, after every `eval_every`-th
    and after the last."""

    losses: Tensor  # (steps,)
    heldout: Tensor  # (measurements,)


def learn(head: nn.Module, train: Pairs, held: Pairs, config: RetainConfig, blocks: int, seed: str) -> Curve:
    """Train one block's head in place and keep the best measured state on held-out pairs, of equals the first. Raises
    `UserError` if training diverges."""
    device = next(head.parameters()).device
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)

    def loss_of(pairs: Pairs, places: Tensor) -> Tensor:
        inputs, labels = pairs.inputs[places].to(device).float(), pairs.labels[places].to(device)
        return block_loss(head(inputs), labels, config.smooth, blocks)

    @torch.no_grad()
    def measure() -> float:
        parts = torch.arange(len(held)).split(MEASURED)
        return sum(loss_of(held, part).item() * len(part) for part in parts) / len(held)

    losses, heldout, measured = [], [measure()], measured_after(config)
    best = deepcopy(head.state_dict())
    draw = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    for step, places in enumerate(batches(len(train), config.batch // 2, config.steps, draw), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(train, places)
        loss.backward()
        nn.utils.clip_grad_value_(head.parameters(), config.clip)
        optimizer.step()
        losses.append(loss.detach())
        if step in measured:
            heldout.append(measure())
            if heldout[-1] < min(heldout[:-1]):
                best = deepcopy(head.state_dict())
    curve = Curve(torch.stack(losses).cpu(), torch.tensor(heldout))
    if not (curve.losses.isfinite().all() and curve.heldout.isfinite().all()):
        raise UserError("the loss of retaining heads is not a number: training diverged; lower retain.lr")
    head.load_state_dict(best)
    return curve


def train_heads(
    heads: RetainingHeads,
    train: Sequence[Path],
    held: Sequence[Path],
    config: RetainConfig,
    work: Path,
    seed: int,
    advance: Advance,
) -> tuple[list[HeadLine], float]:
    """Train every block's head in place on the pairs in files. Returns the loss over all blocks as lines, one per step
    and one per measurement, and the held-out loss of the heads that are kept. Each trained head is written to `work`;
    heads found there are not trained again."""
    work.mkdir(exist_ok=True)
    curves = []
    for block, head in enumerate(heads.blocks):
        file = work / f"{block}.safetensors"
        if file.exists():
            curves.append(_load(head, file))
        else:
            pairs, checked = read_pairs(train, block), read_pairs(held, block)
            if not len(pairs) or not len(checked):
                raise UserError(f"in block {block} no answer sees two neighbouring tokens of its row")
            name = f"retain {seed} {block}"
            curves.append(curve := learn(head, pairs, checked, config, len(heads.blocks), name))
            state = {key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}
            save_whole(state | {"losses": curve.losses, "heldout": curve.heldout}, file)
        falls = f"{curves[-1].heldout[0]:.4f} → {curves[-1].heldout.min():.4f}"
        advance(1, f"held-out loss of block {block}: {falls}")
    return _lines(curves, config), sum(curve.heldout.double().min().item() for curve in curves)


def _load(head: nn.Module, file: Path) -> Curve:
    with safe_open(file, framework="pt") as saved, torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(saved.get_tensor(name))
        return Curve(saved.get_tensor("losses"), saved.get_tensor("heldout"))


def _lines(curves: Sequence[Curve], config: RetainConfig) -> list[HeadLine]:
    """The sum of the blocks' shares."""
    losses = torch.stack([curve.losses for curve in curves]).double().sum(0).tolist()
    heldout = torch.stack([curve.heldout for curve in curves]).double().sum(0).tolist()
    lines: list[HeadLine] = [
        HeadStep(step=step, loss=loss, lr=learning_rate(config, step)) for step, loss in enumerate(losses, start=1)
    ]
    lines += [
        HeldOutHeads(step=step, eval_loss=loss) for step, loss in zip(measured_after(config), heldout, strict=True)
    ]
    return sorted(lines, key=lambda line: (line.step, isinstance(line, HeldOutHeads)))
