"""ONNX through onnxruntime-genai's model builder, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..modeling.load import load_config
from ..stage import Progress

PRECISIONS = ("int4", "fp32")
# accuracy_level 4: MatMulNBits multiplies in int8 on CPUs, which is what makes int4 fast there.
OPTIONS: dict[str, dict[str, str]] = {"int4": {"int4_accuracy_level": "4"}, "fp32": {}}


@dataclass(frozen=True)
class OnnxInfo:
    """What was written."""

    precision: str
    bytes: int  # graph and weights
    bits_per_weight: float


def write_onnx(checkpoint: Path, out: Path, precision: str, progress: Progress | None = None) -> OnnxInfo:
    """Write `out/` with model.onnx, model.onnx.data, genai_config.json and the tokenizer.

    The builder runs in a subprocess: its memory is given back, and nothing of it stays in this one. `out` appears
    only when whole. Raises `UserError` when the builder refuses the model or fails.
    """
    if precision not in PRECISIONS:
        raise UserError(f"ONNX precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    config = load_config(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".onnx-cache-", dir=out.parent) as cache:
        _build(checkpoint.resolve(), partial.resolve(), precision, Path(cache).resolve(), progress or Progress())
    _clean_config(partial / "genai_config.json")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    size = sum(file.stat().st_size for file in out.glob("model.onnx*"))
    return OnnxInfo(precision, size, 8 * size / count_parameters(checkpoint, config))


def _build(checkpoint: Path, out: Path, precision: str, cache: Path, progress: Progress) -> None:
    options = {"hf_token": "false", **OPTIONS[precision]}
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(checkpoint), "-o", str(out), "-p", precision, "-e", "cpu", "-c", str(cache)]
    command += ["--extra_options", *(f"{key}={value}" for key, value in options.items())]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with progress.bar(f"ONNX {precision}") as advance:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache, check=False)
        advance()
    if done.returncode != 0 or not (out / "model.onnx").exists():
        shutil.rmtree(out, ignore_errors=True)
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise UserError(
            f"onnxruntime-genai's builder failed on {checkpoint} at {precision}: {lines[-1] if lines else 'no message'}"
        )


def _clean_config(path: Path) -> None:
    """genai_config.json in a fixed layout, so that the same model gives the same bytes."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def count_parameters(checkpoint: Path, config: Any) -> int:
    """Parameters of a checkpoint, tied weights once, from the safetensors headers."""
    from safetensors import safe_open

    total = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 - a safetensors handle is no dict
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                shape = weights.get_slice(name).get_shape()
                size = 1
                for extent in shape:
                    size *= extent
                total += size
    return total
