"""The merge stage: merges the variants into one model, measures it beside them, and selects the best."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.stage import WORK, Context, Inputs
from ..data.calibration import pad_id
from ..data.chat import load_encoded
from ..data.packing import pack
from ..modeling.checkpoint import copy_companions, link_files
from ..modeling.load import load_tokenizer
from ..modeling.soundness import check_checkpoint
from ..modeling.weights import tensor_headers
from ..records.figures import MergeFigures
from ..records.merge import Merged, MergeRecord
from ..records.students import Variants
from .alignment import check_alike
from .bridge import check_method, merge_weights
from .config import START, MergeConfig
from .measure import heldout_figures, unpruned

MERGE = "merge"  # the merge's name in the results, beside the variants'
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def check(config: MergeConfig, base: Path, context: Context) -> None:
    """Reject what mergekit cannot do, before any variant is trained. The section already lists its models."""
    check_method(config, [entry.model for entry in config.models or []])


def run(config: MergeConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `model/`, the merge or a parent that is better than it, and `merge.json`, with the metrics of all."""
    variants = read_variants(inputs.stages["distill"])
    trained = {entry.name: inputs.stages["distill"] / "variants" / entry.name / "model" for entry in variants.variants}
    config = config.among(list(trained))
    folders = {**trained, START: started_from(inputs)}
    merged = out_dir / WORK / "merged"
    if not merged.exists():
        merge_checkpoints(config, folders, merged, context)
    asked = [entry.model for entry in config.models or []]
    parents = [*trained, *(name for name in asked if name not in trained)]
    figures = _measure({MERGE: merged, **{name: folders[name] for name in parents}}, variants, inputs, out_dir, context)
    chosen = choose(config, figures)
    link_files(merged if chosen == MERGE else folders[chosen], out_dir / "model")
    models = [Merged(name=name, merged=name in asked, **figures[name]) for name in figures]
    MergeRecord(config=config.model_dump(mode="json"), chosen=chosen, models=models).write(out_dir)
    context.progress.note(describe(config, figures, chosen))
    return MergeFigures(method=config.method, chosen=chosen, models=models).model_dump()


def read_variants(folder: Path) -> Variants:
    """The distill stage's record of its variants; raises `UserError` if it had none."""
    variants = Variants.read_if_there(folder)
    if variants is None:
        raise UserError("merge: the distill stage trained no variants; list two or more under distill.variants")
    return variants


def started_from(inputs: Inputs) -> Path:
    """The checkpoint that all variants were trained from: the last one written before the distill stage."""
    checkpoint = inputs.base
    for name, folder in inputs.stages.items():
        if name == "distill":
            break
        if (folder / "model" / "config.json").exists():
            checkpoint = folder / "model"
    return checkpoint


def merge_checkpoints(config: MergeConfig, folders: Mapping[str, Path], out: Path, context: Context) -> None:
    """Merge the checkpoints that the section lists into a new checkpoint folder `out`, created atomically.

    All are compared first: `UserError` says what mergekit rejects, or names the first difference between two of them.
    Configuration, generation defaults and tokenizer are the first model's.
    """
    names = [entry.model for entry in config.models or []]
    base = check_method(config, names)
    if base is not None and base not in folders:
        raise UserError(
            f"merge: {config.method} needs a base model; name the model that all were trained from (--base)"
        )
    used = {name: folders[name] for name in [*names, *([base] if base and base not in names else [])]}
    check_alike(used, any_dtype=config.out_dtype is not None)
    shapes = tensor_headers(used[names[0]])
    own = next(iter(shapes.values())).dtype
    if config.out_dtype is None and own not in DTYPES:
        raise UserError(f"merge: {names[0]} is saved as {own}, which cannot be merged; supported: {', '.join(DTYPES)}")
    config = config.model_copy(update={"out_dtype": config.out_dtype or DTYPES[own]})
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    merge_weights(config, used, base, shapes, partial, context)
    copy_companions(used[names[0]], partial, str(config.out_dtype))
    try:
        check_checkpoint(partial, finite=True)
    except UserError as error:
        raise UserError(
            f"merge: {config.method} produced an unusable model; change merge.parameters ({error})"
        ) from error
    partial.replace(out)


def choose(config: MergeConfig, figures: Mapping[str, Mapping[str, float]]) -> str:
    """The name of the selected model: the merge, unless `select: best` finds a parent that is better."""
    return MERGE if config.select == "merge" else min(figures, key=lambda name: figures[name][f"eval_{config.by}"])


def describe(config: MergeConfig, figures: Mapping[str, Mapping[str, float]], chosen: str) -> str:
    """One line with the metrics and the selected model."""
    name = {"kl": "KL to the unpruned model", "perplexity": "perplexity"}[config.by]
    values = ", ".join(f"{model} {entry[f'eval_{config.by}']:.4g}" for model, entry in figures.items())
    kept = f"the {config.method} merge" if chosen == MERGE else f"{chosen}, which is better than the merge"
    return f"held-out {name}: {values}; selected: {kept}"


def _measure(
    models: Mapping[str, Path], variants: Variants, inputs: Inputs, out_dir: Path, context: Context
) -> dict[str, dict[str, float]]:
    """Held-out metrics by name, in order; those measured before an interruption are reused."""
    records = {name: out_dir / WORK / f"{name}.json" for name in models}
    pending = [name for name, file in records.items() if not file.exists()]
    if pending:
        tokenizer = load_tokenizer(inputs.model)
        rows = load_encoded(inputs.stages["data"], tokenizer, "heldout", variants.length)
        batches = pack(rows, variants.length, variants.batch, pad_id(tokenizer))
        with context.progress.bar("measuring", len(pending) + 1) as advance:
            reference = unpruned(inputs.base, batches, context)
            advance(note="unpruned")
            for name in pending:
                figures = heldout_figures(models[name], batches, reference, context)
                if not all(math.isfinite(value) for value in figures.values()):
                    raise UserError(f"merge: the held-out figures of {name} are not finite; change merge.parameters")
                write_json(records[name], figures)
                advance(note=name)
    return {name: read_json(file) for name, file in records.items()}
