"""ONNX graphs for several depths over one weights file.

    onnx/int4/d12/              genai_config.json (names d16/d24/model-d12.onnx), config.json, tokenizer …
    onnx/int4/d12/d16/          the same for 16 blocks
    onnx/int4/d12/d16/d24/      the same for all blocks, as an ordinary ONNX folder: model.onnx and model.onnx.data;
                                beside them the other depths' graphs, model-d12.onnx and model-d16.onnx

A depth's folder contains those of the greater depths because of the runtimes' restrictions: onnxruntime-genai needs its
graph at or below its genai_config.json, ONNX Runtime and the onnx package need weights beside their graph, neither
follows symbolic links, and the onnx package reads no weights with several hard links. So the one weights file needs no
links, and any copy keeps it single; only the tokenizer's files, a few megabytes, are hard links between depths.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..modeling.blocks import config_at
from ..modeling.checkpoint import link_file
from ..modeling.types import ModelConfig
from ..runtime.onnx_engine import WEIGHTS
from .bundle import Size
from .onnx_retaining import SCORES, head_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

GRAPH = "model.onnx"
SETTINGS = "genai_config.json"
CONFIG = "config.json"


def depth_folder(depth: int, depths: Sequence[int]) -> str:
    """A depth's subfolder in the folder of a family."""
    return "/".join(f"d{d}" for d in depths if d <= depth)


def spread(folder: Path, family: Path, depths: Sequence[int], config: ModelConfig) -> None:
    """Turn an ONNX folder of all blocks, whose configuration is `config`, into a family of several depths.

    `family` is a new folder; `folder` is moved into it.
    """
    deepest = family / depth_folder(depths[-1], depths)
    deepest.parent.mkdir(parents=True)
    folder.rename(deepest)
    for depth in depths[:-1]:
        _add_depth(deepest, family / depth_folder(depth, depths), depth, config)


def _add_depth(deepest: Path, folder: Path, depth: int, config: ModelConfig) -> None:
    import onnx_ir as ir

    graph = deepest / f"model-d{depth}.onnx"
    model = ir.load(deepest / GRAPH)
    cut_graph(model, depth)
    ir.save(model, graph)  # its tensors are where they were in the weights file
    for file in companions(deepest):
        if file.name not in (SETTINGS, CONFIG):
            link_file(file, folder / file.name)
    settings = read_settings(deepest)
    filename = graph.relative_to(folder).as_posix()
    settings["model"]["decoder"] |= {"filename": filename, "num_hidden_layers": depth}
    write_settings(folder, settings)
    config_at(config, depth).to_json_file(folder / CONFIG)


def companions(folder: Path) -> list[Path]:
    """A depth's files other than graphs and weights, in order."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("model")]


def read_settings(folder: Path) -> dict[str, Any]:
    """The contents of genai_config.json."""
    return read_json(folder / SETTINGS)


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write genai_config.json."""
    write_json(folder / SETTINGS, settings, indent=4, ascii=True)


def graph_of(folder: Path) -> Path:
    """The graph that a depth's folder names."""
    return folder / read_settings(folder)["model"]["decoder"]["filename"]


def cut_graph(model: ir.Model, depth: int) -> None:
    """Truncate a builder's graph to its first `depth` blocks, in place.

    The norm before a block adds the block before it to the residual stream as well (SkipSimplifiedLayerNormalization);
    the final norm does the same, so it gets the inputs of the norm of the first removed block.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    nodes = {str(node.name): node for node in graph}
    (final,) = (node for name, node in nodes.items() if name.endswith("/final_norm_layernorm/SkipLayerNorm"))
    first_gone = nodes[f"/model/layers.{depth}/input_layernorm/SkipLayerNorm"]
    for index in (0, 1):
        final.replace_input_with(index, first_gone.inputs[index])
    graph.outputs[:] = [value for value in graph.outputs if _block(str(value.name)) < depth]
    graph.inputs[:] = [value for value in graph.inputs if _block(str(value.name)) < depth]
    RemoveUnusedNodesPass()(model)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)


def _block(name: str) -> int:
    """The block of an input or output such as past_key_values.3.key; -1 for those of no block."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] in ("past_key_values", "present", SCORES) else -1


def weights_read(graph: Path) -> dict[str, tuple[Any, ...]]:
    """A graph's tensors stored in a weights file: name → file, offset, length, type and shape."""
    import onnx

    found: dict[str, tuple[Any, ...]] = {}
    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            where = place["location"], int(place["offset"]), int(place["length"])
            found[tensor.name] = (*where, tensor.data_type, tuple(tensor.dims))
    return found


def check_family(family: Path, depths: Sequence[int]) -> None:
    """`UserError` unless every depth's graph reads the same tensors as the deepest one's."""
    deepest = weights_read(graph_of(family / depth_folder(depths[-1], depths)))
    for depth in depths:
        graph = graph_of(family / depth_folder(depth, depths))
        for name, place in weights_read(graph).items():
            if deepest.get(name) != place:
                raise UserError(f"{graph} and {GRAPH} read different data for {name}: the graph was written wrongly")


def measure_onnx(folder: Path, parameters: int) -> Size:
    """The size of one depth: its files, its graph, and the part of the weights file that the graph reads.

    `parameters` are those of the checkpoint at this depth.
    """
    graph = graph_of(folder)
    weights = sum(place[2] for place in weights_read(graph).values())
    if graph.name == GRAPH:  # all of it, gaps between tensors included
        weights = graph.with_name(WEIGHTS).stat().st_size
    others = sum(file.stat().st_size for file in [graph, *companions(folder)])
    return Size(weights + others, parameters, 8 * (weights - head_bytes(weights_read(graph))) / parameters)


def extract_depth(folder: Path, out: Path) -> None:
    """Write one depth as an ordinary ONNX folder, `out`, which must exist: the tensors byte for byte."""
    import onnx_ir as ir

    ir.save(ir.load(graph_of(folder)), out / GRAPH, external_data=WEIGHTS, size_threshold_bytes=0)
    for file in companions(folder):
        shutil.copyfile(file, out / file.name)
    settings = read_settings(folder)
    settings["model"]["decoder"]["filename"] = GRAPH
    write_settings(out, settings)
