"""One depth of a bundle as a file or folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..core.errors import UserError
from ..runtime.bundle import ArtifactEntry, read_bundle
from .gguf_family import join
from .onnx_depths import extract_depth


def find_artifact(bundle: Path, type: str, depth: int | None) -> ArtifactEntry:
    """The artifact of a type and a depth (the greatest, if none is given); `UserError` listing what there is."""
    manifest = read_bundle(bundle)
    wanted = manifest.depths[-1] if depth is None else depth
    for artifact in manifest.artifacts:
        if (artifact.type, artifact.depth) == (type, wanted):
            return artifact
    types = ", ".join(dict.fromkeys(artifact.type for artifact in manifest.artifacts))
    depths = ", ".join(map(str, manifest.depths))
    raise UserError(f"{bundle} holds no {type} at depth {wanted}; it has the types {types} at the depths {depths}")


def extract(bundle: Path, type: str, depth: int | None, out: Path) -> ArtifactEntry:
    """Write one artifact of a bundle as the single .gguf file, or the ordinary ONNX folder, `out`.

    Its tensors are copied byte for byte. `out` must not be there yet, and appears only when whole.
    """
    if out.exists():
        raise UserError(f"{out} exists already; give another --out, or remove it")
    artifact = find_artifact(bundle, type, depth)
    if (artifact.format == "gguf") != (out.suffix == ".gguf"):
        wanted = "a file that ends in .gguf" if artifact.format == "gguf" else "a folder"
        raise UserError(f"{type} is extracted into {wanted}; --out is {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if artifact.format == "gguf":
        join(bundle / artifact.path, out)
        return artifact
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        extract_depth(bundle / artifact.path, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return artifact
