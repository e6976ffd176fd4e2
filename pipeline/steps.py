"""The functions of `compress.api` that run single stages on checkpoint folders, without a recipe.

Every step reads folders and writes one new stage folder `out`: a manifest with seeds, versions and hashes, and for
stages that make a model a checkpoint in `out`/model. The folder appears when it is complete; a step that was killed
resumes when it is called again with the same settings.

`section` or `**keys` give the recipe's section of the same name: an object such as `PruneConfig(blocks=6)`, or its keys
as arguments. Wrong keys, types and values are rejected before any weight is read, with a recipe's messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.extras import FULL, need
from ..core.files import check_folder_exists
from ..core.place import ANYWHERE, Place
from ..core.registry import packages
from ..core.stage import Context, Inputs, Section
from ..data.config import DataConfig, DrillsConfig, ProseConfig, WrittenConfig
from ..distill.config import DistillConfig
from ..modeling.source import fingerprint_source, hash_file
from ..prune.config import PruneConfig
from ..records.figures import PruneFigures
from ..records.manifest import StageManifest
from ..retain.config import RetainConfig
from ..sort.config import SortConfig
from .making import Origin, Work, check_device, input_hashes, make_stage, shown_name
from .models import ModelLike, cache_of, check_dtype, check_sources
from .options import checked, choose_section
from .places import check_new
from .progress import OnProgress, as_progress
from .stages import STAGES
from .store import StageFolder, fingerprint

ROWS = "rows.parquet"


@dataclass(frozen=True)
class StageResult:
    """A finished stage's folder."""

    folder: Path

    @cached_property
    def manifest(self) -> StageManifest:
        """Inputs, configuration, time, memory, and files with their sha256."""
        return StageManifest.read(self.folder)

    @property
    def metrics(self) -> dict[str, Any]:
        """The stage's own figures."""
        return self.manifest.metrics

    @property
    def seconds(self) -> float:
        """Its wall time."""
        return self.manifest.seconds

    def __str__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True)
class ModelResult(StageResult):
    """A finished stage that made a model."""

    @property
    def model(self) -> Path:
        """The checkpoint folder."""
        return self.folder / "model"


@dataclass(frozen=True)
class PruneResult(ModelResult):
    """A pruned model."""

    @property
    def dropped(self) -> list[int]:
        """The removed blocks, as indices in the model that was pruned."""
        return self.manifest.figures(PruneFigures).dropped


RowsLike = StageResult | Path | str


class _Data(Section):
    """A wrapper for checking the section, whose type depends on its source."""

    data: DataConfig


def collect_rows(
    model: ModelLike,
    out: str | Path,
    section: WrittenConfig | ProseConfig | DrillsConfig | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    runs: str | Path = "runs",
    place: Place = ANYWHERE,
    on_progress: OnProgress = None,
    **keys: object,
) -> StageResult:
    """Collect rows for calibration, training and measurement, written by the unpruned `model` or from a data set.

    >>> rows = collect_rows(model, "rows", source="magpie", rows=92)

    `keys` are those of the recipe's `data` section; its llama.cpp engine runs at `place`. Raises `UserError` for a data
    set that cannot be read.
    """
    config = section or checked(_Data, {"data": keys}).data
    call = _Call("data", config, out, device, dtype, seed, runs, on_progress, place)
    return StageResult(call.make(model, model))


def prune(
    model: ModelLike,
    out: str | Path,
    section: PruneConfig | None = None,
    *,
    rows: RowsLike | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    runs: str | Path = "runs",
    on_progress: OnProgress = None,
    **keys: object,
) -> PruneResult:
    """Measure blocks, choose which to remove, heal the gap and save the pruned model.

    >>> prune(model, "pruned", rows=rows, blocks=6, search="greedy", heal="refit").dropped

    `rows`, from `collect_rows` or a run's data stage, are the calibration rows, unless `calibration` names a text.
    `keys` are those of the recipe's `prune` section. Raises `UserError` for too many blocks or too few rows.
    """
    config = choose_section(PruneConfig, section, keys, "prune")
    call = _Call("prune", config, out, device, dtype, seed, runs, on_progress)
    return PruneResult(call.make(model, model, rows))


def heal(
    model: ModelLike,
    out: str | Path,
    method: str | Mapping[str, object] = "linear",
    *,
    base: ModelLike,
    rows: RowsLike | None = None,
    calibration: Mapping[str, object] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    runs: str | Path = "runs",
    on_progress: OnProgress = None,
) -> ModelResult:
    """Heal a cut again: keep the blocks of `base` that `model` has, with `base`'s weights, and close the gaps.

    >>> heal("pruned/model", "healed", "refit", base=model, rows=rows)

    `method` and `calibration` are the keys `heal` and `calibration` of the recipe's `prune` section. The weights of
    `model` are not read, so any training since the cut is lost. Raises `UserError` if no block was removed.
    """
    config = checked(PruneConfig, {"blocks": 0, "heal": method, "calibration": calibration})
    call = _Call("prune", config, out, device, dtype, seed, runs, on_progress)
    from ..prune.stage import heal_cut

    return ModelResult(call.make(base, model, rows, heal_cut))


def distill(
    model: ModelLike,
    out: str | Path,
    section: DistillConfig | None = None,
    *,
    base: ModelLike,
    rows: RowsLike,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    runs: str | Path = "runs",
    on_progress: OnProgress = None,
    **keys: object,
) -> ModelResult:
    """Train the pruned `model` on `rows`, with the unpruned `base` as its teacher; the best checkpoint is kept.

    >>> distill(pruned.model, "recovered", base=model, rows=rows, objective="asft", teacher="shared")

    `keys` are those of the recipe's `distill` section; with `variants` each student is in `out`/variants/NAME/model.
    Raises `UserError` for rows that are too few or too long.
    """
    config = choose_section(DistillConfig, section, keys, "distill")
    call = _Call("distill", config, out, device, dtype, seed, runs, on_progress)
    return ModelResult(call.make(base, model, rows))


def sort(
    model: ModelLike,
    out: str | Path,
    section: SortConfig | None = None,
    *,
    base: ModelLike,
    rows: RowsLike,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    runs: str | Path = "runs",
    on_progress: OnProgress = None,
    **keys: object,
) -> ModelResult:
    """Train `model` to run at several depths, with the unpruned `base` as its teacher.

    >>> sort(recovered.model, "sorted", base=model, rows=rows, depths=[12, 18, 24])

    `keys` are those of the recipe's `sort` section. Raises `UserError` if the last depth is not all blocks.
    """
    config = choose_section(SortConfig, section, keys, "sort")
    call = _Call("sort", config, out, device, dtype, seed, runs, on_progress)
    return ModelResult(call.make(base, model, rows))


def retain(
    model: ModelLike,
    out: str | Path,
    section: RetainConfig | None = None,
    *,
    rows: RowsLike | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    runs: str | Path = "runs",
    on_progress: OnProgress = None,
    **keys: object,
) -> ModelResult:
    """Train retaining heads, by whose scores a KV cache of fixed size evicts; the model's own weights do not change.

    >>> retain(model, "headed", rows=rows, budget=1024)

    `keys` are those of the recipe's `retain` section. Raises `UserError` if neither `rows` nor `dataset` is given.
    """
    config = choose_section(RetainConfig, section, keys, "retain")
    if rows is None and config.dataset is None:
        raise UserError("retain builds its rows from other rows: pass `rows`, or set `dataset`")
    call = _Call("retain", config, out, device, dtype, seed, runs, on_progress)
    return ModelResult(call.make(model, model, rows))


@dataclass(frozen=True)
class _StepFolder(StageFolder):
    """A stage's folder at a path chosen by the user."""

    out: Path

    @property
    def path(self) -> Path:
        return self.out

    @property
    def partial(self) -> Path:
        # The fingerprint in the name makes a step with other settings start over.
        return self.out.with_name(f".{self.out.name}-{self.fingerprint[:12]}.partial")


@dataclass(frozen=True)
class _Call:
    """The arguments of one step."""

    name: str
    config: Section
    out: str | Path
    device: str
    dtype: str
    seed: int
    runs: str | Path
    on_progress: OnProgress
    place: Place = ANYWHERE

    def make(
        self,
        base: ModelLike,
        model: ModelLike,
        rows: RowsLike | None = None,
        work: Work | None = None,
    ) -> Path:
        """Make the stage's folder; `base` is the unpruned model, `model` the stage's input."""
        need(f"the step {self.name}", *FULL)
        from ..modeling.load import resolve

        spec, out, cache = STAGES[self.name], Path(self.out), cache_of(self.runs)
        check_dtype(self.dtype)
        check_new(out)
        sources = check_sources([str(base), str(model)], cache)
        data = rows_folder(rows)
        context = Context(self.seed, self.device, self.dtype, progress=as_progress(self.on_progress), place=self.place)
        check_device(context)
        if hasattr(spec.module(), "ready"):
            spec.module().ready(self.config, context)
        folders = [resolve(str(source), cache, progress=context.progress) for source in (base, model)]
        if hasattr(spec.module(), "check"):
            spec.module().check(self.config, folders[0], context)
        prints = {source.text: fingerprint_source(source, cache) for source in sources}
        stages = {} if data is None else {"data": data}
        files = [hash_file(folder / ROWS, cache) for folder in stages.values()]
        digest = fingerprint(
            self.name if work is None else "heal",
            spec.format,
            self.config.model_dump(mode="json"),
            self.seed,
            self.dtype,
            prints[sources[0].text],
            [prints[sources[1].text]],
            [*files, *input_hashes(self.name, self.config, context, cache)],
            packages(self.config),
        )
        folder = _StepFolder(out.parent, self.name, digest, out)
        origin = Origin(sources[0].text, prints[sources[0].text], {})
        inputs = Inputs(folders[0], folders[1], stages, shown_name(sources[0]))
        make_stage(spec, self.config, inputs, folder, context, origin, work=work)
        return out


def rows_folder(rows: RowsLike | None) -> Path | None:
    """The folder of a data stage; `UserError` if it has no rows."""
    if rows is None:
        return None
    folder = Path(str(rows))
    check_folder_exists(folder, "rows: ")
    if not (folder / ROWS).is_file():
        raise UserError(
            f"rows: {folder} is not the folder of a data stage, which has {ROWS}; make one with collect_rows"
        )
    return folder
