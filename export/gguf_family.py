"""One set of GGUF tensors for several depths, as llama.cpp's split files.

llama.cpp reads a model split into `NAME-00001-of-0000K.gguf` … from its first part, which holds the metadata,
and finds the tensors in any part. Here every depth has a first part of its own, and the others hold what
the depths share: part 2 embedding, final norm and output, part 3 the blocks of the least depth, part 4 those that the
next greater depth adds, and so on. Their names must say how many parts a depth has, so each depth has its own names for
them: hard links to one file, or copies where the file system has no links.

Tensor types are those of the deepest model's mix, because llama.cpp's mixes depend on a block's position.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from ..core.errors import UserError
from ..core.gguf_header import read_header, read_tensor_names, split_files
from ..core.stage import Progress
from ..modeling.blocks import config_at
from ..modeling.checkpoint import link_file
from ..modeling.gguf_layout import Array
from .bundle import Size
from .gguf import Conversion, Tensor
from .gguf_source import block_of, differing_tensors

SHARED = 2  # parts before those of the blocks: metadata; embedding, norm and output


def family_name(stem: str, depth: int, part: int, depths: Sequence[int]) -> str:
    """The file name of a part (1 is the first) of one of several depths."""
    return f"{stem}-d{depth}-{part:05d}-of-{parts_of(depth, depths):05d}.gguf"


def parts_of(depth: int, depths: Sequence[int]) -> int:
    """How many parts a depth is split into."""
    return SHARED + 1 + list(depths).index(depth)


def write_family(
    checkpoint: Path,
    folder: Path,
    qtype: str,
    depths: Sequence[int],
    *,
    imatrix: Mapping[str, Array] | None = None,
    types: Mapping[str, GGMLQuantizationType] | None = None,
    name: str | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[int, Path]:
    """Write a checkpoint folder for several depths, ascending to all of its blocks; the first part of each depth.

    The folder, which must not exist yet, appears only when complete; tensors are read, quantized and written once.
    The arguments are those of `Conversion`.
    """
    job = Conversion(checkpoint, qtype, imatrix=imatrix, types=types, name=name, threads=threads, progress=progress)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with job.disk_errors(folder), job.progress.bar(f"GGUF {qtype}", len(job.tensors)) as advance:
            own = set(differing_tensors(job.config, depths))
            _write_shared(job, partial, folder.name, depths, own, advance)
            for depth in depths:
                _write_first(job, partial, folder.name, depth, depths, own)
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {depth: folder / family_name(folder.name, depth, 1, depths) for depth in depths}


def _write_shared(job: Conversion, folder: Path, stem: str, depths: Sequence[int], own: set[str], advance) -> None:
    """Write the parts with the shared tensors, under every depth's file names."""
    for part in range(2, parts_of(depths[-1], depths) + 1):
        tensors = [t for t in job.tensors if t.name not in own and _part_of(t.name, depths) == part]
        users = [depth for depth in depths if part <= parts_of(depth, depths)]
        file = folder / family_name(stem, depths[-1], part, depths)
        writer = job.writer()
        _add_split(writer, part, parts_of(depths[-1], depths), len(job.tensors))
        job.write(file, writer, tensors, advance=advance)
        for depth in users[:-1]:
            link_file(file, folder / family_name(stem, depth, part, depths))


def _write_first(job: Conversion, folder: Path, stem: str, depth: int, depths: Sequence[int], own: set[str]) -> None:
    """Write one depth's own part: its metadata, and the few tensors that differ between depths."""
    tensors = tensors_at(job.tensors, depth)
    name = job.name if depth == depths[-1] else f"{job.name}@{depth}"
    writer = job.described(config_at(job.config, depth), name)
    _add_split(writer, 1, parts_of(depth, depths), len(tensors))
    path = folder / family_name(stem, depth, 1, depths)
    job.write(path, writer, [tensor for tensor in tensors if tensor.name in own], depth)


def header_files(job: Conversion, folder: Path, depths: Sequence[int]) -> list[Path]:
    """The files of a model, or with several depths those of the deepest, with all but the tensors' values."""
    job = copy(job)
    job.heads_only = True
    if len(depths) < 2:
        file = folder / "whole.gguf"
        job.write(file, job.described(job.config, job.name), job.tensors)
        return [file]
    own = set(differing_tensors(job.config, depths))
    _write_shared(job, folder, "parts", depths, own, lambda: None)
    _write_first(job, folder, "parts", depths[-1], depths, own)
    return split_files(folder / family_name("parts", depths[-1], 1, depths))


def tensors_at(tensors: Sequence[Tensor], depth: int) -> list[Tensor]:
    """The tensors of the model truncated to the first `depth` blocks."""
    return [tensor for tensor in tensors if (block_of(tensor.name) or 0) < depth]


def _part_of(tensor: str, depths: Sequence[int]) -> int:
    block = block_of(tensor)
    return 2 if block is None else SHARED + 1 + sum(block >= depth for depth in depths)


def _add_split(writer: GGUFWriter, part: int, count: int, tensors: int) -> None:
    """llama.cpp checks in the first part how many parts and tensors there are, and in every part its own number."""
    writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, part - 1)
    writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, count)
    writer.add_int32(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, tensors)


def check_family(folder: Path, depths: Sequence[int]) -> None:
    """`UserError` unless every depth's parts are its own metadata and the very tensors of the deepest."""
    deepest = split_files(folder / family_name(folder.name, depths[-1], 1, depths))
    tensors = {name for file in deepest for name in read_tensor_names(file)}
    for depth in depths:
        files = split_files(folder / family_name(folder.name, depth, 1, depths))
        header = read_header(files[0])
        names = [name for file in files for name in read_tensor_names(file)]
        wanted = {name for name in tensors if (block_of(name) or 0) < depth}
        if header[f"{header['general.architecture']}.block_count"] != depth or sorted(names) != sorted(wanted):
            raise UserError(
                f"{files[0]} and its parts do not make up a model of {depth} blocks: they were written wrongly"
            )
        for file, same in zip(files[1:], deepest[1:], strict=False):
            if not file.samefile(same) and not filecmp.cmp(file, same, shallow=False):
                raise UserError(f"{file} should be identical to {same.name} and is not: it was written wrongly")


def measure_gguf(file: Path) -> Size:
    """The size of a GGUF file, or of all parts that belong to a first part."""
    files = split_files(file)
    tensors = [tensor for part in files for tensor in GGUFReader(part).tensors]
    parameters = sum(int(tensor.n_elements) for tensor in tensors)
    packed = sum(int(tensor.n_bytes) for tensor in tensors)
    return Size(sum(part.stat().st_size for part in files), parameters, 8 * packed / parameters)
