"""Verification finds what is damaged: any tensor of a file, grossly or slightly, and right weights run wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compress.export.artifacts as artifacts
import gguf
import numpy as np
import onnx
import pytest
from compress.core.errors import UserError
from compress.export.config import ExportConfig
from compress.export.gguf_family import family_name
from compress.export.stage import export_checkpoint

VERIFY = {"tokens": 32, "window": 32}


def config(**values: Any) -> ExportConfig:
    return ExportConfig.model_validate({"verify": VERIFY, "threads": 1} | values)


def damage_gguf(file: Path, name: str, change: Any) -> None:
    """Change one tensor's bytes in place."""
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == name)
    data = bytearray(file.read_bytes())
    start, end = int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes)
    data[start:end] = change(np.frombuffer(data[start:end], np.uint8).copy()).tobytes()
    file.write_bytes(data)


def damage_onnx(folder: Path, name: str, change: Any) -> None:
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    tensor = next(t for t in graph.initializer if t.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    start, length = int(place["offset"]), int(place["length"])
    file = folder / "model.onnx.data"
    data = bytearray(file.read_bytes())
    data[start : start + length] = change(np.frombuffer(data[start : start + length], np.uint8).copy()).tobytes()
    file.write_bytes(data)


def flip(data: np.ndarray) -> np.ndarray:
    return data ^ 0xA5


def scale(kind: type, place: int, factor: float) -> Any:
    """Multiply one value (of a row's scale, or a norm) by a factor."""

    def change(data: np.ndarray) -> np.ndarray:
        values = data.view(kind)
        values[place] *= factor
        return data

    return change


def scale_row(data: np.ndarray) -> np.ndarray:
    data.view(np.float16).reshape(-1, 64)[5] *= np.float16(1.01)
    return data


@pytest.mark.parametrize(
    ("kind", "tensor", "change"),
    [
        ("F16", "blk.1.ffn_up.weight", flip),
        ("F16", "blk.1.attn_q.weight", scale_row),
        ("F16", "blk.2.ffn_norm.weight", scale(np.float32, 7, 1.001)),
        ("Q8_0", "token_embd.weight", scale(np.float16, 17 * 60, 1.1)),  # a block's scale: a token the probe lacks
        ("Q4_0", "blk.3.ffn_down.weight", flip),
        ("Q4_K_M", "output.weight", scale(np.float16, 17 * 4, 1.1)),
    ],
)
def test_a_damaged_gguf_fails_verification(shaken, tmp_path, context, monkeypatch, kind, tensor, change):
    write = artifacts.write_gguf

    def broken(checkpoint: Path, out: Path, *args: Any, **options: Any) -> Any:
        info = write(checkpoint, out, *args, **options)
        damage_gguf(out, tensor, change)
        return info

    monkeypatch.setattr(artifacts, "write_gguf", broken)
    with pytest.raises(UserError, match=rf"gguf-{kind}: tensor {tensor} .* differs from the checkpoint"):
        export_checkpoint(shaken(tied=False), tmp_path / "b", config(gguf=[kind]), context)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("part", "tensor"), [(2, "token_embd.weight"), (3, "blk.0.ffn_up.weight"), (4, "blk.3.attn_q.weight")]
)
def test_a_damaged_part_of_several_depths_fails_verification(shaken, tmp_path, context, monkeypatch, part, tensor):
    write = artifacts.write_family

    def broken(checkpoint: Path, folder: Path, kind: str, depths: Any, **options: Any) -> Any:
        firsts = write(checkpoint, folder, kind, depths, **options)
        damage_gguf(folder / family_name(folder.name, 4, part, depths), tensor, flip)
        return firsts

    monkeypatch.setattr(artifacts, "write_family", broken)
    with pytest.raises(UserError, match=rf"gguf-F16: tensor {tensor} .* differs from the checkpoint"):
        export_checkpoint(shaken(), tmp_path / "b", config(gguf=["F16"], depths=[2, 4]), context)


@pytest.mark.parametrize(
    ("kind", "tensor", "change", "named"),
    [
        ("fp32", "model.layers.1.mlp.up_proj.MatMul.weight", flip, "layers.1/mlp/up_proj"),
        ("fp32", "model.layers.2.attn.qkv_proj.MatMul.weight", scale(np.float32, 9, 1.01), "layers.2/attn/qkv_proj"),
        ("int8", "model.layers.0.mlp.down_proj.MatMul.weight_scales", scale(np.float32, 5, 1.1), "layers.0/mlp/down"),
        ("int8", "model.embed_tokens.weight_scales", scale(np.float32, 30, 1.1), "embed_tokens"),
        ("int4", "model.layers.3.mlp.gate_proj.MatMul.weight_Q4", flip, "layers.3/mlp/gate_proj"),
        ("int4", "model.layers.4.final_norm_layernorm.weight", scale(np.float32, 3, 1.001), "final_norm"),
    ],
)
def test_a_damaged_onnx_fails_verification(
    shaken, tmp_path, context, inline_builder, monkeypatch, kind, tensor, change, named
):
    write = artifacts.write_onnx

    def broken(checkpoint: Path, out: Path, *args: Any, **options: Any) -> Any:
        info = write(checkpoint, out, *args, **options)
        damage_onnx(out, tensor, change)
        return info

    monkeypatch.setattr(artifacts, "write_onnx", broken)
    with pytest.raises(UserError, match=rf"onnx-{kind}: tensor \S*{named}.* differs from the checkpoint"):
        export_checkpoint(shaken(tied=False), tmp_path / "b", config(onnx=[kind]), context)


def test_right_weights_run_wrongly_fail_verification(shaken, tmp_path, context, inline_builder, monkeypatch):
    """Rotary embeddings: in GGUF rows in the wrong order, read back likewise; in ONNX a table that is no weight."""
    with monkeypatch.context() as patch:
        patch.setattr("compress.modeling.gguf_layout.interleave", lambda values, _heads: values)
        with pytest.raises(UserError, match=r"gguf: llama.cpp does not compute the checkpoint's model"):
            export_checkpoint(shaken(), tmp_path / "a", config(gguf=["F16"]), context)
    write = artifacts.write_onnx

    def broken(checkpoint: Path, out: Path, *args: Any, **options: Any) -> Any:
        info = write(checkpoint, out, *args, **options)
        damage_onnx(out, "sin_cache", np.zeros_like)
        return info

    monkeypatch.setattr(artifacts, "write_onnx", broken)
    with pytest.raises(UserError, match=r"onnx: onnxruntime does not compute the checkpoint's model"):
        export_checkpoint(shaken(), tmp_path / "b", config(onnx=["fp32"]), context)
