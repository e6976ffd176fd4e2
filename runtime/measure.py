"""Speed and memory of an artifact, measured in a process of its own: the memory is then the runtime's alone."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .engine import Speed
from .open import open_engine


@dataclass(frozen=True)
class Measurement:
    speed: Speed
    peak_memory_bytes: int  # of the whole process, Python and runtime included
    load_seconds: float


def measure(
    path: Path, *, prompt_tokens: int = 128, new_tokens: int = 64, threads: int = 0, runtime: str | None = None
) -> Measurement:
    """Open the artifact in a fresh process and time it. Raises `UserError` as `open_engine` does."""
    settings = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "threads": threads, "runtime": runtime}
    command = [sys.executable, "-m", "compress.runtime.measure", str(path), json.dumps(settings)]
    finished = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        values = json.loads(finished.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]
        raise UserError(f"{path} could not be measured: {last}") from None
    if "error" in values:
        raise UserError(values["error"])
    return Measurement(Speed(*values["speed"]), values["peak_memory_bytes"], values["load_seconds"])


def _main(path: str, settings: str) -> None:
    values = json.loads(settings)
    started = time.perf_counter()
    context = values["prompt_tokens"] + values["new_tokens"] + 8
    try:
        with open_engine(Path(path), values["threads"], context, values["runtime"]) as engine:
            loaded = time.perf_counter() - started
            speed = engine.measure_speed(values["prompt_tokens"], values["new_tokens"])
    except UserError as error:
        print(json.dumps({"error": str(error)}))
        return
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"speed": list(speed), "peak_memory_bytes": peak, "load_seconds": loaded}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
