"""The training loop: transformers' Trainer around chunked objectives, exactly resumable."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..core.errors import UserError
from ..core.stage import Advance, Context, Group
from ..data.packing import Batch
from ..modeling.agreement import Anchor, Head, States, response_positions
from ..modeling.blocks import Decoder
from ..modeling.types import CausalModel
from ..records.students import HeldOutDepth, HeldOutFigures
from .budget import Pace, total_steps
from .config import RANK, Lora, TrainingConfig
from .depths import Depths, Drawn
from .losses import weighted_loss
from .on_policy import StudentRows
from .order import BatchOrder, blank
from .recorder import Recorder
from .sharding import is_sharded, load_optimizer, save_optimizer
from .teacher import Teacher
from .weights import WEIGHTS, WHOLE, load_trainable, save_whole, trainable_state

if TYPE_CHECKING:
    from .rounded import RoundedWeights

OPTIMIZER = "optimizer.pt"  # the Trainer's file name
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit"}


class Student(nn.Module):
    """The model being trained, as a single module that DDP and FSDP can wrap.

    A call returns the hidden states at every trained depth, or the result of `finish` on them, which runs while a
    sharded model's head is gathered.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, depths: Depths):
        super().__init__()
        self.model = model
        self.decoder = decoder
        self.depths = depths
        self.rounded: RoundedWeights | None = None  # where it is trained through rounded weights

    def forward(self, finish: Callable[[list[Tensor]], Any] | None = None, **inputs: Any) -> Any:
        hidden = self.decoder.hidden_at(self.depths.blocks, **inputs)
        return hidden if finish is None else finish(hidden)


@dataclass(frozen=True)
class DepthSums:
    """Sums over response tokens: the weighted loss of all depths, with its gradient, and per depth the loss, negative
    log-likelihood, KL and number of tokens, (D, 4)."""

    loss: Tensor
    table: Tensor


@dataclass(frozen=True)
class HeldOut:
    """This process's share of the held-out batches, with the unpruned model's hidden states at their response
    positions."""

    batches: list[Batch]
    anchors: list[States]

    def with_head_of(self, decoder: Decoder) -> HeldOut:
        """The same with the student's head in place of the teacher's, which can then be freed, if the two are equal and
        the student's is frozen."""
        weight = decoder.head_weight
        if weight.requires_grad or not torch.equal(weight, self.anchors[0].head.weight):
            return self
        head = Head(weight.detach(), decoder.softcap)
        return HeldOut(self.batches, [States(anchor.hidden, head) for anchor in self.anchors])


@torch.no_grad()
def hold_out(batches: list[Batch], teacher: Any, device: str, group: Group | None = None) -> HeldOut:
    """Run the unpruned model over the held-out batches once, every `world`-th in this process; only response positions
    are kept. All processes get the same number of batches, padded with blank ones."""
    if group is not None and group.world > 1:
        blanks = [blank(batches)] * (-len(batches) % group.world)
        batches = [*batches, *blanks][group.rank :: group.world]
    anchors = []
    for batch in batches:
        moved = batch.to(device)
        anchors.append(teacher.anchor(moved, response_positions(moved.input_ids, moved.loss_mask)[0]))
    return HeldOut(batches, anchors)


def lora_model(model: CausalModel, tune: Lora, seed: int) -> Any:
    """The model with fresh adapters; everything else is frozen, except the norm and the head if they are to be trained.
    Raises `UserError` for unknown target names."""
    from peft import LoraConfig, get_peft_model

    _check_targets(model, tune.targets)
    beside = trained_beside(Decoder(model), tune)
    config = LoraConfig(
        r=tune.rank or RANK,
        lora_alpha=tune.alpha,  # type: ignore[arg-type]
        lora_dropout=tune.dropout,
        target_modules=tune.targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for parameter in beside:
        parameter.data = parameter.data.float()  # as for the adapters: lower precision would lose small steps
        parameter.requires_grad_(True)
    return adapted


def trained_beside(decoder: Decoder, tune: Lora) -> list[nn.Parameter]:
    """Parameters that are trained directly, besides the adapters."""
    parameters = list(decoder.norm.parameters()) if tune.train_norm else []
    return [*parameters, *decoder.head_module.parameters()] if tune.train_head else parameters


def _check_targets(model: CausalModel, targets: list[str] | str) -> None:
    # peft accepts a list if any of its names exists, and would adapt the head, which the loss reads without adapters.
    layers = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets if isinstance(targets, list) else []:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise UserError(f"distill.tune.targets: the blocks have no linear layer {target!r}; they have: {known}")


class DistillTrainer(Trainer):
    """transformers' Trainer with our loss, small checkpoints, and held-out measurements."""

    def __init__(
        self,
        student: Student,
        config: TrainingConfig,
        pace: Pace,
        teacher: Teacher | None,
        held_out: HeldOut,
        work: Path,
        context: Context,
        batches: list[Batch],
        advance: Advance,
        own_rows: StudentRows | None = None,
    ):
        super().__init__(
            model=student,
            args=_arguments(config, pace, work, context, len(batches)),
            # The last batch is blank, for processes that get none when batches do not divide evenly.
            train_dataset=[*batches, blank(batches)],  # type: ignore[arg-type]
            data_collator=lambda items: vars(items[0]),
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the response tokens of the whole step
        self.config, self.pace, self.teacher, self.held_out = config, pace, teacher, held_out
        self.group, self.own_rows = context.group, own_rows
        self.order = BatchOrder(len(batches), context.world, context.seed)
        self.student, self.decoder, self.sharded = student, student.decoder, is_sharded(student)
        self.depths = student.depths
        if student.rounded is not None and isinstance(config.tune, Lora):
            student.rounded.first = round(config.tune.quantize_after * total_steps(config, pace, len(batches)))
        self.running = torch.zeros(len(self.depths.blocks), 4, dtype=torch.float64)  # `DepthSums` since the last step
        self.passed = 0  # batches since the last step
        self.add_callback(Recorder(self, work, advance))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Any:
        sums = self.sums(model, Batch(**inputs))
        if not torch.isfinite(sums.loss):
            raise self.diverged("training loss", sums.loss.item(), self.state.global_step + 1)
        self.running += sums.table
        self.passed += 1
        return sums.loss * (self.accelerator.num_processes / max(float(num_items_in_batch or 0), 1.0))

    def diverged(self, figure: str, value: float, step: int) -> UserError:
        return UserError(
            f"the {figure} is {value} at step {step}: training diverged. "
            f"Lower {self.config.stage}.lr (it is {self.pace.lr:g}) or raise {self.config.stage}.warmup."
        )

    def sums(self, model: nn.Module, batch: Batch) -> DepthSums:
        """The objective over one batch of training rows."""
        positions, targets = response_positions(batch.input_ids, batch.loss_mask)
        # The teacher first: a shared one changes weights for its pass, which must precede the student's graph.
        anchor = self.teacher.anchor(batch, positions) if self.teacher is not None else None
        drawn = self.depths.draw(len(positions), self._draw_seed())
        return self._objective(model, batch, positions, targets, anchor, drawn)

    def _draw_seed(self) -> int:
        # Seeded by the batch's place in the step, which depends neither on the number of processes nor on resuming.
        place = self.passed * self.group.world + self.group.rank
        return random.Random(f"depths {self.args.seed} {self.state.global_step} {place}").getrandbits(63)

    def _objective(
        self, model: nn.Module, batch: Batch, positions: Tensor, targets: Tensor, anchor: Anchor | None, drawn: Drawn
    ) -> DepthSums:
        """The objective at the given positions; called while the head's weights are gathered."""
        config, drawn = self.config, drawn.to(positions.device)

        def finish(hidden: list[Tensor]) -> tuple[Tensor, Tensor]:
            head = Head(self.decoder.head_weight, self.decoder.softcap)
            states = drawn.take(torch.stack([depth.flatten(0, 1)[positions] for depth in hidden]))
            loss, values = weighted_loss(config.objective, states, drawn.weight, head, targets, anchor, config.chunk)
            return loss.clone(), values  # FSDP2 does not accept a view of the loss

        inputs = batch.model_inputs()
        loss, values = model(finish=finish, **inputs) if self.sharded else finish(model(**inputs))
        return DepthSums(loss, drawn.sums(values, len(self.depths.blocks)))

    @torch.no_grad()
    def measure(self, step: int) -> HeldOutFigures:
        """Loss, KL to the teacher and perplexity on all processes' held-out rows, after `step` steps: the weighted mean
        over depths, and for several depths also each depth's own."""
        self.student.eval()
        if self.student.rounded is not None:
            self.student.rounded.round()  # what is measured, and may be kept, is what the export makes of it
        own: list[list[list[float]]] = []
        for batch, anchor in zip(self.held_out.batches, self.held_out.anchors, strict=True):
            batch = batch.to(self.args.device)
            positions, targets = response_positions(batch.input_ids, batch.loss_mask)
            every = self.depths.every(len(positions))
            with self._numbers():
                sums = self._objective(self.student, batch, positions, targets, anchor, every)
            own.append(sums.table.tolist())
        shares = self.group.gather(own)
        total = torch.zeros_like(self.running)
        for number in range(sum(map(len, shares))):  # in batch order, for any number of processes
            total += torch.tensor(shares[number % len(shares)][number // len(shares)], dtype=torch.float64)
        means = self.depth_means(total)
        loss, nll, kl = self.depths.mean(means).tolist()
        depths = {"eval_depths": self.by_depth(means)} if self.config.sorts else {}
        perplexity = math.exp(min(nll, 700))
        return HeldOutFigures(step=step, eval_loss=loss, eval_kl=kl, eval_perplexity=perplexity, **depths)

    def _numbers(self) -> Any:
        """Autocast, as in training, for a head that is trained in float32 beside blocks of another dtype."""
        tune = self.config.tune
        cast = isinstance(tune, Lora) and tune.train_head
        return self.compute_loss_context_manager() if cast else nullcontext()

    def depth_means(self, table: Tensor) -> Tensor:
        """(D, 3): mean loss, negative log-likelihood and KL of each depth's tokens."""
        return table[:, :3] / table[:, 3:].clamp(min=1)

    def by_depth(self, means: Tensor) -> list[HeldOutDepth]:
        """The figures of each depth."""
        rows = zip(self.depths.blocks, means.tolist(), strict=True)
        return [
            HeldOutDepth(depth=depth, loss=loss, kl=kl, perplexity=math.exp(min(nll, 700)))
            for depth, (loss, nll, kl) in rows
        ]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """A step's batches and its number of response tokens, those included that the student writes itself."""
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.own_rows is None:
            return samples, count
        step = self.state.global_step
        self.student.eval()  # the Trainer's step sets it to train
        with self.compute_loss_context_manager():
            self.own_rows.prepare(step, self.decoder.model)
        samples = [vars(self.own_rows.replaced(Batch(**sample), step)) for sample in samples]
        return samples, self._get_num_items_in_batch(samples, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        count = torch.stack([batch["loss_mask"][:, 1:].sum() for batch in batch_samples]).sum().to(device)
        if self.accelerator.num_processes == 1:
            return count
        gathered: Any = self.accelerator.gather(count)
        return gathered.sum()

    def _get_train_sampler(self, train_dataset: object = None) -> BatchOrder:
        return self.order

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        state = trainable_state(self.student)
        if self.group.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_whole(state, folder / WEIGHTS)
            if self.student.rounded is not None:
                self.student.rounded.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.student.rounded is not None:
            step = int(Path(resume_from_checkpoint).name.rpartition("-")[2])
            self.student.rounded.load(Path(resume_from_checkpoint), step)
        else:
            load_trainable(self.student, Path(resume_from_checkpoint) / WEIGHTS)

    def _stepped(self) -> tuple[Any, Any]:
        """Optimizer and scheduler; transformers' annotations are wider, because an accelerator may wrap them."""
        return self.optimizer, self.lr_scheduler

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded:
            save_optimizer(*self._stepped(), Path(output_dir), self.group)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.sharded:
            load_optimizer(*self._stepped(), Path(checkpoint), self.group)
        elif not (Path(checkpoint) / OPTIMIZER).exists():
            raise UserError(f"{checkpoint} was written with --shard; resume with --shard, or delete it to start over")
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        self.group.barrier()  # every process has written its part
        if self.group.rank == 0:
            (Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / WHOLE).touch()


def _arguments(config: TrainingConfig, pace: Pace, work: Path, context: Context, batches: int) -> TrainingArguments:
    steps = total_steps(config, pace, batches)
    on_cpu = context.device == "cpu"
    # LoRA keeps float32 adapters beside weights of the given dtype; full tuning keeps float32 weights. float16 needs
    # loss scaling, for which torch has no scaler on CPUs.
    mixed = context.dtype == "bfloat16" or (context.dtype == "float16" and not on_cpu)
    arguments = TrainingArguments(
        output_dir=str(work / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=1,  # a data set item is a whole batch of packed sequences
        gradient_accumulation_steps=pace.accumulate // context.world,
        learning_rate=pace.lr,
        lr_scheduler_type=SCHEDULES[config.schedule],
        warmup_steps=min(math.ceil(config.warmup * steps), steps - 1),  # its first step has a rate of 0
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        optim=OPTIMIZERS[config.optimizer],
        seed=context.seed,
        data_seed=context.seed,
        use_cpu=on_cpu,
        bf16=mixed and context.dtype == "bfloat16",
        fp16=mixed and context.dtype == "float16",
        eval_strategy="no",
        save_strategy="no",  # the recorder asks for checkpoints
        logging_strategy="no",
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,  # the head is used, but not through DDP
        ddp_broadcast_buffers=False,  # they are constants
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one GPU per process
    return arguments
