"""The recipe that makes what a fit recommends."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from ..core.files import write_whole
from ..modeling.source import ModelSource
from ..pipeline.places import bundle_name
from ..pipeline.recipe import Recipe
from ..prune.config import PruneConfig
from .candidates import Combination

FILE = "recipe.yaml"


def write_recipe(
    out: Path,
    source: ModelSource,
    candidate: Combination,
    data: dict[str, Any],
    prune: PruneConfig | None,
    reason: str,
    seed: int,
) -> Path:
    """Write `out`/recipe.yaml: rows, the cut if there is one, and the export. It is checked as `compress validate`
    does."""
    model = source.text if source.path is None or source.text.startswith("package:") else str(source.path.resolve())
    tree: dict[str, Any] = {"name": _name(source, candidate), "model": model, "seed": seed, "data": data}
    if prune is not None:
        tree["prune"] = _short(prune)
    tree["export"] = _export(candidate)
    text = "".join(f"# {line}\n" for line in [reason, *_remarks(candidate)]) + _yaml(tree)
    file = out / FILE
    write_whole(file, text)
    Recipe.load(file)
    return file


def _export(candidate: Combination) -> dict[str, Any]:
    if candidate.engine != "onnx":
        return {"gguf": [candidate.mix]}
    return {"onnx": [candidate.mix]} | ({} if candidate.whole_cache else {"kv": candidate.cache})


def _short(prune: PruneConfig) -> dict[str, Any]:
    """The section without what is default."""
    values = prune.model_dump(mode="json", exclude_defaults=True)
    for key in ("search", "heal"):
        section = getattr(prune, key)
        options = section.model_dump(mode="json", exclude_defaults=True)
        values[key] = {"kind": section.kind, **options} if options else section.kind
    return values


def _name(source: ModelSource, candidate: Combination) -> str:
    plain = bundle_name(source.title.rsplit("/", 1)[-1])
    words = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in plain)
    cut = f"-cut{candidate.removed}" if candidate.removed else ""
    return f"{words.lstrip('._-')[:60] or 'model'}{cut}-{candidate.mix}"


def _remarks(candidate: Combination) -> list[str]:
    found = []
    if candidate.removed:
        found.append("Healed only, as it was measured: a `distill` section wins more back.")
    if not candidate.whole_cache and candidate.engine != "onnx":
        found.append(
            "Run it with an 8-bit cache: compress generate BUNDLE --kv-type q8_0, or llama-server --flash-attn on "
            "--cache-type-k q8_0 --cache-type-v q8_0"
        )
    return found


def _yaml(tree: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = YAML(typ="rt")
    writer.width = 1000
    writer.dump(CommentedMap(tree), text)
    return text.getvalue()
