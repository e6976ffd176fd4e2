"""`curves.jsonl`: a training, a line per step and per measurement on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from ..core.errors import UserError
from ..core.files import parse_line, write_whole
from .record import Entry, SparseEntry
from .students import HeldOutDepth, HeldOutFigures

CURVES = "curves.jsonl"


class TrainingStep(SparseEntry):
    """One step of a student's training; means over its response tokens."""

    step: int = Field(description="step of the optimizer")
    epoch: float = Field(description="passes over the training rows so far")
    loss: float = Field(description="training loss, nats")
    nll: float = Field(description="negative log-likelihood of the response tokens, nats")
    lr: float = Field(description="learning rate of the step")
    tokens: int = Field(description="response tokens")
    kl: float | None = Field(default=None, description="KL to the unpruned model, nats")
    depths: list[HeldOutDepth] = Field(default_factory=list, description="figures of each depth, in a sorted training")


class HeadStep(Entry):
    """One step of all retaining heads together."""

    step: int = Field(description="step of the optimizer")
    loss: float = Field(description="training loss over all blocks")
    lr: float = Field(description="learning rate of the step")


class HeldOutHeads(SparseEntry):
    """Retaining heads on held-out rows."""

    step: int = Field(description="step of the optimizer")
    eval_loss: float = Field(description="loss on held-out rows")
    eval_recall: float | None = Field(
        default=None, description="share of the most attended quarter that is kept; of the first and last measurement"
    )


StudentLine = TrainingStep | HeldOutFigures
HeadLine = HeadStep | HeldOutHeads
L = TypeVar("L", bound=Entry)
_STUDENT, _HEAD = TypeAdapter[StudentLine](StudentLine), TypeAdapter[HeadLine](HeadLine)


def student_lines(path: Path) -> list[StudentLine]:
    """The lines of a student's training; none where there is no file.

    A last line cut short by a kill is left out. `UserError` for a line of another version.
    """
    return _read(path, _STUDENT)


def head_lines(path: Path) -> list[HeadLine]:
    """As `student_lines`, of retaining heads."""
    return _read(path, _HEAD)


def append_line(path: Path, line: StudentLine) -> None:
    """Add a line to the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_text(line))


def write_lines(path: Path, lines: Iterable[StudentLine] | Iterable[HeadLine]) -> None:
    """Write the file whole."""
    write_whole(path, "".join(map(_text, lines)))


def _read(path: Path, kind: TypeAdapter[L]) -> list[L]:
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            found.append(kind.validate_python(parse_line(line, number, path)))
        except ValidationError as error:
            raise UserError(
                f"line {number} of {path} is not one of this version: {error.errors()[0]['msg']}"
            ) from error
    return found


def _text(line: Entry) -> str:
    return json.dumps(line.model_dump()) + "\n"
