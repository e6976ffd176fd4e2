"""The chunked objectives against the same objective on whole logits: time and peak memory, side by side.

    python benchmarks/objectives.py [--positions N] [--vocabulary V] [--hidden H] [--chunk C] [--objective asft]

Each variant runs in a process of its own, forward and backward; memory is what its peak adds to what the process held
before. The default shape is SmolLM2-135M's head over 2,048 response tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from compress.modeling.agreement import Head, States, token_terms
from compress.training.losses import objective_loss
from compress.training.objectives import OBJECTIVES


def measure(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of one forward and backward pass, and the peak memory they add, in MB."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = (options.positions, options.hidden)
    hidden, teacher = torch.randn(shape).requires_grad_(), torch.randn(shape)
    weight = torch.randn(options.vocabulary, options.hidden) * 0.02
    targets = torch.randint(0, options.vocabulary, (options.positions,))
    objective = OBJECTIVES.get(options.objective).model_validate({})
    head = Head(weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(options.repeat):
        hidden.grad = None
        started = time.perf_counter()
        if variant == "chunked":
            loss = objective_loss(objective, hidden, head, targets, States(teacher, head), options.chunk).loss
        else:
            anchor = States(teacher, head) if objective.needs_teacher else None
            said = None if anchor is None else anchor.at(slice(None))
            loss = objective.loss(token_terms(head.logits(hidden), targets, said)).sum()
        loss.backward()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds), "peak_mb": (peak - before) / 1024, "loss": loss.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--objective", choices=OBJECTIVES.names, default="asft")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--variant", choices=["chunked", "whole"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options)))
        return
    found = {}
    for variant in ("chunked", "whole"):
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        found[variant] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    chunked, whole = found["chunked"], found["whole"]
    ratios = {
        "time_ratio": round(chunked["seconds"] / whole["seconds"], 3),
        "memory_ratio": round(chunked["peak_mb"] / whole["peak_mb"], 3),
    }
    print(json.dumps({"shape": vars(options), **found, **ratios}, indent=2))


if __name__ == "__main__":
    main()
