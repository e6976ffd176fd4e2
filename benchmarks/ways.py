"""The tables of docs/research/recovery.md on what a pruned model learns from, tokens per step, and how it is trained.

    python benchmarks/ways.py --run runs/smollm2-135m-24L --text wikitext2_valid.txt [--tokens 7168] [--seeds 2]
        [--stories gsm8k_train.jsonl] [--arms self-256 prose-256 half-256+kd] [--out build/ways]

From the data and prune stages of a run of the default recipe: its conversations, its healed cut. Every arm learns from
as many packed tokens, so in about the same processor time (one thread; printed): from the conversations, from real text
(Python's language reference; --stories: the questions of a JSONL file), or from conversations and text (half) or drills
(drilled), half of the tokens to learn each, in steps of 256 or 1,024 tokens, by the recipe's objective and adapters or
by one of the other ways (+kd, +own-jsd, +full3e-5, ...; the student writes half of the rows with +own...).
The last checkpoint is measured. What is finished is kept in OUT; the table goes to OUT/table.md.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from compress.api import collect_rows, distill
from compress.core.files import read_json, write_json
from compress.core.stage import Context
from compress.data.chat import load_encoded
from compress.data.drills import DrillRows
from compress.data.drills_config import Drills
from compress.data.mixing import goals, interleaved
from compress.data.packing import pack
from compress.data.prose import ProseSource, take
from compress.data.prose_config import PYTHON_DOCS, Prose
from compress.data.rows import read_rows, write_rows
from compress.modeling.load import load_tokenizer
from study import TASKS, Study, Table, comparison, measure

LENGTH = 256
STEPS = {256: 1, 1024: 4}  # tokens per step → packed sequences
ARMS = ("self-1024", "self-256", "prose-1024", "prose-256", "half-256", "half-1024")
OBJECTIVE = {"kind": "asft", "kl_weight": 1.0}
# Keys of the distill section in which an arm differs, by what stands behind its name's plus sign.
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "kd": {"objective": "kd"},
    "all": {"objective": "kd", "learn": "all"},
    "jsd": {"objective": {"kind": "kd", "divergence": "jsd"}},
    "reverse": {"objective": {"kind": "kd", "divergence": "reverse"}},
    "own": {"objective": "kd", "on_policy": {}},
    "own-jsd": {"objective": {"kind": "kd", "divergence": "jsd"}, "on_policy": {}},
    "own-reverse": {"objective": {"kind": "kd", "divergence": "reverse"}, "on_policy": {}},
    "rank4": {"objective": "kd", "tune": {"kind": "lora", "rank": 4}},
    "rank64": {"objective": "kd", "tune": {"kind": "lora", "rank": 64}},
    "rank64-rs": {"objective": "kd", "tune": {"kind": "lora", "rank": 64, "alpha": 64.0}},  # rsLoRA, 2312.03732
    "lr2e-3": {"objective": "kd", "lr": 2e-3},
    "lr5e-4": {"objective": "kd", "lr": 5e-4},
    "full3e-5": {"objective": "kd", "tune": "full", "teacher": "copy", "lr": 3e-5},
    "full1e-4": {"objective": "kd", "tune": "full", "teacher": "copy", "lr": 1e-4},
}


class RealText(Study):
    """What every arm starts from, and the arms."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options.model, options.out)
        self.options, self.tokenizer = options, load_tokenizer(self.base)
        (data,), (pruned,) = (sorted(options.run.glob(f"{stage}-*")) for stage in ("data", "prune"))
        self.start = pruned / "model"
        prose: dict[str, Any] = {"source": "prose", "tokens": 4 * options.tokens, "length": LENGTH, "heldout": 0.05}
        self.rows = {"self": data, "prose": self.made("prose", collect_rows, **prose, path=PYTHON_DOCS)}
        self.rows |= {"half": self.half(data), "drilled": self.drilled(data)}
        if options.stories:
            own: dict[str, Any] = prose | {"path": str(options.stories.resolve()), "text": "prompt"}
            self.rows["stories"] = self.made("stories", collect_rows, **own)

    def half(self, data: Path) -> Path:
        """The run's conversations with as many tokens of real text, as `data.prose: {weight: 1}` has them."""
        folder = self.out / "half"
        if not folder.exists():
            own = read_rows(data)
            source = ProseSource(Prose(path=PYTHON_DOCS), Context(seed=7))
            real = take(source, *goals(own, 1.0), self.tokenizer, LENGTH, self.out / "cache")
            folder.mkdir()
            write_rows(folder, interleaved(own, real.rows))
        return folder

    def drilled(self, data: Path) -> Path:
        """The run's conversations with as many tokens of drills, as `data.drills: {weight: 1}` has them."""
        folder = self.out / "drilled"
        if not folder.exists():
            own = read_rows(data)
            drills = DrillRows(Drills(), self.tokenizer, LENGTH, 7).take(*goals(own, 1.0))
            folder.mkdir()
            write_rows(folder, interleaved(own, drills))
        return folder

    def student(self, arm: str, seed: int) -> tuple[Path, dict[str, float]]:
        """The checkpoint of an arm, and processor seconds, tokens to learn and steps."""
        plain, _, way = arm.partition("+")
        rows, _, per_step = plain.partition("-")
        name, accumulate = f"{arm}-{seed}", STEPS[int(per_step)]
        encoded = load_encoded(self.rows[rows], self.tokenizer, "train", LENGTH)
        batches = pack(encoded, LENGTH, 1, 0, grouped=True)
        each = sum(batch.tokens for batch in batches) / len(batches) * accumulate
        section: dict[str, Any] = {
            "objective": OBJECTIVE,
            "tune": {"kind": "lora", "rank": 16},
            "teacher": "shared",
            "lr": 1e-3,
            "length": LENGTH,
            "accumulate": accumulate,
            "max_steps": round(self.options.tokens / each),
            "eval_every": 10**6,
            "select": "last",
        } | WAYS[way]
        begun, file = time.process_time(), self.out / f"{name}.json"
        folder = self.made(name, distill, self.start, seed, base=self.base, rows=self.rows[rows], **section)
        if not file.exists():
            figures = read_json(folder / "manifest.json")["metrics"]
            found = {"CPU s": time.process_time() - begun, "learned": figures["target_tokens"]}
            write_json(file, found | {"steps": figures["steps"]})
        return folder / "model", read_json(file)


def main() -> None:
    parser = comparison(__doc__, "build/ways")
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of smollm2_135m_24L")
    parser.add_argument("--stories", type=Path, help="JSONL with a column `prompt`, a second kind of real text")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="rows-tokens per step, +way")
    parser.add_argument("--tokens", type=int, default=7168, help="packed tokens that every arm learns from")
    parser.add_argument("--limit", type=int, default=64, help="rows of each task")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    study = RealText(options)
    bench = study.bench(options.text, TASKS, options.measured, options.limit)
    table = Table(study.out / "table.md")
    table.add("the unpruned model", measure(bench, "base", study.base))
    table.add("healed", measure(bench, "h", study.start))
    for seed in range(1, options.seeds + 1):
        for arm in options.arms:
            folder, cost = study.student(arm, seed)
            table.add(f"{arm}, seed {seed}", measure(bench, f"{arm}-{seed}", folder) | cost)
    print(table)


if __name__ == "__main__":
    main()
