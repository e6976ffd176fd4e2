"""The command line's output: results go to standard output, everything else to standard error."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, TypeAdapter
from rich import box
from rich.console import Console
from rich.table import Table

# Paths and model names are printed verbatim: no markup in [brackets], no emoji for :llama:.
console = Console(soft_wrap=True, markup=False, emoji=False)
errors = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)


def print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """Print a command's result as JSON."""
    print(TypeAdapter(type(value)).dump_json(value, indent=2).decode())


def figures_table(title: str, words: tuple[str, ...], figures: tuple[str, ...]) -> Table:
    """A table of figures: text columns on the left, then columns of numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in words:
        table.add_column(column, no_wrap=True)
    for column in figures:
        table.add_column(column, justify="right", no_wrap=True)
    return table
