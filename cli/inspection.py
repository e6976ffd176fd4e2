"""`compress inspect`: what a file or folder is, and what is in it, from headers alone. No torch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..core.errors import UserError
from ..core.files import read_json
from ..core.units import duration, megabytes
from ..modeling.config import read_config
from ..modeling.weights import ADAPTER_CONFIG, is_adapter_alone, safetensors_header, tensor_headers, weight_files
from ..records.bundle import BundleManifest
from ..records.manifest import StageManifest


def inspect_path(path: Path, console: Console) -> None:
    """Describe a checkpoint, GGUF file, ONNX folder, bundle, stage folder or run folder."""
    if not path.exists():
        raise UserError(f"there is nothing at {path}")
    for matches, describe in (
        (path.suffix == ".gguf" and path.is_file(), _gguf),
        ((path / "last-run.json").is_file() or (path / "recipe.yaml").is_file(), _run),
        ((path / "genai_config.json").is_file(), _onnx),
        (_has(path / BundleManifest.FILE, "artifacts"), _bundle),
        (_has(path / StageManifest.FILE, "stage"), _stage),
        (is_adapter_alone(path), _adapter),
        ((path / "config.json").is_file(), _checkpoint),
    ):
        if matches:
            title, rows = describe(path)
            table = Table(title=title, title_justify="left", show_header=False)
            table.add_column(style="dim")
            table.add_column(overflow="fold")
            for key, value in rows:
                table.add_row(key, str(value))
            console.print(table)
            return
    raise UserError(f"{path} is no checkpoint, GGUF file, ONNX folder, bundle, stage or run folder")


Rows = list[tuple[str, Any]]


def _has(file: Path, key: str) -> bool:
    return file.is_file() and key in read_json(file)


def _checkpoint(path: Path) -> tuple[str, Rows]:
    config, notes = read_config_as_is(path)
    kinds: Counter[str] = Counter()
    for tensor in tensor_headers(path).values():
        kinds[tensor.dtype] += tensor.size
    parameters, size = sum(kinds.values()), sum(file.stat().st_size for file in weight_files(path))
    rows: Rows = [
        ("family", config.get("model_type")),
        ("blocks", config.get("num_hidden_layers")),
        ("parameters", f"{parameters:,}"),
        ("types", ", ".join(f"{kind} {count:,}" for kind, count in kinds.items())),
        ("size", megabytes(size)),
        ("hidden size", config.get("hidden_size")),
        ("heads", f"{config.get('num_attention_heads')}, {config.get('num_key_value_heads')} for keys and values"),
        ("vocabulary", config.get("vocab_size")),
        ("context", config.get("max_position_embeddings")),
    ]
    if "compress_kept_blocks" in config:
        rows.append(("kept blocks", ", ".join(map(str, config["compress_kept_blocks"]))))
    if "compress_depths" in config:
        rows.append(("depths", ", ".join(map(str, config["compress_depths"]))))
    heads = path / "retaining" / "heads.safetensors"
    if heads.is_file():
        shapes = [tensor["shape"] for name, tensor in safetensors_header(heads).items() if name.endswith("w1.weight")]
        settings = read_json(heads.with_name("settings.json"))
        used = ", ".join(f"{key} {value}" for key, value in settings.items())
        rows.append(("retaining heads", f"{len(shapes)} of width {shapes[0][0] if shapes else 0}; {used}"))
    rows += [("note", note) for note in notes]
    return f"checkpoint {path}", rows


def read_config_as_is(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The values of config.json, and what is to be said of them: what is put right when it is read as a model, and why
    it is not read."""
    try:
        return read_config(path)
    except UserError as error:
        return read_json(path / "config.json"), [f"not read as a model: {error}"]


def _adapter(path: Path) -> tuple[str, Rows]:
    settings = read_json(path / ADAPTER_CONFIG)
    return f"adapter {path}", [
        ("kind", settings.get("peft_type")),
        ("base model", settings.get("base_model_name_or_path")),
        ("rank", settings.get("r")),
        ("layers", ", ".join(map(str, settings.get("target_modules") or []))),
        ("note", "as a model it is merged into its base"),
    ]


def _gguf(path: Path) -> tuple[str, Rows]:
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
    rows: Rows = [
        *_part(path, values),
        ("size", megabytes(path.stat().st_size)),
        ("parameters", f"{weights:,}"),
        ("bits per weight", f"{8 * packed / max(weights, 1):.2f}"),
        ("tensors", ", ".join(f"{count} {kind}" for kind, count in types.most_common()) or "none"),
    ]
    shown = {key: value for key, value in values.items() if not key.startswith(("GGUF.", "tokenizer.chat"))}
    rows += [(key, value) for key, value in shown.items()]
    return f"GGUF {path}", rows


def _part(path: Path, values: dict[str, Any]) -> Rows:
    """Of a model in several files: which of them this is, and what they are together."""
    from ..core.gguf_header import split_files

    count, number = values.get("split.count", 1), values.get("split.no", 0) + 1
    if count == 1:
        return []
    if number > 1:
        return [("part", f"{number} of a model in several files; what it is says the first")]
    files = split_files(path)
    total = megabytes(sum(file.stat().st_size for file in files))
    shared = megabytes(sum(file.stat().st_size for file in files if file.stat().st_nlink > 1))
    blocks = values.get(f"{values.get('general.architecture')}.block_count")
    return [("part", f"1 of {count}, {total} together; {shared} of it shared with other depths"), ("blocks", blocks)]


def _onnx(path: Path) -> tuple[str, Rows]:
    import onnx

    config = read_json(path / "genai_config.json")["model"]
    graph = path / config["decoder"]["filename"]
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, and OSError for a missing file
        raise UserError(f"{graph} is not a readable ONNX model: {error}") from error
    lengths = [int(e.value) for t in model.graph.initializer for e in t.external_data if e.key == "length"]
    weights = graph.with_name("model.onnx.data")
    whole = megabytes(weights.stat().st_size) if weights.is_file() else "missing"
    operators = Counter(node.op_type for node in model.graph.node)
    bits = {
        a.i for node in model.graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"
    }
    scores = sum(value.name.startswith("retaining_scores.") for value in model.graph.output)
    return f"ONNX {path}", [
        ("family", config["type"]),
        ("blocks", config["decoder"]["num_hidden_layers"]),
        ("weight bits", ", ".join(map(str, sorted(bits))) or "as stored"),
        ("graph", f"{config['decoder']['filename']}, {megabytes(graph.stat().st_size)}"),
        ("weights", f"{megabytes(sum(lengths))} of {whole} in {weights.name}"),
        ("context", config["context_length"]),
        ("operators", ", ".join(f"{count} {name}" for name, count in operators.most_common(8))),
        ("inputs", ", ".join(i.name for i in model.graph.input[:3]) + " …"),
        *([("retaining scores", f"{scores} blocks")] if scores else []),
    ]


def _bundle(path: Path) -> tuple[str, Rows]:
    from ..runtime.bundle import read_bundle
    from ..runtime.kv_budget import HEADS_SETTINGS

    manifest = read_bundle(path)
    rows: Rows = [
        ("family", manifest.family),
        ("parameters", f"{manifest.parameters:,}"),
        ("depths", ", ".join(map(str, manifest.depths))),
    ]
    if manifest.retaining is not None:
        r = manifest.retaining
        used = ", ".join(f"{name} {getattr(r, name)}" for name in ("budget", *HEADS_SETTINGS))
        rows.append(("retaining heads", f"{r.path}, width {r.width}; {used}"))
    for family in manifest.families:
        depths = ", ".join(map(str, family.depths))
        size = f"{megabytes(family.bytes)} ({megabytes(family.bytes_without_links)} without links)"
        rows.append((f"{family.format}-{family.type}", f"{depths} blocks in {size}"))
    for artifact in manifest.artifacts:
        v = artifact.verification
        rows.append(
            (
                artifact.role,
                f"{artifact.path}, {megabytes(artifact.bytes)}, {artifact.bits_per_weight:.2f} bits per weight, "
                f"perplexity {v.perplexity:.2f} (checkpoint {v.checkpoint_perplexity:.2f}), KL {v.kl:.4f}",
            )
        )
    return f"bundle {path}", rows


def _stage(path: Path) -> tuple[str, Rows]:
    manifest = StageManifest.read(path)
    chosen = manifest.metrics.get("chosen")
    return f"stage {manifest.stage} {path}", [
        *([("went on", chosen)] if chosen else []),
        ("fingerprint", manifest.fingerprint),
        ("time", duration(manifest.seconds)),
        ("peak memory", megabytes(manifest.peak_memory_bytes)),
        ("reads", ", ".join(manifest.inputs) or "the base model"),
        ("config", json.dumps(manifest.config)),
        ("files", len(manifest.files)),
    ]


def _run(path: Path) -> tuple[str, Rows]:
    rows: Rows = []
    for folder in sorted(path.iterdir()):
        if _has(folder / StageManifest.FILE, "stage"):
            manifest = StageManifest.read(folder)
            rows.append((manifest.stage, f"{folder.name}, {duration(manifest.seconds)}"))
        elif folder.name.endswith(".partial"):
            rows.append(("begun", folder.name))
    rows += [("report", path / name) for name in ("report.html", "report.json") if (path / name).exists()]
    return f"run {path}", rows
