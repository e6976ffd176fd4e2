"""Calibration tokens: importance is measured, healing fitted and importance matrices collected on them."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import UserError
from ..core.files import read_text
from ..core.stage import Inputs
from ..modeling.types import ModelTokenizer
from ..records.manifest import StageManifest
from .chat import Encoded, encode_text, load_encoded
from .packing import Batch, pack


def calibration_batches(
    inputs: Inputs,
    tokenizer: ModelTokenizer,
    *,
    tokens: int,
    length: int,
    batch: int,
    text: Path | None = None,
    own: bool = False,
) -> list[Batch]:
    """Packed batches of at most `tokens` tokens, in sequences of up to `length`, `batch` sequences each.

    They come from the text file `text` if given, else from the data stage's training rows, in order; with `own` only
    from those of its source, not from what stands beside them. The last row is truncated to make the count exact.
    Raises `UserError` if there is neither, or if it is empty.
    """
    if text is not None:
        rows = encode_text(tokenizer, read_text(text), length)
    elif "data" in inputs.stages:
        folder = inputs.stages["data"]
        others = beside(folder) if own else set()
        rows = load_encoded(folder, tokenizer, "train", length, without=others)
    else:
        raise UserError("no calibration data: add a `data` section to the recipe, or name a text file")
    if not rows:
        raise UserError(f"no calibration data: {text} has fewer than two tokens")
    return pack(_first(rows, tokens), length, batch, pad_id(tokenizer))


def beside(folder: Path) -> set[str]:
    """The titles of the real text and the drills beside a data stage's own rows; empty where there are none."""
    manifest = StageManifest.read_if_there(folder)
    _, *others = (manifest.metrics.get("shares") if manifest else None) or [""]
    return set(others)


def pad_id(tokenizer: ModelTokenizer) -> int:
    """A token to pad with; any one will do, since padding is masked."""
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if number is not None:
            return number
    return 0


def _first(rows: list[Encoded], tokens: int) -> list[Encoded]:
    kept: list[Encoded] = []
    for row in rows:
        if tokens <= 0:
            break
        kept.append(Encoded(row.input_ids[:tokens], row.loss_mask[:tokens], row.row, row.start))
        tokens -= len(row.input_ids)
    return kept
