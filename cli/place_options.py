"""The command-line options of where artifacts run, for every command that opens them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ..core.errors import UserError
from ..core.place import Place

GpuLayersOption = Annotated[
    str | None,
    typer.Option(
        "--gpu-layers",
        metavar="N|auto",
        help="llama.cpp: layers on the GPU, the output head counted; auto (default): all that fit.",
    ),
]

LlamaServerOption = Annotated[
    str | None,
    typer.Option(
        "--llama-server",
        metavar="PATH|URL",
        help="Use your own build of llama.cpp: a llama-server to start, or the address of one that runs.",
    ),
]


@dataclass(frozen=True)
class PlaceOptions:
    """The values of these options, a field for each."""

    gpu_layers: GpuLayersOption = None
    llama_server: LlamaServerOption = None

    def place(self) -> Place:
        """What they say. `UserError` for values that mean nothing."""
        return Place(_layers(self.gpu_layers), self.llama_server)


DEFAULT_PLACE = PlaceOptions()


def _layers(text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--gpu-layers {text}: must be a number or auto") from None
