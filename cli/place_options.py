"""The command-line options of where artifacts run, for every command that opens them."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", help="ONNX Runtime: auto, cpu, cuda, dml, webgpu …; llama.cpp: cpu is no layers on a GPU."
    ),
]
ProviderOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Option of ONNX Runtime's provider, such as device_id=1. May be repeated."),
]


@dataclass(frozen=True)
class PlaceOptions:
    """The values of these options, a field for each."""

    gpu_layers: GpuLayersOption = None
    llama_server: LlamaServerOption = None

    def place(self) -> Place:
        """What they say. `UserError` for values that mean nothing."""
        return Place(_layers(self.gpu_layers), self.llama_server)


@dataclass(frozen=True)
class DevicePlaceOptions(PlaceOptions):
    """Also those of ONNX Runtime, for commands without a device of torch's."""

    device: DeviceOption = "auto"
    provider_option: ProviderOption = None

    def place(self) -> Place:
        """What they say. `UserError` for values that mean nothing."""
        return replace(super().place(), device=self.device, provider_options=_pairs(self.provider_option or []))


DEFAULT_PLACE = PlaceOptions()
DEFAULT_DEVICE_PLACE = DevicePlaceOptions()


def _pairs(texts: list[str]) -> dict[str, str]:
    wrong = next((text for text in texts if not text.partition("=")[0] or "=" not in text), None)
    if wrong is not None:
        raise UserError(f"--provider-option {wrong}: must be KEY=VALUE")
    return {key: value for key, _, value in (text.partition("=") for text in texts)}


def _layers(text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--gpu-layers {text}: must be a number or auto") from None
