"""Describes a file or folder from its headers. No torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from ..core.errors import UserError
from ..core.files import printable, read_json
from ..core.gguf_header import split_files
from ..modeling.config import read_config
from ..modeling.weights import ADAPTER_CONFIG, is_adapter_alone, safetensors_header, tensor_headers, weight_files
from ..records.bundle import ArtifactEntry, FamilyEntry, RetainingEntry
from ..records.manifest import StageManifest
from ..runtime.bundle import is_bundle, read_bundle


class _Info(BaseModel):
    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="the file or folder")


class HeadsInfo(BaseModel):
    """Retaining heads of a checkpoint, and the settings they were trained for."""

    blocks: int = Field(description="number of blocks with a head")
    width: int = Field(description="hidden width of a head")
    settings: dict[str, JsonValue] = Field(description="settings that the heads were trained for")


class CheckpointInfo(_Info):
    """A checkpoint folder; values that its config.json lacks, or that are not numbers there, are null."""

    kind: Literal["checkpoint"] = "checkpoint"
    family: str | None = Field(description="model_type of the configuration")
    blocks: int | None = Field(description="number of blocks")
    parameters: int = Field(description="number of weights")
    types: dict[str, int] = Field(description="number of weights by dtype")
    bytes: int = Field(description="size of the weight files")
    hidden_size: int | None = Field(description="width of the residual stream")
    heads: int | None = Field(description="query heads per block")
    kv_heads: int | None = Field(description="key/value heads per block")
    vocabulary: int | None = Field(description="rows of the embedding")
    context: int | None = Field(description="trained context length in tokens")
    kept_blocks: list[int] | None = Field(default=None, description="indices of its blocks in the unpruned model")
    depths: list[int] | None = Field(default=None, description="depths that it was trained to run at")
    retaining: HeadsInfo | None = Field(default=None, description="its retaining heads")
    notes: list[str] = Field(description="corrections made on loading, or why it cannot be loaded")


class AdapterInfo(_Info):
    """An adapter without its base model."""

    kind: Literal["adapter"] = "adapter"
    method: str | None = Field(description="peft's name of the method")
    base: str | None = Field(description="base model")
    rank: int | None = Field(description="rank of the adapter")
    layers: list[str] = Field(description="names of the adapted layers")


class GgufInfo(_Info):
    """A GGUF file, or the first part of a model in several."""

    kind: Literal["gguf"] = "gguf"
    part: int = Field(default=1, description="number of this part, from 1")
    parts: int = Field(default=1, description="number of parts of the model")
    blocks: int | None = Field(default=None, description="number of blocks")
    bytes: int = Field(description="size of this file")
    bytes_of_all_parts: int | None = Field(default=None, description="size of all parts, for the first of several")
    bytes_shared: int | None = Field(default=None, description="size of the parts that other depths share")
    parameters: int = Field(description="number of weights in this file")
    bits_per_weight: float = Field(description="average over this file's tensors")
    tensors: dict[str, int] = Field(description="number of tensors by type")
    metadata: dict[str, JsonValue] = Field(description="metadata, without vocabulary and chat template")


class OnnxInfo(_Info):
    """An ONNX folder as onnxruntime-genai reads it."""

    kind: Literal["onnx"] = "onnx"
    family: str = Field(description="model type in genai_config.json")
    blocks: int = Field(description="number of blocks")
    weight_bits: list[int] = Field(description="bit widths of quantized weights; empty if there are none")
    graph: str = Field(description="file of the graph")
    graph_bytes: int = Field(description="size of the graph")
    weights: str = Field(description="file of the weights")
    weights_bytes_used: int = Field(description="bytes of the weights file that this graph reads")
    weights_bytes: int | None = Field(description="size of the weights file; null if it is missing")
    context: int = Field(description="context length in tokens")
    operators: dict[str, int] = Field(description="number of nodes by operator, most common first")
    inputs: list[str] = Field(description="names of the graph's inputs")
    retaining_scores: int = Field(description="number of blocks with an output for retaining scores")


class BundleInfo(_Info):
    """A bundle."""

    kind: Literal["bundle"] = "bundle"
    name: str = Field(description="the model's name")
    family: str = Field(description="model_type of the configuration")
    parameters: int = Field(description="parameters of the whole model")
    depths: list[int] = Field(description="numbers of blocks that it can run at, ascending")
    retaining: RetainingEntry | None = Field(description="its retaining heads")
    families: list[FamilyEntry] = Field(description="types with several depths")
    artifacts: list[ArtifactEntry] = Field(description="one entry per type and depth")


class StageInfo(_Info):
    """A stage's folder."""

    kind: Literal["stage"] = "stage"
    stage: str = Field(description="the stage")
    chosen: str | None = Field(description="the selected one of several models")
    fingerprint: str = Field(description="hash of everything that the output depends on")
    seconds: float = Field(description="wall time")
    peak_memory_bytes: int = Field(description="peak memory of the process and its children")
    inputs: list[str] = Field(description="stages that it read")
    config: dict[str, JsonValue] = Field(description="the recipe's section")
    files: int = Field(description="number of files")


class StageOfRun(BaseModel):
    """A stage of a run."""

    name: str = Field(description="the stage")
    folder: str = Field(description="name of its folder")
    seconds: float = Field(description="wall time")


class RunInfo(_Info):
    """A run's folder."""

    kind: Literal["run"] = "run"
    stages: list[StageOfRun] = Field(description="finished stages")
    begun: list[str] = Field(description="folders of unfinished stages")
    reports: list[str] = Field(description="paths of the reports")


Inspection = Annotated[
    CheckpointInfo | AdapterInfo | GgufInfo | OnnxInfo | BundleInfo | StageInfo | RunInfo, Field(discriminator="kind")
]


def inspect(
    path: str | Path,
) -> CheckpointInfo | AdapterInfo | GgufInfo | OnnxInfo | BundleInfo | StageInfo | RunInfo:
    """Describe a checkpoint, adapter, GGUF file, ONNX folder, bundle, stage folder or run folder; reads no weights.

    >>> inspect("bundle/gguf/model-Q4_K_M.gguf").bits_per_weight

    Raises `UserError` for anything else, and for what is broken.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    for matches, describe in (
        (path.suffix == ".gguf" and path.is_file(), _gguf),
        ((path / "last-run.json").is_file() or (path / "recipe.yaml").is_file(), _run),
        ((path / "genai_config.json").is_file(), _onnx),
        (is_bundle(path), _bundle),
        (_has(path / StageManifest.FILE, "stage"), _stage),
        (is_adapter_alone(path), _adapter),
        ((path / "config.json").is_file(), _checkpoint),
    ):
        if matches:
            return describe(path)
    raise UserError(f"{path} is not a checkpoint, GGUF file, ONNX folder, bundle, stage or run folder")


def _has(file: Path, key: str) -> bool:
    return file.is_file() and key in read_json(file)


def _checkpoint(path: Path) -> CheckpointInfo:
    config, notes = read_config_as_is(path)
    types: Counter[str] = Counter()
    for tensor in tensor_headers(path).values():
        types[tensor.dtype] += tensor.size
    return CheckpointInfo(
        path=printable(path),
        family=_text(config.get("model_type")),
        blocks=_count(config.get("num_hidden_layers")),
        parameters=sum(types.values()),
        types=dict(types),
        bytes=sum(file.stat().st_size for file in weight_files(path)),
        hidden_size=_count(config.get("hidden_size")),
        heads=_count(config.get("num_attention_heads")),
        kv_heads=_count(config.get("num_key_value_heads")),
        vocabulary=_count(config.get("vocab_size")),
        context=_count(config.get("max_position_embeddings")),
        kept_blocks=config.get("compress_kept_blocks"),
        depths=config.get("compress_depths"),
        retaining=_heads(path / "retaining" / "heads.safetensors"),
        notes=notes,
    )


def _heads(file: Path) -> HeadsInfo | None:
    if not file.is_file():
        return None
    shapes = [tensor["shape"] for name, tensor in safetensors_header(file).items() if name.endswith("w1.weight")]
    settings = read_json(file.with_name("settings.json"))
    return HeadsInfo(blocks=len(shapes), width=shapes[0][0] if shapes else 0, settings=settings)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def read_config_as_is(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The values of config.json, and notes: corrections made when it is read as a model, or why it cannot be."""
    try:
        return read_config(path)
    except UserError as error:
        return read_json(path / "config.json"), [f"not read as a model: {error}"]


def _adapter(path: Path) -> AdapterInfo:
    settings = read_json(path / ADAPTER_CONFIG)
    layers = settings.get("target_modules") or []
    return AdapterInfo(
        path=printable(path),
        method=_text(settings.get("peft_type")),
        base=_text(settings.get("base_model_name_or_path")),
        rank=_count(settings.get("r")),
        layers=[layers] if isinstance(layers, str) else layers,
    )


def _gguf(path: Path) -> GgufInfo:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        values = {
            key: entry.contents() for key, entry in reader.fields.items() if not key.startswith("tokenizer.ggml.")
        }
    except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
        raise UserError(f"{path} is not a readable GGUF file: {error}") from error
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    packed = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    part, parts = int(values.get("split.no", 0)) + 1, int(values.get("split.count", 1))
    files = [file.stat() for file in split_files(path)] if parts > 1 and part == 1 else []
    return GgufInfo(
        path=printable(path),
        part=part,
        parts=parts,
        blocks=values.get(f"{values.get('general.architecture')}.block_count"),
        bytes=path.stat().st_size,
        bytes_of_all_parts=sum(file.st_size for file in files) if files else None,
        bytes_shared=sum(file.st_size for file in files if file.st_nlink > 1) if files else None,
        parameters=weights,
        bits_per_weight=8 * packed / max(weights, 1),
        tensors=dict(types.most_common()),
        metadata={key: value for key, value in values.items() if not key.startswith(("GGUF.", "tokenizer.chat"))},
    )


def _onnx(path: Path) -> OnnxInfo:
    import onnx

    config = read_json(path / "genai_config.json")["model"]
    graph = path / config["decoder"]["filename"]
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, and OSError for a missing file
        raise UserError(f"{graph} is not a readable ONNX model: {error}") from error
    lengths = [int(e.value) for t in model.graph.initializer for e in t.external_data if e.key == "length"]
    weights = graph.with_name("model.onnx.data")
    packed = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    return OnnxInfo(
        path=printable(path),
        family=config["type"],
        blocks=config["decoder"]["num_hidden_layers"],
        weight_bits=sorted({a.i for node in packed for a in node.attribute if a.name == "bits"}),
        graph=config["decoder"]["filename"],
        graph_bytes=graph.stat().st_size,
        weights=weights.name,
        weights_bytes_used=sum(lengths),
        weights_bytes=weights.stat().st_size if weights.is_file() else None,
        context=config["context_length"],
        operators=dict(Counter(node.op_type for node in model.graph.node).most_common()),
        inputs=[entry.name for entry in model.graph.input],
        retaining_scores=sum(value.name.startswith("retaining_scores.") for value in model.graph.output),
    )


def _bundle(path: Path) -> BundleInfo:
    manifest = read_bundle(path)
    names = set(BundleInfo.model_fields) - {"path", "kind"}
    return BundleInfo(path=printable(path), **{name: getattr(manifest, name) for name in names})


def _stage(path: Path) -> StageInfo:
    manifest = StageManifest.read(path)
    return StageInfo(
        path=printable(path),
        stage=manifest.stage,
        chosen=manifest.chosen,
        fingerprint=manifest.fingerprint,
        seconds=manifest.seconds,
        peak_memory_bytes=manifest.peak_memory_bytes,
        inputs=list(manifest.inputs),
        config=manifest.config,
        files=len(manifest.files),
    )


def _run(path: Path) -> RunInfo:
    stages, begun = [], []
    for folder in sorted(path.iterdir()):
        if _has(folder / StageManifest.FILE, "stage"):
            manifest = StageManifest.read(folder)
            stages.append(StageOfRun(name=manifest.stage, folder=folder.name, seconds=manifest.seconds))
        elif folder.name.endswith(".partial"):
            begun.append(folder.name)
    reports = [printable(path / name) for name in ("report.html", "report.json") if (path / name).exists()]
    return RunInfo(path=printable(path), stages=stages, begun=begun, reports=reports)
