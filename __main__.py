"""`python -m compress`, the form in which `torchrun` and `accelerate launch` start the command line."""

from __future__ import annotations

from .cli.main import main

main()
