"""Retrieval from long prompts: a heat map, memory against context, and lines of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...evaluation.statistics import wilson
from ...records.models import ModelEntry, RetrievalResult
from .plots import BLUE, GREEN, INK, ORANGE, RED, _above, _number_axis, _svg
from .schema import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Way = tuple[str, float | None]  # policy and budget
TITLES = {
    "passkey": "share of prompts with one number in the text retrieved; nats per token of the true answer",
    "keys": "share of numbers retrieved, one at each depth; nats per token of the true answer",
    "continuation": "perplexity of the continuation",
}


@dataclass(frozen=True)
class RetrievalLine:
    """One model, task and policy at one budget: a figure per length."""

    title: str
    role: str
    way: str
    cells: list[str]
    first: bool  # of its task


def retrieval_lengths(models: Sequence[ModelEntry]) -> list[int]:
    return sorted({one.length for model in models for one in model.retrieval})


def retrieval_lines(models: Sequence[ModelEntry]) -> list[RetrievalLine]:
    """A line per task, model, policy and budget; numbers at all depths together, with their 95 % interval."""
    lengths, lines = retrieval_lengths(models), []
    for task, title in TITLES.items():
        found = [(m.role, one) for m in models for one in m.retrieval if one.task == task]
        places = list(dict.fromkeys((role, one.policy, one.budget) for role, one in found))
        for number, (role, policy, budget) in enumerate(places):
            own = [one for r, one in found if (r, one.policy, one.budget) == (role, policy, budget)]
            cells = [_cell([one for one in own if one.length == length]) for length in lengths]
            lines.append(RetrievalLine(title, role, way_name((policy, budget)), cells, number == 0))
    return lines


def way_name(way: Way) -> str:
    policy, budget = way
    if budget is None:
        return policy
    return f"{policy} {budget:.3g}" if budget < 1 else f"{policy} {budget:.0f}"


def _cell(results: Sequence[RetrievalResult]) -> str:
    if not results:
        return "–"
    if results[0].task == "continuation":
        return f"{results[0].value:.4g}"
    n = sum(one.n for one in results)
    hits = round(sum(one.value * one.n for one in results))
    low, high = wilson(hits, n)
    nats = sum(one.nats * one.n for one in results) / n
    return f"{100 * hits / n:.0f} % ({100 * low:.0f} to {100 * high:.0f}), {nats:.2f}"


def shown(report: Report) -> list[RetrievalResult]:
    """The last model's that was measured so."""
    return next((model.retrieval for model in reversed(report.models) if model.retrieval), [])


def heat_map(report: Report, task: str) -> str | None:
    """The share of numbers found, by length and depth, side by side for each policy and budget."""
    found = [one for one in shown(report) if one.task == task and one.depth is not None]
    if not found:
        return None
    ways: list[Way] = list(dict.fromkeys((one.policy, one.budget) for one in found))
    lengths, depths = sorted({one.length for one in found}), sorted({one.depth or 0.0 for one in found})

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        step = len(lengths) + 0.5
        for one in found:
            x = ways.index((one.policy, one.budget)) * step + lengths.index(one.length)
            y = depths.index(one.depth or 0.0)
            axes.add_patch(Rectangle((x, y), 0.96, 0.94, color=BLUE, alpha=0.06 + 0.94 * one.value, linewidth=0))
        axes.set_xlim(-0.1, step * len(ways) - 0.4)
        axes.set_ylim(len(depths), -0.17 * len(depths))  # the beginning of the text on top; room for names above it
        axes.set_yticks([i + 0.47 for i in range(len(depths))], [f"{depth:.0%}" for depth in depths])
        places = [i * step + j + 0.48 for i in range(len(ways)) for j in range(len(lengths))]
        names = [f"{length / 1024:.3g}k" for _ in ways for length in lengths]
        axes.set_xticks(places, names, rotation=90 if len(places) > 16 else 0, fontsize=7)
        for i, way in enumerate(ways):
            axes.text(
                i * step + len(lengths) / 2, -0.02 * len(depths), way_name(way).replace(" ", "\n", 1), ha="center",
                va="bottom", fontsize=7 if len(ways) < 9 else 5, color=INK,
            )  # fmt: skip
        axes.set_ylabel("depth of the number")
        axes.tick_params(length=0)

    return _svg(draw, f"{TITLES[task]}: by length and depth, darker is more")


def memory_plot(report: Report) -> str | None:
    """Bytes of keys and values against the length of the prompt, a line per budget."""
    found = shown(report)
    lengths = sorted({one.length for one in found})
    if len(lengths) < 2:
        return None
    lines: dict[str, dict[int, int]] = {}
    for one in found:
        name = "full" if one.budget is None else way_name(("budget", one.budget))
        line = lines.setdefault(name, {})
        line[one.length] = max(line.get(one.length, 0), one.kv_bytes)

    def draw(axes: Axes) -> None:
        colours = [BLUE, ORANGE, GREEN, RED]
        for number, (name, line) in enumerate(lines.items()):
            xs = sorted(line)
            colour = INK if name == "full" else colours[number % len(colours)]
            axes.plot(xs, [line[x] / 1e6 for x in xs], color=colour, marker="o", markersize=4, linewidth=1.2)
            axes.annotate(
                name, (xs[-1], line[xs[-1]] / 1e6), xytext=(6, 0), textcoords="offset points", fontsize=8, color=colour,
                va="center",
            )  # fmt: skip
        values = [size / 1e6 for line in lines.values() for size in line.values()]
        axes.set_xscale("log")
        axes.set_yscale("log")
        _number_axis(axes.yaxis, values)
        axes.set_ylim(min(values) * 0.8, max(values) * 1.25)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_xlim(lengths[0] * 0.9, lengths[-1] * 1.5)
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("keys and values, MB")
        _above(axes, 0.99, "right", "when most were held, a chunk included", INK)

    return _svg(draw, "Memory of the KV cache against context")
