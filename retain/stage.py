"""The retain stage: adds heads to the model that predict which keys and values are worth keeping."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.stage import WORK, Context, Inputs
from ..data.readers import DatasetSource, local_file
from ..kv.settings import HeadSettings
from ..modeling.blocks import Decoder
from ..modeling.checkpoint import link_file, link_files
from ..modeling.load import load_config, load_model, load_tokenizer
from ..modeling.retaining import save_heads
from ..modeling.source import IMPORTANCE, checkpoint_files
from ..records.curves import CURVES, HeldOutHeads, write_lines
from ..records.figures import HeadFigures, RetainFigures
from .config import RetainConfig, head_width
from .rows import RetainRows, made_rows, users_rows
from .samples import keep_all
from .train import fresh_heads, kept_shares, train_heads


def check(config: RetainConfig, base: Path, context: Context) -> None:
    """Reject missing rows, and rows longer than the model was trained for, before any work is done."""
    positions = load_config(base).max_position_embeddings
    if config.length is not None and config.length > positions:
        raise UserError(
            f"retain.length is {config.length}, but the model was trained for {positions} positions and cannot use "
            f"more; write {positions} or less"
        )
    if config.dataset is not None:
        local_file(DatasetSource(config.dataset, context, "retain.dataset"))


def run(config: RetainConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `model/` (links to the input model, and its heads in `model/retaining/`) and `curves.jsonl`, a line per
    step and per measurement. A killed run resumes after the last row it read, or the last head it trained."""
    work = out_dir / WORK
    work.mkdir(exist_ok=True)
    started = time.monotonic()
    model = load_model(inputs.model, context.dtype, context.device).requires_grad_(False)
    decoder = Decoder(model)
    rows = _rows(config, inputs, work, context)
    width = head_width(config.width, decoder.hidden_size)
    heads, fresh = (fresh_heads(decoder, width, context.seed).to(context.device) for _ in range(2))
    named = {f"train-{number}": partial(rows.train, number) for number in range(rows.count)}
    named |= {f"heldout-{number}": partial(rows.heldout.__getitem__, number) for number in range(len(rows.heldout))}
    with context.progress.bar("long rows", len(named)) as advance:
        files = keep_all(decoder, named, work / "rows", config, context.seed, advance)
    with context.progress.bar("retaining heads", decoder.num_blocks) as advance:
        train, held = files[: rows.count], files[rows.count :]
        lines, loss = train_heads(heads, train, held, config, work / "heads", context.seed, advance)
    shares = kept_shares(decoder, rows.heldout, config, fresh, heads)
    first, last = lines[0], lines[-1]
    assert isinstance(first, HeldOutHeads) and isinstance(last, HeldOutHeads)
    first.eval_recall, last.eval_recall = shares
    link_model(inputs.model, out_dir / "model")
    save_heads(heads.cpu(), HeadSettings(**config.numbers()), out_dir / "model")
    write_lines(out_dir / CURVES, lines)
    context.progress.note(
        f"of the quarter of a prompt that answers attend to most, the heads keep "
        f"{100 * shares[0]:.0f} % → {100 * shares[1]:.0f} %"
    )
    figures = RetainFigures(
        rows=rows.count,
        steps=config.steps,
        width=width,
        trainable_parameters=sum(p.numel() for p in heads.parameters()),
        before=HeadFigures(eval_loss=first.eval_loss, eval_recall=shares[0]),
        after=HeadFigures(eval_loss=loss, eval_recall=shares[1]),
        seconds_training=round(time.monotonic() - started, 1),
    )
    return figures.model_dump()


def _rows(config: RetainConfig, inputs: Inputs, work: Path, context: Context) -> RetainRows:
    tokenizer = load_tokenizer(inputs.model)
    length = config.longest(load_config(inputs.model).max_position_embeddings)
    if config.dataset is not None:
        cache = work / "datasets"
        return users_rows(tokenizer, config.dataset, length, config.rows, config.heldout, context, cache)
    if "data" not in inputs.stages:
        raise UserError(
            "retain builds its rows from the data stage, which this recipe lacks: add `data:` or set `retain.dataset`"
        )
    return made_rows(tokenizer, inputs.stages["data"], length, config.rows, config.heldout, context.seed)


def link_model(source: Path, folder: Path) -> None:
    """Link a checkpoint's files into a new folder, leaving out its heads; symbolic links, as in the Hub's cache, are
    resolved."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in checkpoint_files(source):
        link_file(file.resolve(), folder / file.name)
    if (source / IMPORTANCE).is_dir():
        link_files(source / IMPORTANCE, folder / IMPORTANCE)
