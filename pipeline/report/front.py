"""What the report shows of the front: exported files beside the unpruned model quantized to at most their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...records.models import ModelEntry
from .plots import GREEN, INK, ORANGE, _above, _label, _number_ticks, _panels
from .schema import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 1e-4  # nats: on an axis of orders of magnitude, smaller divergences stand here


def front_lines(models: Sequence[ModelEntry]) -> list[str]:
    """A sentence or two for each artifact and format of rivals."""
    return [f"{s.sentence} {s.conclusion}".strip() for model in models for s in model.standings]


Axis = tuple[str, Callable[[ModelEntry], float | None]]  # what it says, and where a model stands on it


def size_plot(report: Report) -> str | None:
    """KL to the unpruned model against bytes: artifacts and their rivals."""
    return _plot(report, "KL to the unpruned model against size", [("size, MB", lambda model: model.bytes / 1e6)])


def time_plot(report: Report) -> str | None:
    """The same against the time that a token takes to be written and to be read."""
    written: Axis = ("ms per token written", lambda model: _milliseconds(model.tokens_per_second))
    read: Axis = ("ms per token read", lambda model: _milliseconds(model.prefill_tokens_per_second))
    return _plot(report, "KL to the unpruned model against time", [written, read])


def _milliseconds(rate: float | None) -> float | None:
    return 1000 / rate if rate else None


def _plot(report: Report, title: str, wanted: Sequence[Axis]) -> str | None:
    """A panel per axis; None where no rival has a place on all of them."""
    places: list[tuple[ModelEntry, list[float], float]] = []
    for model in report.models:
        where = [value for value in (of(model) for _, of in wanted) if value is not None]
        if (model.rival_of or model.standings) and model.kl_to_base is not None and len(where) == len(wanted):
            places.append((model, where, max(model.kl_to_base, LEAST)))
    if not any(model.rival_of for model, _, _ in places):
        return None

    def draw(panels: Sequence[Axes]) -> None:
        heights = [kl for _, _, kl in places]
        for number, (axes, (label, _)) in enumerate(zip(panels, wanted, strict=True)):
            for model, where, kl in places:
                colour = GREEN if "gguf-" in model.role else ORANGE
                filled = "none" if model.rival_of else "full"
                axes.plot([where[number]], [kl], "o", color=colour, markersize=6, fillstyle=filled)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(label)
            across = [where[number] for _, where, _ in places]
            _number_ticks(axes, across, heights)
            _label(axes, [model.role for model, _, _ in places], across, heights)
        panels[0].set_ylabel("KL to base, nats")
        _above(panels[-1], 0.99, "right", "rings: the unpruned model in plain types", INK)

    return _panels(draw, title, len(wanted))
