"""What `compress bench` found: as tables, as a page with a plot of quality against speed, and in a run's report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..core.errors import UserError
from ..core.extras import REPORT, need
from ..core.files import write_whole
from ..core.units import megabytes, number, percent
from ..pipeline.report.collect import BENCH
from ..pipeline.report.html import bench_page
from ..pipeline.summary import LAST, rebuild
from ..records.bundle import BundleManifest
from ..runtime.bench import DepthFigures
from .run_commands import errors


def bench_entries(
    manifest: BundleManifest, found: Sequence[DepthFigures], drafts: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures with the quality that the bundle's verification measured; keys as in docs/explanation/depths.md."""
    formats = {"gguf": "llama.cpp", "onnx": "onnx"}
    quality = {(formats[a.format], a.type, a.depth): a for a in manifest.artifacts}
    entries = []
    for figures in found:
        artifact = quality[figures.engine, figures.type, figures.depth]
        entries.append(
            {
                "role": artifact.role,
                "engine": figures.engine,
                "type": figures.type,
                "depth": figures.depth,
                "perplexity": artifact.verification.perplexity,
                "prompt_tokens": figures.prompt_tokens,
                "first_token_seconds": figures.first_token_seconds,
                "prefill_tokens_per_second": figures.prefill_tokens_per_second,
                "decode_tokens_per_second": figures.decode_tokens_per_second,
                "peak_memory_bytes": figures.peak_memory_bytes,
                "load_seconds": figures.load_seconds,
            }
        )
    return {"name": manifest.name, "depths": entries, "drafts": drafts}


def show_bench(report: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(soft_wrap=True, markup=False, emoji=False)
    table = Table(
        title=f"{report['name']}: every depth", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in ("engine", "type"):
        table.add_column(column, no_wrap=True)
    for column in ("depth", "perplexity", "prefill\ntokens/s", "first\ntoken", "decode\ntokens/s", "peak\nmemory"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in report["depths"]:
        table.add_row(
            entry["engine"],
            entry["type"],
            str(entry["depth"]),
            number(entry["perplexity"]),
            number(entry["prefill_tokens_per_second"]),
            f"{1000 * entry['first_token_seconds']:.0f} ms",
            number(entry["decode_tokens_per_second"]),
            megabytes(entry["peak_memory_bytes"]),
        )
    console.print(table)
    if not report["drafts"]:
        return
    table = Table(title="a shallow depth drafts", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("engine", "type"):
        table.add_column(column, no_wrap=True)
    for column in ("depth", "draft", "at a time", "accepted", "tokens/s\nalone", "tokens/s\ndrafted", "same text"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in report["drafts"]:
        table.add_row(
            entry["engine"],
            entry["type"],
            *(str(entry[key]) for key in ("depth", "draft_depth", "draft_tokens")),
            percent(entry["acceptance"]),
            number(entry["plain_tokens_per_second"]),
            number(entry["draft_tokens_per_second"]),
            "yes" if entry["equal"] else "no",
        )
    console.print(table)


def write_bench(report: dict[str, Any], out: Path | None) -> list[Path]:
    """Write the figures (.json) or a page (.html); the path, if any."""
    if out is None:
        return []
    text = bench_page(report) if out.suffix == ".html" else json.dumps(report, indent=2) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)
    return [out]


def keep_in_run(report: dict[str, Any], bundle: Path) -> list[Path]:
    """Where the bundle lies in a finished run, put the figures into the run's report; what was written."""
    stage = bundle.resolve().parent
    run = stage.parent
    if not (run / LAST).is_file():
        return []
    write_whole(run / BENCH, json.dumps({**report, "stage": stage.name}, indent=2) + "\n")
    try:
        need("drawing the run's report again", *REPORT)
    except UserError as error:  # what was measured is kept all the same
        errors.print(f"note: {error}", style="yellow")
        return [run / BENCH]
    return [run / BENCH, *rebuild(run)]
