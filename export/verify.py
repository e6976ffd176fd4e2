"""Every exported model is opened in its real runtime and compared with the checkpoint it was made from.

Three checks, because each finds what the others may miss. The weights are read back and dequantized, row by row. The
graph is run once at high precision (F16 in llama.cpp, float32 in ONNX Runtime), where a wrong graph cannot be mistaken
for rounding; with scaled rotary positions, also beyond the model's original context. And each type's next-token
distributions are compared, which by then differ only by rounding. Past a limit the export fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.errors import UserError
from ..data.chat import Encoded, encode_text, load_encoded
from ..data.rows import Split
from ..modeling.blocks import Decoder
from ..modeling.retaining import RetainingHeads
from ..modeling.shape import by_length, original_context, scaled
from ..modeling.types import CausalModel, ModelConfig, ModelTokenizer
from ..records.bundle import Verification
from ..runtime.artifact_types import ARTIFACT_TYPES, ONNX_TYPES
from ..runtime.engine import Distribution, Engine, ScoringWindow, distributions, divergence, perplexity
from ..runtime.llamacpp_engine import LlamaCppEngine
from ..runtime.onnx_engine import OnnxEngine
from .cost import LONG_STEP, LONG_TOKENS, ROW
from .tensors import LIMITS

# Limits on the mean KL to the checkpoint at high precision, where only a wrong graph is far from it: a SmolLM2-135M has
# F16 1e-5 and fp32 below 1e-6. No recipe can change them.
GRAPH_LIMITS = {"F16": 0.001, "fp32": 0.0001}
# Limits on the mean KL to the checkpoint by type, which a recipe can change.
KL_LIMITS = {name: type.kl for name, type in ARTIFACT_TYPES.items()}
# In float32 the largest difference of a retaining score, as a share of the largest.
RETAINING_ERROR = 1e-3
EXACT = ("F32", "F16")  # tensor types without scales
TOP_K = 256

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


FAR_TOKENS = 24  # tokens beyond the original context that are tried
FAR_COST = 1.5e13  # parameters × tokens up to which a text that long is run: some minutes on two cores


@dataclass(frozen=True)
class Gapped:
    """A text whose second half is at positions far beyond its first: for runtimes with position inputs."""

    window: ScoringWindow
    position_ids: list[int]
    scores: list[Distribution]


@dataclass(frozen=True)
class Reference:
    """The checkpoint's own distributions on the probe windows."""

    windows: list[ScoringWindow]
    scores: list[list[Distribution]]  # complete ones
    retaining: tuple[np.ndarray, ...] = ()  # scores (T, G) of the first window per block, where there are heads
    far: Reference | None = None  # one text that is longer than the original context, where positions are scaled
    gapped: Gapped | None = None
    long: Reference | None = None  # one long text, where the cache is rounded

    @property
    def flat(self) -> list[Distribution]:
        return [score for window in self.scores for score in window]


def probe_windows(
    tokenizer: ModelTokenizer, data: Path | None, tokens: int, length: int, split: Split = "heldout"
) -> list[ScoringWindow]:
    """Windows with `tokens` positions in total: from rows of the data stage, else from a built-in text."""
    rows: list[Encoded] = load_encoded(data, tokenizer, split, ROW) if data is not None else []
    rows += encode_text(tokenizer, PROBE, length)
    windows: list[ScoringWindow] = []
    for row in rows:
        count = min(len(row.input_ids) - 1, length - 1, tokens - sum(len(w.positions) for w in windows))
        if count <= 0:
            break
        windows.append(ScoringWindow(row.input_ids[: count + 1], range(1, count + 1)))
    return windows


def far_windows(tokenizer: ModelTokenizer, config: ModelConfig, context: int, parameters: int) -> list[ScoringWindow]:
    """A text that extends `FAR_TOKENS` beyond the original context, at most to `context`, to be compared at its end;
    none if rotary positions are not scaled, or running it would take too long."""
    if not scaled(config):
        return []
    original = original_context(config)
    length = min(original + FAR_TOKENS, context)
    if length <= original or parameters * length > FAR_COST:
        return []
    return [ScoringWindow(_repeated(tokenizer, length), range(max(1, length - FAR_TOKENS), length))]


def _repeated(tokenizer: ModelTokenizer, length: int) -> list[int]:
    ids = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    return (ids * (length // len(ids) + 1))[:length]


@torch.no_grad()
def gapped_reference(model: CausalModel, tokenizer: ModelTokenizer, context: int) -> Gapped | None:
    """The checkpoint's distributions when one half of a text is far beyond the other; None if rotary positions are not
    scaled, or depend on the length of the text (longrope)."""
    decoder = Decoder(model)
    if not scaled(decoder.config) or by_length(decoder.config) or context < 4 * FAR_TOKENS:
        return None
    original, ids = original_context(decoder.config), _repeated(tokenizer, 2 * FAR_TOKENS)
    start = max(min(original, context - FAR_TOKENS), FAR_TOKENS)
    positions = [*range(FAR_TOKENS), *range(start, start + FAR_TOKENS)]
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    # With a mask of its own the jump in the positions is not taken for the beginning of another text.
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    device = model.device
    hidden = decoder.hidden(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)[0]
    window = ScoringWindow.of(ids)
    logits = decoder.head(hidden[[p - 1 for p in window.positions]]).float().cpu().numpy()
    return Gapped(window, positions, distributions(logits, ids, window.positions))


def long_window(tokenizer: ModelTokenizer, data: Path | None, context: int) -> ScoringWindow:
    """A text of up to `LONG_TOKENS` tokens, compared at every `LONG_STEP`-th of them: held-out rows one after the
    other, else a built-in text again and again."""
    rows = load_encoded(data, tokenizer, "heldout", ROW) if data is not None else []
    ids = [token for row in rows for token in row.input_ids]
    length = min(LONG_TOKENS, context - 1)
    if len(ids) < length:
        ids += _repeated(tokenizer, length - len(ids))
    return ScoringWindow(ids[:length], range(min(LONG_STEP, length - 1), length, LONG_STEP))


@torch.no_grad()
def torch_reference(
    model: CausalModel, windows: Sequence[ScoringWindow], heads: RetainingHeads | None = None
) -> Reference:
    """The checkpoint's distributions and retaining scores; logits are computed only for the requested positions."""
    decoder = Decoder(model)
    scores = []
    for window in windows:
        ids = torch.tensor([list(window.ids)], device=model.device)
        hidden = decoder.hidden(input_ids=ids, use_cache=False)[0]
        logits = decoder.head(hidden[[p - 1 for p in window.positions]]).float().cpu().numpy()
        scores.append(distributions(logits, window.ids, window.positions))
    return Reference(list(windows), scores, _retaining(decoder, windows[0], heads) if heads is not None else ())


def _retaining(decoder: Decoder, window: ScoringWindow, heads: RetainingHeads) -> tuple[np.ndarray, ...]:
    with decoder.projections() as projected:
        decoder.hidden(input_ids=torch.tensor([list(window.ids)], device=decoder.model.device), use_cache=False)
    return tuple(heads.score(block, projected[block].cpu())[0].numpy() for block in range(decoder.num_blocks))


def check_retaining(what: str, kind: str, reference: Reference, found: Sequence[np.ndarray]) -> float:
    """The least correlation, over blocks, of a runtime's retaining scores, (T, G) each, with the checkpoint's.

    `UserError` if it is below the limit for the type, or in float32 if a score differs.
    """
    pairs = list(zip(found, reference.retaining, strict=True))
    least = min(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in pairs)
    off = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    limit = ONNX_TYPES[kind].retaining or 0.0
    if not least >= limit or (kind == "fp32" and not off <= RETAINING_ERROR):
        raise UserError(
            f"{what}: its retaining scores differ from the checkpoint's by {off:.3g} of the largest score and "
            f"correlate with them by {least:.4f} (at least {limit:g} required for {kind}): the graph "
            "was written wrongly"
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


def check_weights(what: str, errors: Iterator[tuple[str, str, float]], moved: float = 0.0) -> float:
    """The largest row error; `UserError` naming the tensor if one is past its type's limit.

    `moved` is what training its scales has changed of a quantized row at most, as a share of its norm. It comes on top
    of the limit, which is for rounding alone.
    """
    worst = 0.0
    for tensor, kind, error in errors:
        limit = LIMITS[kind] + (moved * (1 + LIMITS[kind]) if kind not in EXACT else 0.0)
        if not error <= limit:
            raise UserError(
                f"{what}: tensor {tensor} ({kind}) differs from the checkpoint by {error:.3g} of a row's norm "
                f"(limit {limit:g}): the file is damaged or was written wrongly"
            )
        worst = max(worst, error)
    return worst


def kl_limit(kind: str, like: str, limits: Mapping[Any, float]) -> float:
    """The limit on the mean KL of a type, which a recipe may have set; of a size that of the plain type it is like."""
    return limits.get(kind, KL_LIMITS[like])


def check_runtime(
    what: str, kind: str, engine: Engine, reference: Reference, limit: float, tensor_error: float
) -> Verification:
    """Compare a runtime's distributions with the checkpoint's; `UserError` past the limit on the mean KL."""
    whole = not isinstance(engine, LlamaCppEngine)
    found = compare(reference, engine.score(reference.windows, top_k=None if whole else TOP_K))
    if not found["kl"] <= limit:
        raise UserError(
            f"{what}: quantized to {kind}, its predictions in {engine.runtime} are {found['kl']:.4f} nats (mean KL) "
            f"from the checkpoint's (limit {limit:g}); perplexity {found['perplexity']:.3f} against "
            f"{found['checkpoint_perplexity']:.3f}. Use a type with more bits, or add `data:` for an importance matrix"
        )
    return Verification(
        runtime=engine.runtime,
        positions=len(reference.flat),
        tensor_error=_rounded(tensor_error),
        **{key: _rounded(value) for key, value in found.items()},
    )


def check_graph(form: str, kind: str, engine: Engine, reference: Reference) -> float:
    """The mean KL to the checkpoint of a graph at high precision; `UserError` if it exceeds what rounding explains.

    The reference's windows are those of one text length: the probe, or a text beyond the original context.
    """
    found = compare(reference, engine.score(reference.windows, top_k=TOP_K if form == "gguf" else None))["kl"]
    _graph_within(form, kind, engine, found, "")
    return _rounded(found)


def check_cache(what: str, engine: OnnxEngine, long: Reference, limit: float) -> float:
    """The mean KL to the checkpoint of a float32 graph with an int8 cache on a long text; `UserError` past the limit.

    The text is read in passes, each over the rounded keys and values of those before.
    """
    found = compare(long, engine.score(long.windows))["kl"]
    if not found <= limit:
        raise UserError(
            f"{what}: with keys and values in int8 its predictions are {found:.4f} nats (mean KL) from the "
            f"checkpoint's over {len(long.windows[0].ids)} tokens (limit {limit:g}). Export with kv: float32, or raise "
            "export.verify.kv"
        )
    return _rounded(found)


def coarser(kind: str) -> str:
    """The type whose limit on retaining scores holds where an int8 cache disturbs them, too."""
    return min(kind, "int8", key=lambda name: ONNX_TYPES[name].retaining or 0.0)


def check_gapped(kind: str, engine: OnnxEngine, gapped: Gapped) -> float:
    """As `check_graph`, for an ONNX graph and a text whose second half is far beyond its first."""
    window, half = gapped.window, FAR_TOKENS
    # A first reading counts positions itself; given ones are for what comes behind it.
    first, past = engine.logits(window.ids[:half])
    second, _ = engine.logits(window.ids[half:], past, gapped.position_ids[half:])
    logits = np.concatenate([first, second])[[p - 1 for p in window.positions]]
    return _compared(kind, engine, gapped.scores, logits, window, f" at positions up to {gapped.position_ids[-1]}")


def check_in_one(kind: str, engine: OnnxEngine, far: Reference) -> float:
    """As `check_graph`, for an ONNX graph whose rotary frequencies depend on the length read (longrope): the text is
    read at once, since cached keys cannot be updated."""
    (window,), (expected,) = far.windows, far.scores
    logits, _ = engine.logits(window.ids[:-1])
    return _compared(kind, engine, expected, logits[[p - 1 for p in window.positions]], window, "")


def _compared(
    kind: str, engine: Engine, expected: Sequence[Distribution], logits: np.ndarray, window: ScoringWindow, where: str
) -> float:
    scores = distributions(logits, window.ids, window.positions)
    found = float(np.mean([divergence(a, b) for a, b in zip(expected, scores, strict=True)]))
    _graph_within("onnx", kind, engine, found, where)
    return _rounded(found)


def _graph_within(form: str, kind: str, engine: Engine, found: float, where: str) -> None:
    if not found <= GRAPH_LIMITS[kind]:
        raise UserError(
            f"{form}: {engine.runtime} does not compute the checkpoint's model{where}: at {kind} its predictions are "
            f"{found:.4f} nats (mean KL) away, more than rounding explains (limit {GRAPH_LIMITS[kind]:g}). A setting "
            "in config.json is not implemented by the runtime for this family; this format was not exported"
        )


def _rounded(value: float) -> float:
    """Six significant digits: more would differ with a library's thread count."""
    return float(f"{value:.6g}")


def check_tokens(what: str, ids: Sequence[int], expected: Sequence[int]) -> None:
    """`UserError` if the runtime's tokenizer splits the probe text differently from the checkpoint's."""
    if list(ids) != list(expected):
        place = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(expected))
        raise UserError(
            f"{what}: llama.cpp and the checkpoint's tokenizer split the probe text differently (first at token "
            f"{place}); llama.cpp's pre-tokenizer is wrong for this model"
        )


def check_ends(what: str, engine: LlamaCppEngine, ends: Sequence[int]) -> None:
    """`UserError` if stock llama.cpp would continue past an end-of-text token."""
    for token in ends:
        if not engine.ends_at(token):
            raise UserError(f"{what}: llama.cpp does not end a text at token {token}, other runtimes do")
