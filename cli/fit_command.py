"""The command `compress fit`: the best model for a size, a memory or a speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.units import duration, megabytes, number
from .console import console, errors, figures_table, print_json
from .options import DeviceOption, DtypeOption, JsonOption, RunsOption
from .progress import ConsoleProgress

if TYPE_CHECKING:
    from rich.table import Table

    from ..records.fit import FitRecord

PREDICTED = 8  # rows of what was predicted only
NAMES = 15  # columns for a candidate's name at least
MARKS = {"bytes": "size", "latency": "time"}


def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id, folder or .gguf file, as in a recipe.")],
    size: Annotated[str | None, typer.Option(help="Largest file, such as 80MB.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Most memory of the whole process, such as 4GB; see --context.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens that the memory has room for; default: 2048, or what the model has."),
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option("--latency-ms", help="Most milliseconds per written token.")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option("--on", help="Fit to a named device of compress plan; default: this machine, measured."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="llama.cpp (GGUF files; default) or onnx (ONNX Runtime).")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time that all of it may take; what was left out is told.")] = 30.0,
    rows: Annotated[
        Path | None, typer.Option(help="A data stage's folder to calibrate on; default: the model writes rows itself.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file to calibrate on instead.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the result; an interrupted fit goes on there.")] = Path(
        "fit"
    ),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    seed: Annotated[int, typer.Option(help="Random seed of the rows that the model writes.")] = 0,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Find the best model for a size, a memory or a speed: which types, which cache, and whether to cut at all.

    Damage and speed are measured, all combinations predicted, the promising ones measured in the stock runtime.
    """
    from .. import api

    limits = {"size": size, "memory": memory, "context": context, "latency_ms": latency_ms, "on": on, "engine": engine}
    where = {"minutes": minutes, "rows": rows, "text": text, "device": device, "dtype": dtype, "seed": seed}
    found = api.fit(model, out, **limits, **where, runs=runs, on_progress=ConsoleProgress(errors))
    if as_json:
        print_json(found)
        return
    console.print(fit_table(found))
    _tell(found, out)


def fit_table(found: FitRecord) -> Table:
    """The measured candidates, and the best of those that were predicted only."""
    table = figures_table(
        f"{found.model}: KL to the unpruned model on {found.positions} tokens, speeds of {found.device}",
        ("candidate",),
        ("file", "KL", "±", "predicted", "memory", "ms per\ntoken", "front"),
    )
    name = table.columns[0]  # the rest has 64 columns at most: a terminal of 80 has room
    name.no_wrap, name.min_width = False, NAMES
    table.caption = "bold: recommended; front: none has a lower KL without being larger (size) or slower (time)"
    measured = [c for c in found.candidates if c.measured is not None]
    rest = [c for c in found.candidates if c.measured is None]
    for entry in [*measured, *rest[:PREDICTED]]:
        figures = entry.measured or entry.predicted
        table.add_row(
            entry.name,
            megabytes(figures.bytes),
            "–" if entry.measured is None else f"{figures.kl:.3g}",
            "" if entry.deviation is None else f"{entry.deviation:.2g}",
            f"{entry.predicted.kl:.3g}",
            megabytes(figures.memory),
            f"{1000 * figures.latency:.3g}",
            " ".join(MARKS[axis] for axis in entry.front) if entry.meets else "over",
            style="bold" if entry.name == found.recommended else "dim" if entry.measured is None else None,
        )
    return table


def _tell(found: FitRecord, out: Path) -> None:
    from ..fit.report import errors_text

    console.print(found.reason, style="bold", highlight=False)
    console.print(errors_text(found.errors), highlight=False)
    for budget in found.budgets:
        console.print(
            f"a KV budget of {budget.entries} entries: cache {megabytes(budget.bytes)}, KL {number(budget.kl)} more",
            highlight=False,
        )
    for line in found.left_out:
        console.print(f"- {line}", highlight=False)
    console.print(f"{duration(found.seconds)} of work; page: {out / 'fit.html'}", highlight=False)
    console.print(f"make it: compress run {out / found.recipe}", highlight=False)


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: compress fit org/model --size 4GB --latency-ms 60 --out fit")(fit)
