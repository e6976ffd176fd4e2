"""Speed and memory of an artifact, measured in a separate process so that its memory is only the runtime's."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ..core.errors import UserError
from ..core.place import ANYWHERE, Place
from .artifact_types import GGUF_CACHE
from .cost import SLOTS
from .engine import Speed
from .open import open_engine


@dataclass(frozen=True)
class Measurement:
    speed: Speed
    peak_memory_bytes: int  # of the whole process, Python and runtime included
    load_seconds: float


def measure(
    path: Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeat: int = 1,
    threads: int = 0,
    runtime: str | None = None,
    context: int = 0,
    slots: int = SLOTS,
    kv_type: str = GGUF_CACHE,
    place: Place = ANYWHERE,
) -> Measurement:
    """Open the artifact in a fresh process and time it; the best repetition counts.

    llama.cpp allocates a cache of the type `kv_type` for `slots` texts of `context` tokens; 0: as long as the prompt
    and what is written. `place` is the hardware. Raises `UserError` as `open_engine` does.
    """
    settings = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeat": repeat}
    settings |= {"threads": threads, "runtime": runtime, "context": context, "slots": slots, "kv_type": kv_type}
    settings |= {"place": asdict(place)}
    values = in_own_process(__name__, path, settings)
    return Measurement(Speed(*values["speed"]), values["peak_memory_bytes"], values["load_seconds"])


def in_own_process(module: str, path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `answer` prints in a fresh process that runs `module` on `path`. `UserError` for its errors."""
    command = [sys.executable, "-m", module, str(path), json.dumps(settings)]
    finished = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        values = json.loads(finished.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]
        raise UserError(f"{path} could not be measured: {last}") from None
    if "error" in values:
        raise UserError(values["error"])
    return values


def answer(work: Callable[[Path, dict[str, Any]], dict[str, Any]]) -> None:
    """The main program of such a process: print the result of `work`, or the error, as JSON."""
    try:
        result = work(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except UserError as error:
        result = {"error": str(error)}
    print(json.dumps(result))


def _measure_artifact(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    context = max(values["context"], values["prompt_tokens"] + values["new_tokens"] + 8)
    how = {"slots": values["slots"], "kv_type": values["kv_type"], "place": Place(**values["place"])}
    with open_engine(path, values["threads"], context, values["runtime"], **how) as engine:
        loaded = time.perf_counter() - started
        turns = [engine.measure_speed(values["prompt_tokens"], values["new_tokens"]) for _ in range(values["repeat"])]
        speed = Speed(*(max(figures) for figures in zip(*turns, strict=True)))
        memory = peak_memory(engine.processes)
    return {"speed": list(speed), "peak_memory_bytes": memory, "load_seconds": loaded}


def peak_memory(others: Sequence[int] = ()) -> int:
    """The most memory this process has held, and the `others` by their ids, in bytes."""
    return _peak("self") + sum(_peak(str(number)) for number in others)


def _peak(process: str) -> int:
    try:
        # On Linux getrusage's peak is inherited from the parent process; this figure is the process's own.
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if process == "self":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return psutil.Process(int(process)).memory_info().rss  # what it holds now: macOS tells no other process's peak


if __name__ == "__main__":
    answer(_measure_artifact)
