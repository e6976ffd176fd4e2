"""A fit against measuring everything: did it find the front, and what did it predict?

    python benchmarks/fit.py MODEL --size 90MB --text wiki.txt --removed 0,1,2,4,6 --mixes Q8_0,Q4_K_M,Q4_0 --out fitted

The fit goes first, and has no other mixes. Then every combination of the removed blocks and mixes is built and measured
as the fit measures its candidates; what it measured already is taken from its folder. Both are resumable.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.cli.console import console
from compress.cli.progress import ConsoleProgress
from compress.core.stage import WORK, Context
from compress.fit import run, search
from compress.fit.candidates import Combination, combinations, front
from compress.fit.damage import Damage
from compress.fit.ledger import Ledger
from compress.fit.measuring import CandidateBench
from compress.fit.request import make_request
from compress.modeling.geometry import geometry_of
from compress.modeling.load import load_config, resolve
from compress.prune.cuts import cut
from compress.records.fit import FitFigures, FitRecord


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--size", default="90MB")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--removed", default="0,1,2,3,4,6", help="numbers of removed blocks, with commas between")
    parser.add_argument("--mixes", default="Q8_0,Q5_0,Q4_K_M,Q4_0,Q3_K_S")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--positions", type=int, default=run.EFFORT.positions, help="held-out tokens to measure on")
    parser.add_argument("--calibration", type=int, default=run.EFFORT.calibration)
    parser.add_argument("--most", type=int, default=search.MOST, help="candidates that the fit may measure")
    parser.add_argument("--out", type=Path, default=Path("fitted"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    run.EFFORT = replace(run.EFFORT, positions=asked.positions, calibration=asked.calibration)
    run.MIXES = tuple(asked.mixes.split(","))
    search.MOST = asked.most
    progress = ConsoleProgress(console)
    how: dict[str, Any] = {"text": asked.text, "minutes": asked.minutes, "runs": asked.runs, "on_progress": progress}
    found = run.fit(asked.model, asked.out, size=asked.size, **how)
    every = exhaustive(found, asked, ConsoleProgress(console))
    compare(found, every)


def exhaustive(found: FitRecord, asked: argparse.Namespace, progress: ConsoleProgress) -> dict[str, FitFigures]:
    """Every combination's figures, measured as the fit measures, by name."""
    base = resolve(asked.model, asked.runs / ".sources")
    shape = geometry_of(load_config(base).to_dict())
    request = make_request(shape, size=asked.size, memory=None, context=None, latency_ms=None, on=None)
    area = asked.out / WORK
    damage = Damage(base, area / "rows", area, run.EFFORT, Context(progress=progress))
    ledger = Ledger(area / run.LEDGER)
    measured: dict[str, FitFigures] = {}
    removed = [int(number) for number in asked.removed.split(",")]
    for each in combinations(removed, run.MIXES, ["f16"]):
        key = f"measured {each.name} at {request.limits.context}"
        value = ledger.recorded(key, lambda each=each: measure(each, damage, ledger, request))
        measured[each.name] = FitFigures.model_validate(value["figures"])
        print(each.name, json.dumps(value["figures"]), flush=True)
    return measured


def measure(each: Combination, damage: Damage, ledger: Ledger, request: Any) -> dict[str, Any]:
    dropped = (
        ()
        if not each.removed
        else cut(ledger.recorded(f"cut {each.removed}", lambda: cut_of(damage, each.removed))["dropped"])
    )
    return CandidateBench(damage, request, "model").measure(each, dropped)


def cut_of(damage: Damage, count: int) -> dict[str, Any]:
    chosen = damage.cut(count)
    return {"dropped": list(chosen), "kl": damage.of_cut(chosen)}


def compare(found: FitRecord, every: dict[str, FitFigures]) -> None:
    """Print the true front, what the fit has of it, and the errors of its predictions for what it did not measure."""
    names = list(every)
    for axis in ("bytes", "latency"):
        true = front(names, lambda n: every[n].kl, lambda n, axis=axis: getattr(every[n], axis))
        theirs = {c.name for c in found.candidates if axis in c.front}
        have = {c.name for c in found.candidates if c.measured is not None}
        print(f"front in KL and {axis}: {', '.join(true)}")
        print(f"  the fit's: {', '.join(sorted(theirs))}; it measured {len(have & set(true))} of these {len(true)}")
    within = [n for n in names if found.limits.size is None or every[n].bytes <= found.limits.size]
    best = min(within, key=lambda n: every[n].kl)
    print(f"best within the size: {best} ({every[best].kl:.4f}); recommended: {found.recommended}")
    print("| candidate | MB | KL | predicted | ms/token | predicted | in the fit |\n|---|---|---|---|---|---|---|")
    for name in sorted(names, key=lambda n: every[n].kl):
        own = next((c for c in found.candidates if c.name == name), None)
        figures = every[name]
        kl, latency = ("–", "–") if own is None else (f"{own.predicted.kl:.4f}", f"{1e3 * own.predicted.latency:.2f}")
        was = "yes" if own is not None and own.measured is not None else ""
        size, ms = figures.bytes / 1e6, 1e3 * figures.latency
        print(f"| {name} | {size:.1f} | {figures.kl:.4f} | {kl} | {ms:.2f} | {latency} | {was} |")


if __name__ == "__main__":
    main()
