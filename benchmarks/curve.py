"""The curve of recovery as figures and text: its laws, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from law import FEWEST, fitted

BEYOND = (10_000_000, 100_000_000)  # learned tokens that the law is asked for


def laws(points: Sequence[dict[str, Any]], base: dict[str, float]) -> dict[str, Any]:
    """The laws of KL and perplexity: neither falls below the unpruned model's."""
    found: dict[str, Any] = {}
    for figure, floor in (("KL to base", 0.0), ("perplexity", base["perplexity"])):
        fit = fitted([(point["learned"], point[figure]) for point in points], floor)
        if fit is None:
            found[figure] = None
            continue
        beyond = {short(n): [fit.law.at(n), *fit.between(n)] for n in BEYOND}
        left_out = {short(round(n)): error for n, error in fit.left_out.items()}
        errors = {"residual": fit.residual, "left_out": left_out}
        found[figure] = asdict(fit.law) | errors | {"extrapolated": beyond}
    return found


def told(result: dict[str, Any]) -> str:
    """The result as text: a table, and the laws."""
    if "base" not in result:
        return "nothing is measured yet"
    rows = [("unpruned", result["base"]), ("healed", result.get("start"))]
    rows += [(f"{short(p['tokens'])}, seed {p['seed']}", p) for p in result.get("points", [])]
    names = list(result["base"])
    lines = [f"| learned | steps | s | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for label, row in rows:
        if row:
            cells = [f"{row[n]:.3f}" if n in ("perplexity", "KL to base") else f"{row[n]:.1%}" for n in names]
            lines.append(f"| {label} | {row.get('steps', '')} | {row.get('seconds', 0):.0f} | {' | '.join(cells)} |")
    for figure, law in result.get("laws", {}).items():
        if law is None:
            lines.append(f"{figure}: no law is fitted below {FEWEST} numbers of tokens")
            continue
        worst = max(map(abs, law["left_out"].values()))
        lines.append(
            f"{figure} = {law['a']:.4g} + {law['b']:.4g} · n^−{law['c']:.3f}; residual {law['residual']:.1%}, "
            f"worst of a count left out {worst:.1%}"
        )
        for count, (value, low, high) in law["extrapolated"].items():
            lines.append(
                f"  at {count}, extrapolated: {value:.4g} ({low:.4g} to {high:.4g} by the laws with one left out)"
            )
    return "\n".join(lines)


def short(tokens: int) -> str:
    """10k for 10,000."""
    for size, unit in ((1_000_000, "M"), (1000, "k")):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)
