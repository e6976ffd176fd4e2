"""The curve of recovery: how near a cut model comes to the unpruned one, by the number of tokens that it learns.

    python benchmarks/strength.py MODEL --text FILE... --heldout wikitext2_valid.txt [--tokens 10k,100k,1M,3M]
        [--seeds 1,2] [--tasks arc_easy.jsonl ...] [--drop 3-5,13-15] [--device auto] [--minutes 8]
        [--work build/strength] [--out strength.json]

A call works for at most `--minutes` and ends behind a checkpoint; the same call again goes on, also after a kill. It
exits with 3 while there is more to do, with 0 at the end, with 2 for what the user can put right:

    until python benchmarks/strength.py ...; do [ $? = 3 ] || break; done

FILE is text (.txt, .md, .rst), rows (.jsonl: text, or prompt and response) or builtin:python-docs; documents that share
words with what is measured on are dropped. The cut is that of smollm2_135m_24L.yaml (greedy search with copying in
mind, or `--drop`), healed by `refit` on the same text. A student learns the text by that recipe's objective (LoRA,
shared teacher), its rate, rank, epochs and tokens per step by the budget unless `--per-step` or `--set` say otherwise;
its last checkpoint counts. On a GPU it trains in bfloat16; everything else is float32.

Measured are perplexity and KL on the beginning of the held-out text in windows of 256, the built-in written tasks, and
`--tasks` in full. From four numbers of tokens on, y = a + b·n^−c is fitted, with its error when one is left out. A
model file that is too large for one piece may come in several: --model-part A --model-part B.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from compress.api import UserError, collect_rows, distill, evaluate, export, heal, prune
from compress.cli.progress import ConsoleProgress
from compress.core.files import json_lines, read_json, write_json, write_whole
from compress.core.stage import Context
from compress.data.prose_config import PYTHON_DOCS
from compress.evaluation.config import EvaluateConfig
from compress.evaluation.suite import Suite, TorchPlayer
from compress.modeling.blocks import drop_blocks, dropped_since
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.modeling.types import CausalModel
from compress.pipeline.direct import values_of
from compress.training.budget import tokens_per_step
from curve import laws, short, told
from pieces import Clock, Pause, Watched
from rich.console import Console
from sources import documents_of, joined
from study import Study, measure

WINDOW = 256  # tokens of a training row, and of a window that is measured
CHUNK = 200  # rows of a task that are measured together
BUILTIN = ["builtin:copy", "builtin:addition"]
UNFINISHED = 3
HELD_OUT = 1024  # tokens of other documents, for the curves of a training
GREEDY = {"search": {"kind": "greedy", "copying": 0.5}}


class Strength(Study):
    """The cut, the students and their figures."""

    def __init__(self, options: argparse.Namespace, device: str):
        work = options.work
        work.mkdir(parents=True, exist_ok=True)
        save_every = options.save_every or (100 if device == "cuda" else 5)
        self.clock = Clock(options.minutes, work / "clock.json")
        self.watched = Watched(ConsoleProgress(Console()), self.clock, save_every)
        self.save_every, self.options = save_every, options
        hold(settings(options, device), work / "settings.json")
        super().__init__(options.model or str(joined(options.model_part, work)), work, device, self.watched)
        self.text = self.documents()

    def documents(self) -> Path:
        """The training text as rows, one per document."""
        file = self.out / "text.jsonl"
        if not file.exists():
            texts = [text for name in self.options.text for text in documents_of(name)]
            write_whole(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        return file

    def rows(self, name: str, tokens: int, seed: int) -> Path:
        """Rows with exactly so many tokens to learn, and some of other documents for the curves."""
        folder = self.out / f"rows-{name}"
        if folder.exists():
            return folder
        heldout = min(HELD_OUT, tokens)
        measured = [str(path.resolve()) for path in (self.options.heldout, *self.options.tasks)]
        keys: dict[str, Any] = {"source": "prose", "path": str(self.text.resolve()), "tokens": tokens + heldout}
        keys |= {"heldout": heldout / (tokens + heldout), "length": WINDOW, "decontaminate": {"files": measured}}
        with self.clock.piece("rows"):
            return self.made(folder.name, collect_rows, seed=seed, **keys)

    @property
    def start(self) -> Path:
        """The pruned and healed checkpoint."""
        folder = self.out / "pruned"
        if not folder.exists():
            rows = self.rows("calibration", self.options.calibration, 7)
            with self.clock.piece("pruned"):
                self.prune(folder.name, rows)
        return folder / "model"

    def prune(self, name: str, rows: Path) -> None:
        """Search and heal, or only heal the cut that is asked for."""
        options = self.options
        calibration = {"tokens": options.calibration, "length": WINDOW}
        if not options.drop:
            scoring = min(2048, options.calibration // 8)
            calibration |= {"scoring": scoring, "held_out": scoring}
            keys: dict[str, Any] = {"blocks": options.blocks, "heal": "refit", "calibration": calibration} | GREEDY
            self.made(name, prune, rows=rows, **keys)
            return
        cut = self.out / "cut"
        if not cut.exists():
            model = load_model(self.base)
            drop_blocks(model, options.drop)
            save_checkpoint(model, load_tokenizer(self.base), cut)
        self.made(name, heal, cut, base=self.base, method="refit", rows=rows, calibration=calibration)

    def learn(self, tokens: int, seed: int) -> Path:
        """The folder of a student."""
        per_step = self.options.per_step or tokens_per_step(tokens)
        name = f"{short(tokens)}-{per_step}-seed{seed}"
        if not (self.out / name).exists():
            self.clock.check(name)
        batch = max(1, min(self.options.batch or (8 if self.device == "cuda" else 1), per_step // WINDOW))
        section: dict[str, Any] = {
            "objective": {"kind": "asft", "kl_weight": 1.0},
            "tune": "lora",
            "teacher": "shared",
            "length": WINDOW,
            "batch": batch,
            "accumulate": max(1, per_step // (WINDOW * batch)),
            "save_every": self.save_every,
            "select": "last",  # healing has seen some of the documents that are held out here
        }
        self.watched.training = name
        dtype = "bfloat16" if self.device == "cuda" else "float32"
        rows = self.rows(f"{short(tokens)}-seed{seed}", tokens, seed)
        keys = {"base": self.base, "rows": rows, "dtype": dtype} | section | dict(values_of(self.options.set, "--set"))
        return self.made(name, distill, self.start, seed, **keys)

    def figures(self, role: str, folder: Path) -> dict[str, float]:
        """Perplexity, KL and the score of every task, measured in pieces that are kept."""
        known = self.out / "measured" / f"{role}-all.json"
        if not known.exists():
            bench = self.bench(self.options.heldout, BUILTIN, self.options.measured, self.options.limit)
            if bench.kept(role) is None:
                with self.clock.piece("text"):
                    measure(bench, role, folder)
            found = measure(bench, role, folder)
            model: list[CausalModel] = []  # loaded for the first piece that is not known
            for task in self.options.tasks:
                found[task.stem] = self.task(task, role, folder, model)
            write_json(known, found)
        return read_json(known)

    def task(self, task: Path, role: str, folder: Path, loaded: list[CausalModel]) -> float:
        """The score of all rows of a task."""
        rows = [row for _, row in json_lines(task)]
        right = 0.0
        for start in range(0, len(rows), CHUNK):
            known = self.out / "measured" / f"{role}-{task.stem}-{start}.json"
            if not known.exists():
                with self.clock.piece(task.stem):
                    if not loaded:
                        loaded.append(load_model(folder, device=self.device))
                    part = known.with_suffix(".jsonl")
                    write_whole(part, "".join(json.dumps(row) + "\n" for row in rows[start : start + CHUNK]))
                    context, config = Context(device=self.device, progress=self.progress), {"tasks": [str(part)]}
                    suite = Suite(EvaluateConfig.model_validate(config), context, load_tokenizer(self.base))
                    (outcome,) = suite.run(role, TorchPlayer(loaded[0], suite.tokenizer)).values()
                    write_json(known, {"value": outcome.value, "n": outcome.n})
            found = read_json(known)
            right += found["value"] * found["n"]
        return right / len(rows)

    def rival(self, folder: Path, rows: Path) -> list[dict[str, Any]]:
        """The student in IQ4_XS, and the unpruned model at the same bytes, in llama.cpp."""
        known = self.out / "measured" / "rivals.json"
        if not known.exists():
            with self.clock.piece("rivals"):
                shutil.rmtree(self.out / "bundle", ignore_errors=True)
                export(
                    folder, self.out / "bundle", gguf=["IQ4_XS"], rows=rows, runs=self.out, on_progress=self.progress
                )
                entries = evaluate(
                    self.out / "bundle",
                    base=self.base,
                    text=self.options.heldout,
                    rows=rows,
                    tasks=[*BUILTIN, *self.options.tasks],
                    tokens=self.options.measured,
                    window=WINDOW,
                    speed=None,
                    runs=self.out,
                    on_progress=self.progress,
                )
            names = ("role", "bytes", "perplexity", "kl_to_base", "tasks")
            write_json(known, {"rows": [{name: entry.model_dump()[name] for name in names} for entry in entries]})
        return read_json(known)["rows"]

    def run(self, result: dict[str, Any]) -> None:
        """Fill in the result, point by point; `Pause` when the time is over."""
        result["points"] = points = []
        options, bound = self.options, self.options.repeat_until
        arms = [(n, seed) for n in options.tokens for seed in (options.seeds if n <= bound else options.seeds[:1])]
        for tokens, seed in arms:  # a text that is too short is told before hours of work
            self.rows(f"{short(tokens)}-seed{seed}", tokens, seed)
        result["base"] = self.figures("base", self.base)
        result["start"] = self.figures("start", self.start)
        result["dropped"] = dropped(self.base, self.start)
        folder = self.start
        for tokens, seed in arms:
            folder = self.learn(tokens, seed)
            wall, cpu = self.clock.spent.get(folder.name, [0.0, 0.0])
            point = {"tokens": tokens, "seed": seed, **trained(folder), "seconds": wall, "cpu_seconds": cpu}
            points.append(point | self.figures(folder.name, folder / "model"))
            result["laws"] = laws(points, result["base"])
        if options.rival and arms:
            tokens, seed = arms[-1]
            result["rivals"] = self.rival(folder / "model", self.rows(f"{short(tokens)}-seed{seed}", tokens, seed))
        result["complete"] = True


def settings(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """What all points of a folder share."""
    files = {"text": options.text, "model": [options.model] if options.model else options.model_part}
    same = "measured limit blocks drop calibration batch save_every set".split()
    return (
        {name: [Path(file).name for file in found] for name, found in files.items()}
        | {"heldout": options.heldout.name, "tasks": [task.name for task in options.tasks], "device": device}
        | {name: getattr(options, name) for name in same}
    )


def hold(now: dict[str, Any], file: Path) -> None:
    """Keep the settings of a folder; `UserError` if it was begun with others."""
    if not file.exists():
        write_json(file, now)
    before = read_json(file)
    other = [name for name in now if now[name] != before.get(name)]
    if other:
        changes = ", ".join(f"{name}: {before.get(name)} → {now[name]}" for name in other)
        raise UserError(f"{file.parent} was begun with other settings ({changes}); name another folder with --work")


def dropped(base: Path, start: Path) -> list[int]:
    """The blocks that a checkpoint lacks."""
    return list(dropped_since(load_config(start), load_config(base)))


def trained(folder: Path) -> dict[str, Any]:
    """How a student was trained."""
    figures = read_json(folder / "manifest.json")["metrics"]
    pace = {name: figures["pace"][name] for name in ("tokens_per_step", "epochs", "lr", "rank")}
    return {"learned": figures["target_tokens"], "steps": figures["steps"], **pace}


def number(text: str) -> int:
    """A number of tokens: 500, 10k, 3M."""
    unit = {"k": 1e3, "m": 1e6}.get(text[-1:].lower())
    with suppress(ValueError):
        value = float(text[:-1]) * unit if unit else float(text)
        if value >= 1 and value == int(value):
            return int(value)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens such as 10k or 3M")


def numbers(text: str) -> list[int]:
    return sorted({number(part) for part in text.split(",")})


def blocks(text: str) -> list[int]:
    """3-5,13 → 3, 4, 5, 13."""
    spans = [part.partition("-") for part in text.split(",")]
    return [block for first, _, last in spans for block in range(int(first), int(last or first) + 1)]


def arguments() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("model", nargs="?")
    parser.add_argument(
        "--model-part", type=Path, action="append", default=[], help="a part of the model file, in order"
    )
    parser.add_argument("--text", nargs="+", required=True, help="what is learned")
    parser.add_argument("--heldout", type=Path, required=True, help="text that perplexity and KL are measured on")
    parser.add_argument("--tokens", type=numbers, default=numbers("10k,100k,1M,3M"), help="tokens to learn")
    parser.add_argument("--seeds", type=numbers, default=[1, 2], help="of text, adapters and order")
    parser.add_argument("--repeat-until", type=number, default=100_000, help="above it only the first seed")
    parser.add_argument("--tasks", type=Path, nargs="*", default=[], help="multiple-choice rows (JSONL), all of them")
    parser.add_argument("--limit", type=int, default=100, help="rows of each built-in task")
    parser.add_argument("--measured", type=int, default=4096, help="tokens of the held-out text")
    parser.add_argument("--blocks", type=int, default=6, help="to remove, found by the search")
    parser.add_argument("--drop", type=blocks, default=[], help="remove these instead, such as 3-5,13-15")
    parser.add_argument("--calibration", type=int, default=16384, help="tokens to search and heal on")
    parser.add_argument("--per-step", type=int, help="tokens per step instead of the budget's")
    parser.add_argument("--batch", type=int, help="rows per forward pass; 8 on a GPU, else 1")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the distill section")
    parser.add_argument(
        "--rival", action="store_true", help="also the last student in IQ4_XS beside the unpruned model"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--minutes", type=float, default=8, help="that one call may work")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints; 100 on a GPU, else 5")
    parser.add_argument("--work", type=Path, default=Path("build/strength"))
    parser.add_argument("--out", type=Path, default=Path("strength.json"))
    return parser


def checked(options: argparse.Namespace) -> None:
    """What is wrong is said before any work."""
    if bool(options.model) == bool(options.model_part):
        raise UserError("name a model, or its parts with --model-part")
    if options.per_step and options.per_step % WINDOW:
        raise UserError(f"--per-step {options.per_step}: give a multiple of {WINDOW}")
    files = [Path(name) for name in options.text if name != PYTHON_DOCS]
    for file in [*files, options.heldout, *options.tasks, *options.model_part]:
        if not file.is_file():
            raise UserError(f"{file} is no file")
    if options.heldout.resolve() in [file.resolve() for file in files]:
        raise UserError(f"--text: {options.heldout} is what is measured on; learn from other text")


def main(given: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(given)
    result: dict[str, Any] = {"complete": False}
    try:
        checked(options)
        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        result |= {"torch": torch.__version__, "settings": settings(options, device)}
        Strength(options, device).run(result)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Pause:
        print("the time of this call is over; the same call goes on", flush=True)
    write_json(options.out, result)
    print(told(result), flush=True)
    return 0 if result["complete"] else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
