"""How large files will be without writing them: GGUF to the byte, ONNX within a percent."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from gguf import GGMLQuantizationType

from ..export.gguf import Conversion, mixed_model, safe_name
from ..export.gguf_sizes import padded, stored_bytes
from ..export.gguf_source import block_of
from ..export.mixes import tensor_type
from ..export.onnx import check_onnx
from ..export.onnx_sizes import onnx_sizes
from ..export.quantize import row_bytes
from ..export.stage import plain_name
from ..modeling.blocks import config_at
from ..modeling.load import load_config
from ..runtime.artifact_sizes import Target
from ..runtime.artifact_types import ONNX_TYPES
from .prediction import FileSize

_INFO = 8 + 4 + 4 + 8  # bytes of a tensor in the header beside its name and shape: length, dimensions, type, offset


class FileSizes(ABC):
    """Sizes of the files of a checkpoint in every mix, whole and with blocks removed. `title` is the model's."""

    def __init__(self, checkpoint: Path, title: str):
        self.checkpoint, self.title = checkpoint, plain_name(title)

    @abstractmethod
    def size(self, removed: int, mix: str) -> FileSize:
        """Of the model without so many blocks, in a mix."""

    @abstractmethod
    def distinct(self, mixes: Sequence[str]) -> dict[str, list[str]]:
        """The mixes that differ for this model, each with others that give every tensor the same types: where rows fit
        no block of 256, many fall back on the same ones."""

    @abstractmethod
    def sized(self, table: Mapping[tuple[int, str], FileSize], limit: int) -> dict[tuple[int, str], FileSize]:
        """The same for the mix that is the size `limit` itself, where files of that size can be made."""

    def table(self, removed: Iterable[int], mixes: Sequence[str]) -> dict[tuple[int, str], FileSize]:
        """By removed blocks and mix."""
        counts = list(removed)
        return {(count, mix): self.size(count, mix) for count in counts for mix in mixes}

    def name(self, blocks: int) -> str:
        """The model's name in its file, as an export stage would have it."""
        return f"{self.title}-{blocks}L"


class OnnxFileSizes(FileSizes):
    """Of ONNX folders. Raises `UserError` for models that ONNX export cannot hold."""

    def __init__(self, checkpoint: Path, title: str):
        super().__init__(checkpoint, title)
        self.config = load_config(checkpoint)
        check_onnx(self.config)

    def size(self, removed: int, mix: str) -> FileSize:
        found = onnx_sizes(self.checkpoint, self.config.num_hidden_layers - removed)[mix]
        return FileSize(found, found)

    def distinct(self, mixes: Sequence[str]) -> dict[str, list[str]]:
        return {mix: [] for mix in mixes}

    def sized(self, table: Mapping[tuple[int, str], FileSize], limit: int) -> dict[tuple[int, str], FileSize]:
        """Where `limit` lies between the least precision and float32."""
        name, counts = Target(bytes=limit).name, dict.fromkeys(removed for removed, _ in table)
        files = {removed: [self.size(removed, mix).bytes for mix in ONNX_TYPES] for removed in counts}
        fitting = [removed for removed in counts if min(files[removed]) <= limit < max(files[removed])]
        return {(removed, name): FileSize(limit, limit) for removed in fitting}


class GgufFileSizes(FileSizes):
    """Of GGUF files; all mixes are those with an importance matrix. Raises `UserError` for models that GGUF cannot
    hold."""

    def __init__(self, checkpoint: Path, title: str):
        super().__init__(checkpoint, title)
        self.job = Conversion(checkpoint, "F16")

    def sized(self, table: Mapping[tuple[int, str], FileSize], limit: int) -> dict[tuple[int, str], FileSize]:
        """Where `limit` lies between the least plain mix and F16."""
        name, found = Target(bytes=limit).name, {}
        for removed in dict.fromkeys(count for count, _ in table):
            least = min(size.bytes for (count, _), size in table.items() if count == removed)
            whole = self.size(removed, "F16")
            if least <= limit < whole.bytes:
                found[removed, name] = FileSize(limit, limit - (whole.bytes - whole.read))
        return found

    def distinct(self, mixes: Sequence[str]) -> dict[str, list[str]]:
        names: dict[tuple[GGMLQuantizationType, ...], str] = {}
        found: dict[str, list[str]] = {}
        for mix in mixes:
            first = names.setdefault(tuple(self._types(0, mix).values()), mix)
            found.setdefault(first, [])
            if first != mix:
                found[first].append(mix)
        return found

    def size(self, removed: int, mix: str) -> FileSize:
        shapes, types = self._shapes(removed), self._types(removed, mix)
        plain = {name: math.prod(shape[:-1]) * row_bytes(types[name], shape[-1]) for name, shape in shapes.items()}
        name = safe_name(self.name(self.job.config.num_hidden_layers - removed), self.checkpoint)
        header = self._metadata + len(name.encode()) + sum(_info(*item) for item in shapes.items())
        embedding = 0 if "output.weight" not in shapes else plain["token_embd.weight"]
        tensors = sum(stored_bytes(shape, types[name]) for name, shape in shapes.items())
        return FileSize(padded(header) + tensors, sum(plain.values()) - embedding)

    def _shapes(self, removed: int) -> Mapping[str, tuple[int, ...]]:
        """All blocks have the same shapes: those of the first ones."""
        kept = self.job.config.num_hidden_layers - removed
        return {name: shape for name, shape in self.job.source.shapes.items() if (block_of(name) or 0) < kept}

    def _types(self, removed: int, mix: str) -> dict[str, GGMLQuantizationType]:
        config = self.job.config
        model = mixed_model(config_at(config, config.num_hidden_layers - removed), True)
        return {name: tensor_type(name, shape, mix, model) for name, shape in self._shapes(removed).items()}

    @cached_property
    def _metadata(self) -> int:
        """Bytes of the header, vocabulary included, without the model's name and tensors: they depend on nothing."""
        with TemporaryDirectory(prefix="compress-fit-") as folder:
            file = Path(folder) / "header.gguf"
            name = safe_name(self.job.name, self.checkpoint)
            writer = self.job.described(self.job.config, name)
            try:
                writer.write_header_to_file(file)
                writer.write_kv_data_to_file()
            finally:
                writer.close()
            return file.stat().st_size - len(name.encode())


def _info(name: str, shape: tuple[int, ...]) -> int:
    return _INFO + len(name.encode()) + 8 * len(shape)
