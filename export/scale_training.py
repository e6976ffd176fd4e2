"""Training the scales of a written file by the KL to its checkpoint, its integer codes fixed.

This is the second phase of EfficientQAT (arXiv 2407.11062), with the float model's distributions as targets: the file
keeps its size, and every runtime reads it as before. The checkpoint sees the rows once; then its matrices make way,
one by one, for the file's codes, a byte per weight. With several depths the KL is the mean of all depths', each against
the checkpoint truncated to it. The scales that are kept are those with the least held-out KL; where training lowers it
nowhere, that is those of rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.stage import Advance, Context
from ..data.calibration import pad_id
from ..data.chat import Encoded, encode_rows
from ..data.packing import Batch, pack
from ..data.rows import Split, read_rows
from ..modeling.agreement import Head, States, response_positions
from ..modeling.blocks import Decoder
from ..modeling.load import load_model, load_tokenizer
from ..modeling.types import CausalModel
from ..records.bundle import TrainedScales
from ..training.losses import objective_loss
from ..training.objectives.kd import Kd
from ..training.schedule import warmed_cosine
from .config import TrainScales
from .cost import CHUNK
from .scale_files import Array, ScaleFiles
from .scales import ScaledLinear, ScaledMatrix

SPLITS: tuple[Split, ...] = ("train", "heldout")
BETAS, EPSILON = (0.9, 0.95), 1e-8
SAVE_EVERY = 10  # steps between states that a killed training resumes from
LARGEST = 0.5  # relative move of a scale: none may change its sign, nor come near it


@dataclass(frozen=True)
class Seen:
    """ScaleRows that the checkpoint has seen."""

    batch: Batch
    positions: Tensor  # (N,) flat indices of the tokens that are predicted from
    targets: Tensor  # (N,)
    hidden: list[Tensor]  # (N, H) of the checkpoint after its final norm, at each depth


class ScaleRows:
    """The rows that scales are trained and chosen on, seen by the checkpoint once for all types.

    Raises `UserError` where the data stage has no rows to train on, or none held out.
    """

    def __init__(self, config: TrainScales, checkpoint: Path, data: Path, depths: Sequence[int], context: Context):
        self.config, self.checkpoint, self.depths, self.context = config, checkpoint, list(depths), context
        tokenizer = load_tokenizer(checkpoint)
        self.pad = pad_id(tokenizer)
        train, held = (encode_rows(tokenizer, read_rows(data, split), config.length) for split in SPLITS)
        if not train or not held:
            raise UserError(
                f"export.train_scales: {data.name} has {len(train)} rows to train on and {len(held)} held out to "
                "choose by, and needs at least one of each: make more rows"
            )
        random = torch.Generator().manual_seed(context.seed)
        order = torch.randperm(len(train), generator=random).tolist()[: config.steps * config.batch]
        self._train, self._held = [train[i] for i in order], _first(held, config.held_out)

    @cached_property
    def seen(self) -> tuple[Head, list[Seen], list[Seen]]:
        """The checkpoint's head, the batches to train on, one for each step, and those held out."""
        model = load_model(self.checkpoint, self.context.dtype, self.context.device)
        decoder = Decoder(model)
        parts = [self._batches(rows) for rows in (self._train, self._held)]
        with self.context.progress.bar("rows for training scales", sum(map(len, parts))) as advance, torch.no_grad():
            found = [[_see(decoder, batch, self.depths, advance) for batch in part] for part in parts]
        return Head(decoder.head_weight.detach(), decoder.softcap), found[0], found[1]

    def _batches(self, rows: list[Encoded]) -> list[Batch]:
        """So many rows behind one another in one sequence each."""
        count = self.config.batch
        groups = [rows[i : i + count] for i in range(0, len(rows), count)]
        return [pack(group, self.config.length * count, 1, self.pad)[0] for group in groups]

    def order(self) -> list[int]:
        """The batch of each step: all of them in a new order, again and again."""
        random = torch.Generator().manual_seed(self.context.seed + 1)
        batches = math.ceil(len(self._train) / self.config.batch)
        rounds = math.ceil(self.config.steps / batches)
        found = [torch.randperm(batches, generator=random) for _ in range(rounds)]
        return torch.cat(found).tolist()[: self.config.steps]


def _first(rows: list[Encoded], tokens: int) -> list[Encoded]:
    """The first rows, of so many tokens together; the last one may go past them."""
    kept: list[Encoded] = []
    for row in rows:
        if tokens <= 0:
            break
        kept.append(row)
        tokens -= len(row.input_ids)
    return kept


def _see(decoder: Decoder, batch: Batch, depths: list[int], advance: Advance) -> Seen:
    batch = batch.to(decoder.model.device)
    # Every token counts, not the answers' alone: the file is to say what the checkpoint says.
    mask = (batch.segment_ids >= 0) & (batch.position_ids > 0)
    positions, targets = response_positions(batch.input_ids, mask)
    hidden = decoder.hidden_at(depths, **batch.model_inputs())
    advance()
    return Seen(batch, positions, targets, [states.flatten(0, 1)[positions].clone() for states in hidden])


class ScaleStudent:
    """The model that a file holds, its scales ready to be trained."""

    def __init__(self, rows: ScaleRows, files: ScaleFiles):
        self.depths, (self.head, self.train, self.held) = rows.depths, rows.seen
        self.model: CausalModel = load_model(rows.checkpoint, rows.context.dtype, rows.context.device)
        self.model.requires_grad_(False)
        self.decoder = Decoder(self.model)
        self.layers: dict[str, ScaledLinear] = {}
        for name, found in files.weights():
            if isinstance(found, ScaledMatrix):
                self.layers[name] = self._replace(name.removesuffix(".weight"), found)
            else:
                parameter = self.model.get_parameter(name)
                parameter.data = found.to(parameter)
        sizes = [layer.moves.numel() for layer in self.layers.values()]
        # One vector of all moves, of which those of the layers are parts: one step for all, and one tensor to keep.
        self.moves = torch.zeros(sum(sizes), device=self.model.device)
        self.gradient = torch.zeros_like(self.moves)
        for layer, moves, gradient in zip(
            self.layers.values(), self.moves.split(sizes), self.gradient.split(sizes), strict=True
        ):
            layer.moves.data = moves.view(layer.moves.shape)
            layer.moves.grad = gradient.view(layer.moves.shape)
        if rows.config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for block in self.decoder.blocks:
                block.training = True  # without its parts: checkpoints are made in training alone, and no dropout

    def _replace(self, path: str, matrix: ScaledMatrix) -> ScaledLinear:
        parent, _, own = path.rpartition(".")
        linear = self.model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        matrix = matrix.to(linear.weight.device)
        moves = torch.zeros(len(matrix.numbers), *matrix.scales.shape, device=linear.weight.device)
        layer = ScaledLinear(matrix, moves, linear.bias)
        setattr(self.model.get_submodule(parent), own, layer)
        return layer

    def kl(self, seen: Seen) -> Tensor:
        """Mean KL(checkpoint ‖ file) per token of a batch, and over depths, with its gradient."""
        hidden = self.decoder.hidden_at(self.depths, **seen.batch.model_inputs())
        head = Head(self.decoder.head_weight.detach(), self.decoder.softcap)
        total = torch.zeros((), device=self.model.device)
        for states, theirs in zip(hidden, seen.hidden, strict=True):
            anchor = States(theirs, self.head)
            ours = states.flatten(0, 1)[seen.positions]
            total = total + objective_loss(Kd(), ours, head, seen.targets, anchor, CHUNK).loss
        return total / (len(self.depths) * len(seen.targets))

    @torch.no_grad()
    def held_out_kl(self) -> float:
        """The same of all held-out rows, in nats."""
        counts = [len(seen.targets) for seen in self.held]
        return sum(float(self.kl(seen)) * n for seen, n in zip(self.held, counts, strict=True)) / sum(counts)

    def numbers(self) -> dict[str, list[Array]]:
        """Scales and minima as they are now, under the checkpoint's names."""
        return {
            name: [number.cpu().numpy() for number in layer.matrix.moved(layer.moves.detach())]
            for name, layer in self.layers.items()
        }


@dataclass
class State:
    """What a killed training resumes from."""

    step: int
    kl: list[tuple[int, float]]  # (step, held-out KL), from step 0 on
    tensors: dict[str, Tensor]  # moves, mean and square of the gradients, and the best moves so far

    @property
    def best(self) -> tuple[int, float]:
        """The step with the least held-out KL, and that KL."""
        return min(self.kl, key=lambda entry: entry[1])

    def save(self, file: Path) -> None:
        """Write the state; the file is whole or is the one before."""
        from safetensors.torch import save_file

        partial = file.with_suffix(".tmp")
        about = json.dumps({"step": self.step, "kl": self.kl})
        save_file({name: tensor.cpu() for name, tensor in self.tensors.items()}, partial, {"state": about})
        partial.replace(file)

    @classmethod
    def load(cls, file: Path, device: torch.device) -> State:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(file, framework="pt") as found:
            about = json.loads(found.metadata()["state"])
            tensors = {name: found.get_tensor(name).to(device) for name in found.keys()}  # noqa: SIM118
        return cls(about["step"], [(step, kl) for step, kl in about["kl"]], tensors)


def train_scales(rows: ScaleRows, files: ScaleFiles, label: str, file: Path) -> TrainedScales | None:
    """Train the scales of a written artifact and replace them in its files; None where no matrix has scales.

    `file` keeps the state that a killed training resumes from.
    """
    student, config = ScaleStudent(rows, files), rows.config
    if not student.layers:
        return None
    state = _start(student, file)
    order = rows.order()
    with rows.context.progress.bar(f"training scales of {label}", config.steps) as advance:
        advance(state.step)
        while state.step < config.steps:
            student.gradient.zero_()
            loss = student.kl(student.train[order[state.step]])
            loss.backward()
            if not torch.isfinite(student.gradient).all():
                break  # the best so far is kept
            state.step += 1
            _adam(student, state, config)
            if state.step % config.eval_every == 0 or state.step == config.steps:
                _measure(student, state)
            if state.step % SAVE_EVERY == 0 or state.step == config.steps:
                state.save(file)
            advance(note=f"KL {loss.item():.3f}")
    student.moves.copy_(state.tensors["best"])
    step, kl = state.best
    if step:
        files.write(student.numbers())
    return TrainedScales(
        steps=config.steps,
        step=step,
        held_out_tokens=sum(len(seen.targets) for seen in student.held),
        held_out_kl_before=float(f"{state.kl[0][1]:.6g}"),
        held_out_kl=float(f"{kl:.6g}"),
        moved=float(f"{max(map(_moved, student.layers.values())):.6g}"),
    )


@torch.no_grad()
def _moved(layer: ScaledLinear) -> float:
    """The largest change of a row of weights as a share of its norm, that of tiny rows by the typical one."""
    before, after = layer.matrix.values(), layer.matrix.values(layer.moves)
    norms = before.norm(dim=1)
    floor = 0.05 * norms.square().mean().sqrt() + 1e-12
    return float(((after - before).norm(dim=1) / norms.clamp(min=float(floor))).max())


def _start(student: ScaleStudent, file: Path) -> State:
    if file.exists():
        state = State.load(file, student.moves.device)
        student.moves.copy_(state.tensors["moves"])
    else:
        names = ("moves", "mean", "square", "best")
        state = State(0, [(0, student.held_out_kl())], {name: torch.zeros_like(student.moves) for name in names})
    state.tensors["moves"] = student.moves
    return state


def _measure(student: ScaleStudent, state: State) -> None:
    before, kl = state.best[1], student.held_out_kl()
    state.kl.append((state.step, kl if math.isfinite(kl) else math.inf))
    if kl < before:
        state.tensors["best"].copy_(student.moves)


@torch.no_grad()
def _adam(student: ScaleStudent, state: State, config: TrainScales) -> None:
    """One step of Adam (arXiv 1412.6980), its rate rising over the warm-up, then falling as a cosine."""
    rate = config.lr * warmed_cosine(state.step, config.steps, config.warmup)
    mean, square = state.tensors["mean"], state.tensors["square"]
    mean.lerp_(student.gradient, 1 - BETAS[0])
    square.lerp_(student.gradient.square(), 1 - BETAS[1])
    divisor = (square / (1 - BETAS[1] ** state.step)).sqrt_().add_(EPSILON)
    student.moves.sub_(mean / (1 - BETAS[0] ** state.step) / divisor, alpha=rate).clamp_(-LARGEST, LARGEST)
