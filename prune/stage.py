"""The prune stage: measure importance, choose blocks, heal, drop, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import check_file_exists
from ..core.memory import give_back_memory
from ..core.stage import WORK, Context, Inputs
from ..data.calibration import calibration_batches
from ..data.packing import Batch
from ..data.repeated import read_twice
from ..modeling.blocks import drop_blocks, dropped_since, kept_blocks
from ..modeling.checkpoint import save_checkpoint
from ..modeling.cuts import describe
from ..modeling.load import load_config, load_model, load_tokenizer
from ..modeling.types import CausalModel, ModelTokenizer
from ..records.figures import PruneFigures
from ..records.importance import Healing, Importance
from .auto import decide
from .config import PruneConfig
from .healing import heal
from .importance import Distances
from .searches import choose
from .study import Study

LEDGER = "search.jsonl"


def check(config: PruneConfig, base: Path, context: Context) -> None:
    """Reject too many blocks, and a calibration text that does not exist."""
    model = load_config(base)
    candidates = candidate_blocks(config, model.num_hidden_layers)
    if config.blocks != "auto" and config.blocks > len(candidates):
        raise UserError(
            f"prune.blocks is {config.blocks}, but the model has {model.num_hidden_layers} blocks, of which "
            f"{len(candidates)} can be removed; lower prune.blocks"
        )
    if config.calibration.text:
        check_file_exists(context.resolve(config.calibration.text), "prune.calibration.text: ")


def candidate_blocks(config: PruneConfig, blocks: int) -> range:
    """The blocks that may be dropped: all but one; with healing neither the first nor the last."""
    return range(0, blocks - 1) if config.heal.kind == "none" else range(1, blocks - 1)


def run(config: PruneConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `model/` (the pruned, healed checkpoint) and `importance.json` (what was measured and chosen)."""
    model = load_model(inputs.model, context.dtype, context.device)
    tokenizer = load_tokenizer(inputs.model)
    batches = calibration_rows(config, inputs, tokenizer, context)
    record = _choose(config, model, batches, out_dir / WORK / LEDGER, context)
    give_back_memory()  # that of the search's statistics; healing gathers its own
    record.healing = _heal_and_save(model, tokenizer, record.dropped, batches, config, out_dir, context)
    record.kept = kept_blocks(model.config)
    record.write(out_dir)
    return _figures(record.blocks, record.dropped, record.tokens, record.healing)


def heal_cut(config: PruneConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `model/`: the unpruned model without the blocks that `inputs.model` lacks, healed as the section says."""
    model = load_model(inputs.base, context.dtype, context.device)
    dropped = dropped_since(load_config(inputs.model), model.config)
    if not dropped:
        raise UserError(f"heal: {inputs.model} has every block of {inputs.base}, so there is no gap to close")
    tokenizer = load_tokenizer(inputs.base)
    batches = calibration_rows(config, inputs, tokenizer, context)
    blocks, tokens = model.config.num_hidden_layers, sum(batch.tokens for batch in batches)
    healing = _heal_and_save(model, tokenizer, dropped, batches, config, out_dir, context)
    return _figures(blocks, dropped, tokens, healing)


def _figures(blocks: int, dropped: list[int], tokens: int, healing: list[Healing]) -> dict[str, Any]:
    return PruneFigures(blocks=blocks, dropped=dropped, tokens=tokens, healing=healing).model_dump()


def _heal_and_save(
    model: CausalModel,
    tokenizer: ModelTokenizer,
    dropped: list[int],
    batches: list[Batch],
    config: PruneConfig,
    out_dir: Path,
    context: Context,
) -> list[Healing]:
    context.progress.note(f"dropping {len(dropped)} of {model.config.num_hidden_layers} blocks: {describe(dropped)}")
    healing = heal(model, dropped, batches, config.heal, context.progress)
    drop_blocks(model, dropped)
    save_checkpoint(model, tokenizer, out_dir / "model")
    return healing


def _choose(
    config: PruneConfig, model: CausalModel, batches: list[Batch], ledger: Path, context: Context
) -> Importance:
    """The blocks to drop, and the measurements; memory that only the search needs is freed."""
    study = make_study(config, model, batches, ledger, context)
    blocks = study.num_blocks
    distances = study.distances
    candidates = candidate_blocks(config, blocks)
    if config.blocks == "auto":
        dropped, curve = decide(study, config, candidates)
    else:
        dropped, curve = choose(study, config, config.blocks, candidates), []
    return Importance(
        blocks=blocks,
        dropped=list(dropped),
        importance=config.importance.kind,
        position=config.position,
        search=config.search.kind,
        tokens=sum(batch.tokens for batch in batches),
        values=config.importance.windows(study, 1),
        distances={name: table(value, blocks) for name, value in distances.items()},
        trials=study.notes,
        curve=curve,
        kept=[block for block in range(blocks) if block not in dropped],
        healing=[],
    )


def calibration_rows(config: PruneConfig, inputs: Inputs, tokenizer: ModelTokenizer, context: Context) -> list[Batch]:
    """The packed rows that the section calibrates on."""
    calibration = config.calibration
    return calibration_batches(
        inputs,
        tokenizer,
        tokens=calibration.tokens,
        length=calibration.length,
        batch=calibration.batch,
        text=context.resolve(calibration.text) if calibration.text else None,
        own=calibration.rows == "own",
    )


def make_study(config: PruneConfig, model: CausalModel, batches: list[Batch], ledger: Path, context: Context) -> Study:
    """A study whose scoring rows are disjoint from those that heals are fitted on, and whose held-out rows are in
    neither."""
    calibration = config.calibration
    options: dict[str, Any] = {"position": config.position, "ledger": ledger, "progress": context.progress}
    if config.blocks == "auto":
        options["longest"] = (config.goal.at_most if config.goal else None) or model.config.num_hidden_layers // 2
    if not config.splits or config.blocks == 0:
        scoring, _ = take(batches, calibration.scoring)
        return Study(model, batches, scoring=scoring, **options)
    held_out, rest = take(batches[::-1], calibration.held_out)
    scoring, rest = take(rest, calibration.scoring)
    if not scoring or not rest:
        have = sum(batch.tokens for batch in batches)
        raise UserError(
            f"prune.calibration: {have} tokens are too few to heal on, to score cuts on ({calibration.scoring}) and to "
            f"hold out ({calibration.held_out}), in batches of {calibration.batch} rows of {calibration.length}; "
            "raise tokens or lower the others"
        )
    scoring, held_out = (read_twice(rows, config.copying) for rows in (scoring[::-1], held_out))
    return Study(model, rest[::-1], scoring=scoring, held_out=held_out, **options)


def take(batches: list[Batch], tokens: int) -> tuple[list[Batch], list[Batch]]:
    """The first batches that hold `tokens` tokens together, and the rest."""
    count = total = 0
    while count < len(batches) and total < tokens:
        total += batches[count].tokens
        count += 1
    return batches[:count], batches[count:]


def table(distances: Distances, blocks: int) -> dict[str, list[list[float]]]:
    """metric → for each window length n = 1 … L, the distances by first block (L − n + 1 values)."""
    return {
        metric: [distances.windows(metric, length) for length in range(1, blocks + 1)]
        for metric in ("angular", "influence", "magnitude")
    }
