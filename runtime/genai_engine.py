"""onnxruntime-genai: the same ONNX folder in the runtime that drives decoding itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .engine import NextToken, Speed, check_positions, from_logits


class GenaiEngine:
    """A decoder in stock onnxruntime-genai. Raises `UserError` for a missing or broken folder."""

    name = "onnxruntime-genai"

    def __init__(self, folder: Path):
        import onnxruntime_genai as genai

        self.genai = genai
        if not (folder / "genai_config.json").is_file():
            raise UserError(f"{folder} has no genai_config.json")
        try:
            self.model = genai.Model(str(folder))
        except Exception as error:  # its bindings raise RuntimeError and OrtException
            raise UserError(f"onnxruntime-genai cannot open {folder}: {str(error).splitlines()[0]}") from error

    def _generator(self, length: int):
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=length, do_sample=False, min_length=0)
        return self.genai.Generator(self.model, params)

    def next_tokens(self, ids: Sequence[int], positions: Sequence[int], top_k: int | None = None) -> list[NextToken]:
        check_positions(ids, positions)
        generator = self._generator(len(ids) + 1)
        found, done = {}, 0
        for p in sorted(set(positions)):
            generator.append_tokens(np.asarray(ids[done:p], dtype=np.int32))
            done = p
            found[p] = from_logits(np.asarray(generator.get_logits()).reshape(-1), ids[p], top_k)
        return [found[p] for p in positions]

    def generate(self, ids: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> Iterator[int]:
        generator = self._generator(len(ids) + max_tokens)
        generator.append_tokens(np.asarray(ids, dtype=np.int32))
        for _ in range(max_tokens):
            if generator.is_done():
                return
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in stop:
                return
            yield token

    def speed(self, prompt_tokens: int, new_tokens: int) -> Speed:
        ids = np.asarray([3 + i % 89 for i in range(prompt_tokens)], dtype=np.int32)
        self._generator(prompt_tokens + 1).append_tokens(ids)  # first-run allocation is not the model's speed
        generator = self._generator(prompt_tokens + new_tokens + 1)
        start = time.perf_counter()
        generator.append_tokens(ids)
        middle = time.perf_counter()
        for i in range(new_tokens):  # tokens are appended, not sampled, so that an end token cannot stop the clock
            generator.append_tokens(np.asarray([3 + i % 89], dtype=np.int32))
        end = time.perf_counter()
        return Speed(prompt_tokens / (middle - start), new_tokens / (end - middle), prompt_tokens, new_tokens)

    def close(self) -> None:
        del self.model
