"""An ONNX folder opened in stock ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.files import read_json
from ..core.machine import threads_of
from ..core.place import ON_CPU, Place
from .engine import Distribution, Engine, ScoringWindow, distributions, pick
from .providers import open_sessions

PREFILL_CHUNK = 256  # tokens per forward pass: bounds the logits that exist at once


CACHE_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}
WEIGHTS = "model.onnx.data"  # lies beside the graph; graphs of several depths read the same one


def read_genai_config(folder: Path) -> dict[str, Any]:
    """The `genai_config.json` of an ONNX folder; `UserError` when the folder is not one.

    The graph it names may be in a subfolder, with the weights.
    """
    path = folder / "genai_config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no genai_config.json, so it is not an exported ONNX folder")
    try:
        config = read_json(path)
        decoder = config["model"]["decoder"]
        graph = folder / decoder["filename"]
        for file in (graph, graph.with_name(WEIGHTS)):
            if not file.is_file():
                raise UserError(f"{folder} lacks {file.relative_to(folder)}: the export is incomplete; export it again")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a valid genai_config.json: {error}") from error
    return config


class OnnxEngine(Engine):
    """ONNX Runtime on an ONNX folder; `threads` 0 is one per core. `UserError` for missing or broken files, and for a
    device of `place` that does not run them."""

    runtime = "onnxruntime"

    def __init__(self, folder: Path, threads: int = 0, place: Place = ON_CPU):
        import onnxruntime

        self.path = Path(folder)
        config = read_genai_config(self.path)["model"]
        decoder = config["decoder"]
        self.context = int(config["context_length"])
        self._blocks = int(decoder["num_hidden_layers"])

        def options() -> Any:
            made = onnxruntime.SessionOptions()
            made.log_severity_level = 4  # errors come as exceptions; nothing is to reach the terminal
            made.intra_op_num_threads = threads_of(threads)
            return made

        opened = open_sessions([str(self.path / decoder["filename"])], options, place, self.path)
        self._session: Any = opened.sessions[0]
        self.device = opened.device
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._takes_positions = "position_ids" in inputs
        past = inputs["past_key_values.0.key"]
        self._empty = np.zeros((1, past.shape[1], 0, int(decoder["head_size"])), CACHE_TYPES[past.type])
        self._outputs = ["logits"] + [f"present.{i}.{part}" for i in range(self._blocks) for part in ("key", "value")]

    def logits(
        self, ids: Sequence[int], past: list[np.ndarray] | None = None, positions: Sequence[int] | None = None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (T, V) float32 of T new tokens after `past`, and the new past; `positions` (T,) if not consecutive.

        A past is key, value, key, value … of each block, each (1, KV heads, tokens so far, head size), in the graph's
        own type: float32, or int8.
        """
        feed = self._feed(ids, past)
        if positions is not None:
            feed["position_ids"] = np.asarray([positions], np.int64)
        result = self._session.run(self._outputs, feed)
        return result[0][0].astype(np.float32), result[1:]

    def retaining_scores(self, ids: Sequence[int]) -> list[np.ndarray]:
        """Scores (T, KV heads) float32 per block of a text read in one pass; `UserError` if the graph has none."""
        names = [f"retaining_scores.{i}" for i in range(self._blocks)]
        if names[-1] not in {value.name for value in self._session.get_outputs()}:
            raise UserError(f"{self.path} gives no retaining scores: its checkpoint had no retaining heads")
        return [scores[0] for scores in self._session.run(names, self._feed(ids, None))]

    def _feed(self, ids: Sequence[int], past: list[np.ndarray] | None) -> dict[str, np.ndarray]:
        past = past if past is not None else [self._empty] * (2 * self._blocks)
        seen = past[0].shape[2]
        feed = {
            "input_ids": np.asarray([ids], np.int64),
            "attention_mask": np.ones((1, seen + len(ids)), np.int64),
        }
        if self._takes_positions:
            feed["position_ids"] = np.arange(seen, seen + len(ids), dtype=np.int64)[None]
        for i in range(self._blocks):
            feed[f"past_key_values.{i}.key"], feed[f"past_key_values.{i}.value"] = past[2 * i], past[2 * i + 1]
        return feed

    def _chunks(self, ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray, list[np.ndarray]]]:
        past = None
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits, past = self.logits(ids[start : start + PREFILL_CHUNK], past)
            yield start, logits, past

    def score(
        self, windows: Sequence[ScoringWindow], top_k: int | None = None, done: Callable[[int], None] | None = None
    ) -> list[list[Distribution]]:
        found = []
        for window in windows:
            window.check(self.context)
            here: list[Distribution] = []
            last = max(window.positions, default=0)
            for start, logits, _ in self._chunks(window.ids[:last]):
                wanted = [p for p in window.positions if start < p <= start + len(logits)]
                here += distributions(logits[[p - 1 - start for p in wanted]], window.ids, wanted, top_k)
                if done and wanted:
                    done(len(wanted))
            found.append(here)
        return found

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> Iterator[int]:
        random = np.random.default_rng(seed)
        *_, (_, logits, past) = self._chunks(ids)
        for made in range(max_tokens):
            token = pick(logits[-1], temperature, top_p, random)
            if token in stop:
                return
            yield token
            if made + 1 < max_tokens and len(ids) + made + 1 < self.context:
                logits, past = self.logits([token], past)
            else:
                return

    def close(self) -> None:
        self._session = None
