"""ONNX Runtime: an exported folder with `model.onnx`, run with its KV cache as plain inputs and outputs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .engine import NextToken, Speed, check_positions, from_logits, thread_count

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
Past = dict[str, NDArray[Any]]


class OnnxEngine:
    """A decoder in stock onnxruntime. Raises `UserError` for a missing or broken folder."""

    name = "onnxruntime"

    def __init__(self, folder: Path, threads: int = 0):
        import onnxruntime as ort

        model = folder / "model.onnx"
        for file in (model, folder / "genai_config.json"):
            if not file.is_file():
                raise UserError(f"{folder} has no {file.name}, so it is not an exported ONNX folder")
        options = ort.SessionOptions()
        options.intra_op_num_threads = thread_count(threads)
        options.log_severity_level = 4
        try:
            self.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own classes and RuntimeError alike
            raise UserError(f"ONNX Runtime cannot open {model}: {str(error).splitlines()[0]}") from error
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.past_names = [name for name in self.inputs if name.startswith("past_key_values.")]
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        # The graph names these two axes; the configuration beside it has their lengths.
        self.kv_heads, self.head_size = config["num_key_value_heads"], config["head_size"]
        self.outputs = ["logits", *(name.replace("past_key_values", "present") for name in self.past_names)]

    def empty_past(self) -> Past:
        """KV cache entries of length 0, (1, KV heads, 0, D) each."""
        shape = (1, self.kv_heads, 0, self.head_size)
        return {name: np.zeros(shape, DTYPES[self.inputs[name].type]) for name in self.past_names}

    def step(self, ids: Sequence[int], past: Past) -> tuple[NDArray[Any], Past]:
        """Logits (T, V) of `ids` after what is in `past`, and the longer past."""
        before = next(iter(past.values())).shape[2]
        feeds: dict[str, Any] = {
            "input_ids": np.asarray([ids], dtype=np.int64),
            "attention_mask": np.ones((1, before + len(ids)), dtype=np.int64),
            **past,
        }
        if "position_ids" in self.inputs:
            feeds["position_ids"] = np.arange(before, before + len(ids), dtype=np.int64)[None]
        results: list[Any] = list(self.session.run(self.outputs, feeds))
        logits, *present = results
        return logits[0], dict(zip(self.past_names, present, strict=True))

    def next_tokens(self, ids: Sequence[int], positions: Sequence[int], top_k: int | None = None) -> list[NextToken]:
        check_positions(ids, positions)
        logits, _ = self.step(ids, self.empty_past())
        return [from_logits(logits[p - 1], ids[p], top_k) for p in positions]

    def generate(self, ids: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> Iterator[int]:
        logits, past = self.step(ids, self.empty_past())
        for _ in range(max_tokens):
            token = int(logits[-1].argmax())
            if token in stop:
                return
            yield token
            logits, past = self.step([token], past)

    def speed(self, prompt_tokens: int, new_tokens: int) -> Speed:
        ids = [3 + i % 89 for i in range(prompt_tokens)]
        self.step(ids, self.empty_past())  # first-run allocation is not the model's speed
        start = time.perf_counter()
        logits, past = self.step(ids, self.empty_past())
        middle = time.perf_counter()
        for _ in range(new_tokens):
            logits, past = self.step([int(logits[-1].argmax())], past)
        end = time.perf_counter()
        return Speed(prompt_tokens / (middle - start), new_tokens / (end - middle), prompt_tokens, new_tokens)

    def close(self) -> None:
        del self.session
