"""The data stage: rows for calibration, training and held-out evaluation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.files import write_json
from ..core.stage import WORK, Context, Inputs
from ..modeling.load import load_tokenizer
from ..modeling.types import ModelTokenizer
from ..records.figures import DataFigures, ProseFigures, RewriteShares, SourceShare
from .chat import measured
from .collect import collect, sources
from .config import FORMAT as FORMAT
from .config import DataConfig, DatasetConfig, DatasetsConfig, DrillsConfig, MagpieConfig, ProseConfig, TextsConfig
from .cost import prose_goals
from .decontaminate import evaluation_file
from .drafts import KEPT, draw_rows
from .drills import SOURCE as DRILLS
from .drills import DrillRows
from .drills_config import DrillsBeside
from .engines import check_engine
from .magpie import Magpie, query, to_row
from .mixing import check_enough, goals, interleaved
from .mixing import shares as shares_of
from .prose import ProseSource, Taken, take
from .readers import local_file
from .rewriting import Rewriter, examples, settle_row, shares
from .rows import Row, write_rows
from .teacher_cache import write_teacher
from .texts import Texts, to_text_row

STATS = "stats.json"
EXAMPLES = "examples.json"  # rewrites beside gold


def ready(config: DataConfig, context: Context) -> None:
    """Reject engines that are not installed, before the model is downloaded."""
    if isinstance(config, ProseConfig | DrillsConfig):
        return
    if not isinstance(config, (DatasetConfig, DatasetsConfig)) or any(part.rewrite for part in config.parts):
        check_engine(config.engine, context)


def check(config: DataConfig, base: Path, context: Context) -> None:
    """Reject missing files, and conversations for a model without a chat template."""
    source = _prose(config, context)
    if source is not None:
        source.files()
        decontaminate = source.config.decontaminate
        for file in decontaminate.files if decontaminate else []:
            evaluation_file(file, context, source.where)
    if isinstance(config, DrillsConfig) or config.drills is not None:
        _drills(config, load_tokenizer(base), context)
    if isinstance(config, ProseConfig | DrillsConfig):
        return
    if isinstance(config, (DatasetConfig, DatasetsConfig)):
        for source in sources(config, context):
            local_file(source)
        for file in config.decontaminate.files if config.decontaminate else []:
            evaluation_file(file, context)
        if all(part.text is not None for part in config.parts):
            return
    if not isinstance(config, TextsConfig):
        query(load_tokenizer(base), base)


def run(config: DataConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `rows.parquet` and `stats.json` (counts by reason, shares, tokens); return the stats with the speed.

    Several processes sample self-data in parallel; rank 0 writes the files.
    """
    if context.rank and not _writes(config):
        return {}
    tokenizer = load_tokenizer(inputs.base)
    work = out_dir / WORK
    work.mkdir(exist_ok=True)
    made = _made(config, inputs, out_dir, tokenizer, context)
    if context.rank:
        return {}
    rows = made.rows
    figures = statistics(rows, made.counts)
    if made.contaminated is not None:
        figures.contaminated = made.contaminated
    if made.sets:
        figures.sets = made.sets
    if made.prose is not None:
        figures.prose = made.prose
    if made.shares:
        figures.shares = made.shares
    if made.rewritten is not None:
        figures.rewritten = made.rewritten
    write_rows(out_dir, rows)
    if config.teacher is not None:
        size = write_teacher(config.teacher, inputs.base, rows, tokenizer, config.length, out_dir, context)
        figures.teacher_targets, figures.teacher_bytes = size.targets, size.bytes
    write_json(out_dir / STATS, figures.model_dump(), indent=1, ascii=True)
    context.progress.note(
        f"{figures.rows} rows ({figures.heldout} held out), {figures.tokens} tokens, {figures.targets} to train on"
    )
    if made.speed:
        figures.tokens_per_second = round(made.speed, 1)
    return figures.model_dump()


def _writes(config: DataConfig) -> bool:
    """Whether the unpruned model generates text, which all processes do together."""
    if isinstance(config, (DatasetConfig, DatasetsConfig)):
        return any(part.rewrite is not None for part in config.parts)
    return not isinstance(config, ProseConfig | DrillsConfig)


@dataclass(frozen=True)
class _Made:
    """Rows that were written or read, and what is counted on the way."""

    rows: list[Row]
    counts: Counter[str]  # rows by KEPT or the reason they were dropped
    speed: float | None = None  # tokens sampled per second, without what an interrupted attempt had sampled
    contaminated: dict[str, int] | None = None
    sets: dict[str, int] = field(default_factory=dict)
    rewritten: RewriteShares | None = None
    prose: ProseFigures | None = None
    shares: dict[str, SourceShare] = field(default_factory=dict)


def _made(config: DataConfig, inputs: Inputs, out_dir: Path, tokenizer: ModelTokenizer, context: Context) -> _Made:
    """The rows of both splits, and what stands beside them."""
    source, cache = _prose(config, context), out_dir / WORK / "prose"
    drills = _drills(config, tokenizer, context)
    if isinstance(config, ProseConfig):
        taken = take(ProseSource(config, context), *prose_goals(config), tokenizer, config.length, cache)
        made = _Made(taken.rows, taken.counts, prose=_prose_figures(taken))
        return _with_drills(made, {config.source: made.rows}, config.drills, drills, context)
    if isinstance(config, DrillsConfig):
        assert drills is not None
        rows = split_rows([drills.row(number) for number in range(config.rows)], config.heldout, context.seed)
        return _Made(rows, Counter({KEPT: len(rows)}))
    if source is not None and config.prose is not None:
        check_enough(config, source, config.prose.weight, tokenizer, cache)
    if isinstance(config, (DatasetConfig, DatasetsConfig)):
        made = _from_data(config, inputs, out_dir, tokenizer, context)
    else:
        made = _from_model(config, inputs, tokenizer, out_dir / WORK, context)
    if context.rank:
        return made
    rows = split_rows(made.rows, config.heldout, context.seed)
    rows = [measured(row, tokenizer, config.length) for row in rows]
    beside: dict[str, list[Row]] = {config.source: rows}
    if source is not None and config.prose is not None:
        taken = take(source, *goals(rows, config.prose.weight), tokenizer, config.length, cache)
        made, beside[source.title] = replace(made, prose=_prose_figures(taken)), taken.rows
    return _with_drills(replace(made, rows=rows), beside, config.drills, drills, context)


def _with_drills(
    made: _Made, sources: dict[str, list[Row]], config: DrillsBeside | None, drills: DrillRows | None, context: Context
) -> _Made:
    """All sources in one order, drills last; the first one's rows are the source's own."""
    if config is not None and drills is not None:
        own = next(iter(sources.values()))
        sources = sources | {DRILLS: drills.take(*goals(own, config.weight))}
    if len(sources) == 1:
        return made
    shares = shares_of(sources)
    parts = [f"{one.share:.1%} {title}" for title, one in shares.items()]
    context.progress.note(f"tokens to learn: {', '.join(parts)}")
    return replace(made, rows=interleaved(*sources.values()), shares=shares)


def _prose(config: DataConfig, context: Context) -> ProseSource | None:
    """The recipe's real text, if it has some."""
    if isinstance(config, ProseConfig):
        return ProseSource(config, context)
    if isinstance(config, DrillsConfig):
        return None
    return ProseSource(config.prose, context, "data.prose") if config.prose is not None else None


def _drills(config: DataConfig, tokenizer: ModelTokenizer, context: Context) -> DrillRows | None:
    """What makes the recipe's drills, if it has some."""
    if isinstance(config, DrillsConfig):
        return DrillRows(config, tokenizer, config.length, context.seed)
    if config.drills is None:
        return None
    return DrillRows(config.drills, tokenizer, config.length, context.seed, "data.drills")


def _prose_figures(taken: Taken) -> ProseFigures:
    return ProseFigures(
        train_documents=taken.documents["train"],
        heldout_documents=taken.documents["heldout"],
        dropped={reason: count for reason, count in sorted(taken.counts.items()) if reason != KEPT},
        bytes_per_token=taken.bytes_per_token,
    )


def _from_model(
    config: MagpieConfig | TextsConfig, inputs: Inputs, tokenizer: ModelTokenizer, work: Path, context: Context
) -> _Made:
    if isinstance(config, MagpieConfig):
        drawer, to_training_row = Magpie(config, inputs.base, tokenizer, context, work), to_row
        hint = "the model may not be instruction-tuned, or data.max_tokens and data.max_prompt_tokens are too small"
    else:
        drawer, to_training_row = Texts(config, inputs.base, tokenizer, context, work), to_text_row
        hint = "raise data.temperature"
    with drawer.writer as writer:
        drafts, counts = draw_rows(drawer, context, hint)
    return _Made([to_training_row(draft) for draft in drafts], counts, writer.speed())


def _from_data(
    config: DatasetConfig | DatasetsConfig, inputs: Inputs, out_dir: Path, tokenizer: ModelTokenizer, context: Context
) -> _Made:
    work = out_dir / WORK
    collected = collect(config, tokenizer, context, work / "datasets")
    golds, counts = collected.golds, collected.counts
    dropped = dict(collected.contaminated) if config.decontaminate else None
    if all(part.rewrite is None for part in config.parts):
        return _Made([gold.row for gold in golds], counts, None, dropped, collected.sets)
    rewriter = Rewriter(tokenizer, inputs.base, config.length, config.batch, config.engine, context, work)
    outcomes, speed = rewriter.run(golds)
    if context.rank:
        return _Made([], counts)
    by_id = {outcome.id: outcome for outcome in outcomes}
    rows = [settle_row(gold, by_id.get(gold.row.id)) for gold in golds]
    write_json(out_dir / EXAMPLES, examples(golds, outcomes), indent=1)
    rewritten = shares(rows)
    kept = ", ".join(f"{count} {reason}" for reason, count in rewritten.gold_kept.items())
    context.progress.note(
        f"{rewritten.taken_share:.0%} of {len(outcomes)} gold answers replaced (kept: {kept or 'none'})"
    )
    return _Made(rows, counts, speed, dropped, collected.sets, rewritten)


def split_rows(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The rows with their split: a share of them, chosen by a hash of seed and id, is held out; at least one row,
    but never all (given two rows or more)."""
    count = min(max(round(len(rows) * share), 1), len(rows) - 1)
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}/heldout/{row.id}".encode()).digest())
    heldout = {row.id for row in ranked[:count]}
    return [replace(row, split="heldout" if row.id in heldout else "train") for row in rows]


def statistics(rows: Sequence[Row], counts: Counter[str]) -> DataFigures:
    """Counts, the share of read or sampled rows that was kept, and tokens."""
    total = sum(counts.values())
    return DataFigures(
        rows=len(rows),
        train=sum(row.split == "train" for row in rows),
        heldout=sum(row.split == "heldout" for row in rows),
        seen=total,
        dropped={reason: counts[reason] for reason in sorted(counts) if reason != KEPT},
        cut=sum(row.cut for row in rows),
        kept_share=round(counts[KEPT] / total, 4),
        tokens=sum(row.tokens for row in rows),
        targets=sum(row.targets for row in rows),
    )
