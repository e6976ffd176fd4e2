"""Where the runtimes run exported models, as opposed to which models they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import UserError


@dataclass(frozen=True)
class Place:
    """What runs artifacts. Raises `UserError` for a number of layers below 0, or where it can no longer be set."""

    gpu_layers: int | None = None  # llama.cpp: how many go to the GPU, the output head counted; None: all that fit
    llama_server: str | None = None  # the path of a llama-server to start, or the http address of one that runs
    # ONNX Runtime: auto, or the device whose provider it is to use: cpu, cuda, dml, webgpu … For llama.cpp cpu is no
    # layers on a GPU.
    device: str = "auto"
    provider_options: Mapping[str, str] = field(default_factory=dict)  # of that provider

    def __post_init__(self) -> None:
        if self.gpu_layers is None:
            return
        if self.gpu_layers < 0:
            raise UserError(f"--gpu-layers {self.gpu_layers}: must be at least 0, or auto")
        if self.is_running:
            raise UserError(
                f"--gpu-layers is set when a llama-server starts, and {self.llama_server} already runs: leave it out"
            )

    @property
    def is_running(self) -> bool:
        """Whether models run in a server that somebody else started, which serves one model."""
        return self.llama_server is not None and self.llama_server.startswith(("http://", "https://"))

    @property
    def layers(self) -> int | None:
        """llama.cpp's layers on the GPU; None: all that fit."""
        return 0 if self.gpu_layers is None and self.device == "cpu" else self.gpu_layers

    def needs_onnx(self) -> str | None:
        """The option that has a meaning in ONNX Runtime alone, if one was given."""
        if self.device not in ("auto", "cpu"):
            return f"--device {self.device}"
        return "--provider-option" if self.provider_options else None

    def needs_llamacpp(self) -> str | None:
        """The option that has a meaning in llama.cpp alone, if one was given."""
        if self.llama_server is not None:
            return "--llama-server"
        return "--gpu-layers" if self.gpu_layers is not None else None

    def opens_files(self, what: str) -> Place:
        """Itself. `UserError` for a server that already runs, where `what` opens several files or measures memory."""
        if self.is_running:
            raise UserError(
                f"--llama-server {self.llama_server}: {what} starts a llama-server for each file; give the program's "
                "path instead"
            )
        return self


ANYWHERE = Place()
ON_CPU = Place(device="cpu")
