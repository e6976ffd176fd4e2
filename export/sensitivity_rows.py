"""The rows that sensitivity is measured on: the data stage's, else texts that the checkpoint writes itself."""

from __future__ import annotations

from pathlib import Path

from ..core.stage import Inputs, Progress
from ..data.calibration import calibration_batches
from ..modeling.types import CausalModel, ModelTokenizer
from .cost import SENSED, TEXT
from .own_text import own_batches
from .sensitivity import Sensitivity, check_spread, collect_sensitivity, load_sensitivity, save_sensitivity


def kept_sensitivity(
    file: Path, model: CausalModel, tokenizer: ModelTokenizer, inputs: Inputs, seed: int, progress: Progress
) -> Sensitivity:
    """The sensitivity of a model, from `file` if it was measured before. Raises `UserError` for rows too few to tell
    two types apart."""
    if not file.exists():
        if "data" in inputs.stages:
            batches = calibration_batches(inputs, tokenizer, tokens=SENSED, length=TEXT, batch=1)
        else:
            progress.note("no rows: the types of tensors are chosen on texts that the checkpoint writes itself")
            length = min(TEXT, model.config.max_position_embeddings)
            with progress.bar("texts to measure on", SENSED) as advance:
                batches = own_batches(model, tokenizer, SENSED, length, seed, advance)
        with progress.bar("sensitivity", sum(batch.tokens for batch in batches)) as advance:
            found = collect_sensitivity(model, batches, seed=seed, advance=advance)
        check_spread(found)
        save_sensitivity(found, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return load_sensitivity(file)
