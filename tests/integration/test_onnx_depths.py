"""Several depths over one ONNX weights file, in stock onnxruntime and onnxruntime-genai, compared with torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compress.core.errors import UserError
from compress.export.onnx import write_onnx
from compress.export.onnx_depths import (
    check_family,
    depth_folder,
    extract_depth,
    graph_of,
    measure_onnx,
    weights_read,
)
from compress.modeling.blocks import without_blocks
from compress.modeling.families import FAMILIES
from compress.modeling.load import load_config, load_model
from compress.modeling.weights import count_parameters
from compress.runtime.engine import ScoringWindow
from compress.runtime.genai_engine import GenaiEngine
from compress.runtime.onnx_engine import OnnxEngine
from onnx.numpy_helper import to_array

TOLERANCE = 1e-4  # nats, of every log-probability in float32
IDS = [(37 * i) % 450 + 3 for i in range(60)]
DEPTHS = [1, 3, 4]
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + i / 16 for i in range(8)],
    "long_factor": [2 + i / 5 for i in range(8)],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tied": False}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tied": False}),
    "phi3, two rope caches": (
        "phi3",
        {"rope_parameters": LONG, "max_positions": 512, "original_max_position_embeddings": 256},
    ),
    "gemma3": (
        "gemma3_text",
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8, "tied": False},
    ),
}


def expected(checkpoint: Path, depth: int) -> np.ndarray:
    model = load_model(checkpoint)
    with without_blocks(model, range(depth, model.config.num_hidden_layers)), torch.no_grad():
        return torch.log_softmax(model(torch.tensor([IDS])).logits[0], -1).numpy()


def largest_difference(folder: Path, logprobs: np.ndarray, engine_class: Any) -> float:
    with engine_class(folder, threads=1) as engine:
        scores = engine.score([ScoringWindow.of(IDS)])[0]
    assert len(scores) == len(IDS) - 1
    return max(float(np.abs(score.logprobs - logprobs[score.position - 1]).max()) for score in scores)


def values_of(graph: Path) -> dict[str, np.ndarray]:
    """Every tensor of a graph, by the onnx package's own reading of the weights file."""
    return {tensor.name: to_array(tensor) for tensor in onnx.load(str(graph)).graph.initializer}


def test_every_family_is_tested():
    assert sorted({family for family, _ in CASES.values()}) == sorted(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_every_depth_predicts_what_torch_does(shaken, tmp_path, inline_builder, case):
    family, options = CASES[case]
    checkpoint = shaken(family, **options)
    write_onnx(checkpoint, tmp_path / "m", "fp32", depths=DEPTHS)
    check_family(tmp_path / "m", DEPTHS)
    for depth in DEPTHS:
        folder = tmp_path / "m" / depth_folder(depth, DEPTHS)
        logprobs = expected(checkpoint, depth)
        for engine_class in (OnnxEngine, GenaiEngine):
            assert largest_difference(folder, logprobs, engine_class) < TOLERANCE
        names = [value.name for value in onnx.load(str(graph_of(folder)), load_external_data=False).graph.output]
        presents = [f"present.{i}.{part}" for i in range(depth) for part in ("key", "value")]
        assert sorted(names) == sorted(["logits", *presents])
        config = load_config(folder)
        assert config.num_hidden_layers == depth and len(getattr(config, "layer_types", None) or [0] * depth) == depth


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_depths_share_one_weights_file(shaken, tmp_path, inline_builder, precision, tied):
    checkpoint = shaken(tied=tied)
    write_onnx(checkpoint, tmp_path / "single", precision)
    write_onnx(checkpoint, tmp_path / "m", precision, depths=DEPTHS)
    deepest = tmp_path / "m" / "d1" / "d3" / "d4"
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "config.json", "tokenizer.json"):
        assert (deepest / name).read_bytes() == (tmp_path / "single" / name).read_bytes(), name
    data = [file for file in (tmp_path / "m").rglob("*.data")]
    assert data == [deepest / "model.onnx.data"] and data[0].stat().st_nlink == 1
    whole = values_of(deepest / "model.onnx")
    for depth in DEPTHS:
        folder = tmp_path / "m" / depth_folder(depth, DEPTHS)
        logprobs = expected(checkpoint, depth)
        assert largest_difference(folder, logprobs, OnnxEngine) < (0.2 if precision == "int8" else 3)
        made = tmp_path / f"one-{depth}"
        made.mkdir()
        extract_depth(folder, made)
        values = values_of(made / "model.onnx")
        assert values and all(np.array_equal(array, whole[name]) for name, array in values.items())
        with OnnxEngine(made, threads=1) as one, OnnxEngine(folder, threads=1) as shared:
            assert np.array_equal(one.logits(IDS)[0], shared.logits(IDS)[0])
        GenaiEngine(made).close()
        parameters = count_parameters(checkpoint, depth)
        size = measure_onnx(folder, parameters)
        files = sum(file.stat().st_size for file in made.iterdir())
        assert size.parameters == parameters and size.bytes == pytest.approx(files, rel=0.01)
    assert (tmp_path / "one-4" / "model.onnx.data").read_bytes() == data[0].read_bytes()


def test_a_further_depth_costs_a_graph(tiny, tmp_path, inline_builder):
    """Tokenizers are links; what is left is a graph and two small files."""
    write_onnx(tiny(), tmp_path / "m", "int4", depths=[2, 4])
    files = {file for file in (tmp_path / "m").rglob("*") if file.is_file()}
    once = {file.stat().st_ino: file.stat().st_size for file in files}
    deepest = tmp_path / "m" / "d2" / "d4"
    graph = deepest / "model-d2.onnx"
    alone = {file for file in deepest.iterdir() if file != graph}
    own = [graph, tmp_path / "m" / "d2" / "genai_config.json", tmp_path / "m" / "d2" / "config.json"]
    assert sum(once.values()) == sum(file.stat().st_size for file in [*alone, *own])
    assert (tmp_path / "m" / "d2" / "tokenizer.json").samefile(deepest / "tokenizer.json")


def test_a_copied_family_works(shaken, tmp_path, inline_builder):
    checkpoint = shaken()
    write_onnx(checkpoint, tmp_path / "m", "fp32", depths=[2, 4])
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    shutil.rmtree(tmp_path / "m")
    assert len(list((tmp_path / "copy").rglob("*.data"))) == 1
    for engine_class in (OnnxEngine, GenaiEngine):
        assert largest_difference(tmp_path / "copy" / "d2", expected(checkpoint, 2), engine_class) < TOLERANCE


def test_graphs_that_read_other_weights_are_found(tiny, tmp_path, inline_builder):
    write_onnx(tiny(), tmp_path / "m", "int8", depths=[2, 4])
    graph = graph_of(tmp_path / "m" / "d2")
    model = onnx.load(str(graph), load_external_data=False)
    name = next(iter(weights_read(graph)))
    tensor = next(t for t in model.graph.initializer if t.name == name)
    for entry in tensor.external_data:
        if entry.key == "offset":
            entry.value = str(int(entry.value) + 32)
    onnx.save(model, str(graph))
    with pytest.raises(UserError, match=r"model-d2\.onnx and model\.onnx read different data for "):
        check_family(tmp_path / "m", [2, 4])


def test_a_folder_that_lacks_its_graph_or_weights_is_named(tiny, tmp_path, inline_builder):
    write_onnx(tiny(), tmp_path / "m", "int8", depths=[2, 4])
    settings = json.loads((tmp_path / "m" / "d2" / "genai_config.json").read_text())
    assert settings["model"]["decoder"]["filename"] == "d4/model-d2.onnx"
    (tmp_path / "m" / "d2" / "d4" / "model.onnx.data").unlink()
    with pytest.raises(UserError, match=r"lacks d4/model\.onnx\.data: the export is incomplete"):
        OnnxEngine(tmp_path / "m" / "d2")
    (tmp_path / "m" / "d2" / "d4" / "model-d2.onnx").unlink()
    with pytest.raises(UserError, match=r"lacks d4/model-d2\.onnx"):
        OnnxEngine(tmp_path / "m" / "d2")
