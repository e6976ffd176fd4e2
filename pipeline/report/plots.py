"""The report's plots as inline SVG that follows the page's colours."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from .schema import ModelEntry, Report

INK = "#010203"  # replaced by the page's text colour
FAINT = "#040506"  # replaced by the page's line colour
BLUE, ORANGE, GREEN, RED = "#3b7dd8", "#e07b39", "#3a9d6e", "#cc4b4b"


def importance_plot(report: Report) -> str | None:
    """Distance across each block, the dropped ones marked, and across each window of the dropped length."""
    record = report.importance
    if not record:
        return None
    metric, position, dropped = record["importance"], record["position"], record["dropped"]
    table = record["distances"][position][metric]

    def draw(axes: Any) -> None:
        values, blocks = table[0], range(record["blocks"])
        colours = [RED if block in dropped else BLUE for block in blocks]
        axes.bar(blocks, values, color=colours, width=0.75)
        axes.set_xlabel("block")
        axes.set_ylabel(f"{metric} distance")
        axes.set_xlim(-0.7, record["blocks"] - 0.3)
        count = len(dropped)
        if 1 < count < record["blocks"] and record["search"] == "window":
            window = table[count - 1]
            axes.plot(range(len(window)), window, color=ORANGE, marker="o", markersize=3, linewidth=1.2)
            first = dropped[0]
            axes.plot([first], [window[first]], color=ORANGE, marker="o", markersize=9, fillstyle="none")
            axes.text(
                0.99,
                0.97,
                f"line: across {count} blocks from there on",
                transform=axes.transAxes,
                ha="right",
                va="top",
                fontsize=8,
                color=ORANGE,
            )
        axes.text(
            0.01,
            0.97,
            f"red: dropped ({count} of {record['blocks']})",
            transform=axes.transAxes,
            ha="left",
            va="top",
            fontsize=8,
            color=RED,
        )

    return _svg(draw, "Importance per block")


def loss_plot(report: Report) -> str | None:
    """Training loss by step."""
    steps = [line for line in report.curves if "loss" in line]
    if not steps:
        return None

    def draw(axes: Any) -> None:
        axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], color=BLUE, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")

    return _svg(draw, "Training loss")


def heldout_plot(report: Report) -> str | None:
    """KL to the unpruned model, and perplexity, on the held-out rows."""
    points = [line for line in report.curves if "eval_kl" in line]
    if not points:
        return None

    def draw(axes: Any) -> None:
        x = [p["step"] for p in points]
        axes.plot(x, [p["eval_kl"] for p in points], color=BLUE, marker="o", markersize=3, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("held-out KL to the unpruned model", color=BLUE)
        right = axes.twinx()
        right.plot(x, [p["eval_perplexity"] for p in points], color=ORANGE, marker="s", markersize=3, linewidth=1.2)
        right.set_ylabel("held-out perplexity", color=ORANGE)
        _plain(right)

    return _svg(draw, "Held-out KL and perplexity while training")


def quality_plot(report: Report) -> str | None:
    """Perplexity against size on disk, one labelled point per model and artifact."""
    models = [entry for entry in report.models if entry.bytes]
    if len(models) < 2:
        return None

    def colour(entry: ModelEntry) -> str:
        return GREEN if entry.role.startswith("gguf") else ORANGE if entry.role.startswith("onnx") else BLUE

    def draw(axes: Any) -> None:
        for entry in models:
            axes.plot([entry.bytes / 1e6], [entry.perplexity], "o", color=colour(entry), markersize=6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("size, MB")
        axes.set_ylabel("perplexity")
        _number_ticks(axes, [m.bytes / 1e6 for m in models], [m.perplexity for m in models])
        for entry, offset in zip(models, _offsets(models), strict=True):
            axes.annotate(
                entry.role,
                (entry.bytes / 1e6, entry.perplexity),
                xytext=offset,
                textcoords="offset points",
                fontsize=8,
                color=INK,
                va="center",
            )

    return _svg(draw, "Perplexity against size", height=3.6)


def _offsets(models: list[ModelEntry]) -> list[tuple[float, float]]:
    """Where each label goes: right of its point, moved down where one above it would be covered."""
    import math

    taken: list[tuple[float, float]] = []
    offsets = []
    for entry in models:
        x, y = 150 * math.log10(entry.bytes), 170 * math.log10(entry.perplexity)
        shift = 0.0
        while any(abs(x - a) < 75 and abs(y + shift - b) < 11 for a, b in taken):
            shift += 11 if len(taken) % 2 else -11
        taken.append((x, y + shift))
        offsets.append((8.0, shift))
    return offsets


def _number_ticks(axes: Any, xs: list[float], ys: list[float]) -> None:
    from matplotlib.ticker import NullFormatter

    for axis, values in ((axes.xaxis, xs), (axes.yaxis, ys)):
        low, high = min(values), max(values)
        steps = [m * 10**e for e in range(-2, 7) for m in (1, 1.5, 2, 3, 5, 7)]
        ticks = [s for s in steps if low * 0.85 <= s <= high * 1.2]
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlim(min(xs) * 0.85, max(xs) * 1.6)
    axes.set_ylim(min(ys) * 0.9, max(ys) * 1.15)


def _svg(draw: Callable[[Any], None], title: str, height: float = 3.0) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": title}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.4, height), layout="tight")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _plain(axes)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--line)")
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.spines["top"].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8, color=FAINT)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
