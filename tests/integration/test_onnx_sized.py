"""ONNX folders of a size: bytes known beforehand, grids as chosen, the runtime's predictions those of the values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Inputs, Progress
from compress.data.calibration import calibration_batches
from compress.export import sensitivity
from compress.export.config import ExportConfig
from compress.export.extract import extract
from compress.export.grids import FLOAT, Grid
from compress.export.job import ExportJob
from compress.export.onnx import build_graph, write_onnx
from compress.export.onnx_kv import CacheScales
from compress.export.onnx_sized import OnnxSizes
from compress.export.sensitivity import Sensitivity, collect_sensitivity
from compress.export.stage import export_checkpoint
from compress.export.tensors import CheckpointWeights, dequantize_nbits, integer_parts
from compress.kv.settings import HeadSettings
from compress.modeling.checkpoint import link_files
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.modeling.retaining import RetainingHeads, save_heads
from compress.modeling.shape import AttentionShape
from compress.runtime.engine import ScoringWindow
from compress.runtime.onnx_engine import OnnxEngine
from onnx.numpy_helper import to_array

QUICK = {"verify": {"tokens": 16, "window": 16}, "imatrix_tokens": 128, "threads": 1}
IDS = [(37 * i) % 450 + 3 for i in range(60)]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "untied, multi-head, rows of 80 and 72": (
        "llama",
        {"tied": False, "hidden": 80, "heads": 5, "kv_heads": 5, "intermediate": 72},
    ),
    "qwen3": ("qwen3", {"tied": False}),
    "phi3, halves of one matrix": ("phi3", {"tied": False}),
    "gemma3": ("gemma3_text", {}),
}


@pytest.fixture(scope="module")
def built(shaken, tmp_path_factory, builder_here) -> Callable[[str], tuple[Path, Path]]:
    """built(case) -> a checkpoint and the folder with its graph, made once."""
    found: dict[str, tuple[Path, Path]] = {}

    def make(case: str) -> tuple[Path, Path]:
        if case not in found:
            family, options = CASES[case]
            checkpoint = shaken(family, **options)
            with builder_here():
                folder = build_graph(checkpoint, tmp_path_factory.mktemp("graph") / "built", Progress())
            found[case] = checkpoint, folder
        return found[case]

    return make


def drawn(sizes: OnnxSizes, seed: int) -> dict[str, Grid]:
    """A grid for every matrix, any that fits."""
    draw = np.random.default_rng(seed)
    kinds = {name: sizes.kinds(shape[1]) for name, shape in sizes.shapes.items()}
    return {name: found[draw.integers(len(found))] for name, found in kinds.items()}


def flat(sizes: OnnxSizes) -> dict[str, np.ndarray]:
    return {name: np.ones(shape[1], np.float32) for name, shape in sizes.shapes.items()}


def grids_in(folder: Path) -> dict[str, Grid]:
    """What the nodes of a graph say of themselves; FLOAT for matrices that are as they were."""
    found = {}
    for node in onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.node:
        settings = {a.name: a.i for a in node.attribute}
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            found[node.name] = Grid(settings["bits"], settings["block_size"], len(node.input) == 4)
        elif node.op_type in ("MatMul", "Gather") and "/rotary" not in node.name:
            found[node.name] = FLOAT
    return found


def dequantized(folder: Path, checkpoint: Path) -> Any:
    """The checkpoint's model with the values of a folder's integers."""
    model = load_model(checkpoint)
    weights = CheckpointWeights(checkpoint)
    graph = onnx.load(str(folder / "model.onnx")).graph
    stored = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        settings = {a.name: a.i for a in node.attribute}
        parts = [stored[name] if name else None for name in integer_parts(node)]
        places, start = weights.places(node.name), 0
        columns = weights.where.headers[places[0][0]].shape[1]
        values = dequantize_nbits(parts, settings["bits"], settings["block_size"], columns)
        for name, rows in places:
            count = rows.stop - rows.start
            model.get_parameter(name).data[rows] = torch.from_numpy(values[start : start + count])
            start += count
    return model


def kl(folder: Path, model: Any) -> float:
    """From a torch model's predictions to those of a folder in ONNX Runtime."""
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([IDS])).logits[0], -1).numpy()
    with OnnxEngine(folder, threads=1) as engine:
        scores = engine.score([ScoringWindow.of(IDS)])[0]
    rows = [(expected[s.position - 1], s.logprobs) for s in scores]
    return float(np.mean([np.sum(np.exp(p) * (p - q)) for p, q in rows]))


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_known_and_the_runtime_predicts_with_the_values(built, tmp_path, case):
    checkpoint, folder = built(case)
    sizes = OnnxSizes(checkpoint, folder)
    types = drawn(sizes, 3)
    importance = flat(sizes)
    info = write_onnx(
        checkpoint,
        tmp_path / "m",
        "1MB",
        built=folder,
        grids={node: types[name] for name, nodes in sizes.nodes.items() for node in nodes},
        imatrix={node: importance[name] for name, nodes in sizes.nodes.items() for node in nodes},
    )
    assert sizes.bytes(types) == info.bytes
    assert sizes.weight_bytes(types) == (tmp_path / "m" / "model.onnx.data").stat().st_size
    found = grids_in(tmp_path / "m")
    nodes = {node: types[name] for name, nodes in sizes.nodes.items() for node in nodes}
    assert nodes.items() <= found.items()
    if "/model/embed_tokens/Gather" not in nodes:  # tied: one choice, one matrix
        assert found["/model/embed_tokens/Gather"] == types["/lm_head/MatMul"]
    # Activations are rounded to 8 bits, which costs little; the weights' rounding costs much more.
    exact = kl(tmp_path / "m", dequantized(tmp_path / "m", checkpoint))
    assert exact < 2e-3 and exact < 0.05 * kl(tmp_path / "m", load_model(checkpoint))


def test_rows_that_fit_no_block_stay_as_they_are(built):
    sizes = OnnxSizes(*built("untied, multi-head, rows of 80 and 72"))
    assert sizes.kinds(72) == [FLOAT]
    assert {grid.block for grid in sizes.kinds(80)} == {1, 16}
    assert {grid.bits for grid in sizes.kinds(80)} == {32, 8, 4}


def test_halves_of_a_matrix_and_packed_ones_are_one_choice(built):
    sizes = OnnxSizes(*built("phi3, halves of one matrix"))
    gates = [nodes for nodes in sizes.nodes.values() if any("mlp/gate" in node for node in nodes)]
    assert len(gates) == 4 and all(len(nodes) == 2 for nodes in gates)
    llama = OnnxSizes(*built("llama"))
    assert len([name for name in llama.nodes if "qkv_proj" in name]) == 4


def test_an_int8_cache_is_counted(built, tmp_path):
    checkpoint, folder = built("llama")
    ones = np.full((4, 32), 0.1, np.float32)
    sizes = OnnxSizes(checkpoint, folder, kv=True)
    types = drawn(sizes, 4)
    importance = flat(sizes)
    options = {"grids": types, "imatrix": importance, "kv": CacheScales(ones, ones)}
    assert sizes.bytes(types) == write_onnx(checkpoint, tmp_path / "m", "1MB", built=folder, **options).bytes
    assert sizes.bytes(types) != OnnxSizes(checkpoint, folder).bytes(types)


def test_retaining_heads_are_counted_as_a_file_but_not_as_weights(built, tmp_path):
    checkpoint, folder = built("llama")
    link_files(checkpoint, tmp_path / "with")
    shape = load_config(checkpoint)
    heads = RetainingHeads(shape.num_hidden_layers, AttentionShape.of(shape), 24)
    save_heads(heads, HeadSettings(budget=64, chunk=16, stabilizers=8, local=8), tmp_path / "with")
    sizes = OnnxSizes(tmp_path / "with", folder)
    types = drawn(sizes, 5)
    info = write_onnx(tmp_path / "with", tmp_path / "m", "1MB", built=folder, grids=types, imatrix=flat(sizes))
    assert sizes.bytes(types) == info.bytes
    assert sizes.weight_bytes(types) == OnnxSizes(checkpoint, folder).weight_bytes(types)
    assert 8 * sizes.weight_bytes(types) / sizes.parameters == pytest.approx(info.bits_per_weight)


@pytest.fixture(scope="module")
def sensed(built, talks) -> Callable[[str], Sensitivity]:
    def make(case: str) -> Sensitivity:
        checkpoint, _ = built(case)
        inputs = Inputs(checkpoint, checkpoint, {"data": talks})
        batches = calibration_batches(inputs, load_tokenizer(checkpoint), tokens=384, length=64, batch=1)
        return collect_sensitivity(load_model(checkpoint), batches)

    return make


def plain_int4(sizes: OnnxSizes) -> dict[str, Grid]:
    kinds = {True: Grid(4, 32, True), False: Grid(8, 32, False)}
    return {name: kinds["/layers." in name] for name in sizes.shapes}


@pytest.mark.parametrize("case", ["llama", "phi3, halves of one matrix", "gemma3"])
def test_a_choice_fits_and_costs_less_than_int4(built, sensed, case):
    """The estimate of a matrix's cost is that of its parts alone, each with its own rows."""
    checkpoint, folder = built(case)
    sizes, found = OnnxSizes(checkpoint, folder), sensed(case)
    like = plain_int4(sizes)
    budget = sizes.bytes(like)
    chosen = sizes.chosen(f"{budget}B", found, {})
    assert 0.98 * budget < sizes.bytes(chosen.types) <= budget and chosen.like == "int4"
    costs = 0.0
    weights, values = CheckpointWeights(checkpoint), sizes.candidates(found, chosen.importance, 0.0)
    for name, grid in like.items():
        matrix = values[name]
        error = (matrix.rounded(matrix.read(), grid) - matrix.read()) ** 2
        start, sum_of_parts = 0, 0.0
        for tensor, rows in (place for node in sizes.nodes[name] for place in weights.places(node)):
            count = rows.stop - rows.start
            for term in found.terms[tensor]:
                sum_of_parts += 0.5 * float(term.rows[rows] @ error[start : start + count] @ term.columns)
            start += count
        whole = 0.5 * sum(float(term.rows @ error @ term.columns) for term in matrix.terms)
        assert whole == pytest.approx(sum_of_parts, rel=1e-4)
        costs += whole
    assert chosen.damage < 0.8 * costs
    damages = [sizes.chosen(f"{bits}bits", found, {}).damage for bits in (6.5, 7, 9)]
    assert damages == sorted(damages, reverse=True) and damages[0] > 3 * damages[-1]


@pytest.fixture
def files(shaken, context, tmp_path, inline_builder) -> Callable[..., tuple[Path, list[dict[str, Any]]]]:
    def make(rows: Path | None = None, **keys: Any) -> tuple[Path, list[dict[str, Any]]]:
        out = tmp_path / "bundle"
        shutil.rmtree(out, ignore_errors=True)
        wanted = ExportConfig.model_validate(QUICK | keys)
        export_checkpoint(shaken(**LOUD), out, wanted, context, name="m", rows=rows)
        return out, json.loads((out / "manifest.json").read_text())["artifacts"]

    return make


LOUD = {"initializer_range": 0.1}


def test_a_folder_is_as_large_as_was_asked_for(files, talks):
    out, entries = files(rows=talks, onnx=[{"size": "400kB"}, {"bits": 6.5}, "int4"], gguf={"size": "400kB"})
    of = {(entry["format"], entry["type"]): entry for entry in entries}
    sized, bits = of["onnx", "400kB"], of["onnx", "6.5bits"]
    folder = out / sized["path"]
    assert sum(file.stat().st_size for file in folder.iterdir()) == sized["bytes"]
    assert 0.97 * 400e3 < sized["bytes"] <= 400e3 and 6.2 < bits["bits_per_weight"] <= 6.5
    assert len(set(grids_in(folder).values())) > 2
    # A size may be asked for in both formats: what is extracted is told by where to.
    extract(out, "400kB", None, out.parent / "m.gguf")
    extract(out, "400kB", None, out.parent / "m")
    assert (out.parent / "m" / "model.onnx").is_file() and (out.parent / "m.gguf").is_file()


def test_sizes_out_of_reach_are_refused_and_large_ones_are_float32(files, built, shaken, monkeypatch, builder_here):
    monkeypatch.setattr(ExportJob, "_measure", lambda _job: pytest.fail("it has begun to work"))
    with pytest.raises(UserError, match=r"export\.onnx: 100kB is too small .* the file has 0\.\d\d MB") as caught:
        files(onnx=["100kB"])
    least = float(str(caught.value).split("the file has ")[1].split()[0])
    monkeypatch.undo()
    with builder_here():
        _, (found,) = files(onnx=[f"{least}MB"], verify={"kl": {f"{least}MB": 99.0}} | QUICK["verify"])
        assert found["bytes"] <= least * 1e6
        monkeypatch.setattr(ExportJob, "_sensed", lambda _job, _model: None)  # there is nothing to choose
        out, (found,) = files(onnx=["1GB"])
    assert set(grids_in(out / found["path"]).values()) == {FLOAT} and found["verification"]["kl"] < 1e-4


def test_depths_share_the_grids_of_their_blocks(files, talks):
    out, found = files(rows=talks, onnx={"size": "400kB"}, depths=[2, 4], kv="int8")
    assert [entry["depth"] for entry in found] == [4, 2]
    assert found[1]["bytes"] < 0.95 * 400e3 < found[0]["bytes"] <= 400e3
    assert len(list((out / "onnx").rglob("*.data"))) == 1


def test_scales_of_chosen_grids_are_trained(files, talks):
    steps = {"steps": 6, "eval_every": 3, "lr": 5e-3}
    _, (found,) = files(
        rows=talks, onnx={"bits": 4.5}, train_scales=steps, verify={"kl": {"4.5bits": 9.0}} | QUICK["verify"]
    )
    trained = found["trained_scales"]
    assert trained["held_out_kl"] < 0.97 * trained["held_out_kl_before"] and trained["step"] > 0


def test_rows_too_few_to_choose_by_are_said(files, talks, monkeypatch):
    monkeypatch.setattr(sensitivity, "TOLD_APART", 0.001)
    with pytest.raises(UserError, match=r"calibration tokens are too few to tell two types apart"):
        files(rows=talks, onnx={"bits": 5.0})
