"""`optimum-cli compress …`: our command line as one of Optimum's.

Optimum imports every file of the namespace `optimum.commands.register`, to which each installed distribution may add
its own; pyproject.toml maps this folder there. What the commands need is imported when one runs.
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class CompressCommand(BaseOptimumCLICommand):
    """Hands every argument on, and ends with the exit code that `compress` ends with."""

    COMMAND = CommandInfo(name="compress", help="Make decoder-only language models small: prune, recover, export.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.prefix_chars = ""  # nothing is an option of this parser, not even --help
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        assert self.args is not None
        from compress.cli.main import main  # pyright: ignore[reportMissingImports]

        main(self.args.arguments, "optimum-cli compress")


REGISTER_COMMANDS = [CompressCommand]
