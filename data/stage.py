"""The data stage: rows to calibrate on, to learn, and to measure with."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from ..errors import UserError
from ..modeling.load import load_model, load_tokenizer
from ..stage import WORK, Context, Inputs
from .chat import encode_row, encode_text, special_tokens
from .config import FORMAT as FORMAT
from .config import DataConfig, DatasetConfig, MagpieConfig, TextsConfig
from .drafts import KEPT, draw_rows
from .magpie import Magpie, query, to_row
from .readers import Record, local_file, read_records
from .rows import Row, write_rows
from .teacher_cache import write_teacher
from .texts import Texts, to_text_row

STATS = "stats.json"


def check(config: DataConfig, base: Path, context: Context) -> None:
    """Refuse files that are not there, and conversations for a model without a chat template."""
    if isinstance(config, DatasetConfig):
        local_file(config, context)
        if config.text is not None:
            return
    if not isinstance(config, TextsConfig):
        query(load_tokenizer(base))


def run(config: DataConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `rows.parquet` and `stats.json` (counts by reason, shares, tokens); return them with the speed.

    Several processes draw self-data side by side; the first one writes it down.
    """
    if context.rank and isinstance(config, DatasetConfig):
        return {}
    tokenizer = load_tokenizer(inputs.base)
    work = out_dir / WORK
    work.mkdir(exist_ok=True)
    speed: dict[str, Any] = {}
    if isinstance(config, DatasetConfig):
        rows, counts = _from_dataset(config, tokenizer, work, context)
    else:
        rows, counts, speed = _from_model(config, inputs, tokenizer, work, context)
        if context.rank:
            return {}
    rows = split_rows(rows, config.heldout, context.seed)
    rows = [_measured(row, tokenizer, config.length) for row in rows]
    stats = statistics(rows, counts)
    write_rows(out_dir, rows)
    if config.teacher is not None:
        stats |= write_teacher(config.teacher, inputs.base, rows, tokenizer, config.length, out_dir, context)
    (out_dir / STATS).write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")
    context.progress.note(
        f"{stats['rows']} rows ({stats['heldout']} held out), {stats['tokens']} tokens, {stats['targets']} to learn"
    )
    return stats | speed


def _from_model(
    config: MagpieConfig | TextsConfig, inputs: Inputs, tokenizer: Any, work: Path, context: Context
) -> tuple[list[Row], Counter[str], dict[str, Any]]:
    model = load_model(inputs.base, context.dtype, context.device)
    if isinstance(config, MagpieConfig):
        drawer, made = Magpie(config, model, tokenizer, context, work), to_row
        hint = "it may not be an instruction-tuned model, or data.max_tokens and data.max_prompt_tokens are too small"
    else:
        drawer, made = Texts(config, model, tokenizer, context, work), to_text_row
        hint = "raise data.temperature"
    drafts, counts = draw_rows(drawer, context, hint)
    speed = drawer.speed()  # rows taken over from before an interruption were not timed here
    return [made(draft) for draft in drafts], counts, {"tokens_per_second": round(speed, 1)} if speed else {}


def _from_dataset(
    config: DatasetConfig, tokenizer: Any, work: Path, context: Context
) -> tuple[list[Row], Counter[str]]:
    source = PurePath(config.path).name if config.local else config.path
    special = list(special_tokens(tokenizer).values())
    counts: Counter[str] = Counter()
    rows: list[Row] = []
    failure = ""
    with context.progress.bar("reading", config.rows) as advance:
        for record in read_records(config, context, work / "datasets"):
            if config.rows is not None and len(rows) == config.rows:
                break
            reason, detail = _usable(record, tokenizer, special, config.length)
            counts[reason] += 1
            failure = failure or detail
            if reason == KEPT:
                rows.append(Row(record.number, "train", record.messages, record.text, source))
                advance()
    if len(rows) < 2:
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != KEPT)
        raise UserError(
            f"data.path: {config.path} has {len(rows)} usable rows and at least 2 are needed, one to learn and one to "
            f"hold out (dropped: {dropped or 'none'})" + (f"; the first failure: {failure}" if failure else "")
        )
    return sorted(rows, key=lambda row: row.id), counts


def _usable(record: Record, tokenizer: Any, special: Sequence[str], length: int) -> tuple[str, str]:
    """KEPT or the reason why not, and a message where the reason alone does not say it."""
    if record.dropped:
        return record.dropped, ""
    if record.messages is None:
        return (KEPT, "") if encode_text(tokenizer, record.text or "", length) else ("empty", "")
    # Written into a template, such words would end the turn or speak for another role.
    if any(token in message["content"] for message in record.messages for token in special):
        return "special_token", ""
    try:
        encoded = encode_row(tokenizer, Row(0, "train", record.messages))
    except UserError as error:
        return "template", str(error)
    return (KEPT if len(encoded.input_ids) <= length else "too_long"), ""


def split_rows(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The rows with their split: a share of them, chosen by a hash of seed and id, is held out; at least one row,
    and never all (of two rows or more)."""
    count = min(max(round(len(rows) * share), 1), len(rows) - 1)
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}/heldout/{row.id}".encode()).digest())
    heldout = {row.id for row in ranked[:count]}
    return [replace(row, split="heldout" if row.id in heldout else "train") for row in rows]


def _measured(row: Row, tokenizer: Any, length: int) -> Row:
    windows = [encode_row(tokenizer, row)] if row.messages else encode_text(tokenizer, row.text or "", length)
    tokens = sum(len(window.input_ids) for window in windows)
    return replace(row, tokens=tokens, targets=sum(sum(window.loss_mask) for window in windows))


def statistics(rows: Sequence[Row], counts: Counter[str]) -> dict[str, Any]:
    """Counts, shares of what was read or drawn, and tokens."""
    total = sum(counts.values())
    return {
        "rows": len(rows),
        "train": sum(row.split == "train" for row in rows),
        "heldout": sum(row.split == "heldout" for row in rows),
        "seen": total,
        "dropped": {reason: counts[reason] for reason in sorted(counts) if reason != KEPT},
        "cut": sum(row.cut for row in rows),
        "kept_share": round(counts[KEPT] / total, 4),
        "tokens": sum(row.tokens for row in rows),
        "targets": sum(row.targets for row in rows),
    }
