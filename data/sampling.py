"""Batched sampling from a model, each row with its own random numbers.

Why not `model.generate`: it uses one generator for the whole batch, so a row depends on its neighbours; it keeps
computing rows that have ended; and it copies the KV cache at every token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..modeling.types import CausalModel

LOOP = 32  # if this many tokens repeat with a period of at most LOOP // 2, the row will never end
_ROOM = 64  # tokens by which the KV cache grows


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Temperature 0 is greedy; top_k 0 and top_p 1 exclude no tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass
class Sampled:
    """The tokens sampled after one prompt, without the stop token."""

    tokens: list[int]
    ended: bool = False
    looped: bool = False
    stop: int | None = None  # the stop token, if one ended the text

    def append(self, token: int, stop: Collection[int], stopped: Callable[[list[int]], bool] | None) -> None:
        """Add the next token unless the text has ended, and check whether it ends the text."""
        if self.ended or self.looped:
            return
        if token in stop:
            self.ended, self.stop = True, token
            return
        self.tokens.append(token)
        self.ended = stopped is not None and stopped(self.tokens)
        self.looped = not self.ended and loops(self.tokens)


def row_seed(seed: int, row: int, phase: str) -> int:
    """The seed of one row's random numbers, independent of all other rows."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{phase}/{row}".encode()).digest()[:7], "big")


@torch.inference_mode()
def sample(
    model: CausalModel,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    how: Sampling,
    *,
    stop: Collection[int],
    banned: Sequence[int] = (),
    stopped: Callable[[list[int]], bool] | None = None,
) -> list[Sampled]:
    """Continue each prompt (token ids, not empty) until a token of `stop`, or `stopped(tokens)`, or `max_tokens`.

    Row i samples from a generator seeded with `seeds[i]`, one number per token, so its text does not depend on the
    other rows, except for rounding. Tokens of `banned` are never sampled.
    """
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device
    uniforms = torch.stack([_uniforms(seed, how.max_tokens) for seed in seeds]).to(device)
    drawn = [Sampled([]) for _ in prompts]
    logits, cache, seen = _prefill(model, prompts, how.max_tokens, device)
    rows = list(range(len(prompts)))  # still running
    ends = frozenset(stop)
    for step in range(how.max_tokens):
        logits[:, list(banned)] = -torch.inf
        chosen = choose(logits, uniforms[rows, step], how)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            drawn[row].append(token, ends, stopped)
        keep = [i for i, row in enumerate(rows) if not (drawn[row].ended or drawn[row].looped)]
        if not keep or step == how.max_tokens - 1:
            break
        if len(keep) <= 0.9 * len(rows):  # removing rows copies the cache, so not for every single one
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            seen, chosen, rows = seen[index], chosen[index], [rows[i] for i in keep]
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
        logits = _forward(model, chosen[:, None], seen, cache)
    return drawn


def choose(logits: Tensor, uniforms: Tensor, how: Sampling) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution: (B, V) and (B,) in [0, 1) → (B,) long.

    The nucleus (`top_p`) holds the tokens with less than that mass before them, among those that `top_k` leaves.
    """
    if how.temperature == 0:
        return logits.argmax(-1)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / how.temperature
    if how.top_k == 0 and how.top_p == 1:
        mass = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(mass, (uniforms * mass[:, -1])[:, None], right=True).clamp_max(mass.shape[1] - 1)[
            :, 0
        ]
    size = logits.shape[1]
    width = min(how.top_k or 256, size)
    total = None if how.top_k else logits.logsumexp(-1, keepdim=True)
    while True:  # a full sort of the vocabulary is slow and rarely needed: the nucleus is usually small
        values, tokens = logits.topk(width)
        mass = (values - (values.logsumexp(-1, keepdim=True) if total is None else total)).double().exp().cumsum(-1)
        if how.top_k or width == size or bool((mass[:, -1] >= how.top_p).all()):
            break
        width = min(8 * width, size)
    inside = (mass < how.top_p).sum(-1, keepdim=True).clamp_max(width - 1)  # index of the nucleus's last token
    point = uniforms[:, None] * mass.gather(1, inside)
    return tokens.gather(1, (mass <= point).sum(-1, keepdim=True).minimum(inside))[:, 0]


def loops(tokens: list[int]) -> bool:
    """Whether the last LOOP tokens repeat with some period of at most half that length."""
    tail = tokens[-LOOP:]
    return len(tail) == LOOP and any(tail[p:] == tail[:-p] for p in range(1, LOOP // 2 + 1))


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _prefill(
    model: CausalModel, prompts: Sequence[list[int]], tokens: int, device: torch.device
) -> tuple[Tensor, Cache, Tensor]:
    """Logits after each prompt (B, V), the cache, and a mask of the columns each row sees (B, T).

    The prefix that all prompts share (the template's system message) is computed once; the remainders are left-padded.
    `tokens` is the number of tokens to follow.
    """
    common = _common(prompts, getattr(model.config, "sliding_window", None), tokens)
    width = max(map(len, prompts)) - common
    rest = torch.zeros((len(prompts), width), dtype=torch.long)
    seen = torch.zeros((len(prompts), common + width), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        rest[i, width - (len(prompt) - common) :] = torch.tensor(prompt[common:])
        seen[i, :common] = 1
        seen[i, common + width - (len(prompt) - common) :] = 1
    rest, seen = rest.to(device), seen.to(device)
    cache = Cache(layer_class_to_replicate=_Layer)
    if common:
        head = torch.tensor([prompts[0][:common]], device=device)
        _forward(model, head, torch.ones_like(head), cache)
        cache.batch_repeat_interleave(len(prompts))
    return _forward(model, rest, seen, cache), cache, seen


def _common(prompts: Sequence[list[int]], window: int | None, tokens: int) -> int:
    """Length of the prefix that all prompts share, excluding each prompt's last token."""
    lengths = [len(prompt) for prompt in prompts]
    if window is not None and window < max(lengths) + tokens and len(set(lengths)) > 1:
        return 0  # windows are counted in columns, and there would be padding between the prefix and the remainder
    common = 0
    while common < min(lengths) - 1 and len({prompt[common] for prompt in prompts}) == 1:
        common += 1
    return common


def _forward(model: CausalModel, ids: Tensor, seen: Tensor, cache: Cache) -> Tensor:
    """Logits (B, V) after the last of `ids` (B, T), which are the last T columns of `seen`."""
    positions = (seen.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    out = model(
        input_ids=ids,
        attention_mask=None if bool(seen.all()) else seen,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1]


class _Layer(DynamicLayer):
    """Keys and values of one block, (B, heads, T, d), written in place into a buffer with room to grow.

    Sliding-window blocks keep everything too: the mask hides what is outside the window.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **options: Any) -> tuple[Tensor, Tensor]:
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < new:
            self.is_initialized = True
            self.buffers = (self._grown(self.keys, key_states, new), self._grown(self.values, value_states, new))
        keys, values = self.buffers
        keys[:, :, old:new] = key_states
        values[:, :, old:new] = value_states
        self.keys, self.values = keys[:, :, :new], values[:, :, :new]
        return self.keys, self.values

    @staticmethod
    def _grown(old: Tensor | None, like: Tensor, length: int) -> Tensor:
        batch, heads, _, size = like.shape
        buffer = like.new_empty((batch, heads, length + _ROOM, size))
        if old is not None:
            buffer[:, :, : old.shape[-2]] = old
        return buffer

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = None
