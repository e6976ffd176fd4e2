"""An int8 cache against the float one in ONNX Runtime: memory and speed by length of the prompt, and what it costs.

    python benchmarks/kv_int8.py MODEL --text wikitext2_valid.txt [--type int4] [--lengths 2048,8000]
                                 [--out build/kv_int8]

Writes the model's ONNX folder with either cache (once: what is in `--out` is used again), the scales measured on the
text's first 4,096 tokens. Then, side by side:

* KL(float cache ‖ int8 cache) in nats, and how often the likeliest token is the same, of the same weights over texts
  of several lengths from the rest of the text, at every eighth position of each text's second half;
* per length a process for each cache, float and int8 in turns, `--repeat` of them: it opens the folder, warms up,
  reads a made-up prompt and decodes `--new-tokens` greedily. Times are the best, also of all threads together, which
  other work on the machine changes less (`--threads 1`); memory is the largest resident set of the process, also less
  what it held before the long prompt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from clock import Took, timed

CACHES = ("float32", "int8")
CALIBRATION = 4096  # tokens
TEXTS = {64: 16, 256: 8, 1024: 4, 2048: 2}  # tokens of a text → texts that are compared


def measure_cell(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Read and decode once, in this process."""
    from compress.runtime.generator import Request, RequestWork
    from compress.runtime.measure import peak_memory
    from compress.runtime.onnx_engine import read_genai_config
    from compress.runtime.onnx_generator import OnnxGenerator

    depth = read_genai_config(folder)["model"]["decoder"]["num_hidden_layers"]
    length, count = values["length"], values["new_tokens"]
    with OnnxGenerator(folder, (depth,), values["threads"]) as generator:

        def run(prompt: list[int], new: int) -> tuple[Took, Took]:
            """The first token, and the others."""
            tokens = generator.generate(Request(prompt, new + 1, depth), RequestWork())
            return timed(next, tokens)[1], timed(list, tokens)[1]

        run([5 + i % 90 for i in range(16)], 2)
        before = peak_memory()
        first, others = run([(7 * i + 13) % 97 + 3 for i in range(length)], count)
        return {
            "prefill_seconds": first.wall / length,
            "decode_seconds": others.wall / count,
            "prefill_cpu_seconds": first.cpu / length,
            "decode_cpu_seconds": others.cpu / count,
            "peak_memory_bytes": peak_memory(),
            "grown_bytes": peak_memory() - before,
        }


def logprobs(folder: Path, text: Sequence[int], threads: int) -> np.ndarray:
    """(P, V) float64 at every eighth position of the text's second half."""
    from compress.runtime.engine import log_softmax
    from compress.runtime.onnx_engine import PREFILL_CHUNK, OnnxEngine

    found, past = [], None
    with OnnxEngine(folder, threads) as engine:
        for start in range(0, len(text), PREFILL_CHUNK):
            logits, past = engine.logits(text[start : start + PREFILL_CHUNK], past)
            places = range(max(start, len(text) // 2), start + len(logits), 8)
            found += [logits[place - start] for place in places]
    return log_softmax(np.array(found, np.float64))


def compare(folders: dict[str, Path], ids: list[int], threads: int) -> None:
    """Print KL and agreement by length of the text."""
    at = 0
    for length, count in TEXTS.items():
        kl, same = [], []
        for _ in range(count):
            text, at = ids[at : at + length], at + length
            assert len(text) == length, "the text is too short"
            exact, rounded = (logprobs(folders[cache], text, threads) for cache in CACHES)
            kl.append((np.exp(exact) * (exact - rounded)).sum(-1))
            same.append(exact.argmax(-1) == rounded.argmax(-1))
        print(
            f"{length:6d} tokens ({count:2d} texts): KL(float32 cache ‖ int8 cache) {np.mean(kl):.5f} nats, "
            f"worst position {max(each.max() for each in kl):.4f}, same likeliest token {np.mean(same):.1%}",
            flush=True,
        )


def write_folders(model: str, out: Path, kind: str, rows: list[list[int]], threads: int, runs: Path) -> dict[str, Path]:
    """The ONNX folder of each cache, with the same weights; what is there already is used again."""
    from compress.core.stage import Progress
    from compress.export.onnx import build_graph, write_onnx
    from compress.export.onnx_kv import calibrate
    from compress.modeling.load import load_config, resolve
    from compress.modeling.shape import rotated_size

    checkpoint = resolve(model, runs / "sources")
    built = build_graph(checkpoint, out / "built", Progress())
    folders = {cache: out / f"{kind}-{cache}" for cache in CACHES}
    if not folders["int8"].exists():
        turned = rotated_size(load_config(checkpoint))
        write_onnx(checkpoint, folders["int8"], kind, built=built, kv=calibrate(built, rows, turned, threads))
    if not folders["float32"].exists():
        write_onnx(checkpoint, folders["float32"], kind, built=built)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--type", default="int4")
    parser.add_argument("--lengths", default="2048,8000")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("build/kv_int8"))
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # the process of a cell
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure_cell(Path(options.model), json.loads(options.cell))))
        return
    if options.text is None:
        parser.error("--text is needed")
    from compress.modeling.load import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve(options.model, options.runs / "sources"))
    text = options.text.read_text(encoding="utf-8")[:200_000]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [ids[start : start + 1024] for start in range(0, CALIBRATION, 1024)]
    folders = write_folders(options.model, options.out, options.type, rows, options.threads, options.runs)
    compare(folders, ids[CALIBRATION:], options.threads)
    how = {"new_tokens": options.new_tokens, "threads": options.threads}
    for length in map(int, options.lengths.split(",")):
        cells: dict[str, list[dict[str, Any]]] = {cache: [] for cache in CACHES}
        for _ in range(options.repeat):
            for cache in CACHES:
                cells[cache].append(in_own_process(folders[cache], how | {"length": length}))
        for cache in CACHES:
            show(length, cache, cells[cache])


def in_own_process(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder), "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{cell['length']} tokens: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(length: int, cache: str, cells: list[dict[str, Any]]) -> None:
    best = {name: min(cell[name] for cell in cells) for name in cells[0]}
    print(
        f"{length:6d} {cache:8s} peak {best['peak_memory_bytes'] / 1e6:7.0f} MB "
        f"(grown {best['grown_bytes'] / 1e6:6.1f}), "
        f"prefill {1 / best['prefill_seconds']:7.1f} tokens/s, decode {1 / best['decode_seconds']:6.1f} tokens/s; "
        f"of processor time {1 / best['prefill_cpu_seconds']:7.1f} and {1 / best['decode_cpu_seconds']:6.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
