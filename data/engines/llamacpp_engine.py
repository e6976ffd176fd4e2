"""llama.cpp, in this process through xllamacpp: a quantized teacher, several rows at a time.

Its server refills slots as rows end and keeps each slot's cache, so the prefix that all prompts share is read once per
slot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.gguf_header import read_header
from ...core.machine import cores
from ...core.place import ANYWHERE, Place
from ...modeling.load import load_config
from ...runtime.llamacpp_server import SEEDS, Server, checked, open_server
from ..cost import LLAMACPP_ROWS
from ..sampling import Sampled, Sampling
from . import settle


class LlamaCpp:
    """llama.cpp on `file`, a GGUF of the model in the folder `base`, for texts of `length` tokens, `slots` at once.

    Raises `UserError` for files that are broken or hold another model, and for layers where there is no GPU.
    """

    def __init__(
        self,
        file: Path,
        base: Path,
        length: int,
        threads: int = 0,
        slots: int = LLAMACPP_ROWS,
        place: Place = ANYWHERE,
    ):
        _check_same_model(file, base)
        self.file = file
        try:
            self._server: Server | None = open_server(file, threads or cores(), slots, length + 1, place=place)
            self.slots = self._server.slots
        except UserError as error:
            raise UserError(f"data.engine.gguf: {error}") from error

    def sample(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        how: Sampling,
        *,
        stop: Collection[int],
        banned: Sequence[int] = (),
        stopped: Callable[[list[int]], bool] | None = None,
    ) -> list[Sampled]:
        likeliest = how.temperature == 0
        shared = {
            "n_predict": how.max_tokens,
            "temperature": how.temperature or 1.0,
            "top_p": how.top_p,
            "top_k": 1 if likeliest else how.top_k,
            # In the order of `choose`: top_k, temperature, then the nucleus.
            "samplers": ["top_k"] if likeliest else ["top_k", "temperature", "top_p"],
            "logit_bias": [[token, False] for token in banned],
            "cache_prompt": True,
            "return_tokens": True,
        }

        def draw(prompt: list[int], seed: int) -> Sampled:
            answer = self._ask({"prompt": list(prompt), "seed": seed % SEEDS, **shared})
            sampled = settle(answer["tokens"], stop, how.max_tokens, stopped)
            # llama.cpp also stops at the end tokens listed in its file.
            sampled.ended = sampled.ended or (answer["stop_type"] == "eos" and not sampled.looped)
            return sampled

        with ThreadPoolExecutor(self.slots) as pool:
            return list(pool.map(draw, prompts, seeds))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._server is None:
            raise RuntimeError("the engine is closed")
        return checked(self._server.ask("/completion", request), f"a prompt for {self.file}")

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = None


def _check_same_model(file: Path, base: Path) -> None:
    config = load_config(base)
    header = read_header(file)
    architecture, size = header.get("general.architecture"), header.get("tokenizer.ggml.tokens", 0)
    shape = (header.get(f"{architecture}.block_count"), header.get(f"{architecture}.embedding_length"))
    expected = (config.num_hidden_layers, config.hidden_size)
    if shape != expected or size > config.vocab_size:
        raise UserError(
            f"data.engine.gguf: {file} is not the recipe's model: it has {shape[0]} blocks of width {shape[1]} and "
            f"{size} tokens, but the model has {expected[0]} of width {expected[1]} and {config.vocab_size}"
        )
