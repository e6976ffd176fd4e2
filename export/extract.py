"""Extracting one depth of a bundle into its own file or folder. For a GGUF file this needs no torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

from ..core.errors import UserError
from ..core.gguf_header import split_files
from ..records.bundle import ArtifactEntry
from ..runtime.bundle import read_bundle
from .gguf_source import file_order


def find_artifact(bundle: Path, type: str, depth: int | None, form: str) -> ArtifactEntry:
    """The artifact of a type and a depth (the greatest, if none is given), of format `form` if there are two, as of a
    size; `UserError` listing what there is."""
    manifest = read_bundle(bundle)
    wanted = manifest.depths[-1] if depth is None else depth
    found = [artifact for artifact in manifest.artifacts if (artifact.type, artifact.depth) == (type, wanted)]
    for artifact in sorted(found, key=lambda artifact: artifact.format != form):
        return artifact
    types = ", ".join(dict.fromkeys(artifact.type for artifact in manifest.artifacts))
    depths = ", ".join(map(str, manifest.depths))
    raise UserError(f"{bundle} holds no {type} at depth {wanted}; it has the types {types} at the depths {depths}")


def extract(bundle: Path, type: str, depth: int | None, out: Path) -> ArtifactEntry:
    """Write one artifact of a bundle as the single .gguf file, or the ordinary ONNX folder, `out`.

    Its tensors are copied byte for byte. `out` must not exist yet, and appears only when complete.
    """
    if out.exists():
        raise UserError(f"{out} exists already; give another --out, or remove it")
    artifact = find_artifact(bundle, type, depth, "gguf" if out.suffix == ".gguf" else "onnx")
    if (artifact.format == "gguf") != (out.suffix == ".gguf"):
        wanted = "a file that ends in .gguf" if artifact.format == "gguf" else "a folder"
        raise UserError(f"{type} is extracted into {wanted}; --out is {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if artifact.format == "gguf":
        join(bundle / artifact.path, out)
        return artifact
    from .onnx_depths import extract_depth

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        extract_depth(bundle / artifact.path, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return artifact


def join(file: Path, out: Path) -> None:
    """Write a GGUF file, or all parts that belong to a first part, as the one file `out`: tensors byte for byte."""
    readers = [GGUFReader(part) for part in split_files(file)]
    fields = readers[0].fields
    writer = GGUFWriter(None, fields["general.architecture"].contents())
    for key, entry in fields.items():
        if not key.startswith(("GGUF.", "split.")) and key != "general.architecture":
            inner = entry.types[-1] if len(entry.types) > 1 else None
            writer.add_key_value(key, entry.contents(), entry.types[0], inner)
    tensors = sorted((t for reader in readers for t in reader.tensors), key=lambda tensor: file_order(tensor.name))
    for tensor in tensors:
        rows = tensor.data.view(np.uint8)
        writer.add_tensor_info(tensor.name, rows.shape, np.dtype(np.uint8), rows.nbytes, tensor.tensor_type)
    partial = out.with_name(f".{out.name}.partial")
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.data.view(np.uint8))
        writer.close()
        os.replace(partial, out)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
