"""What stands in a bundle's files of a size: chosen when first asked for, with what was measured kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from gguf import GGMLQuantizationType

from ..core.stage import Progress
from ..runtime.artifact_sizes import target_of
from .config import ExportConfig
from .damage import Array
from .gguf_sized import GgufSizes
from .grids import Grid
from .onnx_sized import OnnxSizes
from .sensitivity import Sensitivity
from .sized import Chosen


@dataclass
class Choices:
    """The sizes that a bundle's files are to have, in each format, and what stands in them."""

    checkpoint: Path
    name: str  # the model's in its files
    depths: Sequence[int]
    config: ExportConfig
    work: Path
    built: Callable[[], Path]  # the folder with the float32 ONNX graph
    sensitivity: Callable[[], Sensitivity | None]
    imatrix: Callable[[], Mapping[str, Array] | None]
    progress: Progress
    _gguf: dict[str, Chosen[GGMLQuantizationType]] = field(default_factory=dict)
    _onnx: dict[str, Chosen[Grid]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `UserError` for a size that no choice of types reaches."""
        for target in _sizes(self.config.gguf):
            self._gguf_sizes.check(target)
        for target in _sizes(self.config.onnx):
            self._onnx_sizes.check(target)

    @property
    def needs_damage(self) -> bool:
        """Whether it matters for one of the sizes what each tensor loses."""
        if any(self._gguf_sizes.needs_damage(target) for target in _sizes(self.config.gguf)):
            return True
        return any(self._onnx_sizes.needs_damage(target) for target in _sizes(self.config.onnx))

    def gguf(self, target: str) -> Chosen[GGMLQuantizationType]:
        """The types of the tensors of a GGUF of a size, by llama.cpp's names."""
        if target not in self._gguf:
            cache = self.work / "damage.json"
            self._gguf[target] = self._gguf_sizes.chosen(
                target, self.sensitivity(), self.imatrix() or {}, cache=cache, progress=self.progress
            )
        return self._gguf[target]

    def onnx(self, target: str) -> Chosen[Grid]:
        """The grids of the matrices of an ONNX folder of a size, by the names of the graph's nodes."""
        if target not in self._onnx:
            cache = self.work / "damage-onnx.json"
            found = self._onnx_sizes.chosen(
                target, self.sensitivity(), self.imatrix() or {}, cache=cache, progress=self.progress
            )
            self._onnx[target] = self._onnx_sizes.by_node(found)
        return self._onnx[target]

    @property
    def smallest_gguf(self) -> int:
        """Bytes of the smallest possible GGUF."""
        return self._gguf_sizes.smallest

    @cached_property
    def _gguf_sizes(self) -> GgufSizes:
        return GgufSizes(self.checkpoint, name=self.name, depths=self.depths, threads=self.config.threads)

    @cached_property
    def _onnx_sizes(self) -> OnnxSizes:
        return OnnxSizes(self.checkpoint, self.built(), kv=self.config.kv != "float32")


def _sizes(names: Sequence[str]) -> list[str]:
    return [name for name in names if target_of(name) is not None]
