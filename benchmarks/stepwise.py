"""Prune, recover, prune again, against one cut: is it better to take blocks out two at a time?

    python benchmarks/stepwise.py --rows runs/x/data-0a1b2c --text wikitext2_valid.txt [--blocks 6] [--parts 1 3]
        [--seeds 1] [--out build/stepwise]

With `--parts 3` a third of the blocks goes, then every third row is learned with the unpruned model as the teacher, and
so on; with `--parts 1` all blocks go at once, and all rows are learned, once. All else is equal. The last checkpoint is
measured; processor time (one thread) includes the searches. What is finished is kept in OUT; the table goes to
OUT/table.md.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from compress.api import distill, prune
from compress.core.files import read_json, write_json
from compress.data.rows import read_rows, write_rows
from study import TASKS, Study, Table, comparison, measure

SPLITS = ("train", "heldout")
CUT: dict[str, Any] = {
    "search": {"kind": "greedy", "copying": 0.5},
    "heal": "refit",
    "calibration": {"tokens": 8192, "length": 256, "scoring": 2048, "held_out": 2048},
}
RECOVERY: dict[str, Any] = {
    "objective": "kd",
    "tune": {"kind": "lora", "rank": 16},
    "teacher": "copy",
    "lr": 1e-3,
    "length": 256,
    "accumulate": 1,
    "epochs": 1,
    "eval_every": 10**6,
    "select": "last",
}


class Stepwise(Study):
    """Students of one or several cuts."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options.model, options.out)
        self.options = options

    def student(self, parts: int, seed: int) -> tuple[Path, dict[str, float]]:
        """The recovered checkpoint after so many cuts, and its cost."""
        options, model, spent = self.options, self.base, 0.0
        for part in range(parts):
            name = f"{parts}-{seed}-{part}"
            begun, file = time.process_time(), self.out / f"{name}.json"
            cut = self.made(f"{name}-cut", prune, model, rows=options.rows, blocks=options.blocks // parts, **CUT)
            rows = self.rows(part, parts)
            model = self.made(name, distill, cut / "model", seed, base=self.base, rows=rows, **RECOVERY)
            if not file.exists():
                write_json(file, {"CPU s": time.process_time() - begun})
            spent, model = spent + read_json(file)["CPU s"], model / "model"
        return model, {"CPU s": spent}

    def rows(self, part: int, parts: int) -> Path:
        """Every so many-th training row, and all that are held out."""
        folder = self.out / f"rows-{part}-of-{parts}"
        if not folder.exists():
            kinds = {split: [r for r in read_rows(self.options.rows) if r.split == split] for split in SPLITS}
            folder.mkdir()
            write_rows(folder, kinds["train"][part::parts] + kinds["heldout"])
        return folder


def main() -> None:
    parser = comparison(__doc__, "build/stepwise")
    parser.add_argument("--rows", type=Path, required=True, help="a data stage's folder")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--limit", type=int, default=64, help="rows of each task")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    study = Stepwise(options)
    bench = study.bench(options.text, TASKS, options.measured, options.limit)
    table = Table(study.out / "table.md")
    table.add("the unpruned model", measure(bench, "base", study.base))
    for seed in range(1, options.seeds + 1):
        for parts in options.parts:
            folder, cost = study.student(parts, seed)
            figures = measure(bench, f"{parts}-{seed}", folder) | cost
            table.add(f"{options.blocks} blocks in {parts}, seed {seed}", figures)
    print(table)


if __name__ == "__main__":
    main()
