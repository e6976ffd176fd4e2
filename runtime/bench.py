"""Speed and memory of a bundle at one depth, and the speed-up of a draft; each measured in its own process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.place import ANYWHERE, Place
from ..kv.settings import KvBudget
from .bundle import read_bundle
from .generator import Request, RequestWork
from .measure import answer, in_own_process, peak_memory
from .session import Session, Settings, choose_artifact, choose_engine, depth_artifacts

# Prompts for measuring drafts. Acceptance depends on the text; speed without a draft does not.
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a lighthouse keeper.",
    "Explain in simple words how a bicycle stays upright.",
)


@dataclass(frozen=True)
class DepthFigures:
    """One engine, type and depth. The time to the first token covers the whole prompt and one token."""

    engine: str
    type: str
    depth: int
    prompt_tokens: int
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int  # of the whole process: weights, keys and values, Python and runtime
    load_seconds: float
    device: str = "cpu"

    @property
    def latency_ms(self) -> float:
        """Milliseconds per decoded token."""
        return 1000 / self.decode_tokens_per_second


@dataclass(frozen=True)
class DraftFigures:
    """A draft depth against the full depth alone, greedy, over `PROMPTS`."""

    engine: str
    type: str
    depth: int
    draft_depth: int
    draft_tokens: int
    tokens: int
    acceptance: float  # of the drafted tokens
    plain_tokens_per_second: float  # without prefill, as the next
    draft_tokens_per_second: float
    equal: bool  # whether the text equals that of the full depth alone


def measure_depth(
    bundle: Path,
    engine: str,
    kind: str,
    depth: int,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeat: int = 1,
    threads: int = 0,
    kv: KvBudget | None = None,
    kv_type: str | None = None,
    place: Place = ANYWHERE,
) -> DepthFigures:
    """Open the bundle in a fresh process at this depth only and time it; the best repetition counts.

    `kv` bounds the cache, `kv_type` is how llama.cpp holds keys and values, `place` is the hardware.
    """
    settings = {"engine": engine, "kind": kind, "depth": depth, "threads": threads}
    settings |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeat": repeat}
    settings |= {"kv": None if kv is None else asdict(kv), "kv_type": kv_type, "place": asdict(place)}
    return DepthFigures(**in_own_process(__name__, bundle, settings))


def measure_draft(
    bundle: Path,
    engine: str,
    kind: str,
    draft_depth: int,
    *,
    draft_tokens: int = 4,
    new_tokens: int = 64,
    threads: int = 0,
    kv_type: str | None = None,
    place: Place = ANYWHERE,
) -> DraftFigures:
    """Write answers to `PROMPTS` at the greatest depth in a fresh process, without and with a draft."""
    settings = {"engine": engine, "kind": kind, "draft_depth": draft_depth, "draft_tokens": draft_tokens}
    settings |= {"new_tokens": new_tokens, "threads": threads, "kv_type": kv_type, "place": asdict(place)}
    return DraftFigures(**in_own_process(__name__, bundle, settings))


def measure_all(
    bundle: Path,
    engine: str | None = None,
    kind: str | None = None,
    *,
    done: Callable[[DepthFigures], None] = lambda _: None,
    **settings: Any,
) -> list[DepthFigures]:
    """Every engine, type and depth of the bundle, or the given ones; `settings` as for `measure_depth`."""
    manifest = read_bundle(bundle)
    choose_artifact(manifest, engine, kind)  # an error lists the available ones
    formats = {"gguf": "llama.cpp", "onnx": "onnx"}
    measured = []
    for entry in sorted(manifest.artifacts, key=lambda entry: (entry.format, entry.type, entry.depth)):
        name = formats[entry.format]
        if engine in (None, name) and (kind is None or kind.lower() == entry.type.lower()):
            measured.append(measure_depth(bundle, name, entry.type, entry.depth, **settings))
            done(measured[-1])
    return measured


def choose_depth(
    bundle: Path,
    engine: str | None,
    kind: str | None,
    *,
    latency_ms: float | None = None,
    memory_bytes: int | None = None,
    **settings: Any,
) -> DepthFigures:
    """The deepest depth that decodes a token in `latency_ms` and fits in `memory_bytes`, measured on the spot.

    Raises `UserError` with the measurements if none does.
    """
    if latency_ms is None and memory_bytes is None:
        raise UserError("--depth auto needs a limit to choose by: --latency-ms, --memory-mb, or both")
    manifest = read_bundle(bundle)
    place = settings.get("place", ANYWHERE).opens_files("--depth auto")
    engine = choose_engine(engine, settings.get("kv"), settings.get("kv_type"), place)  # as a session does
    engine, kind = choose_artifact(manifest, engine, kind)
    tried = []
    for depth in reversed(depth_artifacts(manifest, engine, kind)):
        measured = measure_depth(bundle, engine, kind, depth, **settings)
        tried.append(measured)
        if measured.latency_ms <= (latency_ms or float("inf")) and measured.peak_memory_bytes <= (
            memory_bytes or float("inf")
        ):
            return measured
    limits = [f"{latency_ms:g} ms per token"] if latency_ms is not None else []
    limits += [f"{memory_bytes / 1e6:.0f} MB"] if memory_bytes is not None else []
    figures = "; ".join(f"depth {f.depth}: {f.latency_ms:.1f} ms, {f.peak_memory_bytes / 1e6:.0f} MB" for f in tried)
    raise UserError(f"no depth of {bundle} in {engine} {kind} meets {' and '.join(limits)} (measured: {figures})")


def _time_depth(bundle: Path, values: dict[str, Any]) -> dict[str, Any]:
    prompt_tokens, new_tokens = values["prompt_tokens"], values["new_tokens"]
    started = time.perf_counter()
    where = {"threads": values["threads"], "context": prompt_tokens + new_tokens + 8, "deepest": values["depth"]}
    kv = None if values["kv"] is None else KvBudget(**values["kv"])
    where |= {"kv_budget": kv, "kv_type": values["kv_type"], "place": Place(**values["place"])}
    with Session(bundle, values["engine"], values["kind"], **where) as session:
        device = session.device
        prompt_tokens = min(prompt_tokens, session.context - new_tokens)
        if prompt_tokens < 1:
            raise UserError(f"{new_tokens} new tokens leave no room for a prompt in a context of {session.context}")
        loaded = time.perf_counter() - started
        firsts, decodes = [], []
        for turn in range(values["repeat"] + 1):
            # A different first token each time, so that no prefix is reused.
            prompt = [(7 * i + 13 * turn) % 97 + 3 for i in range(prompt_tokens)]
            request = Request(prompt, new_tokens + 1 if turn else 2, values["depth"])
            first, decode, count = _clock(session, request)
            if turn:  # the first turn warms up
                firsts.append(first)
                decodes.append(count / decode)
        memory = peak_memory(session.processes)
    figures = DepthFigures(
        values["engine"],
        values["kind"],
        values["depth"],
        prompt_tokens,
        min(firsts),
        prompt_tokens / min(firsts),
        max(decodes),
        memory,
        loaded,
        device,
    )
    return asdict(figures)


def _clock(session: Session, request: Request, work: RequestWork | None = None) -> tuple[float, float, int]:
    """(seconds to the first token, seconds for the others, number of others)."""
    started = time.perf_counter()
    tokens = session.tokens(request, work or RequestWork())
    next(tokens, None)
    first = time.perf_counter()
    count = sum(1 for _ in tokens)
    return first - started, time.perf_counter() - first, count


def _time_draft(bundle: Path, values: dict[str, Any]) -> dict[str, Any]:
    context = 1024
    where = {"threads": values["threads"], "context": context, "kv_type": values["kv_type"]}
    where |= {"place": Place(**values["place"])}
    with Session(bundle, values["engine"], values["kind"], **where) as session:
        depth, new_tokens = session.depths[-1], values["new_tokens"]
        plain = Settings(max_tokens=new_tokens)
        prompts = [session.prompt([{"role": "user", "content": text}]) for text in PROMPTS]
        seconds, counts, equal, works = {False: 0.0, True: 0.0}, {False: 0, True: 0}, True, RequestWork()
        for number, ids in enumerate([prompts[0], *prompts]):  # the first one warms up
            texts = {}
            for drafted in (False, True):
                request = Request(ids, plain.max_tokens, depth, stop=session.stop)
                if drafted:
                    request = replace(request, draft_depth=values["draft_depth"], draft_tokens=values["draft_tokens"])
                work, written = RequestWork(), []
                tokens = session.tokens(request, work)
                written += [token for token in [next(tokens, None)] if token is not None]
                started = time.perf_counter()
                written += tokens
                if number:
                    seconds[drafted] += time.perf_counter() - started
                    counts[drafted] += max(len(written) - 1, 0)
                    works.drafted, works.accepted = works.drafted + work.drafted, works.accepted + work.accepted
                texts[drafted] = written
            equal = equal and texts[False] == texts[True]
    rates = {key: counts[key] / seconds[key] if counts[key] else 0.0 for key in counts}
    figures = DraftFigures(
        values["engine"],
        values["kind"],
        depth,
        values["draft_depth"],
        values["draft_tokens"],
        counts[True],
        works.accepted / works.drafted if works.drafted else 0.0,
        rates[False],
        rates[True],
        equal,
    )
    return asdict(figures)


if __name__ == "__main__":
    answer(lambda bundle, values: (_time_draft if "draft_depth" in values else _time_depth)(bundle, values))
