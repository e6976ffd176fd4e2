"""The command line. Commands import heavy libraries when they run, so that help and finished runs start quickly."""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .. import __version__
from ..core.errors import UserError
from ..core.extras import missing
from ..core.machine import spin_briefly
from ..pipeline.explain import explained, without_foreign_advice
from . import bundle_commands, fit_command, model_commands, recipe_commands, serve_command
from .console import errors


class Stopped(Exception):
    """Ctrl-C."""


class _Commands(TyperGroup):
    """On Ctrl-C, say what to do; typer exits silently or with code 1, depending on its version."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped from error


app = typer.Typer(
    name="compress",
    cls=_Commands,
    help="Make decoder-only language models small without losing what made them good.",
    epilog="Start with: compress run smollm2_135m_24L",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for _group in (recipe_commands, model_commands, fit_command, bundle_commands, serve_command):
    _group.add_to(app)


def _version(value: bool) -> None:
    if value:
        print(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _refuse(error: UserError, arguments: list[str]) -> NoReturn:
    message = without_foreign_advice(str(error))
    if "--json" in arguments:  # for programs: one line, however many problems a recipe has
        message = "; ".join(line.strip() for line in message.splitlines()).replace(":; ", ": ", 1)
    errors.print(f"error: {message}", style="red")
    sys.exit(2)


def main(arguments: list[str] | None = None, name: str = "compress") -> None:
    """Entry point: exit code 2 with one message for what the user can fix, 130 for Ctrl-C.

    `arguments` are the process's own if not given; `name` is what help calls the command.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    spin_briefly()
    # On CPUs with AVX-512 BF16, importing bitsandbytes logs that a package of faster kernels is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # File names may have bytes that are not UTF-8, and must still be printable.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(arguments, prog_name=name)  # exits by itself, with code 2 for wrong options and commands
    except UserError as error:
        _refuse(error, arguments)
    except (Stopped, KeyboardInterrupt):
        errors.print("stopped; finished work is kept, and the same command resumes from here")
        sys.exit(130)
    except Exception as error:
        known = explained(error, f"{name} {' '.join(arguments)}")
        if isinstance(error, ModuleNotFoundError):
            known = missing(" ".join(["compress", *arguments[:1]]), error)
        if known is None:
            raise
        _refuse(known, arguments)


if __name__ == "__main__":
    main()
