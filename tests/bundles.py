"""A tiny bundle of several depths, for tests of the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.export.bundle import copy_model_files, list_files, write_manifest
from compress.export.gguf import write_gguf
from compress.export.onnx import write_onnx
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import count_parameters, save_checkpoint
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.runtime.bundle import ArtifactEntry, Manifest, Verification

UNVERIFIED = Verification(
    runtime="none",
    positions=1,
    perplexity=30.0,
    checkpoint_perplexity=30.0,
    kl=0.0,
    top1_agreement=1.0,
    tensor_error=0.0,
)


def truncated(checkpoint: Path, depth: int, folder: Path) -> Path:
    """The first `depth` blocks of a checkpoint as a checkpoint."""
    model = load_model(checkpoint)
    blocks = load_config(checkpoint).num_hidden_layers
    if depth == blocks:
        return checkpoint
    drop_blocks(model, list(range(depth, blocks)))
    save_checkpoint(model, load_tokenizer(checkpoint), folder)
    return folder


def make_bundle(checkpoint: Path, depths: Sequence[int], out: Path, gguf: str = "F16", onnx: str = "fp32") -> Path:
    """A bundle of `checkpoint` at the ascending `depths`, the last of which is all its blocks; nothing is verified."""
    bundle, deepest = out / "bundle", depths[-1]
    bundle.mkdir(parents=True)
    copy_model_files(checkpoint, bundle)
    artifacts = []
    for depth in depths:
        model = truncated(checkpoint, depth, out / f"d{depth}")
        suffix = "" if depth == deepest else f"@{depth}"
        file = f"gguf/tiny-{gguf}/tiny-{gguf}-d{depth}.gguf"
        write_gguf(model, bundle / file, gguf)
        folder = f"onnx/{onnx}" if depth == deepest else f"onnx/{onnx}/d{depth:02d}"
        written = write_onnx(model, out / f"onnx{depth}", onnx)
        target = bundle / folder
        target.mkdir(parents=True, exist_ok=True)
        for path in (out / f"onnx{depth}").iterdir():
            path.rename(target / path.name)
        common: dict[str, Any] = {"depth": depth, "bits_per_weight": 32.0, "verification": UNVERIFIED}
        size = (bundle / file).stat().st_size
        artifacts.append(
            ArtifactEntry(role=f"gguf-{gguf}{suffix}", format="gguf", type=gguf, path=file, bytes=size, **common)
        )
        artifacts.append(
            ArtifactEntry(
                role=f"onnx-{onnx}{suffix}", format="onnx", type=onnx, path=folder, bytes=written.bytes, **common
            )
        )
    manifest = Manifest(
        name="tiny",
        family=load_config(checkpoint).model_type,
        parameters=count_parameters(checkpoint),
        depths=list(depths),
        kept_blocks=list(range(deepest)),
        importance_matrix=False,
        artifacts=artifacts,
        files=[],
    )
    write_manifest(bundle, manifest.model_copy(update={"files": list_files(bundle)}))
    return bundle
