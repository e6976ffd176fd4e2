"""How many bytes a GGUF file will have, before anything is quantized."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import GGUF_DEFAULT_ALIGNMENT
from gguf import GGMLQuantizationType as Type

from ..modeling.load import load_config
from ..runtime.artifact_types import GGUF_TYPES
from .gguf import Conversion, mixed_model
from .gguf_family import header_files
from .mixes import tensor_type
from .quantize import row_bytes


def plain_sizes(
    checkpoint: Path, importance: bool, *, name: str | None = None, depths: Sequence[int] = ()
) -> dict[str, int]:
    """Bytes of the GGUF file of every plain type, vocabulary and metadata included; the types that need an importance
    matrix only with `importance`.

    With several `depths` they are those of all files that the deepest is read from. `name` is the model's in the file.
    Raises `UserError` for models that GGUF cannot hold.
    """
    job = Conversion(checkpoint, "F16", name=name)
    shapes, model = job.source.shapes, mixed_model(load_config(checkpoint), importance)
    rest = header_bytes(job, depths)
    return {
        mix: rest + tensor_bytes(shapes, {n: tensor_type(n, shape, mix, model) for n, shape in shapes.items()})
        for mix, kind in GGUF_TYPES.items()
        if importance or not kind.needs_importance
    }


def distinct_types(checkpoint: Path, importance: bool) -> list[str]:
    """The plain types without those that come to the same file as one before: where rows fit few types' blocks, several
    do."""
    shapes = Conversion(checkpoint, "F16").source.shapes
    model = mixed_model(load_config(checkpoint), importance)
    found: dict[tuple[Type, ...], str] = {}
    for mix in GGUF_TYPES:
        found.setdefault(tuple(tensor_type(name, shape, mix, model) for name, shape in shapes.items()), mix)
    return list(found.values())


def tensor_bytes(shapes: Mapping[str, Sequence[int]], types: Mapping[str, Type]) -> int:
    """Bytes of all tensors as they lie in a file."""
    return sum(stored_bytes(shape, types[name]) for name, shape in shapes.items())


def stored_bytes(shape: Sequence[int], kind: Type) -> int:
    """Bytes of one tensor in a file, what fills it up to the next included."""
    return padded(math.prod(shape[:-1]) * row_bytes(kind, shape[-1]))


def header_bytes(job: Conversion, depths: Sequence[int] = ()) -> int:
    """Bytes of the files but for the tensors: metadata, vocabulary and the list of tensors. Types do not change it."""
    with tempfile.TemporaryDirectory() as folder:
        return sum(padded(file.stat().st_size) for file in header_files(job, Path(folder), depths))


def padded(size: int) -> int:
    return -(-size // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT
