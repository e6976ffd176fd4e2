"""How others scan a model's layers, for `scan.py` to compare with: written from what their code does, not copied.

Each takes batches of equally long rows without padding (`Batch`) and gives its numbers by name: metric, tokens, and
the block boundaries between which it was measured. What they do besides the scan is theirs too: both call the whole
model, so that logits of every token are computed and a KV cache is filled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from compress.data.packing import Batch
from torch import Tensor

OPTIPFAIR = "0.4.2"  # the version this was written for


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """What a tokenizer would give; every token is real."""
    return {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}


@torch.no_grad()
def pruneme(model: Any, batches: Sequence[Batch], lengths: Sequence[int]) -> dict[str, float]:
    """Angular distance at each row's last token, as arcee-ai/PruneMe finds it (for arXiv 2403.17887).

    All hidden states of a batch are asked for and stay until the next batch's are there. The embedding's output is
    left out, and the last state is what `transformers` reports as such, behind the final norm: a window that ends
    there is measured against another thing than the residual stream, hence its own name. The authors' script takes
    one window length; each further one is another run of it, spared here.
    """
    blocks = model.config.num_hidden_layers
    found: dict[tuple[int, int], list[float]] = {
        (start, start + length): [] for length in lengths for start in range(blocks - length)
    }
    for batch in batches:
        inputs = inputs_of(batch)
        outputs = model(**inputs, output_hidden_states=True)
        states = [_at_last_token(state, inputs["attention_mask"]) for state in outputs.hidden_states][1:]
        for (first, last), values in found.items():
            values.append(_angle(states[first], states[last]).mean().item())
    names = [*map(str, range(1, blocks)), "norm"]
    return {
        f"angular last {names[first]} {names[last]}": math.fsum(values) / len(values)
        for (first, last), values in found.items()
    }


def _at_last_token(state: Tensor, mask: Tensor) -> Tensor:
    """(B, T, H) → (B, H), row by row, as the original looks for the last token anew in every layer."""
    rows = [hidden[int(real.nonzero().max())] for hidden, real in zip(state, mask, strict=True)]
    return torch.stack(rows)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """arccos of the cosine over π, by row."""
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    return (a * b).sum(-1).clamp(-1, 1).arccos() / math.pi


def optipfair(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Block influence over all tokens by the `optipfair` package's own function; any iterable is a loader to it."""
    from optipfair.pruning.depth import analyze_layer_importance  # type: ignore[import-not-found]

    scores = analyze_layer_importance(model, [inputs_of(batch) for batch in batches], show_progress=False)
    return {f"influence all {block} {block + 1}": float(value) for block, value in scores.items()}
