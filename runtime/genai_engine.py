"""An ONNX folder opened in stock onnxruntime-genai."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.machine import threads_of
from .engine import Distribution, Engine, ScoringWindow, distributions, pick
from .onnx_engine import read_genai_config


class GenaiEngine(Engine):
    """onnxruntime-genai on the same folder as `OnnxEngine`; its cache is one buffer that grows in place."""

    runtime = "onnxruntime-genai"

    def __init__(self, folder: Path, threads: int = 0):
        # Any: its compiled module comes without types.
        self._library: Any = importlib.import_module("onnxruntime_genai")
        self.path = Path(folder)
        self.context = int(read_genai_config(self.path)["model"]["context_length"])
        try:
            config = self._library.Config(str(self.path))
            if threads := threads_of(threads):
                options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
                config.overlay(json.dumps(options))
            self._model: Any = self._library.Model(config)
        except Exception as error:  # it raises plain RuntimeError and its own types alike
            raise UserError(f"onnxruntime-genai cannot load {self.path}: {str(error).splitlines()[0][:300]}") from error

    def _generator(self, length: int) -> Any:
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, max_length=min(length, self.context))
        return self._library.Generator(self._model, parameters)

    def score(
        self, windows: Sequence[ScoringWindow], top_k: int | None = None, done: Callable[[int], None] | None = None
    ) -> list[list[Distribution]]:
        scores = []
        for window in windows:
            window.check(self.context)
            here: list[Distribution] = []
            if window.positions:
                last = max(window.positions)
                generator = self._generator(last + 1)
                generator.append_tokens(np.asarray([window.ids[:last]], np.int32))
                logits = np.asarray(generator.get_output("logits"), np.float32)[0]
                here = distributions(logits[[p - 1 for p in window.positions]], window.ids, window.positions, top_k)
            if done:
                done(len(here))
            scores.append(here)
        return scores

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
        generator = self._generator(len(ids) + max_tokens)
        generator.append_tokens(np.asarray([ids], np.int32))
        for written in range(max_tokens):
            # Drawn here rather than by its own sampler, which would end at the model's end-of-text token unasked.
            token = pick(np.asarray(generator.get_logits(), np.float32).reshape(-1), temperature, top_p, random)
            if token in stop:
                return
            yield token
            if written + 1 >= max_tokens or len(ids) + written + 1 >= self.context:
                return
            generator.append_tokens(np.asarray([[token]], np.int32))

    def close(self) -> None:
        self._model = None
