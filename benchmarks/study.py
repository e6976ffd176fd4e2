"""What the benchmarks share that train: stages run one by one, each once, and the same measurements of every model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.cli.progress import ConsoleProgress
from compress.core.stage import WORK, Context, Inputs
from compress.evaluation.config import EvaluateConfig
from compress.evaluation.stage import Bench, Subject
from compress.modeling.load import load_config, load_model, resolve
from compress.prune import stage as prune
from compress.prune.config import PruneConfig
from rich.console import Console


class Study:
    """The folders of one study below `out`, each made once."""

    def __init__(self, model: str, out: Path):
        self.out = out
        self.out.mkdir(parents=True, exist_ok=True)
        self.progress = ConsoleProgress(Console())
        self.base = resolve(model, self.out / "sources", progress=self.progress)

    def made(self, name: str, stage: Any, config: Any, seed: int = 7, **inputs: Any) -> Path:
        """A stage's folder; one that was stopped goes on."""
        folder = self.out / name
        if not (folder / "done").exists():
            (folder / WORK).mkdir(parents=True, exist_ok=True)
            model = inputs.pop("model", self.base)
            context = Context(seed=seed, progress=self.progress)
            figures = stage.run(config, Inputs(self.base, model, **inputs), folder, context)
            shutil.rmtree(folder / WORK)
            (folder / "done").write_text(json.dumps(figures))
        return folder

    def pruned(self, data: Path, drop: int, tokens: int, copying: float = 0) -> Path:
        """The checkpoint without the best angular window of `drop` blocks, healed by `refit`; with `copying` without
        those that a greedy search finds, which tries cuts on that share of rows read twice."""
        section: dict[str, Any] = {"blocks": drop, "heal": "refit", "calibration": {"tokens": tokens, "length": 256}}
        if copying:
            section["search"] = {"kind": "greedy", "copying": copying}
            section["calibration"] |= {"scoring": 2048, "held_out": 2048}
        return self.made("pruned", prune, PruneConfig.model_validate(section), stages={"data": data}) / "model"

    def bench(self, text: Path, tasks: Sequence[str], tokens: int, limit: int) -> Bench:
        """Perplexity of `tokens` of a text in windows of 256, and `limit` rows of each task."""
        config = EvaluateConfig(
            text=str(text.resolve()), window=256, tokens=tokens, tasks=list(tasks), limit=limit, speed=None
        )
        work = self.out / "measured"
        work.mkdir(exist_ok=True)
        return Bench(config, Context(progress=self.progress), self.base, None, work)


def measure(bench: Bench, role: str, folder: Path) -> dict[str, float]:
    """Perplexity, KL to the base and the score of every task."""
    blocks = load_config(folder).num_hidden_layers
    found = bench.measured(Subject(role, lambda: load_model(folder), folder, blocks))
    scores = {name: task.value for name, task in found.tasks.items()}
    return {"perplexity": found.perplexity, "KL to base": found.kl_to_base, **scores}


def written(name: str, value: float) -> str:
    """A figure of `measure` as a table has it."""
    return f"{value:.3g}" if name in ("perplexity", "KL to base") else f"{value:.1%}"
