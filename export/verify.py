"""Every exported model is opened in its real runtime and compared with the checkpoint it was made from.

Two checks, because each sees what the other may miss: the weights, read back and dequantized, row by row; and the
next-token distributions of the runtime on a probe text. Past a limit the export fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from ..data.chat import Encoded, encode_text, load_encoded
from ..errors import UserError
from ..modeling.blocks import Decoder
from ..modeling.retaining import RetainingHeads
from ..runtime.bundle import Verification
from ..runtime.engine import Distribution, Engine, Window, distributions, divergence, perplexity
from .config import GgufType
from .tensors import LIMITS

# Limits on the mean KL to the checkpoint. They find graphs that compute something else; damaged weights are found by
# their row errors. A SmolLM2-135M of 24 blocks, not yet recovered, has (without importance matrix) F16 1e-5, Q8_0
# 0.004, Q6_K 0.012, Q4_K_M 0.06, Q4_0 0.32, int4 0.31, int8 0.005, fp32 below 1e-6; worse models have more.
KL_LIMITS = {"F16": 0.001, "Q8_0": 0.02, "Q6_K": 0.05, "Q4_K_M": 0.25, "Q4_0": 0.8}
KL_LIMITS |= {"int4": 0.8, "int8": 0.02, "fp32": 0.0001}
# Least correlation of retaining scores, and in float32 the largest difference as a share of the largest score. Heads
# themselves are not quantized; they read what quantized blocks give.
RETAINING_LIMITS = {"fp32": 0.9999, "int8": 0.95, "int4": 0.5}
RETAINING_ERROR = 1e-3
TOP_K = 256
ROW = 2048  # longest held-out row that is encoded; its beginning is the probe

PROBE = """\
The library on the corner opens at nine. Anna returned three books on Tuesday, paid a fine of 2.40 euros and asked \
whether the new atlas had arrived. It had not: the printer in Leipzig was short of paper, and the shipment would take \
another two weeks. She left her telephone number and walked home along the river, where the ice had begun to break.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

Water boils at a lower temperature on a mountain because the air presses on it less. At sea level the pressure is \
about 101 kilopascals; at 3,000 metres it is near 70, and tea is ready at 90 degrees. Whoever cooks rice there waits \
longer, or uses a pot with a lid that locks.

Question: A train leaves at 14:05 and arrives at 16:50. How long is the journey?
Answer: From 14:05 to 16:05 are two hours, and 45 minutes remain, so the journey takes 2 hours and 45 minutes.
"""


@dataclass(frozen=True)
class Reference:
    """The checkpoint's own distributions on the probe windows."""

    windows: list[Window]
    scores: list[list[Distribution]]  # complete ones
    retaining: tuple[np.ndarray, ...] = ()  # scores (T, G) of the first window per block, where there are heads

    @property
    def flat(self) -> list[Distribution]:
        return [score for window in self.scores for score in window]


def probe_windows(tokenizer: Any, data: Path | None, tokens: int, length: int) -> list[Window]:
    """Windows with `tokens` positions in all: from the data stage's held-out rows, else from a text built in."""
    rows: list[Encoded] = load_encoded(data, tokenizer, "heldout", ROW) if data is not None else []
    rows += encode_text(tokenizer, PROBE, length)
    windows: list[Window] = []
    for row in rows:
        count = min(len(row.input_ids) - 1, length - 1, tokens - sum(len(w.positions) for w in windows))
        if count <= 0:
            break
        windows.append(Window(row.input_ids[: count + 1], range(1, count + 1)))
    return windows


@torch.no_grad()
def torch_reference(model: Any, windows: Sequence[Window], heads: RetainingHeads | None = None) -> Reference:
    """The checkpoint's distributions, and what its retaining heads say; logits are computed for the asked positions
    only."""
    decoder = Decoder(model)
    scores = []
    for window in windows:
        ids = torch.tensor([list(window.ids)], device=model.device)
        hidden = decoder.hidden(input_ids=ids, use_cache=False)[0]
        logits = decoder.head(hidden[[p - 1 for p in window.positions]]).float().cpu().numpy()
        scores.append(distributions(logits, window.ids, window.positions))
    return Reference(list(windows), scores, _retaining(decoder, windows[0], heads) if heads is not None else ())


def _retaining(decoder: Decoder, window: Window, heads: RetainingHeads) -> tuple[np.ndarray, ...]:
    with decoder.projections() as projected:
        decoder.hidden(input_ids=torch.tensor([list(window.ids)], device=decoder.model.device), use_cache=False)
    return tuple(heads.score(block, projected[block].cpu())[0].numpy() for block in range(decoder.num_blocks))


def check_retaining(what: str, kind: str, reference: Reference, found: Sequence[np.ndarray]) -> float:
    """The least correlation, over blocks, of a runtime's retaining scores, (T, G) each, with the checkpoint's.

    `UserError` where it is below the limit for the type, or in float32 where a score differs.
    """
    pairs = list(zip(found, reference.retaining, strict=True))
    least = min(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in pairs)
    off = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    if not least >= RETAINING_LIMITS[kind] or (kind == "fp32" and not off <= RETAINING_ERROR):
        raise UserError(
            f"{what}: its retaining scores differ from the checkpoint's by {off:.3g} of the largest, with a "
            f"correlation of {least:.4f}, where {RETAINING_LIMITS[kind]:g} is the limit for {kind}: the "
            "graph was written wrongly"
        )
    return _rounded(least)


def compare(reference: Reference, scores: list[list[Distribution]]) -> dict[str, float]:
    """Perplexities, mean KL(checkpoint ‖ artifact) in nats and top-1 agreement over all positions."""
    found = [score for window in scores for score in window]
    expected = reference.flat
    return {
        "perplexity": perplexity(found),
        "checkpoint_perplexity": perplexity(expected),
        "kl": float(np.mean([divergence(a, b) for a, b in zip(expected, found, strict=True)])),
        "top1_agreement": float(np.mean([a.top == b.top for a, b in zip(expected, found, strict=True)])),
    }


def check_weights(what: str, errors: Iterator[tuple[str, str, float]]) -> float:
    """The largest row error; `UserError` naming the tensor where one is past its type's limit."""
    worst = 0.0
    for tensor, kind, error in errors:
        if error > LIMITS[kind]:
            raise UserError(
                f"{what}: tensor {tensor} ({kind}) differs from the checkpoint by {error:.3g} of a row's norm, "
                f"where {LIMITS[kind]:g} is the limit: the file is damaged or was written wrongly"
            )
        worst = max(worst, error)
    return worst


def check_runtime(
    what: str, kind: str, engine: Engine, reference: Reference, limits: dict[Any, float], tensor_error: float
) -> Verification:
    """Compare a runtime's distributions with the checkpoint's; `UserError` past the limit for the type."""
    found = compare(reference, engine.score(reference.windows, top_k=TOP_K if kind in get_args(GgufType) else None))
    limit = (KL_LIMITS | limits)[kind]
    if not found["kl"] <= limit:
        raise UserError(
            f"{what}: in {engine.runtime} its predictions are {found['kl']:.4f} nats (mean KL) from the checkpoint's, "
            f"where {limit:g} is the limit for {kind}; perplexity {found['perplexity']:.3f} against "
            f"{found['checkpoint_perplexity']:.3f}. If you accept that, set export.verify.kl.{kind}."
        )
    return Verification(
        runtime=engine.runtime,
        positions=len(reference.flat),
        tensor_error=_rounded(tensor_error),
        **{key: _rounded(value) for key, value in found.items()},
    )


def _rounded(value: float) -> float:
    """Six significant digits: more would differ with a library's thread count."""
    return float(f"{value:.6g}")


def check_tokens(what: str, ids: Sequence[int], expected: Sequence[int]) -> None:
    """`UserError` where the runtime's tokenizer splits the probe text otherwise than the checkpoint's."""
    if list(ids) != list(expected):
        place = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(expected))
        raise UserError(
            f"{what}: llama.cpp tokenizes the probe text otherwise than the checkpoint's tokenizer (first at token "
            f"{place}); its pre-tokenizer is not the right one for this model"
        )
