"""A KV cache of fixed size against the full one in ONNX Runtime: peak memory and tokens/s by length of the prompt.

    python benchmarks/kv_memory.py BUNDLE [--type int4] [--budget 1024] [--lengths 2048,4096,…] [--out kv_memory.json]

Each cell is a process of its own: it opens the bundle, warms up on a short prompt, reads one of made-up tokens and
decodes `--new-tokens` greedily. Memory is the largest resident set of the process, also less what it held before the
long prompt (weights, Python, the runtime). Both caches run in the same parts of the same graph; the full one also
keeps hidden states (4 bytes per channel and token), and holds old and new buffers at once when it grows.

Past the bundle's context the full cache is left out, and the bounded one counts positions over what it holds
(contiguous), as it does at every length here: nothing of this depends on what the text says. For a full cache at 32k
with a model of a shorter context, export a checkpoint whose config.json claims more (`max_position_embeddings`).

Cells that are in `--out` are not measured again. Stop with Ctrl-C and go on at will.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTHS = (2048, 4096, 8192, 16384, 32768)


def measure_cell(bundle: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Read and decode once, in this process."""
    from compress.api import KvBudget, Session
    from compress.runtime.generator import Request, RequestWork
    from compress.runtime.measure import peak_memory

    kv = None if values["kv"] is None else KvBudget(**values["kv"])
    with Session(bundle, "onnx", values["type"], threads=values["threads"], kv_budget=kv) as session:
        depth, length, count = session.depths[-1], values["length"], values["new_tokens"]

        def run(prompt: list[int], new: int) -> tuple[float, float]:
            """Seconds to the first token, and of each one after it."""
            started = time.perf_counter()
            tokens = session.tokens(Request(prompt, new + 1, depth), RequestWork())
            next(tokens)
            first = time.perf_counter()
            made = sum(1 for _ in tokens)
            assert made == new, f"{made} of {new} tokens were decoded"
            return first - started, (time.perf_counter() - first) / made

        run([5 + i % 90 for i in range(16)], 2)
        before = peak_memory()
        prefill, step = run([(7 * i + 13) % 97 + 3 for i in range(length)], count)
        return {
            "length": length,
            "cache": "full" if kv is None else "bounded",
            "prefill_tokens_per_second": length / prefill,
            "decode_tokens_per_second": 1 / step,
            "peak_memory_bytes": peak_memory(),
            "grown_bytes": peak_memory() - before,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--type", default="int4")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--stabilizers", type=int, default=64)
    parser.add_argument("--local", type=int, default=100)
    parser.add_argument("--policy", default="retaining")
    parser.add_argument("--evict-decoding", action="store_true", help="moves and turns keys at every token")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kv_memory.json"))
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # the process of a cell
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure_cell(options.bundle, json.loads(options.cell))))
        return
    settings = {"chunk": options.chunk, "stabilizers": options.stabilizers, "local": options.local}
    settings |= {"budget": options.budget, "policy": options.policy, "positions": "contiguous"}
    settings |= {"evict_decoding": options.evict_decoding}
    how = {"type": options.type, "new_tokens": options.new_tokens, "threads": options.threads}
    report = {"bundle": options.bundle.name, "kv": settings, **how, "cells": []}
    if options.out.exists():
        found = json.loads(options.out.read_text(encoding="utf-8"))
        if {**found, "cells": []} != report:
            sys.exit(f"{options.out} holds figures of other settings; give another --out")
        report = found
    context = json.loads((options.bundle / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    for length in map(int, options.lengths.split(",")):
        for cache in ("bounded", "full"):
            known = any((cell["length"], cell["cache"]) == (length, cache) for cell in report["cells"])
            if known or (cache == "full" and length + options.new_tokens + 1 >= context):
                continue
            cell = {**how, "length": length, "kv": settings if cache == "bounded" else None}
            report["cells"].append(in_own_process(options.bundle, cell))
            options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            show(report["cells"][-1])
    print()
    for cell in report["cells"]:
        show(cell)


def in_own_process(bundle: Path, cell: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, str(bundle), "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{cell['length']} tokens: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(cell: dict[str, Any]) -> None:
    print(
        f"{cell['length']:6d} {cell['cache']:8s} peak {cell['peak_memory_bytes'] / 1e6:7.0f} MB "
        f"(grown {cell['grown_bytes'] / 1e6:6.1f}), prefill {cell['prefill_tokens_per_second']:7.1f} tokens/s, "
        f"decode {cell['decode_tokens_per_second']:6.1f} tokens/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
