"""Sizes, counts, shares and times as text."""

from __future__ import annotations


def megabytes(value: float | None) -> str:
    """Bytes as MB or GB."""
    if value is None:
        return "–"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def kilobytes(value: float | None) -> str:
    """Bytes as kB."""
    return "–" if value is None else f"{value / 1e3:.1f} kB"


def number(value: float | None) -> str:
    """A number with four significant digits."""
    if value is None:
        return "–"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.3e}"


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Seconds, as minutes and seconds from one minute on."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"
