"""The prune stage: measure importance, choose blocks, heal, drop, save."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..data.calibration import calibration_batches
from ..errors import UserError
from ..modeling.blocks import FAMILIES, drop_blocks, kept_blocks
from ..modeling.checkpoint import save_checkpoint
from ..modeling.load import load_config, load_model, load_tokenizer
from ..stage import Context, Inputs
from .config import LinearHeal, PruneConfig
from .heal import Healing, heal_linear
from .importance import Distances, scan
from .search import best_window, lowest

SEARCHES = {"window": best_window, "lowest": lowest}


def check(config: PruneConfig, base: Path, context: Context) -> None:
    """Refuse more blocks than there are, and healing where it cannot be fused."""
    model = load_config(base)
    if isinstance(config.heal, LinearHeal) and config.blocks and not FAMILIES[model.model_type]:
        raise UserError(f"prune.heal: linear cannot be fused into a {model.model_type} model; use heal: none")
    candidates = candidate_blocks(config, model.num_hidden_layers)
    if config.blocks > len(candidates):
        raise UserError(
            f"prune.blocks is {config.blocks}, but the model has {model.num_hidden_layers} blocks, of which "
            f"{len(candidates)} can go; lower prune.blocks"
        )
    if config.calibration.text and not context.resolve(config.calibration.text).is_file():
        raise UserError(f"prune.calibration.text: no file {context.resolve(config.calibration.text)}")


def candidate_blocks(config: PruneConfig, blocks: int) -> range:
    """The blocks that may go: all but one; with linear healing neither the first nor the last."""
    if isinstance(config.heal, LinearHeal):
        return range(1, blocks - 1)
    return range(0, blocks - 1)


def run(config: PruneConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `model/` (the pruned, healed checkpoint) and `importance.json` (what was measured and chosen)."""
    model = load_model(inputs.model, context.dtype, context.device)
    tokenizer = load_tokenizer(inputs.model)
    calibration = config.calibration
    batches = calibration_batches(
        inputs,
        tokenizer,
        tokens=calibration.tokens,
        length=calibration.length,
        batch=calibration.batch,
        text=context.resolve(calibration.text) if calibration.text else None,
    )
    tokens = sum(int((batch.segment_ids >= 0).sum()) for batch in batches)
    with context.progress.bar("importance", tokens) as advance:
        distances = scan(model, batches, advance)
    blocks = model.config.num_hidden_layers
    dropped = SEARCHES[config.search](
        distances[config.position], config.importance, config.blocks, candidate_blocks(config, blocks)
    )
    context.progress.note(f"dropping {len(dropped)} of {blocks} blocks: {describe(dropped)}")
    healings: list[Healing] = []
    if isinstance(config.heal, LinearHeal) and dropped:
        with context.progress.bar("healing", None) as advance:
            healings = heal_linear(model, dropped, batches, config.heal, advance)
    drop_blocks(model, dropped)
    save_checkpoint(model, tokenizer, out_dir / "model")
    record = {
        "blocks": blocks,
        "dropped": dropped,
        "kept": kept_blocks(model.config),
        "importance": config.importance,
        "position": config.position,
        "search": config.search,
        "tokens": tokens,
        "distances": {name: table(value, blocks) for name, value in distances.items()},
        "healing": [dataclasses.asdict(healing) for healing in healings],
    }
    (out_dir / "importance.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return {key: record[key] for key in ("blocks", "dropped", "tokens", "healing")}


def table(distances: Distances, blocks: int) -> dict[str, list[list[float]]]:
    """metric → for each window length n = 1 … L, the distances by first block (L − n + 1 values)."""
    return {
        metric: [distances.windows(metric, length) for length in range(1, blocks + 1)]
        for metric in ("angular", "influence")
    }


def describe(dropped: list[int]) -> str:
    """Block numbers as people write them: 3, 17-22."""
    from .heal import gaps

    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in gaps(dropped)) or "none"
