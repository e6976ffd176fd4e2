"""An int8 cache of a bundle's ONNX artifacts: its scales, measured once, and what it costs, measured in float32."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..core.stage import Progress
from ..data.chat import encode_text, load_encoded
from ..modeling.load import load_config
from ..modeling.shape import rotated_size
from ..modeling.types import ModelTokenizer
from .artifacts import Making, OnnxKind
from .cost import CACHE_TOKENS
from .onnx_kv import CacheScales, calibrate
from .verify import PROBE, Reference


def kept_scales(
    file: Path,
    built: Path,
    rows: Callable[[], list[list[int]]],
    checkpoint: Path,
    threads: int,
    progress: Progress,
) -> CacheScales:
    """The scales in `file`, which is first made with the float32 graph in `built` on `rows` of tokens."""
    if not file.exists():
        given, turned, partial = rows(), rotated_size(load_config(checkpoint)), file.with_suffix(".tmp")
        with progress.bar("scales of keys and values", sum(map(len, given))) as advance:
            calibrate(built, given, turned, threads, advance).save(partial)
        partial.replace(file)
    return CacheScales.load(file)


def calibration_rows(tokenizer: ModelTokenizer, data: Path | None, length: int) -> list[list[int]]:
    """The data stage's first training rows, `CACHE_TOKENS` tokens in all; without one a short built-in text."""
    if data is None:
        return [row.input_ids for row in encode_text(tokenizer, PROBE, length)]
    rows: list[list[int]] = []
    left = CACHE_TOKENS
    for row in load_encoded(data, tokenizer, "train", length):
        rows.append(row.input_ids[:left])
        left -= len(rows[-1])
        if left <= 0:
            break
    return rows


def rounded_cache_kl(making: Making, place: Path, references: Mapping[int, Reference]) -> dict[str, float]:
    """Depth → KL to the checkpoint of the float32 graph with an int8 cache; its files are made in `place` and removed.

    `UserError` past the limit.
    """
    shutil.rmtree(place, ignore_errors=True)
    precise = OnnxKind(replace(making, bundle=place, temporary=True), OnnxKind.precise)
    precise.write()
    found: dict[str, float] = {}
    with making.progress.bar("checking the int8 cache", len(making.depths)) as step:
        for depth in making.depths:
            found[str(depth)] = precise.check_cache(depth, references[depth])
            step()
    shutil.rmtree(place)
    return found
