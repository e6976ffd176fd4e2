"""`compress.api.fit`: reading what was asked for, the folder that a fit works in, and its result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.extras import FULL, need
from ..core.files import read_json, read_json_if_there, write_json
from ..core.geometry import Geometry
from ..core.stage import WORK, Context
from ..modeling.geometry import geometry_of
from ..modeling.source import ModelSource, fingerprint_source, hash_file
from ..pipeline.explain import readable_errors
from ..pipeline.making import check_device, shown_name
from ..pipeline.models import ModelLike, cache_of, check_dtype, check_sources
from ..pipeline.places import check_file, check_folder
from ..pipeline.progress import OnProgress, as_progress
from ..pipeline.steps import ROWS, RowsLike
from ..pipeline.store import lock
from ..records.fit import FitBudget, FitCandidate, FitFigures, FitLimits, FitRecord
from ..runtime.artifact_types import ARTIFACT_TYPES
from .candidates import Combination, front
from .choice import Found, doubts, reason
from .prediction import FileSize, Knowledge, prediction_errors
from .recipe import FILE, write_recipe
from .report import write_fit
from .request import MIXES, FitRequest, check_reachable, make_request, removable
from .rows import Effort, FitRows, given_rows, own_rows, text_rows

if TYPE_CHECKING:
    from .ledger import Clock, Ledger
    from .search import FitSearch

IDENTITY, LEDGER = "fit-of.json", "ledger.jsonl"
# In the work area, folders with their contents.
LARGE = ("unpruned.*", "imatrix-*", "sensitivity-*", "damage-*", "*.gguf", "cuts", "onnx-*", "kv-*")
ROWS_SHARE = 0.2  # of all time, for rows that the model writes
EFFORT = Effort()


def fit(
    model: ModelLike,
    out: str | Path = "fit",
    *,
    size: str | int | None = None,
    memory: str | int | None = None,
    context: int | None = None,
    latency_ms: float | None = None,
    on: str | None = None,
    engine: str | None = None,
    minutes: float = 30.0,
    rows: RowsLike | None = None,
    text: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    runs: str | Path = "runs",
    on_progress: OnProgress = None,
) -> FitRecord:
    """The best model for a size, a memory or a speed, found by measuring: which types, and whether to cut at all.

    >>> fit("org/model", "fit", size="80MB").reason

    `size` is the most bytes of the file, `memory` of the whole process with a cache for `context` tokens (each also as
    a text such as "80MB"), `latency_ms` the most milliseconds per written token: on this machine, or as `compress plan`
    counts them `on` a named one, whose memory is then a limit too. `engine` is llama.cpp (GGUF files; the default) or
    onnx (ONNX Runtime). Damage is measured on `rows` of a data stage, on the
    file `text`, or on a few rows that the model writes itself; `minutes` is the time that all of this may take.

    The folder `out` gets fit.json (the result), fit.html and recipe.yaml. A fit that was killed goes on when it is
    called again; with other limits it uses what is known. Raises `UserError` for limits that nothing meets, limits that
    contradict each other, unknown devices, a context that the model cannot have, and too short a text.
    """
    need("compress fit", *FULL)
    out, cache, progress = Path(out), cache_of(runs), as_progress(on_progress)
    check_dtype(dtype)
    _check_options(rows, text, minutes)
    (source,) = check_sources([str(model)], cache)
    check_folder(out, "--out")
    check_device(Context(device=device))
    from ..modeling.load import load_config, resolve

    base = resolve(str(model), cache, progress=progress)
    shape = geometry_of(load_config(base).to_dict())
    request = make_request(
        shape, size=size, memory=memory, context=context, latency_ms=latency_ms, on=on, engine=engine
    )
    from .sizes import GgufFileSizes, OnnxFileSizes

    files = (OnnxFileSizes if request.engine == "onnx" else GgufFileSizes)(base, shown_name(source))
    distinct = files.distinct(MIXES[request.engine])
    request = replace(request, mixes=tuple(distinct))
    sizes = files.table(removable(shape), request.mixes)
    if request.limits.size is not None and (own := files.sized(sizes, request.limits.size)):
        request = replace(request, mixes=(*request.mixes, next(iter(own))[1]))
        sizes |= own
    check_reachable(request, shape, sizes)
    identity = {"model": fingerprint_source(source, cache), "rows": _rows_identity(rows, text, cache), "seed": seed,
                "dtype": dtype, "place": request.place, "engine": request.engine}  # fmt: skip
    _check_owner(out, identity)
    with lock(out, "--out"), readable_errors(f"fit, working in {out}"):
        (out / WORK).mkdir(exist_ok=True)
        write_json(out / WORK / IDENTITY, identity)
        job = _Job(
            source, base, shape, request, sizes, out, Context(seed, device, dtype, progress=progress), files.name
        )
        same = [f"{', '.join(others)} would be the same file as {mix}" for mix, others in distinct.items() if others]
        return job.run(minutes, rows, text, runs, same)


def _check_options(rows: RowsLike | None, text: str | Path | None, minutes: float) -> None:
    if not minutes > 0:
        raise UserError(f"--minutes {minutes:g}: must be more than 0")
    if rows is not None and text is not None:
        raise UserError("--rows and --text are both given: calibrate on one of them")
    if rows is not None:
        given_rows(Path(str(rows)))
    if text is not None:
        check_file(Path(text), "--text")


def _rows_identity(rows: RowsLike | None, text: str | Path | None, cache: Path) -> str:
    if text is not None:
        return hash_file(Path(text))
    return "own" if rows is None else hash_file(Path(str(rows)) / ROWS, cache)


def _check_owner(out: Path, identity: dict[str, Any]) -> None:
    """`UserError` unless the folder is empty, or another attempt at the same fit."""
    file = out / WORK / IDENTITY
    if not file.is_file():
        if out.is_dir() and any(entry.name not in (".lock", WORK) for entry in out.iterdir()):
            raise UserError(f"{out} exists already and is no fit's folder; give another --out, or remove it")
        return
    known = read_json(file)
    differs = [name for name in identity if known.get(name) != identity[name]]
    if differs:
        words = {"model": "model", "rows": "calibration rows", "seed": "seed", "dtype": "--dtype", "place": "device"}
        words["engine"] = "--engine"
        told = " and ".join(words[name] for name in differs)
        raise UserError(f"{out} belongs to another fit, with another {told}; give another --out, or remove it")


class _Job:
    """A fit in its folder, which is this process's alone."""

    def __init__(
        self,
        source: ModelSource,
        base: Path,
        shape: Geometry,
        request: FitRequest,
        sizes: dict[tuple[int, str], FileSize],
        out: Path,
        context: Context,
        name: Callable[[int], str],
    ):
        self.source, self.base, self.shape, self.request, self.sizes = source, base, shape, request, sizes
        self.out, self.area, self.context, self.name = out, out / WORK, context, name

    def run(
        self, minutes: float, rows: RowsLike | None, text: str | Path | None, runs: str | Path, notes: list[str]
    ) -> FitRecord:
        """Measure, choose, and write the result; `notes` are told with what was left out."""
        from .damage import Damage
        from .ledger import Clock, Ledger
        from .search import FitSearch

        ledger = Ledger(self.area / LEDGER)
        clock = Clock(ledger, 60 * minutes)
        data = self._rows(ledger, clock, rows, text, runs)
        damage = Damage(self.base, data.folder, self.area, EFFORT, self.context, self.name)
        damage.check("--text" if text is not None else "--rows" if rows is not None else "the model's own rows")
        known = Knowledge(self.shape, self.sizes)
        search = FitSearch(damage, self.request, known, ledger, clock, self.context.progress, self.name)
        chosen = search.run()
        found = sorted(search.found.values(), key=lambda each: (each.figures.kl, each.candidate))
        why = reason(chosen, found, self._smallest(), self.request.limits)
        budgets = self._budgets(search, text)
        search.left_out += [*doubts(chosen, found, self.request.limits), *notes]
        removed = chosen.candidate.removed
        prune = damage.section(removed) if removed else None
        write_recipe(self.out, self.source, chosen.candidate, data.section, prune, why, self.context.seed)
        record = self._record(search, chosen, found, why, damage.positions).model_copy(update={"budgets": budgets})
        write_fit(record, self.out)
        _discard(self.area)
        return record

    def _rows(
        self, ledger: Ledger, clock: Clock, rows: RowsLike | None, text: str | Path | None, runs: str | Path
    ) -> FitRows:
        """The rows, made once; what making them took counts."""
        from ..modeling.load import load_tokenizer

        if rows is not None:
            return given_rows(Path(str(rows)))
        known = self.area / "rows.json"
        if not ledger.has("rows") or not known.is_file():
            context, tokenizer = self.context, load_tokenizer(self.base)
            how = {"device": context.device, "dtype": context.dtype, "seed": context.seed, "runs": runs}
            how |= {"on_progress": context.progress, "folder": self.area / "rows"}

            def make() -> None:
                if text is not None:
                    made = text_rows(Path(text), self.out, self.base, tokenizer, EFFORT, **how)
                else:
                    time = ROWS_SHARE * clock.total
                    made = own_rows(self.base, tokenizer, self.shape, EFFORT, time, context.progress, **how)
                write_json(known, made.section)

            ledger.recorded("rows", make)
        return FitRows(self.area / "rows", read_json_if_there(known))

    def _budgets(self, search: FitSearch, text: str | Path | None) -> list[FitBudget]:
        """What a cache of fixed size costs, where the cache is asked about and a long text is there."""
        if len(self.request.caches) == 1:
            return []
        from ..modeling.load import load_tokenizer
        from .budgets import SHARES, budget_cost, long_texts

        context = self.request.limits.context
        texts = long_texts(Path(text), load_tokenizer(self.base), context) if text is not None else []
        if not texts:
            search.left_out.append(f"what a KV budget costs was not measured: it needs a --text of {context:,} tokens")
            return []
        found = []
        for share in SHARES:
            key, entries = f"budget {context // share} of {context}", context // share
            if found and search.too_late(key, 1.0):
                search.left_out.append(f"for want of time, a KV budget of {entries} was not measured")
                break
            value = search.ledger.recorded(
                key, lambda entries=entries: budget_cost(search.damage.model, texts, entries).model_dump()
            )
            found.append(FitBudget.model_validate(value))
        return found

    def _smallest(self) -> tuple[str, int]:
        """The plain mix with the smallest file."""
        plain = {
            mix: size.bytes for (removed, mix), size in self.sizes.items() if not removed and mix in ARTIFACT_TYPES
        }
        name = min(plain, key=lambda mix: plain[mix])
        return name, plain[name]

    def _record(self, search: FitSearch, chosen: Found, found: list[Found], why: str, positions: int) -> FitRecord:
        limits, cuts = self.request.limits, search.cuts
        pairs = [(search.predicted[each.candidate], each.figures) for each in found]
        later = [pair for pair, each in zip(pairs, found, strict=True) if each.candidate != next(iter(search.found))]
        fronts = {
            axis: front(found, lambda each: each.figures.kl, lambda each, axis=axis: getattr(each.figures, axis))
            for axis in ("bytes", "latency")
        }
        measured = [
            _entry(each.candidate, cuts, search.predicted[each.candidate], limits.meets(each.figures)).model_copy(
                update={
                    "measured": each.figures,
                    "deviation": _deviation(each),
                    "front": [axis for axis, members in fronts.items() if each in members],
                }
            )
            for each in found
        ]
        rest = {c: f for c, f in search.all_predicted().items() if c not in search.found}
        ordered = sorted(rest, key=lambda c: (rest[c].kl, c))
        return FitRecord(
            model=self.source.title,
            blocks=self.shape.blocks,
            engine=self.request.engine,
            limits=FitLimits(
                size=limits.size, memory=limits.memory, context=limits.context, latency_ms=limits.latency_ms
            ),
            device=self.request.place,
            positions=positions,
            candidates=[*measured, *(_entry(c, cuts, rest[c], limits.meets(rest[c])) for c in ordered)],
            recommended=chosen.candidate.name,
            reason=why,
            recipe=FILE,
            errors=prediction_errors(pairs, later, timed=self.request.device is None),
            left_out=list(dict.fromkeys(search.left_out)),
            seconds=round(search.ledger.spent, 1),
        )


def _entry(candidate: Combination, cuts: Any, predicted: FitFigures, meets: bool) -> FitCandidate:
    return FitCandidate(
        name=candidate.name,
        removed=candidate.removed,
        dropped=list(cuts[candidate.removed]),
        mix=candidate.mix,
        cache=candidate.cache,
        predicted=predicted,
        meets=meets,
    )


def _deviation(each: Found) -> float:
    from .measuring import standard_error

    return standard_error(list(each.kl))


def _discard(area: Path) -> None:
    """Take away what is large and can be made again; the ledger and the rows stay, for a fit with other limits."""
    for found in [found for kind in LARGE for found in area.glob(kind)]:
        shutil.rmtree(found) if found.is_dir() else found.unlink(missing_ok=True)
