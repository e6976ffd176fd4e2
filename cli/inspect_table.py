"""What `compress inspect` found, as a table of names and values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table

from ..core.units import duration, kilobytes, megabytes
from ..pipeline.inspection import (
    AdapterInfo,
    BundleInfo,
    CheckpointInfo,
    GgufInfo,
    OnnxInfo,
    RunInfo,
    StageInfo,
)

Rows = list[tuple[str, object]]


def inspection_table(
    found: CheckpointInfo | AdapterInfo | GgufInfo | OnnxInfo | BundleInfo | StageInfo | RunInfo,
) -> Table:
    """The table of anything that can be inspected."""
    title = {"gguf": "GGUF", "onnx": "ONNX", "stage": f"stage {found.stage}" if found.kind == "stage" else ""}
    table = Table(title=f"{title.get(found.kind) or found.kind} {found.path}", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in _ROWS[found.kind](found):
        table.add_row(key, str(value))
    return table


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _checkpoint(found: CheckpointInfo) -> Rows:
    rows: Rows = [
        ("family", found.family),
        ("blocks", found.blocks),
        ("parameters", f"{found.parameters:,}"),
        ("types", _listed(f"{dtype} {count:,}" for dtype, count in found.types.items())),
        ("size", megabytes(found.bytes)),
        ("hidden size", found.hidden_size),
        ("heads", f"{found.heads}, {found.kv_heads} for keys and values"),
        ("vocabulary", found.vocabulary),
        ("context", found.context),
    ]
    if found.kept_blocks is not None:
        rows.append(("kept blocks", _listed(found.kept_blocks)))
    if found.depths is not None:
        rows.append(("depths", _listed(found.depths)))
    if found.retaining is not None:
        used = _listed(f"{key} {value}" for key, value in found.retaining.settings.items())
        rows.append(("retaining heads", f"{found.retaining.blocks} of width {found.retaining.width}; {used}"))
    return [*rows, *(("note", note) for note in found.notes)]


def _adapter(found: AdapterInfo) -> Rows:
    return [
        ("kind", found.method),
        ("base model", found.base),
        ("rank", found.rank),
        ("layers", _listed(found.layers)),
        ("note", "merged into its base model when it is loaded"),
    ]


def _gguf(found: GgufInfo) -> Rows:
    return [
        *_part(found),
        ("size", megabytes(found.bytes)),
        ("parameters", f"{found.parameters:,}"),
        ("bits per weight", f"{found.bits_per_weight:.2f}"),
        ("tensors", _listed(f"{count} {name}" for name, count in found.tensors.items()) or "none"),
        *found.metadata.items(),
    ]


def _part(found: GgufInfo) -> Rows:
    """For a model in several files: which part this is, and the size of all."""
    if found.parts == 1:
        return []
    if found.part > 1:
        return [("part", f"{found.part} of a model in several files; inspect the first for the whole model")]
    total, shared = megabytes(found.bytes_of_all_parts), megabytes(found.bytes_shared)
    shown = f"1 of {found.parts}, {total} together; {shared} of it shared with other depths"
    return [("part", shown), ("blocks", found.blocks)]


def _onnx(found: OnnxInfo) -> Rows:
    whole = "missing" if found.weights_bytes is None else megabytes(found.weights_bytes)
    return [
        ("family", found.family),
        ("blocks", found.blocks),
        ("weight bits", _listed(found.weight_bits) or "as stored"),
        ("graph", f"{found.graph}, {megabytes(found.graph_bytes)}"),
        ("weights", f"{megabytes(found.weights_bytes_used)} of {whole} in {found.weights}"),
        ("context", found.context),
        ("operators", _listed(f"{count} {name}" for name, count in list(found.operators.items())[:8])),
        ("inputs", _listed(found.inputs[:3]) + " …"),
        *([("retaining scores", f"{found.retaining_scores} blocks")] if found.retaining_scores else []),
    ]


def _bundle(found: BundleInfo) -> Rows:
    rows: Rows = [
        ("family", found.family),
        ("parameters", f"{found.parameters:,}"),
        ("depths", _listed(found.depths)),
    ]
    if found.retaining is not None:
        used = _listed(f"{name} {value}" for name, value in found.retaining.numbers().items())
        rows.append(("retaining heads", f"{found.retaining.path}, width {found.retaining.width}; {used}"))
    for family in found.families:
        size = f"{megabytes(family.bytes)} ({megabytes(family.bytes_without_links)} without links)"
        rows.append((f"{family.format}-{family.type}", f"{_listed(family.depths)} blocks in {size}"))
    for artifact in found.artifacts:
        v = artifact.verification
        rows.append(
            (
                artifact.role,
                f"{artifact.path}, {megabytes(artifact.bytes)}, {artifact.bits_per_weight:.2f} bits per weight, "
                f"perplexity {v.perplexity:.2f} (checkpoint {v.checkpoint_perplexity:.2f}), KL {v.kl:.4f}, "
                f"{kilobytes(artifact.kv_bytes_per_token)} of keys and values per token ({artifact.kv})",
            )
        )
    return rows


def _stage(found: StageInfo) -> Rows:
    return [
        *([("selected", found.chosen)] if found.chosen else []),
        ("fingerprint", found.fingerprint),
        ("time", duration(found.seconds)),
        ("peak memory", megabytes(found.peak_memory_bytes)),
        ("reads", _listed(found.inputs) or "the base model"),
        ("config", json.dumps(found.config)),
        ("files", found.files),
    ]


def _run(found: RunInfo) -> Rows:
    rows: Rows = [(stage.name, f"{stage.folder}, {duration(stage.seconds)}") for stage in found.stages]
    return [*rows, *(("unfinished", name) for name in found.begun), *(("report", path) for path in found.reports)]


_ROWS: dict[str, Callable[[Any], Rows]] = {
    "checkpoint": _checkpoint,
    "adapter": _adapter,
    "gguf": _gguf,
    "onnx": _onnx,
    "bundle": _bundle,
    "stage": _stage,
    "run": _run,
}
