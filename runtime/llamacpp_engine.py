"""A GGUF file opened in stock llama.cpp through xllamacpp.

llama.cpp's server gives the log-probabilities of the next token, not the logits of a whole text, and only of the
most probable tokens and of the one it sampled. A bias that forces the sampled token makes it return the
exact, unbiased log-probability of any token. A text is scored position by position; what a slot has already read stays
in its cache, so each position costs one decoded token, and several slots are decoded in one batch.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.gguf_header import read_header, split_files
from ..core.machine import cores
from ..core.place import ANYWHERE, Place
from .artifact_types import GGUF_CACHE
from .cost import SLOTS
from .engine import SMALLEST, Distribution, Engine, ScoringWindow, Speed
from .llamacpp_server import SEEDS, Server, check_kv_type, checked, open_server

FORCE = 1e9  # a logit bias that no logit outweighs
LIFT = 200.0  # a logit bias that lifts a token above all unbiased ones, yet costs it only 2e-5 of its own precision
MARGIN = 10.0  # nats between two lifted tokens, so that the upper one is almost always sampled
# Tokens requested at a time during generation: few at first, so that it begins at once. One at a time would cost a
# request each; a stream would omit tokens that end inside a character.
STEPS = (1, 1, 2, 4, 8)
DRAFTED_STEPS = (1, 8, 32)  # where a draft model guesses ahead: it stops at the end of each request


class LlamaCppEngine(Engine):
    """llama.cpp on `file`: texts of up to `context` tokens, `slots` at a time; `threads` 0 is one per core.

    `draft` is a GGUF file of the same vocabulary that proposes `draft_tokens` at a time during generation. `kv_type`
    is the type of keys and values: f16, or q8_0 in about half the memory. `place` says how many layers go to the GPU.
    Raises `UserError`, with llama.cpp's own reason, for missing or broken files, and for layers where there is no GPU.
    """

    runtime = "llama.cpp"

    def __init__(
        self,
        file: Path,
        threads: int = 0,
        context: int = 1024,
        slots: int = SLOTS,
        draft: Path | None = None,
        draft_tokens: int = 4,
        kv_type: str = GGUF_CACHE,
        place: Place = ANYWHERE,
    ):
        self.path = Path(file)
        split_files(self.path)  # raises for a missing part; llama.cpp finds the parts by itself
        header = read_header(self.path)
        architecture = header.get("general.architecture")
        trained = header.get(f"{architecture}.context_length")
        vocabulary = header.get("tokenizer.ggml.tokens")
        if not isinstance(trained, int) or not isinstance(vocabulary, int):
            raise UserError(f"{self.path} is not a language model: its header names no context length or vocabulary")
        check_kv_type(kv_type, header, self.path)
        self._vocabulary = vocabulary
        self.context = min(context, trained)
        self._plain: int | None = None
        threads = threads or cores()
        # One more token: the server needs room for the token it samples.
        self._steps = STEPS if draft is None else DRAFTED_STEPS
        how = (draft, draft_tokens, kv_type, place)
        self._server: Server | None = open_server(self.path, threads, slots, self.context + 1, *how)
        self._slots, self.context = self._server.slots, min(self.context, self._server.context - 1)
        self.device, self.processes = self._server.device, self._server.processes

    def score(
        self, windows: Sequence[ScoringWindow], top_k: int | None = None, done: Callable[[int], None] | None = None
    ) -> list[list[Distribution]]:
        for window in windows:
            window.check(self.context)
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self._slots):
            free.put(slot)

        def work(window: ScoringWindow) -> list[Distribution]:
            slot = free.get()
            try:
                scores = []
                for position in window.positions:
                    scores.append(self._predict(slot, window.ids, position, top_k or self._vocabulary))
                    if done:
                        done(1)
                return scores
            finally:
                free.put(slot)

        with ThreadPoolExecutor(self._slots) as pool:
            futures = [pool.submit(work, window) for window in windows]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def _predict(self, slot: int, ids: Sequence[int], position: int, count: int) -> Distribution:
        prompt, target = list(ids[:position]), int(ids[position])
        answer = self._force(slot, prompt, target, count)
        if answer is not None:
            logprob = answer["logprob"]
        else:
            answer, logprob = self._predict_fragment(slot, prompt, target, count)
        tokens = np.asarray([entry["id"] for entry in answer["top_logprobs"]], np.int64)
        logprobs = np.asarray([entry["logprob"] for entry in answer["top_logprobs"]], np.float32)
        logprobs = np.maximum(logprobs, SMALLEST)
        complete = len(tokens) == self._vocabulary
        if complete:
            order = np.argsort(tokens)
            tokens, logprobs = tokens[order], logprobs[order]
        return Distribution(position, target, max(logprob, SMALLEST), tokens, logprobs, complete)

    def _predict_fragment(self, slot: int, prompt: list[int], target: int, count: int) -> tuple[dict[str, Any], float]:
        """The prediction if `target` is part of a UTF-8 character.

        The server reports no probabilities for such a token when it samples it. So a plain token is forced instead;
        if the target is not among the most probable, both are lifted above all others, the plain one higher by a
        known margin, and the ratio of their probabilities gives the target's.
        """
        plain = self._plain_token(slot, prompt)
        answer = self._force(slot, prompt, plain, count)
        assert answer is not None
        listed = {entry["id"]: entry["logprob"] for entry in answer["top_logprobs"]}
        if target in listed or len(listed) == self._vocabulary:
            return answer, listed[target]
        ceiling = min(listed.values())  # the target's log-probability lies below
        lift = {target: LIFT, plain: LIFT + MARGIN + ceiling - answer["logprob"]}
        for seed in range(20):  # the target itself is drawn with a chance below 5e-5
            entry = self._ask(
                slot,
                prompt,
                n_probs=2,
                logit_bias=[[token, bias] for token, bias in lift.items()],
                samplers=["top_k"],
                top_k=2,
                temperature=1.0,
                seed=seed,
                post_sampling_probs=True,
            )
            if entry is not None:
                shares = {item["id"]: item["prob"] for item in entry["top_probs"]}
                if target not in shares:
                    return answer, SMALLEST  # underflowed even next to one other token
                return answer, math.log(shares[target] / shares[plain]) + ceiling + MARGIN
        raise RuntimeError(f"llama.cpp gave no probability of token {target}")

    def _plain_token(self, slot: int, prompt: list[int]) -> int:
        """A token whose text is whole characters; searched for once."""
        candidates = range(self._vocabulary) if self._plain is None else [self._plain]
        for token in candidates:
            if self._force(slot, prompt, token, 1) is not None:
                self._plain = token
                return token
        raise UserError(f"no token of {self.path} is whole characters: its vocabulary is broken")

    def _force(self, slot: int, prompt: list[int], token: int, count: int) -> dict[str, Any] | None:
        """The server's log-probability of `token` after `prompt`, with the `count` most probable tokens."""
        return self._ask(slot, prompt, n_probs=count, logit_bias=[[token, FORCE]], samplers=[], temperature=-1.0)

    def _ask(self, slot: int, prompt: list[int], **options: Any) -> dict[str, Any] | None:
        request = {"prompt": prompt, "id_slot": slot, "n_predict": 1, "cache_prompt": True, **options}
        logprobs = self._send(request)["choices"][0]["logprobs"]
        first = logprobs["content"][0] if logprobs else None
        if first and any(
            value is None for entry in (first, *first.get("top_logprobs", ())) for value in entry.values()
        ):
            raise UserError(f"{self.path} predicts NaN: its weights are damaged or out of range")
        return first

    def _send(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._post("/v1/completions", request)

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
        """As in every engine; sampled by llama.cpp's own sampler."""
        return self.write(ids, max_tokens, temperature, top_p, seed, stop)

    def write(
        self,
        ids: Sequence[int],
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Collection[int],
        note: Callable[[dict[str, Any]], None] | None = None,
    ) -> Iterator[int]:
        """`generate`; `note` receives the timings that the server sends every few tokens."""
        sampling: dict[str, Any] = {"samplers": ["top_k"], "top_k": 1}
        if temperature > 0:
            sampling = {"samplers": ["temperature", "top_p"], "temperature": temperature, "top_p": top_p}
        text, written, turn = [int(i) for i in ids], 0, 0
        limit = min(max_tokens, self.context - len(text) + 1)
        while written < limit:
            count = min(self._steps[min(turn, len(self._steps) - 1)], limit - written)
            settings = {"n_predict": count, "seed": (seed + written) % SEEDS, "return_tokens": True, **sampling}
            answer = self._post("/completion", {"prompt": text, "id_slot": 0, "cache_prompt": True, **settings})
            if note:
                note(answer["timings"])
            for token in answer[
                "tokens"
            ]:  # including its own end-of-text tokens, which do not end the text by themselves
                if token in stop:
                    return
                yield token
            text += answer["tokens"]
            written, turn = written + len(answer["tokens"]), turn + 1

    def measure_speed(self, prompt_tokens: int = 128, new_tokens: int = 64) -> Speed:
        """Measured by llama.cpp itself."""
        prompt = [(7 * i) % 97 + 3 for i in range(prompt_tokens)]
        settings = {"id_slot": 0, "samplers": [], "temperature": -1.0, "ignore_eos": True, "cache_prompt": False}
        self._send({"prompt": prompt[:8], "n_predict": 2, **settings})
        timings = self._send({"prompt": prompt, "n_predict": new_tokens + 1, **settings})["timings"]
        return Speed(float(timings["prompt_per_second"]), float(timings["predicted_per_second"]))

    def ends_at(self, token: int) -> bool:
        """Whether stock llama.cpp ends a text at this token, by itself."""
        request = {
            "prompt": [token],
            "id_slot": 0,
            "n_predict": 2,
            "logit_bias": [[token, FORCE]],
            "cache_prompt": False,
        }
        return self._post("/completion", {**request, "samplers": [], "temperature": -1.0})["stop_type"] == "eos"

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, its special tokens recognised and nothing added."""
        return self._post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]

    def _post(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        if self._server is None:
            raise RuntimeError("the engine is closed")
        return checked(self._server.ask(path, request), self.path)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = None
