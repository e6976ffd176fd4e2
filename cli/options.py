"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as prune.blocks=4.")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="The folder that holds all runs.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables; compress schema has its form.")]

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, as compress export writes it.")]
EngineOption = Annotated[
    str | None, typer.Option("--engine", help="onnx or llama.cpp; default: llama.cpp where the bundle has a GGUF file.")
]
TypeOption = Annotated[
    str | None, typer.Option("--type", help="Q4_K_M, int4 …; default: the engine's first type in the bundle.")
]
DepthOption = Annotated[str | None, typer.Option("--depth", help="Number of blocks to run, or auto; all if not given.")]
LatencyOption = Annotated[
    float | None,
    typer.Option("--latency-ms", help="With --depth auto: maximum milliseconds per token, measured on this machine."),
]
MemoryOption = Annotated[
    float | None, typer.Option("--memory-mb", help="With --depth auto: maximum megabytes, weights and cache together.")
]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", help="Maximum number of new tokens.")]
TemperatureOption = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopPOption = Annotated[
    float, typer.Option("--top-p", help="Sample from the likeliest tokens that add up to this probability.")
]
SeedOption = Annotated[int, typer.Option(help="Random seed for sampling.")]
ContextOption = Annotated[int, typer.Option("--context", help="Context size that llama.cpp reserves, in tokens.")]
ThreadsOption = Annotated[int, typer.Option(help="Number of threads; 0 is one per core.")]
SystemOption = Annotated[str | None, typer.Option(help="A system message.")]
DraftTokensOption = Annotated[int, typer.Option("--draft-tokens", help="Tokens drafted per step.")]
