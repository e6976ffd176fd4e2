"""`optimum-cli compress …`: this command line as a command of Optimum.

Optimum imports every file of the namespace `optimum.commands.register`, to which any installed distribution may
contribute; pyproject.toml maps this folder there. Commands import what they need when they run.
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class CompressCommand(BaseOptimumCLICommand):
    """Passes all arguments to `compress`, and exits with its exit code."""

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
