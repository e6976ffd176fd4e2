"""Building the report from a run's stage folders. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.files import read_json, read_json_value
from ...records.curves import CURVES, head_lines, student_lines
from ...records.figures import DataFigures, EvaluateFigures, ExportFigures
from ...records.importance import Importance
from ...records.manifest import StageManifest
from ...records.merge import MergeRecord
from ...records.models import Models
from ...records.students import Variants
from .schema import Report, StageEntry

SAMPLES = 3
BENCH = "bench.json"  # in a run's folder


@dataclass(frozen=True)
class StageRecord:
    """A finished stage: its folder and its manifest."""

    name: str
    folder: Path
    manifest: StageManifest


def build_report(name: str, recipe: str, stages: list[StageRecord]) -> Report:
    """The report of the finished stages; parts whose stages are missing are empty."""
    folders = {stage.name: stage.folder for stage in stages}
    last = stages[-1].manifest if stages else None
    manifests = {stage.name: stage.manifest for stage in stages}
    evaluated, exported, data = (manifests.get(name) for name in ("evaluate", "export", "data"))
    measured = Models.read_if_there(folders.get("evaluate"))
    return Report(
        name=name,
        base=last.base.source if last else "",
        measured_on=evaluated.figures(EvaluateFigures).text if evaluated else None,
        models=measured.root if measured else [],
        stages=[_entry(stage) for stage in stages],
        importance=Importance.read_if_there(folders.get("prune")),
        curves=student_lines(folders["distill"] / CURVES) if "distill" in folders else [],
        sort=student_lines(folders["sort"] / CURVES) if "sort" in folders else [],
        retain=head_lines(folders["retain"] / CURVES) if "retain" in folders else [],
        variants=Variants.read_if_there(folders.get("distill")),
        merge=MergeRecord.read_if_there(folders.get("merge")),
        data=data.figures(DataFigures) if data else None,
        samples=_samples(folders.get("data")),
        rewrites=_examples(folders.get("data")),
        artifacts=exported.figures(ExportFigures).artifacts if exported else [],
        bench=_bench(folders.get("export")),
        recipe=recipe,
        versions=last.versions if last else {},
        machine=last.machine if last else {},
    )


def _bench(export: Path | None) -> dict[str, Any] | None:
    """bench.json of the run's folder, where it is of this bundle."""
    file = export.parent / BENCH if export is not None else None
    if export is None or file is None or not file.is_file():
        return None
    found = read_json(file)
    return found if found.get("stage") == export.name else None


def _entry(stage: StageRecord) -> StageEntry:
    manifest = stage.manifest
    return StageEntry(
        name=stage.name,
        folder=stage.folder.name,
        fingerprint=manifest.fingerprint,
        seconds=manifest.seconds,
        dtype=manifest.dtype,
        resumed=manifest.resumed,
        peak_memory_bytes=manifest.peak_memory_bytes,
        peak_cuda_bytes=manifest.peak_cuda_bytes,
        planned_memory_bytes=manifest.planned_memory_bytes,
        metrics=manifest.metrics,
    )


def _examples(data: Path | None) -> list[dict[str, str]]:
    file = data / "examples.json" if data is not None else None
    return read_json_value(file) if file is not None and file.is_file() else []


def _samples(folder: Path | None) -> list[list[dict[str, str]]]:
    if folder is None or not (folder / "rows.parquet").is_file():
        return []
    import pyarrow.parquet as pq

    with (folder / "rows.parquet").open("rb") as file:
        rows = pq.read_table(file, columns=["messages", "text"]).slice(0, SAMPLES).to_pylist()
    return [_turns(row["messages"]) or [{"role": "text", "content": row["text"] or ""}] for row in rows]


def _turns(messages: list[dict[str, Any]] | None) -> list[dict[str, str]]:
    """What is shown of a conversation: beside what is said also the thoughts and calls, as they are stored."""
    shown = [[m["content"], m.get("more")] for m in messages or []]
    texts = ["\n".join(part for part in parts if part) for parts in shown]
    return [{"role": m["role"], "content": text} for m, text in zip(messages or [], texts, strict=True)]
