"""ONNX export: onnxruntime-genai's model builder makes the graph, onnx-ir edits and quantizes it.

The folder written runs in stock onnxruntime and stock onnxruntime-genai. Input and output names are Optimum's:
`input_ids`, `attention_mask`, `position_ids`, `past_key_values.N.key` → `logits`, `present.N.key`.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.stage import Progress
from ..modeling.checkpoint import link_file
from ..modeling.families import FAMILIES, family_of
from ..modeling.load import load_config
from ..modeling.retaining import has_heads
from ..modeling.shape import rope_settings, rotated_size, sliding_blocks
from ..modeling.types import ConfigLike
from ..modeling.weights import count_parameters
from ..runtime.artifact_sizes import target_of
from ..runtime.artifact_types import ONNX_TYPES
from ..runtime.onnx_engine import WEIGHTS
from .bundle import TOKENIZER, settle_tokenizer
from .ends import end_tokens, write_generation_config
from .grids import Grid
from .onnx_depths import GRAPH, spread, weights_read
from .onnx_edit import Rounding, edited_graph, grid_rounding, plain_rounding, save_graph
from .onnx_kv import CacheScales
from .onnx_retaining import head_bytes

# Settings that the builder passes over, with what attention would do.
LEFT_OUT = {"attn_logit_softcapping": "is soft-capped", "use_bidirectional_attention": "looks ahead"}


@dataclass(frozen=True)
class WrittenOnnx:
    """The folder written."""

    files: tuple[str, ...]  # names in the folder, sorted
    bytes: int  # of all files together
    bits_per_weight: float  # of the weights file, per parameter of the checkpoint


def check_onnx(config: ConfigLike, precision: str = "int4") -> None:
    """Raise `UserError` unless models of this configuration (object or dict) can be exported at `precision`."""
    values = config if isinstance(config, dict) else config.to_dict()
    family = values.get("model_type")
    if precision not in ONNX_TYPES and target_of(precision) is None:
        why = ": ONNX Runtime's CPU kernels take no float16 attention" if precision == "fp16" else ""
        raise UserError(f"unknown ONNX precision {precision!r}{why}; there are: {', '.join(ONNX_TYPES)}")
    builders = {name: record.onnx for name, record in FAMILIES.items() if record.onnx is not None}
    if family not in builders:
        raise UserError(f"ONNX export of family {family!r} is not supported; supported: {', '.join(sorted(builders))}")
    if values.get("quantization_config"):
        raise UserError("this checkpoint is already quantized; ONNX export needs float weights")
    for key, what in LEFT_OUT.items():
        if values.get(key):
            raise UserError(f"ONNX export of attention that {what} ({key}) is not supported")
    kind, turned = rope_settings(values)["rope_type"], rotated_size(values)
    if kind not in builders[family].ropes:
        raise UserError(f"ONNX export of {family} with rope scaling {kind!r} is not supported")
    if turned % 16:
        raise UserError(
            f"ONNX Runtime's attention rotates a multiple of 16 dimensions per head; this model rotates {turned}"
        )


def write_onnx(
    checkpoint: Path,
    out_dir: Path,
    precision: str,
    *,
    depths: Sequence[int] = (),
    imatrix: Mapping[str, np.ndarray] | None = None,
    grids: Mapping[str, Grid] | None = None,
    built: Path | None = None,
    link: bool = False,
    kv: CacheScales | None = None,
    progress: Progress | None = None,
) -> WrittenOnnx:
    """Write `checkpoint` as an ONNX folder at `precision`: int4, int8 or fp32.

    int4 holds the blocks' matrices at 4 bits with zero points and head and embedding at 8 bits; int8 holds all at 8
    bits. Head and embedding are one tensor where the model ties them. A checkpoint's retaining heads stay float32 and
    become outputs (`onnx_retaining`). `imatrix` gives the mean squared activations of each matrix's inputs,
    (in_features,) float32 by llama.cpp tensor name, and improves int4.

    With `grids` every matrix has one of its own, by the name of the node that reads it (`onnx_sized`); `imatrix` then
    has these names too, and `precision` is the name of a size.

    With `kv` the cache's keys and values are int8, rounded with these scales (`onnx_kv`); else float32.

    With several `depths`, ascending to all blocks, `out_dir` becomes a family (`onnx_depths`); the return value
    and the weights file are then those of all blocks.

    The folder appears complete or not at all; the bytes depend only on the checkpoint and the packages. While it is
    built, the float32 graph is stored beside it (4 bytes per parameter), unless `built` is a folder that `build_graph`
    made from the checkpoint, which is left unchanged. With `link`, a float32 folder's weights file is a hard link to
    the built one's, which the onnx package does not read: for folders that are soon deleted. Raises `UserError` for
    unsupported models, a broken checkpoint or a full disk.
    """
    progress = progress or Progress()
    config = _read_config(checkpoint)
    check_onnx(config, precision)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir} exists and is not empty; name a new folder for the ONNX export")
    work = out_dir.with_name(f"{out_dir.name}.partial")
    with _work_folder(work), _disk_errors(out_dir):
        if built is None:
            build_float32([(checkpoint, work / "fp32")], progress)
        made = work / "folder"
        known = imatrix or {}
        rounding = plain_rounding(precision, known) if grids is None else grid_rounding(grids, known)
        _finish(checkpoint, built or work / "fp32", made, rounding, kv, link, precision, progress)
        info = _describe(made, checkpoint)
        if len(depths) > 1:
            spread(made, work / "family", depths, load_config(checkpoint))
            made = work / "family"
        if out_dir.exists():
            out_dir.rmdir()
        made.rename(out_dir)
    return info


def build_graph(checkpoint: Path, folder: Path, progress: Progress) -> Path:
    """The builder's float32 graph of a checkpoint in `folder`, built if missing: the source of every precision."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        with _disk_errors(folder):
            build_float32([(checkpoint, partial)], progress)
            partial.rename(folder)
    return folder


def build_float32(jobs: list[tuple[Path, Path]], progress: Progress) -> None:
    """Run the builder in a separate process: each job is a checkpoint folder and the folder to write."""
    command = [sys.executable, "-m", "compress.export._onnx_build"]
    total = 0
    for checkpoint, folder in jobs:
        config = _read_config(checkpoint)
        total += int(config["num_hidden_layers"])
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        source = _builder_input(checkpoint, folder, config)
        command += [str(source.resolve()), str(folder.resolve())]
    log = jobs[0][1].with_name("builder.log")
    with log.open("wb") as errors, progress.bar("onnx graph", total) as advance:
        # Its standard input is a pipe that closes when this process dies, so that it does not live on.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_offline(),
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("Reading layer"):
                    advance()
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
    if code != 0:
        raise _builder_error(jobs[0][0], log)


def _builder_input(checkpoint: Path, folder: Path, config: dict[str, Any]) -> Path:
    """The checkpoint with a `config.json` that the builder reads correctly."""
    wanted = _builder_config(config)
    if wanted == config:
        return checkpoint
    source = folder.with_name(f"{folder.name}-input")
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file() and path.name != "config.json":
            (source / path.name).symlink_to(path.resolve())
    write_json(source / "config.json", wanted)
    return source


def _builder_config(config: dict[str, Any]) -> dict[str, Any]:
    """The builder reads the family from the architecture's name and sliding windows only from `layer_types`."""
    builder = family_of(config).onnx
    assert builder is not None, "check_onnx comes first"
    wanted = config | {"architectures": [builder.architecture]}
    if any(sliding_blocks(config)) and not config.get("layer_types"):
        wanted["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        wanted["rope_parameters"] = rope | {"type": "longrope"}
    return wanted


def _offline() -> dict[str, str]:
    settings = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **settings, "TOKENIZERS_PARALLELISM": "false"}


def _builder_error(checkpoint: Path, log: Path) -> UserError | OSError:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it ended without an error message (out of memory?)"
    if "No space left" in last or "os error 28" in last:
        return OSError(errno.ENOSPC, "No space left on device")
    return UserError(f"onnxruntime-genai's model builder could not export {checkpoint}: {last[:300]}")


def _finish(
    checkpoint: Path,
    built: Path,
    made: Path,
    rounding: Rounding | None,
    kv: CacheScales | None,
    link: bool,
    label: str,
    progress: Progress,
) -> None:
    """Write the edited graph and gather the folder's files in the new folder `made`."""
    import onnx_ir as ir

    made.mkdir()
    model = edited_graph(checkpoint, built, rounding, kv=kv, label=label, progress=progress)
    if rounding is None and not has_heads(checkpoint):
        (link_file if link else shutil.copyfile)(built / WEIGHTS, made / WEIGHTS)
        ir.save(model, made / GRAPH)
    else:
        save_graph(model, made)
    copy_companions(checkpoint, built, made)


def copy_companions(checkpoint: Path, built: Path, made: Path) -> None:
    """The folder's files beside graph and weights: tokenizer, configuration, genai's settings."""
    for path in sorted(built.iterdir()):
        if path.is_file() and not path.name.startswith(GRAPH):
            shutil.copyfile(path, made / path.name)
    shutil.copyfile(checkpoint / "config.json", made / "config.json")
    write_generation_config(checkpoint, made)
    settle_tokenizer(made / TOKENIZER)
    settings = read_json(made / "genai_config.json")
    settings["model"]["decoder"]["inputs"]["position_ids"] = "position_ids"
    ends = end_tokens(checkpoint)
    if ends:
        settings["model"]["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(made / "genai_config.json", settings, indent=4, ascii=True)


def _describe(folder: Path, checkpoint: Path) -> WrittenOnnx:
    files = sorted(folder.iterdir())
    size = (folder / "model.onnx.data").stat().st_size - head_bytes(weights_read(folder / "model.onnx"))
    bits = 8 * size / count_parameters(checkpoint)
    return WrittenOnnx(tuple(path.name for path in files), sum(path.stat().st_size for path in files), bits)


def _read_config(checkpoint: Path) -> dict[str, Any]:
    return load_config(checkpoint).to_dict()  # whatever version of transformers wrote it


@contextmanager
def _work_folder(work: Path) -> Iterator[None]:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _disk_errors(out_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk is full: {out_dir} could not be written") from error
        raise
