"""The local phase: before distillation, the blocks around each gap learn the unpruned model's hidden states.

A token costs the few blocks that are trained, forward and backward, instead of the whole student and its head; what the
unpruned model says is computed once for all epochs. A gap's result is kept only if held-out figures gain (`Guard`),
because blocks can learn the states of the training text and lose what the text does not need, such as copying.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.memory import give_back_memory
from ..core.stage import WORK, Context, Inputs
from ..data.calibration import pad_id
from ..data.chat import load_encoded
from ..data.packing import pack
from ..modeling.blocks import Decoder, dropped_since
from ..modeling.checkpoint import save_checkpoint
from ..modeling.load import load_config, load_model, load_tokenizer
from ..records.students import LocalFigures
from ..training.config import Copy
from ..training.run import SPLITS, pack_rows
from ..training.teacher import CopyTeacher
from .config import DistillConfig, Local
from .guard import Guard
from .local_training import LocalTraining
from .states import Surroundings, surroundings, write_states

FOLDER = "local"


def check_local(config: DistillConfig, base: Path, pruned: Path) -> list[int]:
    """The dropped blocks. `UserError` where there is no gap, or none with kept blocks on both sides."""
    whole = load_config(base)
    dropped = dropped_since(load_config(pruned), whole)
    if not dropped:
        raise UserError("distill.local trains the blocks around a gap, and no block was dropped; leave it out")
    if 0 in dropped or whole.num_hidden_layers - 1 in dropped:
        raise UserError(
            "distill.local needs kept blocks on both sides of every gap, and the first or the last block was dropped; "
            "leave it out"
        )
    return dropped


def localized(
    config: DistillConfig, inputs: Inputs, out_dir: Path, context: Context
) -> tuple[Inputs, list[LocalFigures]]:
    """The inputs with the model that the local phase has made, and a record for each gap; rank 0 does the work."""
    if config.local is None:
        return inputs, []
    work = out_dir / WORK / FOLDER
    if context.rank == 0 and not (work / "model" / "config.json").exists():
        LocalPhase(config, config.local, inputs, work, context).run()
        give_back_memory()
    context.group.barrier()
    figures = [LocalFigures.model_validate(entry) for entry in read_json(work / "figures.json")["gaps"]]
    return replace(inputs, model=work / "model"), figures


class LocalPhase:
    """Trains gap after gap, each with those before it done; a gap that is finished is not trained again."""

    def __init__(self, config: DistillConfig, local: Local, inputs: Inputs, work: Path, context: Context):
        self.config, self.local, self.work, self.context = config, local, work, context
        self.dropped = check_local(config, inputs.base, inputs.model)
        self.tokenizer = load_tokenizer(inputs.model)
        self.teacher = CopyTeacher(inputs.base, Copy(), context)
        self.model = load_model(inputs.model, context.dtype, context.device).requires_grad_(False)
        self.student = Decoder(self.model)
        whole = self.teacher.decoder.num_blocks
        self.kept = [block for block in range(whole) if block not in set(self.dropped)]
        self.gaps = surroundings(self.dropped, whole, local.reach)
        train, held = (load_encoded(inputs.stages["data"], self.tokenizer, s, config.length) for s in SPLITS)
        sequences = max(1, local.tokens_per_step // config.length)
        self.batches = pack(train, config.length, sequences, pad_id(self.tokenizer))
        self.guard = Guard(pack_rows(config, held, self.tokenizer), self.teacher, config.chunk, context)

    def run(self) -> None:
        """Train all gaps, and write the model and the figures."""
        self.work.mkdir(parents=True, exist_ok=True)
        figures = [self._gap(number, around) for number, around in enumerate(self.gaps)]
        write_json(self.work / "figures.json", {"gaps": [entry.model_dump() for entry in figures]})
        partial = self.work / "model.partial"
        save_checkpoint(self.model.to(getattr(torch, self.context.dtype)), self.tokenizer, partial)
        partial.replace(self.work / "model")

    def _gap(self, number: int, around: Surroundings) -> LocalFigures:
        folder = self.work / f"gap-{number}"
        training = LocalTraining(self.student, self._blocks(around), self.local, folder, self.context)
        record = folder / "done.json"
        if record.exists():
            figures = LocalFigures.model_validate(read_json(record))
            training.restore(trained=figures.kept)
            return figures
        before = self.guard.measure(self.student)
        unpruned = self.teacher.decoder
        later = {"student": self.student, "kept": self.kept} if number else {}
        write_states(unpruned, around, self.batches, folder / "states", self.context.progress, **later)
        training.run(self.batches, self._scale(around))
        after = self.guard.measure(self.student)
        kept = after.better_than(before)
        figures = LocalFigures(
            first=around.first,
            last=around.last,
            steps=training.steps(len(self.batches)),
            tokens=sum(batch.tokens for batch in self.batches),
            kl_before=before.kl,
            kl_after=after.kl,
            repeated_before=before.repeated,
            repeated_after=after.repeated,
            kept=kept,
        )
        training.restore(trained=kept)
        write_json(record, figures.model_dump())
        shutil.rmtree(folder / "states")
        self.context.progress.note(
            f"local phase, gap {around.label}: held-out KL {before.kl:.3f} → {after.kl:.3f}, on repeated text "
            f"{before.repeated:.3f} → {after.repeated:.3f}" + ("" if kept else "; undone, because it lost")
        )
        return figures

    def _blocks(self, around: Surroundings) -> tuple[list[int], list[int]]:
        """The trained blocks before and behind a gap, as the student numbers them."""
        return [self.kept.index(n) for n in around.before], [self.kept.index(n) for n in around.behind]

    def _scale(self, around: Surroundings) -> float:
        """Healing may have changed the scale of the stream behind a gap; the blocks there tell how."""
        block = around.behind[0]
        return self.student.adds_scaled(self.kept.index(block), self.teacher.decoder, block)
