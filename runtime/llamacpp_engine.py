"""llama.cpp through xllamacpp: its server in this process, spoken to on the loopback interface.

The server gives the most probable next tokens, not the logits of a whole prompt. The log-probability of *any* token
is had exactly by forcing it: the sampled token's reported log-probability is taken before the bias is applied.
Consecutive prefixes re-use the server's prompt cache, so each position costs one decoded token.
"""

from __future__ import annotations

import importlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .engine import NextToken, Speed, captured_stderr, check_positions, thread_count

DEFAULT_TOP_K = 256
FORCED = 1e4  # a bias no logit outweighs


class LlamaCppEngine:
    """A GGUF file in stock llama.cpp. Raises `UserError` for a missing or broken file.

    `context` is the number of tokens the KV cache holds.
    """

    name = "llama.cpp"

    def __init__(self, file: Path, threads: int = 0, context: int = 2048):
        llama: Any = importlib.import_module("xllamacpp")  # it re-exports a binary module that has no types
        check_gguf(file)
        params = llama.CommonParams()
        params.model.path = str(file)
        params.n_ctx = context
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = thread_count(threads)
        params.n_gpu_layers = 0
        params.warmup = False
        params.verbosity = -1
        params.fit_params = False  # take the context as asked for, without probing devices
        params.cache_ram_mib = 0
        with captured_stderr() as lines:
            try:
                self.server = llama.Server(params)
            except RuntimeError as error:
                failure: RuntimeError | None = error
            else:
                failure = None
        if failure is not None:
            why = next((line.strip() for line in lines if "error" in line.lower()), str(failure))
            raise UserError(f"llama.cpp cannot open {file}: {why}") from failure
        self.address = self.server.listening_address
        # Never through a proxy, whatever the environment says: the server is this process.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request to the server, JSON to JSON."""
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self.opener.open(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise UserError(f"llama.cpp refused a request: {error.read().decode(errors='replace')[:300]}") from error

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text with its special tokens recognised, nothing added."""
        return self.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]

    def next_tokens(self, ids: Sequence[int], positions: Sequence[int], top_k: int | None = None) -> list[NextToken]:
        """As the protocol says; at most `top_k` tokens (256 if not given) are listed."""
        check_positions(ids, positions)
        found = {p: self._probe(ids[:p], ids[p], top_k or DEFAULT_TOP_K) for p in sorted(set(positions))}
        return [found[p] for p in positions]

    def _probe(self, prefix: Sequence[int], target: int, top_k: int) -> NextToken:
        answer = self.post(
            "/completion",
            {
                "prompt": [int(token) for token in prefix],
                "n_predict": 1,
                "n_probs": top_k,
                "temperature": 0.0,
                "logit_bias": [[int(target), FORCED]],
                "cache_prompt": True,
                "post_sampling_probs": False,
            },
        )
        first = answer["completion_probabilities"][0]
        if first["id"] != target:
            raise UserError(f"llama.cpp did not follow a forced token ({first['id']} instead of {target})")
        top = first["top_logprobs"]
        return NextToken(
            int(target),
            float(first["logprob"]),
            np.asarray([entry["id"] for entry in top], dtype=np.int64),
            np.asarray([entry["logprob"] for entry in top], dtype=np.float32),
        )

    def generate(self, ids: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> Iterator[int]:
        answer = self.post(
            "/completion",
            {
                "prompt": [int(token) for token in ids],
                "n_predict": max_tokens,
                "temperature": 0.0,
                "return_tokens": True,
                "ignore_eos": not stop,
            },
        )
        for token in answer["tokens"]:
            if token in stop:
                return
            yield int(token)

    def speed(self, prompt_tokens: int, new_tokens: int) -> Speed:
        body = {
            "prompt": [3 + i % 89 for i in range(prompt_tokens)],
            "n_predict": new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        self.post("/completion", body | {"n_predict": 1})  # first-run allocation is not the model's speed
        times = self.post("/completion", body)["timings"]
        return Speed(times["prompt_per_second"], times["predicted_per_second"], prompt_tokens, new_tokens)

    def close(self) -> None:
        with captured_stderr():
            del self.server


def check_gguf(file: Path) -> None:
    """Refuse a file that is missing, no GGUF, or cut short, before native code sees it."""
    import gguf

    if not file.is_file():
        raise UserError(f"there is no file {file}")
    try:
        reader = gguf.GGUFReader(file)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
        raise UserError(f"{file} is not a readable GGUF file: {error}") from error
    if end > file.stat().st_size:
        raise UserError(f"{file} is cut short: its tensors need {end} bytes, it has {file.stat().st_size}")
