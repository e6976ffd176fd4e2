"""Where the runtimes run exported models, as opposed to which models they run."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class Place:
    """The hardware that runs artifacts. Raises `UserError` for a number of layers below 0."""

    gpu_layers: int | None = None  # llama.cpp: how many go to the GPU, the output head counted; None: all that fit

    def __post_init__(self) -> None:
        if self.gpu_layers is not None and self.gpu_layers < 0:
            raise UserError(f"--gpu-layers {self.gpu_layers}: must be at least 0, or auto")

    def needs_llamacpp(self) -> str | None:
        """The option that has a meaning in llama.cpp alone, if one was given."""
        return "--gpu-layers" if self.gpu_layers is not None else None


ANYWHERE = Place()
