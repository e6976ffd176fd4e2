"""Generating text with llama.cpp: one server per requested depth, in this process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from ..core.errors import UserError
from ..core.place import ANYWHERE, Place
from .artifact_types import GGUF_CACHE
from .generator import Generator, Request, RequestWork, Tokens
from .llamacpp_engine import LlamaCppEngine
from .llamacpp_server import ServerGone


class LlamaCppGenerator(Generator):
    """`files` maps depths to GGUF files. A depth is opened when first requested, and stays open. `kv_type` is the type
    of keys and values, `place` says how many layers go to the GPU.

    llama.cpp has no way to stop at a depth, so each has a cache of its own. It maps files into memory: what the files
    of two depths share on disk they also share in memory, except matrices that it repacks for the CPU.
    """

    runtime = "llama.cpp"

    @property
    def processes(self) -> tuple[int, ...]:
        return tuple(number for engine in self._engines.values() for number in engine.processes)

    def __init__(
        self,
        files: Mapping[int, Path],
        threads: int = 0,
        context: int = 4096,
        kv_type: str = GGUF_CACHE,
        place: Place = ANYWHERE,
    ):
        self.depths = tuple(sorted(files))
        self._files, self._threads, self._wanted, self._kv_type, self._place = files, threads, context, kv_type, place
        self._engines: dict[tuple[int, int | None, int], LlamaCppEngine] = {}
        self._lock = threading.Lock()
        deepest = self._engine(self.depths[-1])
        self.context, self.device = deepest.context, deepest.device

    def _engine(self, depth: int, draft: int | None = None, draft_tokens: int = 0) -> LlamaCppEngine:
        key = (depth, draft, draft_tokens if draft is not None else 0)
        if key not in self._engines:
            draft_file = None if draft is None else self._files[draft]
            self._engines[key] = LlamaCppEngine(
                self._files[depth], self._threads, self._wanted, 1, draft_file, draft_tokens, self._kv_type, self._place
            )
        return self._engines[key]

    def generate(self, request: Request, work: RequestWork) -> Tokens:
        self.check(request)
        if request.exits:
            raise UserError("llama.cpp has no early exit; use the onnx engine")

        def note(timings: dict[str, float]) -> None:
            nonlocal first
            if first:
                work.reused, first = len(request.ids) - int(timings["prompt_n"]), False
            work.drafted += int(timings.get("draft_n", 0))
            work.accepted += int(timings.get("draft_n_accepted", 0))

        first = True
        with self._lock:
            engine = self._engine(request.depth, request.draft_depth, request.draft_tokens)
            settings = (request.temperature, request.top_p, request.seed)
            try:
                for token in engine.write(request.ids, request.max_tokens, *settings, (), note):
                    if token in request.stop:
                        work.finish = "stop"
                        return
                    work.depths[request.depth] += 1
                    yield token
            except ServerGone:
                self.close()  # so that the next request opens another
                raise

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines = {}
