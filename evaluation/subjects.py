"""What is measured: a torch model, an exported file, or a rival of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records.models import ArtifactFormat


@dataclass(frozen=True)
class Subject:
    """Something to measure: a torch model, or an artifact."""

    role: str
    load: Callable[[], Any] | None = None  # for torch models
    files: Path | None = None  # weights on disk: a checkpoint folder, a .gguf file or an ONNX folder
    blocks: int = 0
    parameters: int | None = None
    bits_per_weight: float | None = None
    bytes: int = 0  # size of an artifact, including the files it refers to
    sized: bool = False  # an artifact with a type per tensor
    heads: Path | None = None  # a checkpoint folder with retaining heads for it
    retrieves: bool = False  # whether retrieval is measured

    @property
    def format(self) -> ArtifactFormat:
        """An artifact's format."""
        assert self.files is not None
        return "gguf" if self.files.suffix == ".gguf" else "onnx"
