"""Speed and memory of every depth of a bundle beside its measured quality; writing these figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import UserError
from ..core.extras import REPORT, need
from ..core.files import write_whole
from ..core.place import ANYWHERE, Place
from ..kv.settings import KvBudget, choose_budget
from ..records.bundle import BundleManifest
from ..runtime.artifact_types import GGUF_CACHE
from ..runtime.bench import DepthFigures, DraftFigures
from ..runtime.bundle import read_bundle
from ..runtime.cost import held_as
from .places import check_file_place
from .progress import OnProgress, as_progress
from .report.collect import BENCH
from .report.html import bench_page
from .summary import LAST, rebuild

ENGINES = {"gguf": "llama.cpp", "onnx": "onnx"}


class _Figures(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BenchDepth(_Figures):
    """One engine, type and depth."""

    role: str = Field(description="the artifact's role, such as onnx-int4@18")
    engine: str = Field(description="onnx or llama.cpp")
    type: str = Field(description="type of the artifact, such as int4")
    depth: int = Field(description="number of blocks")
    perplexity: float = Field(description="perplexity of the probe text, from the export's verification")
    prompt_tokens: int = Field(description="tokens in the prompt")
    first_token_seconds: float = Field(description="time for the whole prompt and one token")
    prefill_tokens_per_second: float = Field(description="speed of reading the prompt")
    decode_tokens_per_second: float = Field(description="speed of generating, one stream")
    peak_memory_bytes: int = Field(description="peak memory of the whole process")
    kv_bytes_per_token: int | None = Field(default=None, description="size of keys and values per token that is held")
    load_seconds: float = Field(description="time to open the artifact")
    device: str = Field(default="cpu", description="what it ran on: cpu, or the names of GPUs")


class BenchDraft(_Figures):
    """A draft depth against the greatest depth alone, greedy."""

    engine: str = Field(description="onnx or llama.cpp")
    type: str = Field(description="type of the artifact, such as int4")
    depth: int = Field(description="the full depth, which verifies")
    draft_depth: int = Field(description="the depth that drafts")
    draft_tokens: int = Field(description="tokens drafted at a time")
    tokens: int = Field(description="tokens generated")
    acceptance: float = Field(description="share of the drafted tokens that were accepted")
    plain_tokens_per_second: float = Field(description="decoding speed without a draft")
    draft_tokens_per_second: float = Field(description="decoding speed with the draft")
    equal: bool = Field(description="whether the text equals that of the full depth alone")


class BenchReport(_Figures):
    """All figures of a bundle."""

    name: str = Field(description="the bundle's name")
    depths: list[BenchDepth] = Field(description="figures per engine, type and depth")
    drafts: list[BenchDraft] = Field(description="figures per draft depth, with --speculate")
    kv: KvBudget | None = Field(default=None, description="settings of the bounded KV cache; null without --kv-budget")
    kv_type: str | None = Field(
        default=None, description="how llama.cpp held keys and values, with --kv-type; null: each artifact its own way"
    )
    stage: str | None = Field(
        default=None, description="in a run's bench.json: folder of the export stage with the bundle"
    )


def bench(
    bundle: str | Path,
    *,
    engine: str | None = None,
    type: str | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeat: int = 2,
    speculate: bool = False,
    draft_tokens: int = 4,
    threads: int = 0,
    kv_budget: int | KvBudget | None = None,
    kv_type: str | None = None,
    place: Place = ANYWHERE,
    on_progress: OnProgress = None,
) -> BenchReport:
    """Time every depth of a bundle in every engine and type, or the ones named, each in a process of its own.

    The best of `repeat` runs counts. `speculate` also measures each shallower depth as a draft for the deepest,
    `draft_tokens` at a time. `kv_budget` bounds the KV cache `kv_type` is how llama.cpp holds it, and `place` is
    the hardware, as for a `Session`. Raises `UserError` for engines and types that the bundle lacks.
    """
    from ..runtime.bench import measure_all, measure_draft
    from ..runtime.session import choose_engine

    if min(prompt_tokens, new_tokens, repeat, draft_tokens) < 1:
        raise UserError("--prompt-tokens, --new-tokens, --repeat and --draft-tokens must be at least 1")
    bundle, progress = Path(bundle), as_progress(on_progress)
    place.opens_files("compress bench")
    budget = choose_budget(bundle, kv_budget) if isinstance(kv_budget, int) else kv_budget
    if budget is not None and speculate:
        raise UserError("--speculate cannot be combined with --kv-budget: leave one of them out")
    measured = measure_all(
        bundle,
        choose_engine(engine, budget, kv_type, place),
        type,
        done=lambda f: progress.note(f"measured {f.engine} {f.type} at depth {f.depth}"),
        kv=budget,
        kv_type=kv_type,
        place=place,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeat=repeat,
        threads=threads,
    )
    drafts: list[DraftFigures] = []
    for figures in measured if speculate else []:
        same = [f.depth for f in measured if (f.engine, f.type) == (figures.engine, figures.type)]
        if figures.depth < max(same):
            progress.note(f"drafting in {figures.engine} {figures.type} at depth {figures.depth}")
            how = {"draft_tokens": draft_tokens, "new_tokens": new_tokens, "threads": threads, "kv_type": kv_type}
            how |= {"place": place}
            drafts.append(measure_draft(bundle, figures.engine, figures.type, figures.depth, **how))
    manifest = read_bundle(bundle)
    return BenchReport(
        name=manifest.name,
        depths=_with_quality(manifest, measured, kv_type),
        drafts=[BenchDraft(**asdict(draft)) for draft in drafts],
        kv=budget,
        kv_type=kv_type,
    )


def _with_quality(manifest: BundleManifest, found: list[DepthFigures], kv_type: str | None) -> list[BenchDepth]:
    """The figures with the quality that the bundle's verification measured, in the artifact's own type of cache."""
    artifacts = {(ENGINES[a.format], a.type, a.depth): a for a in manifest.artifacts}
    entries = []
    for figures in found:
        artifact = artifacts[figures.engine, figures.type, figures.depth]
        held = artifact.kv_bytes_per_token
        if held is not None and kv_type is not None:
            held = held_as(held, GGUF_CACHE, kv_type)
        known = {"role": artifact.role, "perplexity": artifact.verification.perplexity}
        entries.append(BenchDepth(**known, kv_bytes_per_token=held, **asdict(figures)))
    return entries


def as_text(report: BenchReport) -> str:
    """The figures as JSON."""
    return report.model_dump_json(indent=2, exclude_none=True) + "\n"


def check_bench_file(out: Path) -> None:
    """`UserError` unless figures or a page can be written there."""
    if out.suffix not in (".html", ".json"):
        raise UserError(f"--out {out}: must end in .html or .json")
    check_file_place(out)


def write_bench(report: BenchReport, out: Path) -> None:
    """Write the figures (.json), or a page with a plot of quality against speed (.html)."""
    page = out.suffix == ".html"
    text = bench_page(report.model_dump(exclude_none=True)) if page else as_text(report)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)


def keep_in_run(report: BenchReport, bundle: Path, note: Callable[[str], None]) -> list[Path]:
    """Add the figures to the report of the run that the bundle belongs to, if it does; returns the files written.

    If the report cannot be drawn here, `note` gets the reason, and the figures are saved nevertheless. With a KV budget
    or another type of keys and values nothing is written: the run's report plots speed against quality, which they
    change.
    """
    stage = bundle.resolve().parent
    run = stage.parent
    if report.kv is not None or report.kv_type is not None or not (run / LAST).is_file():
        return []
    write_whole(run / BENCH, as_text(report.model_copy(update={"stage": stage.name})))
    try:
        need("drawing the run's report again", *REPORT)
    except UserError as error:
        note(str(error))
        return [run / BENCH]
    return [run / BENCH, *rebuild(run)]
