"""The result of a fit as files: fit.json, and fit.html, one self-contained page."""

from __future__ import annotations

from pathlib import Path

from ..core.files import read_text, write_whole
from ..core.units import megabytes, percent
from ..pipeline.report.fit import FrontPoint, front_plot
from ..pipeline.report.html import template
from ..records.fit import FitCandidate, FitErrors, FitLimits, FitRecord

PAGE = "fit.html"


def write_fit(record: FitRecord, out: Path) -> None:
    """Write both files into the fit's folder, where its recipe is already."""
    write_whole(out / PAGE, page(record, read_text(out / record.recipe)))
    record.write(out)


def page(record: FitRecord, recipe: str) -> str:
    """The page."""
    measured = [c for c in record.candidates if c.measured is not None]
    limits = record.limits
    size = None if limits.size is None else limits.size / 1e6
    return template("page.html.j2", "compress.fit").render(
        fit=record,
        runtime={"llama.cpp": "llama.cpp", "onnx": "ONNX Runtime"}[record.engine],
        limits=limits_text(limits),
        measured=measured,
        predicted=[c for c in record.candidates if c.measured is None],
        errors=errors_text(record.errors),
        recipe=recipe,
        plots=[
            ("KL against the file's size", front_plot(_points(record, "bytes"), "size, MB", size)),
            ("KL against time", front_plot(_points(record, "latency"), "ms per token", limits.latency_ms)),
        ],
    )


def _points(record: FitRecord, axis: str) -> list[FrontPoint]:
    scale = {"bytes": 1e-6, "latency": 1e3}[axis]
    return [_point(c, axis, scale, c.name == record.recommended) for c in record.candidates]


def _point(candidate: FitCandidate, axis: str, scale: float, chosen: bool) -> FrontPoint:
    figures = candidate.measured or candidate.predicted
    kind = "predicted" if candidate.measured is None else "cut" if candidate.removed else "plain"
    return FrontPoint(candidate.name, getattr(figures, axis) * scale, figures.kl, kind, chosen)


def limits_text(limits: FitLimits) -> str:
    """The limits in words."""
    found = [f"size {megabytes(limits.size)}"] if limits.size is not None else []
    if limits.memory is not None:
        found.append(f"memory {megabytes(limits.memory)} at a context of {limits.context}")
    found += [f"{limits.latency_ms:g} ms per token"] if limits.latency_ms is not None else []
    return ", ".join(found)


def errors_text(errors: FitErrors) -> str:
    """How far predictions were off."""
    names = {"kl": "KL", "bytes": "file", "memory": "memory", "latency": "ms per token", "prefill": "prompts"}
    told = [f"{title} {percent(getattr(errors, name))}" for name, title in names.items() if
            getattr(errors, name) is not None]  # fmt: skip
    return (
        f"Predictions against what was then measured, the median over {errors.measured} "
        f"candidate{'' if errors.measured == 1 else 's'}: {', '.join(told)}."
    )
