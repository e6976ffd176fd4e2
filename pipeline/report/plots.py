"""The report's plots as inline SVG that follows the page's colours."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...records.curves import HeadStep, HeldOutHeads, TrainingStep
from ...records.models import ModelEntry
from ...records.students import HeldOutFigures
from .schema import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INK = "#010203"  # replaced by the page's text colour
FAINT = "#040506"  # replaced by the page's line colour
BLUE, ORANGE, GREEN, RED = "#3b7dd8", "#e07b39", "#3a9d6e", "#cc4b4b"
Box = tuple[float, float, float, float]  # left, bottom, right, top


def importance_plot(report: Report) -> str | None:
    """Distance across each block, the dropped ones marked, and across each window of the dropped length."""
    record = report.importance
    if not record:
        return None
    metric, dropped = record.importance, record.dropped
    table = record.distances[record.position].get(metric)  # of metrics that are distances across windows

    def draw(axes: Axes) -> None:
        values, blocks = record.values, range(record.blocks)
        colours = [RED if block in dropped else BLUE for block in blocks]
        axes.bar(blocks, values, color=colours, width=0.75)
        axes.set_xlabel("block")
        axes.set_ylabel(f"{metric} distance" if table else metric)
        axes.set_xlim(-0.7, record.blocks - 0.3)
        count = len(dropped)
        if table and 1 < count < record.blocks and record.search == "window":
            window = table[count - 1]
            axes.plot(range(len(window)), window, color=ORANGE, marker="o", markersize=3, linewidth=1.2)
            first = dropped[0]
            axes.plot([first], [window[first]], color=ORANGE, marker="o", markersize=9, fillstyle="none")
            _above(axes, 0.99, "right", f"line: across {count} blocks from there on", ORANGE)
        _above(axes, 0.01, "left", f"red: dropped ({count} of {record.blocks})", RED)

    return _svg(draw, "Importance per block")


def curve_plot(report: Report) -> str | None:
    """Held-out perplexity against the number of blocks removed, pruned and healed, where `blocks: auto` tried them."""
    curve = report.importance.curve if report.importance else []
    if len(curve) < 2:
        return None
    chosen = len(report.importance.dropped) if report.importance else 0

    def draw(axes: Axes) -> None:
        blocks = [len(point.dropped) for point in curve]
        for name, colour in (("pruned", ORANGE), ("healed", BLUE)):
            values = [getattr(point, name) for point in curve]
            axes.plot(blocks, values, color=colour, marker="o", markersize=3, linewidth=1.2)
            axes.plot(
                [chosen], [values[blocks.index(chosen)]], color=colour, marker="o", markersize=9, fillstyle="none"
            )
        axes.set_yscale("log")
        values = [getattr(point, name) for point in curve for name in ("pruned", "healed")]
        _number_axis(axes.yaxis, values)
        axes.set_ylim(min(values) * 0.9, max(values) * 1.1)
        axes.set_xticks(blocks)
        axes.set_xlabel("blocks removed")
        axes.set_ylabel("held-out perplexity")
        _above(axes, 0.01, "left", "pruned", ORANGE)
        _above(axes, 0.12, "left", "healed", BLUE)
        _above(axes, 0.99, "right", "ring: chosen", INK)

    return _svg(draw, "Quality against blocks removed")


def _above(axes: Axes, x: float, align: str, text: str, colour: str) -> None:
    """A line of legend over the plot, where no data is."""
    axes.text(x, 1.02, text, transform=axes.transAxes, ha=align, va="bottom", fontsize=8, color=colour)


def loss_plot(report: Report) -> str | None:
    """Training loss by step."""
    steps = [line for line in report.curves if isinstance(line, TrainingStep)]
    if not steps:
        return None

    def draw(axes: Axes) -> None:
        axes.plot([s.step for s in steps], [s.loss for s in steps], color=BLUE, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")

    return _svg(draw, "Training loss")


def heldout_plot(report: Report) -> str | None:
    """KL to the unpruned model, and perplexity, on the held-out rows; each has an axis of its own."""
    points = [line for line in report.curves if isinstance(line, HeldOutFigures)]
    if not points:
        return None

    def draw(axes: Axes) -> None:
        x = [p.step for p in points]
        axes.plot(x, [p.eval_kl for p in points], color=BLUE, marker="o", markersize=3, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("held-out KL to the unpruned model", color=BLUE)
        other = axes.twinx()
        other.plot(x, [p.eval_perplexity for p in points], color=ORANGE, marker="s", markersize=3, linewidth=1.2)
        _plain(other)
        other.set_ylabel("held-out perplexity", color=ORANGE)

    return _svg(draw, "Held-out KL and perplexity while training")


def sort_plot(report: Report) -> str | None:
    """KL to the unpruned model on the held-out rows by step, a line per depth of a sorted training."""
    points = [line for line in report.sort if isinstance(line, HeldOutFigures) and line.eval_depths]
    if not points:
        return None

    def draw(axes: Axes) -> None:
        x = [p.step for p in points]
        series = list(zip(*(p.eval_depths for p in points), strict=True))
        for own, opacity in zip(series, _opacities(len(series)), strict=True):
            values = [figures.kl for figures in own]
            axes.plot(x, values, color=BLUE, alpha=opacity, marker="o", markersize=3, linewidth=1.2)
            axes.annotate(
                str(own[-1].depth), (x[-1], values[-1]), xytext=(6, 0), textcoords="offset points", fontsize=8,
                color=INK, va="center",
            )  # fmt: skip
        axes.set_yscale("log")
        values = [figures.kl for p in points for figures in p.eval_depths]
        _number_axis(axes.yaxis, values)
        axes.set_ylim(min(values) * 0.9, max(values) * 1.1)
        axes.set_xlabel("step")
        axes.set_ylabel("held-out KL to the unpruned model")
        _above(axes, 0.99, "right", "a line per depth, by its number of blocks", INK)

    return _svg(draw, "Held-out KL of every depth while training")


def retain_plot(report: Report) -> str | None:
    """The heads' loss by step, on what they learn from and on held-out rows, and what they keep before and after."""
    points = [line for line in report.retain if isinstance(line, HeldOutHeads)]
    if not points:
        return None

    def draw(axes: Axes) -> None:
        learned = [line for line in report.retain if isinstance(line, HeadStep)]
        axes.plot([p.step for p in learned], [p.loss for p in learned], color=INK, alpha=0.35, linewidth=0.8)
        axes.plot(
            [p.step for p in points],
            [p.eval_loss for p in points],
            color=BLUE,
            marker="o",
            markersize=3,
            linewidth=1.2,
        )
        axes.set_xlabel("step")
        axes.set_ylabel("loss, held out", color=BLUE)
        first, last = (100 * (point.eval_recall or 0.0) for point in (points[0], points[-1]))
        kept = f"grey: of the training's batches. Kept of the best quarter: {first:.0f} % → {last:.0f} %"
        _above(axes, 0.99, "right", kept, INK)

    return _svg(draw, "Loss of the retaining heads while training")


def _opacities(count: int) -> list[float]:
    """From faint to full: the deepest is the darkest."""
    return [0.35 + 0.65 * (i + 1) / count for i in range(count)]


def depth_plot(report: Report) -> str | None:
    """Perplexity against the number of blocks: checkpoints and exported files that run at several depths."""
    families: dict[str, list[ModelEntry]] = {}
    for entry in report.models:
        name = "checkpoint" if entry.role.startswith("depth-") else entry.role.partition("@")[0]
        families.setdefault(name, []).append(entry)
    found = {name: sorted(entries, key=lambda m: m.blocks) for name, entries in families.items() if len(entries) > 1}
    if not found:
        return None
    base = report.model("base")

    def draw(axes: Axes) -> None:
        for name, entries in found.items():
            colour = BLUE if name == "checkpoint" else GREEN if name.startswith("gguf") else ORANGE
            places = [m.blocks for m in entries], [m.perplexity for m in entries]
            axes.plot(*places, color=colour, marker="o", markersize=4, linewidth=1.2)
        shown = [m for entries in found.values() for m in entries]
        values = [m.perplexity for m in shown] + ([base.perplexity] if base else [])
        if base:
            axes.axhline(base.perplexity, color=INK, linewidth=0.8, linestyle="--")
            _above(axes, 0.99, "right", f"dashed: the unpruned model's {base.blocks} blocks", INK)
        axes.set_yscale("log")
        _number_axis(axes.yaxis, values)
        axes.set_ylim(min(values) * 0.9, max(values) * 1.15)
        axes.set_xticks(sorted({m.blocks for m in shown}))
        axes.set_xlabel("depth, blocks")
        axes.set_ylabel("perplexity")
        at = 0.01
        for title, colour, kind in (
            ("checkpoint", BLUE, "checkpoint"),
            ("GGUF", GREEN, "gguf"),
            ("ONNX", ORANGE, "onnx"),
        ):
            if any(name.startswith(kind) for name in found):
                _above(axes, at, "left", title, colour)
                at += 0.03 + 0.012 * len(title)

    return _svg(draw, "Quality against depth")


def quality_plot(report: Report) -> str | None:
    """Perplexity against size on disk, one labelled point per model and artifact."""
    models = [entry for entry in report.models if entry.bytes]
    if len(models) < 2:
        return None

    def colour(entry: ModelEntry) -> str:
        return GREEN if entry.role.startswith("gguf") else ORANGE if entry.role.startswith("onnx") else BLUE

    def draw(axes: Axes) -> None:
        for entry in models:
            axes.plot([entry.bytes / 1e6], [entry.perplexity], "o", color=colour(entry), markersize=6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("size, MB")
        axes.set_ylabel("perplexity")
        _number_ticks(axes, [m.bytes / 1e6 for m in models], [m.perplexity for m in models])
        _label(axes, [m.role for m in models], [m.bytes / 1e6 for m in models], [m.perplexity for m in models])

    return _svg(draw, "Perplexity against size")


def speed_plot(depths: list[dict[str, Any]]) -> str | None:
    """Perplexity against decoding speed: a line per engine and type, a point per depth."""
    if len(depths) < 2:
        return None
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in depths:
        lines.setdefault((entry["engine"], entry["type"]), []).append(entry)

    def draw(axes: Axes) -> None:
        xs, ys = [e["decode_tokens_per_second"] for e in depths], [e["perplexity"] for e in depths]
        for engine, kind in lines:
            found = sorted(lines[engine, kind], key=lambda e: e["depth"])
            places = [(e["decode_tokens_per_second"], e["perplexity"]) for e in found]
            colour = GREEN if engine == "llama.cpp" else ORANGE
            axes.plot(*zip(*places, strict=True), color=colour, marker="o", markersize=6, linewidth=1.2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("decoding, tokens/s")
        axes.set_ylabel("perplexity")
        _number_ticks(axes, xs, ys)
        _label(axes, [f"{e['type']} {e['depth']}" for e in depths], xs, ys)

    return _svg(draw, "Quality against speed")


def _label(axes: Axes, labels: list[str], xs: list[float], ys: list[float]) -> None:
    """Put labels beside points, once the axes have their limits."""
    places = list(zip(xs, ys, strict=True))
    pixels = axes.transData.transform(places)
    points = [(text, x, y) for text, (x, y) in zip(labels, pixels, strict=True)]
    edges = axes.get_window_extent()
    offsets = label_offsets(points, axes.figure.dpi / 72, edges.x0, edges.x1)
    for text, place, offset in zip(labels, places, offsets, strict=True):
        axes.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=8, color=INK, va="center")


def label_offsets(
    points: list[tuple[str, float, float]], scale: float, left: float, right: float
) -> list[tuple[float, float]]:
    """Where labels go, in typographic points from their (text, x, y) in pixels: the nearest place that is free.

    Labels stay between `left` and `right`, in pixels, and cover neither points nor each other where that can be.
    """
    height = 10.0
    places = [(x / scale, y / scale) for _, x, y in points]
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]  # the marks themselves
    offsets = []
    for (text, _, _), (x, y) in zip(points, places, strict=True):
        width = 4.6 * len(text)
        candidates = [(side, float(dy)) for dy in (0, 11, -11, 22, -22, 33, -33) for side in (8.0, -8.0 - width)]
        candidates += [(-width / 2, 12.0), (-width / 2, -12.0)]

        def box(offset: tuple[float, float], x: float = x, y: float = y, width: float = width) -> Box:
            left, middle = x + offset[0], y + offset[1]
            return (left, middle - height / 2, left + width, middle + height / 2)

        inside = [c for c in candidates if left / scale <= box(c)[0] and box(c)[2] <= right / scale]
        free = [c for c in inside if not any(_overlap(box(c), other) for other in boxes)]
        best = min(free or candidates, key=lambda c: (abs(c[1]), c[0] < 0))
        boxes.append(box(best))
        offsets.append(best)
    return offsets


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _number_ticks(axes: Axes, xs: list[float], ys: list[float]) -> None:
    _number_axis(axes.xaxis, xs)
    _number_axis(axes.yaxis, ys)
    axes.set_xlim(min(xs) * 0.85, max(xs) * 1.6)
    axes.set_ylim(min(ys) * 0.9, max(ys) * 1.15)


def _number_axis(axis: Axis, values: list[float]) -> None:
    from matplotlib.ticker import NullFormatter

    low, high = min(values), max(values)
    ticks: list[float] = []
    for tenths in ((10, 15, 20, 30, 50, 70), range(10, 100, 5), range(10, 100)):  # closer where values lie close
        steps = [m * 10.0**e for e in range(-3, 6) for m in tenths]
        ticks = [step for step in steps if low * 0.85 <= step <= high * 1.2]
        if len(ticks) > 2:
            break
    axis.set_ticks(ticks, [f"{tick:.4g}" for tick in ticks])
    axis.set_minor_formatter(NullFormatter())


def _svg(draw: Callable[[Any], None], title: str) -> str:
    """A figure of one panel, which `draw` is given."""
    return _panels(lambda panels: draw(panels[0]), title, 1)


def _panels(draw: Callable[[list[Any]], None], title: str, count: int) -> str:
    """A figure of panels side by side, all of which `draw` is given."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": title}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.4, 3.2))
        FigureCanvasSVG(figure)
        # Places are fixed, so that labels are placed where they will be.
        width = 0.8 / count - 0.05 * (count - 1)
        places = [(0.11 + number * (width + 0.1), 0.15, width, 0.77) for number in range(count)]
        panels = [figure.add_axes(place) for place in places]
        for axes in panels:
            _plain(axes)
        draw(panels)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--line)")
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _plain(axes: Axes) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.spines["top"].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8, color=FAINT)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
