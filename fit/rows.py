"""The rows that a fit calibrates and measures on: given, made of a text, or written by the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.cost import Setting
from ..core.errors import UserError
from ..core.files import read_text, write_whole
from ..core.geometry import Geometry
from ..core.machine import cores
from ..core.stage import Progress
from ..core.units import duration
from ..data.config import DatasetConfig, MagpieConfig, TextsConfig
from ..data.cost import COST
from ..data.rows import read_rows
from ..modeling.types import ModelTokenizer
from ..pipeline.plan import find_device
from ..pipeline.steps import ROWS, collect_rows
from ..records.manifest import StageManifest

PIECES = "calibration.jsonl"  # a text as rows, beside the recipe that names it
PIECE = 1200  # characters, about a window of tokens
HELD_OUT = 0.25  # of the rows: what KL is measured on
CHARACTERS = 8  # per token at most, to know how much of a large text to take
OWN = MagpieConfig | TextsConfig


@dataclass(frozen=True)
class Effort:
    """How much is read and measured."""

    rows: int = 64  # that the model writes
    fewest_rows: int = 32
    written: int = 128  # tokens of each at most
    length: int = 256  # tokens of a window
    batch: int = 2  # windows per forward pass while cuts are chosen and healed
    calibration: int = 8192  # tokens to heal and to weigh rounding errors on
    scoring: int = 1024  # of them, to choose cuts on
    positions: int = 1024  # held-out tokens that KL is measured on
    least_calibration: int = 2048
    least_positions: int = 256
    prompt: int = 128  # tokens, to time prompts with
    answer: int = 32  # written tokens, to time


@dataclass(frozen=True)
class FitRows:
    """A data stage's folder, and the recipe's `data` section that makes it."""

    folder: Path
    section: dict[str, Any]


def given_rows(folder: Path) -> FitRows:
    """Rows of an earlier data stage. `UserError` where the folder has none."""
    if not (folder / ROWS).is_file():
        raise UserError(f"--rows {folder}: it is not the folder of a data stage, which has {ROWS}")
    manifest = StageManifest.read_if_there(folder)
    section = manifest.config if manifest is not None else {}
    if section.get("source") in ("magpie", "texts"):  # others name files by paths of another recipe
        return FitRows(folder, {key: value for key, value in section.items() if key != "prose"})
    column = "messages" if any(row.messages for row in read_rows(folder)) else "text"
    path = str((folder / ROWS).resolve())
    return FitRows(folder, {"source": "dataset", "path": path, column: column, "heldout": HELD_OUT})


def check_tokens(tokens: int, effort: Effort, what: str) -> None:
    """`UserError` for a text on which two types cannot be told apart."""
    needed = int(max(effort.least_calibration / (1 - HELD_OUT), effort.least_positions / HELD_OUT)) + effort.length
    if tokens < needed:
        raise too_few(f"{what}: {tokens} tokens", f"{needed} are needed (about {4 * needed} characters)")


def too_few(what: str, needed: str) -> UserError:
    """The error for a text or rows on which two types cannot be told apart."""
    return UserError(
        f"{what} are too few to tell two types apart; at least {needed}: give more of them, or a --text FILE"
    )


def text_rows(text: Path, out: Path, base: Path, tokenizer: ModelTokenizer, effort: Effort, **how: Any) -> FitRows:
    """Rows of a text file, in pieces that `out`/calibration.jsonl keeps for the recipe."""
    limit = CHARACTERS * (effort.calibration + int(effort.positions / HELD_OUT))
    whole = read_text(text, "--text: ")[:limit]
    check_tokens(len(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]), effort, f"--text {text}")
    lines = [json.dumps({"text": piece}, ensure_ascii=False) for piece in pieces(whole)]
    write_whole(out / PIECES, "\n".join(lines) + "\n")
    keys = {"source": "dataset", "text": "text", "heldout": HELD_OUT, "length": effort.length}
    section = DatasetConfig.model_validate({**keys, "path": str((out / PIECES).resolve())})
    return FitRows(_collected(section, base, how), {**keys, "path": PIECES})


def pieces(text: str) -> Iterator[str]:
    """A text cut at white space into pieces of about PIECE characters; joined they are the text."""
    start = 0
    while start < len(text):
        end = min(start + PIECE, len(text))
        while end < len(text) and end < start + 2 * PIECE and not text[end - 1].isspace():
            end += 1
        yield text[start:end]
        start = end


def own_rows(
    base: Path,
    tokenizer: ModelTokenizer,
    shape: Geometry,
    effort: Effort,
    seconds: float,
    progress: Progress,
    **how: Any,
) -> FitRows:
    """Rows that the model writes: conversations, or plain texts where it has no chat template.

    As many as about `seconds` allow by the plan's estimate. `UserError` where even few of them take longer.
    """
    sections = [_own_section(tokenizer, count, effort) for count in (effort.rows, effort.rows // 2, effort.fewest_rows)]
    for section in sections:
        estimate = writing_seconds(section, shape, how["dtype"], how["device"])
        if estimate <= seconds:
            break
    else:
        raise UserError(
            f"to calibrate, the model would write {effort.fewest_rows} rows itself, which takes about "
            f"{duration(estimate)} here; give --rows FOLDER or --text FILE, or more --minutes"
        )
    if section.rows < effort.rows:
        progress.note(f"the model writes {section.rows} rows instead of {effort.rows}, for the time that there is")
    return FitRows(_collected(section, base, how), section.model_dump(mode="json", exclude_defaults=True))


def _own_section(tokenizer: ModelTokenizer, rows: int, effort: Effort) -> OWN:
    keys = {"rows": rows, "heldout": HELD_OUT, "length": effort.length}
    if tokenizer.chat_template:
        return MagpieConfig(source="magpie", max_tokens=effort.written, unfinished="keep", **keys)
    return TextsConfig(source="texts", tokens=effort.written, **keys)


def writing_seconds(section: OWN, shape: Geometry, dtype: str, device: str) -> float:
    """About how long the model writes its rows, as the plan counts it; nothing is known of GPUs, which are fast."""
    if device != "cpu":
        return 0.0
    work = COST.work(section, Setting(shape, shape.blocks, dtype))
    two_cores = find_device("cpu-2core")
    return two_cores.seconds(work, dtype) * 2 / cores() if work else 0.0


def _collected(section: Any, base: Path, how: dict[str, Any]) -> Path:
    folder: Path = how.pop("folder")
    if not folder.is_dir():
        collect_rows(base, folder, section, **how)
    return folder
