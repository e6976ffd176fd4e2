"""A fit against measuring everything: did it find the front, and what did it predict?

    python benchmarks/fit.py MODEL --size 95MB --text wiki.txt --work build/fit [--dither]

The fit goes first; it may choose among `--mixes` and the size itself, and measure `--most` candidates. Then every
combination of the numbers of blocks in `--removed` with the mixes is built and measured as the fit measures its
candidates; what the fit measured is taken from it. Everything finished is kept in the work folder: a run that was
stopped at any moment goes on.

`--dither` moves the weights within their 4-bit step first, as benchmarks/front.py does and says why.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
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
from compress.fit.measuring import make_bench
from compress.fit.request import FitRequest, make_request
from compress.modeling.cuts import cut
from compress.modeling.geometry import geometry_of
from compress.modeling.load import load_config, resolve
from compress.records.fit import FitCandidate, FitFigures, FitRecord
from front import dithered

AXES: dict[str, Callable[[FitFigures], float]] = {"bytes": lambda f: f.bytes, "latency": lambda f: f.latency}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--size", default="95MB")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--removed", default="0,1,2,3,4,6", help="numbers of removed blocks, with commas between")
    parser.add_argument("--mixes", default="Q8_0,Q5_1,Q4_K_M,IQ4_XS,Q3_K_S")
    parser.add_argument("--minutes", type=float, default=60, help="time that the fit may take")
    parser.add_argument("--positions", type=int, default=run.EFFORT.positions, help="held-out tokens to measure on")
    parser.add_argument("--calibration", type=int, default=run.EFFORT.calibration, help="tokens to heal on")
    parser.add_argument("--most", type=int, default=search.MOST, help="candidates that the fit may measure")
    parser.add_argument("--work", type=Path, default=Path("build/fit"))
    parser.add_argument("--dither", action="store_true")
    asked = parser.parse_args()
    run.EFFORT = replace(run.EFFORT, positions=asked.positions, calibration=asked.calibration)
    run.MIXES = {"llama.cpp": tuple(asked.mixes.split(","))}
    search.MOST = asked.most
    asked.work.mkdir(parents=True, exist_ok=True)
    base = resolve(asked.model, asked.work / "sources")
    base = dithered(base, asked.work / "dithered") if asked.dither else base
    found = fitted(base, asked)
    compare(found, exhaustive(found, base, asked))


def fitted(base: Path, asked: argparse.Namespace) -> FitRecord:
    """The fit's own result."""
    out = asked.work / "fit"
    if (out / FitRecord.FILE).is_file():
        return FitRecord.read(out)
    how: dict[str, Any] = {"text": asked.text, "minutes": asked.minutes, "runs": asked.work / "runs"}
    return run.fit(str(base), out, size=asked.size, on_progress=ConsoleProgress(console), **how)


def exhaustive(found: FitRecord, base: Path, asked: argparse.Namespace) -> dict[Combination, FitFigures]:
    """Every combination's figures, measured as the fit measures."""
    known, area = asked.work / "fit" / WORK, asked.work / "every"
    if not area.exists():
        started = asked.work / "unfinished"
        shutil.rmtree(started, ignore_errors=True)
        started.mkdir()
        for file in (run.LEDGER, "search.jsonl"):  # what the fit measured, and what its search looked at
            if (known / file).is_file():
                shutil.copy(known / file, started / file)
        started.rename(area)
    shape = geometry_of(load_config(base).to_dict())
    request = make_request(shape, size=asked.size, memory=None, context=None, latency_ms=None, on=None)
    damage = Damage(base, known / "rows", area, run.EFFORT, Context(progress=ConsoleProgress(console)))
    ledger = Ledger(area / run.LEDGER)
    damage.searched = bool(ledger.recorded("searched", lambda: True))
    measured: dict[Combination, FitFigures] = {}
    for each in combinations([int(number) for number in asked.removed.split(",")], asked.mixes.split(","), ["f16"]):
        value = ledger.recorded(
            f"measured {each.name} at {request.limits.context}",
            lambda each=each: measure(each, damage, ledger, request),
        )
        measured[each] = FitFigures.model_validate(value["figures"])
        print(f"{each.name}: {json.dumps(value['figures'])}", flush=True)
    print(f"measuring everything took {ledger.spent:.0f} s; the fit {found.seconds:.0f} s", flush=True)
    return measured


def measure(each: Combination, damage: Damage, ledger: Ledger, request: FitRequest) -> dict[str, Any]:
    """One combination, as the fit measures it; its blocks are chosen as the fit chooses them."""

    def chosen() -> dict[str, Any]:
        dropped = damage.cut(each.removed)
        return {"dropped": list(dropped), "kl": damage.of_cut(dropped)}

    dropped = cut(ledger.recorded(f"cut {each.removed}", chosen)["dropped"]) if each.removed else ()
    return make_bench(damage, request, "model").measure(each, dropped)


def compare(found: FitRecord, every: dict[Combination, FitFigures]) -> None:
    """Print the true front, what the fit has of it, and how far its predictions were from all measurements."""
    theirs = {Combination(c.removed, c.mix, c.cache): c for c in found.candidates}
    for axis, value in AXES.items():
        true = front(list(every), lambda c: every[c].kl, lambda c, value=value: value(every[c]))
        have = [c for c in true if c in theirs and theirs[c].measured is not None]
        print(f"front in KL and {axis}: {'; '.join(c.name for c in true)}")
        print(f"  the fit measured {len(have)} of these {len(true)}: {'; '.join(c.name for c in have)}")
    within = [c for c in every if found.limits.size is None or every[c].bytes <= found.limits.size]
    best = min(within, key=lambda c: every[c].kl)
    print(f"best of all within the size: {best.name}, KL {every[best].kl:.4f}; recommended: {found.recommended}")
    pairs = [(theirs[c], every[c]) for c in every if c in theirs]
    print_errors("all predictions", pairs)
    print_errors("of what the fit did not measure", [(own, true) for own, true in pairs if own.measured is None])
    print("| candidate | MB | KL | predicted | ms/token | predicted | in the fit |\n|---|---|---|---|---|---|---|")
    for each in sorted(every, key=lambda c: every[c].kl):
        own, figures = theirs.get(each), every[each]
        kl, latency = ("–", "–") if own is None else (f"{own.predicted.kl:.4f}", f"{1e3 * own.predicted.latency:.2f}")
        was = "measured" if own is not None and own.measured is not None else ""
        size, ms = figures.bytes / 1e6, 1e3 * figures.latency
        print(f"| {each.name} | {size:.1f} | {figures.kl:.4f} | {kl} | {ms:.2f} | {latency} | {was} |")


def print_errors(what: str, pairs: Sequence[tuple[FitCandidate, FitFigures]]) -> None:
    """Rank correlation, and mean and median relative errors, of KL and of the time per token."""
    if len(pairs) < 2:
        return
    for name, value in {"KL": lambda f: f.kl, "ms/token": lambda f: f.latency}.items():
        predicted, true = [value(own.predicted) for own, _ in pairs], [value(figures) for _, figures in pairs]
        errors = [abs(p - t) / t for p, t in zip(predicted, true, strict=True)]
        order = statistics.correlation(ranks(predicted), ranks(true))
        print(
            f"{what} ({len(pairs)}), {name}: rank correlation {order:.3f}, relative error "
            f"{statistics.fmean(errors):.1%} in the mean, {statistics.median(errors):.1%} in the median"
        )


def ranks(values: Sequence[float]) -> list[int]:
    """The place of each among all, from 0."""
    order = sorted(values)
    return [order.index(value) for value in values]


if __name__ == "__main__":
    main()
