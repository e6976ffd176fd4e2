"""Scales of quantized files: read with their codes, differentiated, replaced in place."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from compress.export.gguf import write_gguf
from compress.export.gguf_family import family_name, write_family
from compress.export.onnx import write_onnx
from compress.export.quantize import Type, quantize
from compress.export.scale_files import PLACES, GgufScales, OnnxScales, ScaleFiles, read_blocks
from compress.export.scales import ScaledLinear, ScaledMatrix
from compress.export.tensors import gguf_errors, onnx_errors, row_error
from compress.modeling.families import FAMILIES
from compress.modeling.weights import Tensors

WIDE = {"hidden": 256, "intermediate": 512, "blocks": 2}  # rows of whole K-quants


def matrix_of(kind: Type, rows: int = 6, columns: int = 512) -> tuple[ScaledMatrix, np.ndarray]:
    """A random matrix of a type, and its values as gguf-py has them."""
    values = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32) + 0.3
    data = quantize(values, kind, threads=1)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    return read_blocks(data.reshape(-1, size), kind, rows), gguf.dequantize(data, kind)


@pytest.mark.parametrize("kind", PLACES, ids=lambda kind: kind.name)
def test_every_layout_is_scales_times_codes_and_minima_times_offsets(kind):
    matrix, expected = matrix_of(kind)
    torch.testing.assert_close(matrix.values(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    assert matrix.codes.dtype in (torch.int8, torch.int16)
    assert (matrix.minima is not None) == (kind.name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"))


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q4_K], ids=lambda kind: kind.name)
def test_gradients_are_those_of_the_plain_expression(kind):
    """Against torch's own differentiation, in float64, with whole dequantized weights."""
    matrix, _ = matrix_of(kind)
    random = torch.Generator().manual_seed(2)
    moves = 0.05 * torch.randn(len(matrix.numbers), *matrix.scales.shape, generator=random)
    inputs = torch.randn(3, 5, 512, generator=random, requires_grad=True)
    bias, wanted = torch.randn(6, generator=random), torch.randn(3, 5, 6, generator=random)
    layer = ScaledLinear(matrix, moves.clone(), bias)
    out = layer(inputs)
    (out * wanted).sum().backward()

    exact, plain = moves.double().requires_grad_(), inputs.detach().double().requires_grad_()
    weights = matrix.codes.double() * (matrix.scales.double() * (1 + exact[0]))[..., None]
    if matrix.minima is not None and matrix.offsets is not None:
        parts = matrix.offsets.double() * (matrix.minima.double() * (1 + exact[1]))[..., None]
        weights = weights + parts.repeat_interleave(weights.shape[-1] // parts.shape[-1], -1)
    expected = plain @ weights.flatten(1).T + bias.double()
    (expected * wanted.double()).sum().backward()
    size = float(expected.detach().abs().mean())
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=2e-3 * size)  # scales in half precision
    assert exact.grad is not None and plain.grad is not None and inputs.grad is not None
    for found, right in ((layer.moves.grad, exact.grad), (inputs.grad, plain.grad)):
        assert found is not None
        torch.testing.assert_close(found.double(), right, rtol=1e-2, atol=2e-3 * float(right.abs().mean()))


def moved(files: ScaleFiles) -> dict[str, torch.Tensor]:
    """Change all numbers of a file at random; the values that its matrices should then have."""
    random = torch.Generator().manual_seed(4)
    numbers, expected = {}, {}
    for name, found in files.weights():
        if not isinstance(found, ScaledMatrix):
            expected[name] = found.clone()
            continue
        moves = 0.03 * torch.randn(len(found.numbers), *found.scales.shape, generator=random)
        numbers[name] = [number.numpy() for number in found.moved(moves)]
        expected[name] = found.values(moves)
    files.write(numbers)
    return expected


def near_the_checkpoint(files: ScaleFiles, checkpoint: Path, limit: float) -> set[str]:
    """The weights of a file, all of them as near to the checkpoint's as rounding leaves them."""
    weights, names = Tensors(checkpoint), set()
    for name, found in files.weights():
        values = found.values() if isinstance(found, ScaledMatrix) else found
        assert row_error(values.numpy(), weights[name].float().numpy()) < limit, name
        names.add(name)
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_scales_are_replaced_in_the_checkpoints_layout(shaken, tmp_path, family):
    checkpoint, file = shaken(family, **WIDE), tmp_path / "m.gguf"
    write_gguf(checkpoint, file, "Q4_K_M", threads=1)
    before, size = {t.name: t.data.tobytes() for t in gguf.GGUFReader(file).tensors}, file.stat().st_size
    names = near_the_checkpoint(GgufScales([file], checkpoint), checkpoint, 0.3)
    assert len(names) == 2 * (4 if family == "phi3" else 7) + 1
    expected = moved(GgufScales([file], checkpoint))
    assert file.stat().st_size == size
    for name, found in GgufScales([file], checkpoint).weights():
        values = found.values() if isinstance(found, ScaledMatrix) else found
        torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-6)
    changed = {t.name for t in gguf.GGUFReader(file).tensors if t.data.tobytes() != before[t.name]}
    assert len(changed) == len(names) - 1 and all(name.startswith("blk.") for name in changed)
    errors = [error for name, _, error in gguf_errors(file, checkpoint) if name in changed]
    assert 0.05 < max(errors) < 0.4  # read back as the verification does: moved, and not shuffled


def test_depths_share_the_scales_that_are_replaced(shaken, tmp_path):
    """In hard links and, where the file system has none, in every copy."""
    checkpoint, depths = shaken(**WIDE), [1, 2]
    for copied in (False, True):
        folder = tmp_path / f"copied-{copied}"
        write_family(checkpoint, folder, "Q4_0", depths, threads=1)
        if copied:
            for path in folder.iterdir():
                data = path.read_bytes()
                path.unlink()
                path.write_bytes(data)
        first = [folder / family_name(folder.name, depth, 1, depths) for depth in depths]
        expected = moved(GgufScales(first, checkpoint))
        for file in first:
            for name, found in GgufScales([file], checkpoint).weights():
                values = found.values() if isinstance(found, ScaledMatrix) else found
                torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_onnx_scales_are_replaced_in_the_checkpoints_layout(shaken, tmp_path, inline_builder, family, tied):
    checkpoint, folder = shaken(family, tied=tied), tmp_path / "m"
    write_onnx(checkpoint, folder, "int4")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = near_the_checkpoint(OnnxScales(folder, checkpoint), checkpoint, 0.3)
    assert len(names) == 4 * (4 if family == "phi3" else 7) + (1 if tied else 2)
    expected = moved(OnnxScales(folder, checkpoint))
    for name, found in OnnxScales(folder, checkpoint).weights():
        values = found.values() if isinstance(found, ScaledMatrix) else found
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-7)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"model.onnx.data"}
    assert len(after["model.onnx.data"]) == len(before["model.onnx.data"])
    errors = {name: error for name, kind, error in onnx_errors(folder, checkpoint) if kind == "int4"}
    assert 0.05 < max(errors.values()) < 0.4
