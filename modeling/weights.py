"""A checkpoint folder's weight files: finding them, reading their headers, and reading single tensors.

Which files hold the weights is decided here for the whole package: those that `model.safetensors.index.json` lists,
else `model.safetensors`. Any other .safetensors file (a vendor's `consolidated.safetensors`, an adapter) is not part of
the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json, unreadable
from .families import HEAD, block_number

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
# Bytes of one number of each type that is read as weights.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's entry in its file's header."""

    file: Path
    dtype: str  # as safetensors writes it, such as BF16
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The files with a checkpoint's weights, in order.

    Raises `UserError` if there are none, the index is damaged, or a file that it lists is missing.
    """
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(weight_map(index).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(
                f"{folder} lacks {missing[0]}, one of {len(files)} weight files that {INDEX} lists; copy or download "
                "the checkpoint again"
            )
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    others = sorted(file.name for file in folder.iterdir() if file.suffix == ".safetensors")
    if not others:
        raise UserError(
            f"{folder} has no .safetensors files; only safetensors are read (pickled weights can run code). Convert "
            "the checkpoint with `save_pretrained` first"
        )
    raise UserError(
        f"{folder} has neither {SINGLE} nor {INDEX}, so it is not clear which files hold the weights "
        f"(it has {', '.join(others[:3])}); download the checkpoint again, or save it with `save_pretrained`"
    )


def weight_map(index: Path) -> dict[str, str]:
    """Tensor → file name, from an index. `UserError` if it is damaged or names a file outside its folder."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index} has no weight_map of tensor names to files; download the checkpoint again")
    for name in files.values():
        if PurePath(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} lists {name!r}, which is not the name of a .safetensors file beside it")
    return files


def is_adapter_alone(folder: Path) -> bool:
    """Whether a folder holds an adapter (what peft saves) and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX))


def safetensors_header(file: Path) -> dict[str, Any]:
    """Names, types and shapes of the tensors in a safetensors file; `UserError` if it is cut or broken."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            if not isinstance(entry["dtype"], str) or not all(isinstance(n, int) and n >= 0 for n in [*shape, begin]):
                raise ValueError("its header is damaged")
            if entry["dtype"] in FLOATS and math.prod(shape) * FLOATS[entry["dtype"]] != end - begin:
                raise ValueError("a tensor's size does not fit its shape")
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if file.stat().st_size < 8 + length + end:
            raise ValueError("it is cut short")
        return header
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from error
    except OSError as error:
        raise unreadable(file, error) from error


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint folder by name, from the headers of its weight files.

    Raises `UserError` for a tensor that is in two of them.
    """
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        for name, entry in safetensors_header(file).items():
            if name in headers:
                raise UserError(f"{folder}: tensor {name} is in both {headers[name].file.name} and {file.name}")
            headers[name] = TensorHeader(file, entry["dtype"], tuple(entry["shape"]))
    return headers


class Tensors:
    """A checkpoint folder's tensors by name, read one at a time and not kept.

    Raises `KeyError` for an unknown name.
    """

    def __init__(self, folder: Path):
        self.headers = tensor_headers(folder)

    def __getitem__(self, name: str) -> Any:
        from safetensors import safe_open

        with safe_open(self.headers[name].file, framework="pt") as weights:
            return weights.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)


def count_parameters(checkpoint: Path, depth: int | None = None) -> int:
    """Parameters of a checkpoint folder (of its first `depth` blocks), tied weights once, from its headers."""
    tied = read_json(checkpoint / "config.json").get("tie_word_embeddings", False)
    total = 0
    for name, tensor in tensor_headers(checkpoint).items():
        beyond = depth is not None and (block_number(name) or 0) >= depth
        if not beyond and not (tied and name == HEAD):
            total += tensor.size
    return total
