"""Candidates as they will run: built, scored on the held-out windows in the stock runtime, timed in a process of their
own, and deleted again."""

from __future__ import annotations

import math
import shutil
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..evaluation.language import engine_divergences
from ..export.cost import CACHE_ROW
from ..export.gguf import write_gguf
from ..export.onnx import build_graph, write_onnx
from ..export.onnx_kv import CacheScales
from ..export.onnx_sized import OnnxSizes
from ..export.rounded_cache import calibration_rows, kept_scales
from ..modeling.cuts import Cut
from ..modeling.geometry import geometry_of
from ..modeling.load import load_config, load_tokenizer
from ..records.fit import FitFigures
from ..runtime.artifact_types import ONNX_TYPES
from ..runtime.cost import kv_bytes_per_token
from ..runtime.engine import Engine
from ..runtime.llamacpp_engine import LlamaCppEngine
from ..runtime.measure import Measurement, measure
from ..runtime.onnx_engine import OnnxEngine
from .candidates import CACHES, Combination
from .damage import Damage, listed
from .request import FitRequest

REPEAT = 2


def make_bench(damage: Damage, request: FitRequest, name: str) -> CandidateBench:
    """Of the engine that was asked for; `name` is the model's in its file."""
    return (OnnxBench if request.engine == "onnx" else GgufBench)(damage, request, name)


class CandidateBench(ABC):
    """Builds and measures candidates of one engine; `name` is the model's in its file."""

    def __init__(self, damage: Damage, request: FitRequest, name: str):
        self.damage, self.request, self.name = damage, request, name

    @abstractmethod
    def of_type(self, mix: str) -> float:
        """KL of the unpruned model in a mix."""

    @abstractmethod
    def roomier(self, limit: int, sizes: Sequence[int]) -> list[float]:
        """What own types for files of other sizes are estimated to cost the unpruned model, as shares of `limit`'s."""

    @abstractmethod
    def _written(self, candidate: Combination, cut: Cut) -> Path:
        """The candidate as a file or a folder in the work area."""

    @abstractmethod
    def _opened(self, path: Path, cache: str, longest: int) -> Engine:
        """The runtime on it, for texts of `longest` tokens."""

    @abstractmethod
    def _memory(self, found: Measurement, candidate: Combination) -> int:
        """Of the process with a cache for the asked context."""

    def measure(self, candidate: Combination, cut: Cut) -> dict[str, Any]:
        """Figures of a candidate, its KL at every position, and its seconds per token on this machine."""
        with self._made(candidate, cut) as path:
            values = self._score(path, candidate.cache, candidate.name)
            found = self._time(path, candidate.cache)
            files = path.iterdir() if path.is_dir() else [path]
            size = sum(file.stat().st_size for file in files)
        figures = FitFigures(
            kl=max(statistics.fmean(values), 0.0),
            bytes=size,
            memory=self._memory(found, candidate),
            latency=1 / found.speed.decode_tokens_per_second,
            prefill=1 / found.speed.prefill_tokens_per_second,
        )
        return {"figures": figures.model_dump(), "kl": [round(value, 6) for value in values]}

    @contextmanager
    def _made(self, candidate: Combination, cut: Cut) -> Iterator[Path]:
        path = self._written(candidate, cut)
        try:
            yield path
        finally:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _score(self, path: Path, cache: str, label: str) -> list[float]:
        damage = self.damage
        longest = max(len(row.input_ids) for row in damage.held_out)
        with (
            self._opened(path, cache, longest) as engine,
            damage.context.progress.bar(label, damage.positions) as advance,
        ):
            top_k = listed(damage.reference.shape[1])
            return engine_divergences(engine, damage.held_out, damage.reference, top_k, advance)

    @property
    def _timed(self) -> tuple[int, int]:
        """Tokens of the prompt, and written ones."""
        effort, context = self.damage.effort, self.request.limits.context
        return max(min(effort.prompt, context - effort.answer), 1), max(min(effort.answer, context - 1), 1)

    def _time(self, path: Path, cache: str) -> Measurement:
        prompt, new = self._timed
        return measure(
            path,
            prompt_tokens=prompt,
            new_tokens=new,
            repeat=REPEAT,
            context=self.request.limits.context,
            slots=1,
            kv_type=cache,
        )


class GgufBench(CandidateBench):
    """GGUF files in llama.cpp."""

    def of_type(self, mix: str) -> float:
        return self.damage.of_type(mix)  # on the weights in torch: no file is written

    def roomier(self, limit: int, sizes: Sequence[int]) -> list[float]:
        return self.damage.roomier(self.damage.gguf_sizes(self.damage.base), limit, sizes)

    def _written(self, candidate: Combination, cut: Cut) -> Path:
        checkpoint, file = self.damage.checkpoint(cut), self.damage.area / "candidate.gguf"
        how, progress = self.damage.types(checkpoint, candidate.mix), self.damage.context.progress
        write_gguf(
            checkpoint, file, how.mix, imatrix=how.importance, types=how.types, name=self.name, progress=progress
        )
        return file

    def _opened(self, path: Path, cache: str, longest: int) -> Engine:
        return LlamaCppEngine(path, context=longest, kv_type=cache)

    def _memory(self, found: Measurement, candidate: Combination) -> int:
        return found.peak_memory_bytes  # llama.cpp allocates the whole cache


class OnnxBench(CandidateBench):
    """ONNX folders in ONNX Runtime."""

    def of_type(self, mix: str) -> float:
        whole, _ = CACHES["onnx"]
        with self._made(Combination(0, mix, whole), ()) as path:  # integer kernels round activations, too
            return max(statistics.fmean(self._score(path, whole, mix)), 0.0)

    def roomier(self, limit: int, sizes: Sequence[int]) -> list[float]:
        return self.damage.roomier(OnnxSizes(self.damage.base, self._graph(self.damage.base)), limit, sizes)

    def _written(self, candidate: Combination, cut: Cut) -> Path:
        damage, checkpoint = self.damage, self.damage.checkpoint(cut)
        folder, progress = damage.area / "onnx-candidate", damage.context.progress
        built = self._graph(checkpoint)
        shutil.rmtree(folder, ignore_errors=True)  # what a kill left
        write_onnx(
            checkpoint,
            folder,
            candidate.mix,
            built=built,
            kv=None if candidate.whole_cache else self._scales(checkpoint),
            progress=progress,
            **self._rounding(candidate, checkpoint, built),
        )
        return folder

    def _rounding(self, candidate: Combination, checkpoint: Path, built: Path) -> dict[str, Any]:
        """How `write_onnx` is to round the weights."""
        damage = self.damage
        if not candidate.sized:
            calibrated = ONNX_TYPES[candidate.mix].calibrated
            return {"imatrix": damage.matrix(checkpoint, None) if calibrated else None}
        sizes = OnnxSizes(checkpoint, built, kv=not candidate.whole_cache)
        chosen = sizes.by_node(damage.chosen(sizes, candidate.mix))
        return {"grids": chosen.types, "imatrix": chosen.importance}

    def _graph(self, checkpoint: Path) -> Path:
        """The float32 graph of a checkpoint; that of another one goes, since each takes 4 bytes per parameter."""
        folder = self.damage.area / f"onnx-{self.damage.label(checkpoint)}"
        for other in self.damage.area.glob("onnx-*"):
            if other != folder:
                shutil.rmtree(other)
        return build_graph(checkpoint, folder, self.damage.context.progress)

    def _scales(self, checkpoint: Path) -> CacheScales:
        """Of an int8 cache, measured on the training rows; made once."""
        damage = self.damage
        length = min(CACHE_ROW, geometry_of(load_config(checkpoint).to_dict()).positions)
        rows = partial(calibration_rows, load_tokenizer(damage.base), damage.rows, length)
        file = damage.area / f"kv-{damage.label(checkpoint)}.safetensors"
        return kept_scales(file, self._graph(checkpoint), rows, checkpoint, 0, damage.context.progress)

    def _opened(self, path: Path, cache: str, longest: int) -> Engine:
        return OnnxEngine(path)

    def _memory(self, found: Measurement, candidate: Combination) -> int:
        """Its cache grows with the text: what it had in the end is filled up."""
        shape = geometry_of(load_config(self.damage.base).to_dict())
        each = kv_bytes_per_token(shape, shape.blocks - candidate.removed, candidate.cache)
        return found.peak_memory_bytes + max(self.request.limits.context - sum(self._timed), 0) * each


def standard_error(values: list[float]) -> float:
    """Of their mean; tokens of one text are not independent, so that it is a little more."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
