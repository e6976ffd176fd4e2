"""`python -m compress`, the form in which `torchrun` and `accelerate launch` start the command line."""

from __future__ import annotations

from .pipeline.cli import main

main()
