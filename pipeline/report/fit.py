"""The plot of a fit: KL to the unpruned model against what a candidate costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .plots import GREEN, INK, ORANGE, _above, _number_ticks, _svg, label_offsets

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 1e-3  # nats: on an axis of orders of magnitude, smaller divergences stand here
COLOURS = {"plain": GREEN, "cut": ORANGE, "predicted": INK}


@dataclass(frozen=True)
class FrontPoint:
    """A candidate: its cost, and its KL to the unpruned model."""

    label: str
    cost: float
    kl: float
    kind: Literal["plain", "cut", "predicted"]
    chosen: bool = False

    @property
    def place(self) -> tuple[float, float]:
        """Where it is drawn."""
        return self.cost, max(self.kl, LEAST)


def front_plot(points: Sequence[FrontPoint], cost: str, limit: float | None = None) -> str | None:
    """One labelled point per measured candidate, faint ones for those that were predicted, a line at the limit."""
    if len(points) < 2:
        return None

    def draw(axes: Axes) -> None:
        for point in points:
            x, y = point.place
            faint = point.kind == "predicted"
            size, alpha = (3, 0.35) if faint else (6, 1.0)
            axes.plot([x], [y], "o", color=COLOURS[point.kind], markersize=size, alpha=alpha)
            if point.chosen:
                axes.plot([x], [y], "o", color=INK, markersize=11, fillstyle="none")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(cost)
        axes.set_ylabel("KL to the unpruned model")
        _number_ticks(axes, [p.place[0] for p in points], [p.place[1] for p in points])
        if limit is not None:
            axes.axvline(limit, color=INK, linewidth=0.8, linestyle="--")
        _label(axes, [point for point in points if point.kind != "predicted"])
        _above(axes, 0.01, "left", "unpruned", GREEN)
        _above(axes, 0.14, "left", "with a cut", ORANGE)
        _above(axes, 0.99, "right", "ring: recommended; faint: predicted only", INK)

    return _svg(draw, f"KL against {cost}")


def _label(axes: Axes, points: Sequence[FrontPoint]) -> None:
    pixels = [(point.label, *axes.transData.transform(point.place)) for point in points]
    edges = axes.get_window_extent()
    offsets = label_offsets(pixels, axes.figure.dpi / 72, edges.x0, edges.x1)
    for point, offset in zip(points, offsets, strict=True):
        axes.annotate(
            point.label, point.place, xytext=offset, textcoords="offset points", fontsize=8, color=INK, va="center"
        )
