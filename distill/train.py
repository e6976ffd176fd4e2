"""The training loop: transformers' Trainer around chunked objectives, exactly resumable."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import get_rank
from torch.distributed.fsdp import FSDPModule
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..data.packing import Batch
from ..errors import UserError
from ..modeling.agreement import Anchor, Head, States, response_positions
from ..modeling.blocks import Decoder
from ..stage import Advance, Context, Group, write_whole
from .config import DistillConfig, Lora
from .losses import LossSums, objective_loss
from .order import BatchOrder, blank
from .sharding import copy_whole, is_sharded, load_optimizer, save_optimizer, whole
from .teacher import Teacher

WHOLE = "WHOLE"  # written last into a checkpoint; one without it was cut short and is not resumed from
WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.pt"  # the Trainer's name for it
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit"}


class Student(nn.Module):
    """The model being trained, called for hidden states, or for what `finish` makes of them while all weights of a
    sharded model's head are there; one module, so that DDP and FSDP can wrap it."""

    def __init__(self, model: nn.Module, decoder: Decoder):
        super().__init__()
        self.model = model
        self.decoder = decoder

    def forward(self, finish: Callable[[Tensor], Any] | None = None, **inputs: Any) -> Any:
        hidden = self.decoder.hidden(**inputs)
        return hidden if finish is None else finish(hidden)


@dataclass(frozen=True)
class HeldOut:
    """This process's share of the held-out batches, with the unpruned model's hidden states at their response
    positions."""

    batches: list[Batch]
    anchors: list[States]

    def with_head_of(self, decoder: Decoder) -> HeldOut:
        """The same with the student's head for the teacher's, so that this can go: where they are equal and the
        student's is not trained."""
        weight = decoder.head_weight
        if weight.requires_grad or not torch.equal(weight, self.anchors[0].head.weight):
            return self
        head = Head(weight.detach(), decoder.softcap)
        return HeldOut(self.batches, [States(anchor.hidden, head) for anchor in self.anchors])


@torch.no_grad()
def hold_out(batches: list[Batch], teacher: Any, device: str, group: Group | None = None) -> HeldOut:
    """Run a teacher that has the unpruned model over the held-out batches once, every `world`-th in this process; only
    response positions are kept. All processes have equally many: blank ones come on top."""
    if group is not None and group.world > 1:
        blanks = [blank(batches)] * (-len(batches) % group.world)
        batches = [*batches, *blanks][group.rank :: group.world]
    anchors = []
    for batch in batches:
        moved = batch.to(device)
        anchors.append(teacher.anchor(moved, response_positions(moved.input_ids, moved.loss_mask)[0]))
    return HeldOut(batches, anchors)


def lora_model(model: Any, tune: Lora, seed: int) -> Any:
    """The model with fresh adapters; everything else is frozen. Raises `UserError` for unknown target names."""
    from peft import LoraConfig, get_peft_model

    _check_targets(model, tune.targets)
    config = LoraConfig(
        r=tune.rank,
        lora_alpha=tune.alpha,  # type: ignore[arg-type]
        lora_dropout=tune.dropout,
        target_modules=tune.targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _check_targets(model: Any, targets: list[str] | str) -> None:
    # peft is content when one of several names is found, and would adapt the head, which the loss reads unadapted.
    layers = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets if isinstance(targets, list) else []:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise UserError(f"distill.tune.targets: the blocks have no linear layer {target!r}; they have: {known}")


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name, on the CPU. Of a sharded module they are gathered, for which all
    processes must call this; the first one has them."""
    state = {}
    if isinstance(module, FSDPModule):
        module.reshard()  # after a forward pass alone, the root's weights still are whole
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            value = whole(parameter)
            if not (is_sharded(module) and get_rank()):
                state[name] = value.cpu().contiguous()
    return state


def load_trainable(module: nn.Module, file: Path) -> None:
    """Put saved parameters back; the names must be the trained ones exactly."""
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with safe_open(file, framework="pt") as saved:  # one at a time: several processes may read it at once
        if set(saved.keys()) != parameters.keys():
            raise UserError(f"{file} does not hold the parameters this recipe trains; delete its folder and run again")
        for name, parameter in parameters.items():
            copy_whole(parameter, saved.get_tensor(name))


def save_whole(state: dict[str, Tensor], file: Path) -> None:
    """Write safetensors so that the file is never seen half-written."""
    temporary = file.with_name(file.name + ".tmp")
    save_file(state, temporary)
    os.replace(temporary, file)


class DistillTrainer(Trainer):
    """transformers' Trainer with our loss, small checkpoints, and held-out measurements."""

    def __init__(
        self,
        student: Student,
        config: DistillConfig,
        teacher: Teacher | None,
        held_out: HeldOut,
        work: Path,
        context: Context,
        batches: list[Batch],
        advance: Advance,
    ):
        super().__init__(
            model=student,
            args=_arguments(config, work, context, len(batches)),
            # The last is blank: where batches do not divide evenly, processes without one take it and learn nothing.
            train_dataset=[*batches, blank(batches)],  # type: ignore[arg-type]
            data_collator=lambda items: vars(items[0]),
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the response tokens of the whole step
        self.config, self.teacher, self.held_out, self.group = config, teacher, held_out, context.group
        self.order = BatchOrder(len(batches), context.world, context.seed)
        self.student, self.decoder, self.sharded = student, student.decoder, is_sharded(student)
        self.running = torch.zeros(4, dtype=torch.float64)  # sums of loss, nll, kl and tokens since the last step
        self.add_callback(_Recorder(self, work, advance))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        sums = self.sums(model, Batch(**inputs))
        if not torch.isfinite(sums.loss):
            raise self.diverged("training loss", sums.loss.item(), self.state.global_step + 1)
        figures = [sums.loss.item(), sums.nll.item(), sums.kl.item(), sums.tokens]
        self.running += torch.tensor(figures, dtype=torch.float64)
        return sums.loss * (self.accelerator.num_processes / max(float(num_items_in_batch), 1.0))

    def diverged(self, figure: str, value: float, step: int) -> UserError:
        return UserError(
            f"the {figure} is {value} at step {step}: training diverged. "
            f"Lower distill.lr (it is {self.config.lr:g}) or raise distill.warmup."
        )

    def sums(self, model: Any, batch: Batch) -> LossSums:
        """The objective over one batch of training rows."""
        positions, targets = response_positions(batch.input_ids, batch.loss_mask)
        # The teacher first: the shared one changes the weights for its pass, when no graph hangs on them yet.
        anchor = self.teacher.anchor(batch, positions) if self.teacher is not None else None
        return self._objective(model, batch, positions, targets, anchor)

    def _objective(
        self, model: Any, batch: Batch, positions: Tensor, targets: Tensor, anchor: Anchor | None
    ) -> LossSums:
        """The objective at some positions, computed where the head's weights are whole."""
        config = self.config

        def finish(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            head = Head(self.decoder.head_weight, self.decoder.softcap)
            states = hidden.flatten(0, 1)[positions]
            sums = objective_loss(config.objective, states, head, targets, anchor, config.chunk)
            return sums.loss.clone(), sums.nll, sums.kl  # FSDP2 wants no view of the loss

        inputs = batch.model_inputs()
        loss, nll, kl = model(finish=finish, **inputs) if self.sharded else finish(model(**inputs))
        return LossSums(loss, nll, kl, len(targets))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Loss, KL to the teacher and perplexity on the held-out rows of all processes."""
        self.student.eval()
        own: list[list[float]] = []
        for batch, anchor in zip(self.held_out.batches, self.held_out.anchors, strict=True):
            batch = batch.to(self.args.device)
            positions, targets = response_positions(batch.input_ids, batch.loss_mask)
            sums = self._objective(self.student, batch, positions, targets, anchor)
            own.append([float(sums.loss), float(sums.nll), float(sums.kl), sums.tokens])
        shares = self.group.gather(own)
        total = torch.zeros(4, dtype=torch.float64)
        for number in range(sum(map(len, shares))):  # in the batches' order, however many processes there are
            total += torch.tensor(shares[number % len(shares)][number // len(shares)], dtype=torch.float64)
        loss, nll, kl = (total[:3] / total[3].clamp(min=1)).tolist()
        return {"eval_loss": loss, "eval_kl": kl, "eval_perplexity": math.exp(min(nll, 700))}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        count = torch.stack([batch["loss_mask"][:, 1:].sum() for batch in batch_samples]).sum().to(device)
        if self.accelerator.num_processes == 1:
            return count
        gathered: Any = self.accelerator.gather(count)
        return gathered.sum()

    def _get_train_sampler(self, train_dataset: Any = None) -> BatchOrder:
        return self.order

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        state = trainable_state(self.student)
        if self.group.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_whole(state, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trainable(self.student, Path(resume_from_checkpoint) / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded:
            save_optimizer(self.optimizer, self.lr_scheduler, Path(output_dir), self.group)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.sharded:
            load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint), self.group)
        elif not (Path(checkpoint) / OPTIMIZER).exists():
            raise UserError(f"{checkpoint} is of a training begun with --shard; go on with it, or delete that folder")
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.group.barrier()  # every process has written its part
        if self.group.rank == 0:
            (Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / WHOLE).touch()


class _Recorder(TrainerCallback):
    """Writes the curves, measures and keeps the best weights; asks for checkpoints. All processes measure, the first
    one writes."""

    def __init__(self, trainer: DistillTrainer, work: Path, advance: Advance):
        self.trainer, self.advance, self.group = trainer, advance, trainer.group
        self.curves, self.best = work / "curves.jsonl", work / "best.json"
        self.best_weights = work / "best.safetensors"
        self.note, self.lr = "", 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.group.rank:
            torch.manual_seed(args.seed + self.group.rank)  # each process drops out other numbers
        begun = False
        if self.group.rank == 0:
            keep = [line for line in read_lines(self.curves) if line["step"] <= state.global_step > 0]
            _write_lines(self.curves, keep)
            begun = bool(keep)
        self.advance(state.global_step)
        if not self.group.share(begun):
            self._measure(0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The Trainer does not reach the sampler of one of several processes that resumes within an epoch.
        self.trainer.order.set_epoch(state.global_step // self._epoch_steps())

    def _epoch_steps(self) -> int:
        return math.ceil(self.trainer.order.count / self.trainer.config.accumulate)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.lr = self.trainer._get_learning_rate()  # by the end of the step it is the next one's

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loss, nll, kl, tokens = map(sum, zip(*self.group.gather(self.trainer.running.tolist()), strict=True))
        self.trainer.running.zero_()
        count = max(tokens, 1.0)
        config, step = self.trainer.config, state.global_step
        epochs, steps = divmod(step, self._epoch_steps())
        line = {
            "step": step,
            "epoch": round(epochs + steps * config.accumulate / self.trainer.order.count, 4),
            "loss": loss / count,
            "nll": nll / count,
            "lr": self.lr,
            "tokens": int(tokens),
        }
        if self.trainer.teacher is not None:
            line["kl"] = kl / count
        if self.group.rank == 0:
            _append_line(self.curves, line)
        last = step >= state.max_steps
        if step % config.eval_every == 0 or last:
            self._measure(step)
        if step % config.save_every == 0 and not last:
            control.should_save = True
        self.advance(1, f"loss {loss / count:.3f}  {self.note}")

    def _measure(self, step: int) -> None:
        found = self.trainer.measure()
        for name in ("loss", "kl"):
            if not math.isfinite(found[f"eval_{name}"]):
                raise self.trainer.diverged(f"held-out {name}", found[f"eval_{name}"], step)
        if self.group.rank == 0:
            _append_line(self.curves, {"step": step, **found})
        self.note = f"held-out kl {found['eval_kl']:.3f}, perplexity {found['eval_perplexity']:.2f}"
        select = self.trainer.config.select
        value = -float(step) if select == "last" else found[f"eval_{select}"]
        # Killed between a measurement and its checkpoint, a run measures again: the same value changes nothing.
        if self.group.share(self.group.rank == 0 and self._is_best(value)):
            weights = trainable_state(self.trainer.student)
            if self.group.rank == 0:
                save_whole(weights, self.best_weights)
                write_whole(self.best, json.dumps({"value": value, "step": step, **found}))

    def _is_best(self, value: float) -> bool:
        best = json.loads(self.best.read_text())["value"] if self.best.exists() else math.inf
        return value < best or not self.best_weights.exists()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; ones cut short by a kill are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            found.append(path)
        else:
            shutil.rmtree(path)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def total_steps(config: DistillConfig, batches: int) -> int:
    """Optimizer steps of a run over `batches` batches per epoch."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * math.ceil(batches / config.accumulate)))


def _arguments(config: DistillConfig, work: Path, context: Context, batches: int) -> TrainingArguments:
    steps = total_steps(config, batches)
    on_cpu = context.device == "cpu"
    # LoRA keeps its adapters in float32 beside weights of the given type; full tuning keeps float32 weights. float16
    # needs its losses scaled, which there is no scaler for on CPUs.
    mixed = context.dtype == "bfloat16" or (context.dtype == "float16" and not on_cpu)
    arguments = TrainingArguments(
        output_dir=str(work / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=1,  # a data set item is a whole batch of packed sequences
        gradient_accumulation_steps=config.accumulate // context.world,
        learning_rate=config.lr,
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
        ddp_find_unused_parameters=False,  # the head is used, but outside what DDP sees
        ddp_broadcast_buffers=False,  # they are constants
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process uses one GPU, however many there are
    return arguments


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _append_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
