"""The retain stage: the model as it is, with heads that say which keys and values are worth keeping."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from ...data.readers import Source, local_file
from ...errors import UserError
from ...modeling.blocks import Decoder
from ...modeling.checkpoint import link_file
from ...modeling.load import load_config, load_model, load_tokenizer
from ...modeling.retaining import RetainingSettings, save_heads
from ...modeling.source import checkpoint_files
from ...stage import WORK, Context, Inputs
from .config import RetainConfig, head_width
from .rows import Rows, made_rows, users_rows
from .train import CURVES, Trainer, fresh_heads


def check(config: RetainConfig, base: Path, context: Context) -> None:
    """Refuse rows that are not there, and rows longer than what the model was trained for, before any work is done."""
    positions = load_config(base).max_position_embeddings
    if config.length is not None and config.length > positions:
        raise UserError(
            f"retain.length is {config.length}, but the model was trained for {positions} positions: beyond them "
            f"it does not find what it is asked about; write {positions} or less"
        )
    if config.rows is not None:
        local_file(Source(config.rows, context, "retain.rows"))


def run(config: RetainConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `model/`, the model so far by links and its heads in `model/retaining/`, and `curves.jsonl`, a line per
    step and per measurement. A killed run goes on from its last checkpoint."""
    work = out_dir / WORK
    work.mkdir(exist_ok=True)
    started = time.monotonic()
    model = load_model(inputs.model, context.dtype, context.device).requires_grad_(False)
    decoder = Decoder(model)
    rows = _rows(config, inputs, work, context)
    width = head_width(config.width, decoder.hidden_size)
    heads = fresh_heads(decoder, width, context.seed)
    with context.progress.bar("retaining heads", config.steps) as advance:
        trainer = Trainer(decoder, heads, config, rows, work, advance)
        trainer.train()
    link_model(inputs.model, out_dir / "model")
    settings = RetainingSettings(config.budget, config.chunk, config.stabilizers, config.local)
    save_heads(heads.cpu(), settings, out_dir / "model")
    shutil.copyfile(work / CURVES, out_dir / CURVES)
    before, last = trainer.measurements()[0], trainer.measurements()[-1]
    context.progress.note(
        f"of the quarter of a prompt that answers attend to most, the heads keep "
        f"{100 * before['eval_recall']:.0f} % → {100 * last['eval_recall']:.0f} %"
    )
    return {
        "steps": config.steps,
        "width": width,
        "trainable_parameters": sum(p.numel() for p in heads.parameters()),
        "before": before,
        "last": last,
        "seconds_training": round(time.monotonic() - started, 1),
    }


def _rows(config: RetainConfig, inputs: Inputs, work: Path, context: Context) -> Rows:
    tokenizer = load_tokenizer(inputs.model)
    length = config.longest(load_config(inputs.model).max_position_embeddings)
    if config.rows is not None:
        return users_rows(tokenizer, config.rows, length, config.steps, config.heldout, context, work / "datasets")
    if "data" not in inputs.stages:
        raise UserError("retain makes its rows of the data stage's, and there is none; name a data set in retain.rows")
    return made_rows(tokenizer, inputs.stages["data"], length, config.heldout, context.seed)


def link_model(source: Path, folder: Path) -> None:
    """A checkpoint's files under a second name, without heads it may have; the files themselves where it is a folder of
    links, as in the Hub's cache."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in checkpoint_files(source):
        link_file(file.resolve(), folder / file.name)
