"""A KV cache of bounded size in torch, for measuring eviction policies; every KV head of every block evicts on its own.

It follows the rules of all runtimes (`kv`), and gives policies all that any of them needs: retaining heads, attention
and labels. Shapes are for a single sequence: T tokens are read at once, each of G KV heads holds n entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import UserError
from ..kv.eviction import best, entry_scores
from ..kv.policy import Floats, Policy, View
from ..kv.settings import KvBudget
from ..kv.steps import most_held, read_in_steps, steps
from ..modeling.attention import Heads, own_attention
from ..modeling.blocks import Decoder
from ..modeling.retaining import RetainingHeads
from ..modeling.rotary import Rotary, check_positions
from ..modeling.shape import AttentionShape

Watch = Callable[[Heads, Tensor, Tensor], None]  # a block's heads; its keys (G, n, d) and their positions (G, n)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether queries at positions (T,) see keys at positions (G, n): (G, T, n)."""
    distance = queries[:, None] - keys[:, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


class Layer:
    """One block's entries, in buffers for `room` entries per head."""

    def __init__(self, shape: AttentionShape, room: int, like: Tensor, turning: bool):
        size = (shape.kv_heads, room)
        self.keys, self.values = (like.new_empty((*size, shape.size)) for _ in range(2))
        self.unturned = like.new_empty((*size, shape.size)) if turning else None  # keys before rotary embedding
        self.positions = torch.empty(size, dtype=torch.long, device=like.device)
        self.scores = np.empty(size, np.float32)
        self.count = 0

    def append(self, **parts: Tensor) -> None:
        """Append T entries; each part is (G, T, …)."""
        tokens = parts["keys"].shape[1]
        for name, part in parts.items():
            getattr(self, name)[:, self.count : self.count + tokens] = part
        self.count += tokens

    def keep(self, kept: NDArray[np.int64]) -> None:
        """Keep the entries at indices `kept` (G, m) only, in that order."""
        count = kept.shape[1]
        self.scores[:, :count] = np.take_along_axis(self.scores[:, : self.count], kept, 1)
        index = torch.from_numpy(kept).to(self.positions.device)
        for _, buffer in self._buffers():
            wide = index if buffer.ndim == 2 else index[..., None].expand(-1, -1, buffer.shape[-1])
            buffer[:, :count] = buffer[:, : self.count].gather(1, wide)
        self.count = count

    def copy(self) -> Layer:
        twin = object.__new__(Layer)
        for name, buffer in self._buffers():
            other = torch.empty_like(buffer)
            other[:, : self.count] = buffer[:, : self.count]
            setattr(twin, name, other)
        twin.count, twin.scores = self.count, self.scores.copy()
        if self.unturned is None:
            twin.unturned = None
        return twin

    def _buffers(self) -> list[tuple[str, Tensor]]:
        names = ("keys", "values", "unturned", "positions")
        return [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]


class KVCache:
    """Runs a model over one prompt of at most `length` tokens, then over at most `new` tokens after it.

    `heads` and `labels` (per block (G, N), for the prompt's first N tokens) are for policies that need them. `watch`,
    if set, is called for every block with its heads, keys and positions. Raises `UserError` where positions exceed what
    the model was trained for, `ValueError` for a policy whose needs are not met.
    """

    def __init__(
        self,
        decoder: Decoder,
        policy: Policy,
        settings: KvBudget,
        length: int,
        new: int = 0,
        *,
        heads: RetainingHeads | None = None,
        labels: Sequence[Tensor] | None = None,
    ):
        missing = policy.needs & {name for name, value in (("heads", heads), ("labels", labels)) if value is None}
        if missing:
            raise ValueError(f"the policy {policy} needs {' and '.join(sorted(missing))}")
        self.decoder, self.policy, self.settings = decoder, policy, settings
        self.heads = None if heads is None else heads.to(decoder.embedding.weight.device)
        self.labels = None if labels is None else [label.float().cpu().numpy() for label in labels]
        self.watch: Watch | None = None
        self.rotary = Rotary(decoder) if settings.positions == "contiguous" else None
        room = most_held(settings, length, new)
        hint = "shorten it" + ("" if self.rotary else ", or use contiguous positions with a budget")
        last = (room if self.rotary else length + new) - 1
        check_positions(decoder, last, f"a prompt of {length} tokens with {new} after it", hint)
        shape, weight = AttentionShape.of(decoder.config), decoder.embedding.weight
        self.layers = [Layer(shape, room, weight, self.rotary is not None) for _ in range(decoder.num_blocks)]
        self.seen = 0  # tokens read
        self.most = 0  # most entries that a head has held at once

    @property
    def held(self) -> int:
        """Entries that each KV head of each block holds."""
        return self.layers[0].count

    @property
    def bytes(self) -> int:
        """Size of keys and values at their peak."""
        entry = self.layers[0].keys[:, :1]
        return 2 * entry.numel() * entry.element_size() * self.most * len(self.layers)

    def copy(self) -> KVCache:
        """An independent copy, to continue from the same state in another way."""
        twin = object.__new__(KVCache)
        twin.__dict__ = {**self.__dict__, "layers": [layer.copy() for layer in self.layers]}
        return twin

    @torch.inference_mode()
    def read_prompt(self, prompt: Sequence[int], count: int | None = None) -> Tensor:
        """Read a prompt up to its `count`-th step (all by default), from where it was left. Logits (V,) after the last
        token read."""
        if not prompt:
            raise UserError("the prompt has no tokens")
        plan = [step for step in steps(len(prompt), self.settings)[:count] if step.start >= self.seen]
        return self.decoder.head(read_in_steps(prompt, plan, self._read, self._evict)[-1])

    @torch.inference_mode()
    def read_on(self, ids: Sequence[int]) -> Tensor:
        """Read tokens after the prompt; logits (T, V) after each. One at a time if each may evict, else in chunks."""
        size = 1 if self.settings.evict_decoding else self.settings.chunk
        logits = []
        for start in range(0, len(ids), size):
            if self.settings.evict_decoding:
                self._make_room()
            logits.append(self.decoder.head(self._read(ids[start : start + size], decoding=True)))
        return torch.cat(logits)

    def write(self, logits: Tensor, tokens: int, stop: frozenset[int]) -> list[int]:
        """Decode greedily from `logits` (V,), at most `tokens` tokens, ending before one of `stop`."""
        written: list[int] = []
        while len(written) < tokens and (token := int(logits.argmax())) not in stop:
            written.append(token)
            if len(written) < tokens:
                logits = self.read_on([token])[0]
        return written

    def _read(self, ids: Sequence[int], decoding: bool = False) -> Tensor:
        """Hidden states (T, H) of the next tokens."""
        device = self.decoder.embedding.weight.device
        places = torch.arange(self.seen, self.seen + len(ids), device=device)
        rotary = places if self.rotary is None else places - self.seen + self.held
        projected: dict[int, Tensor] = {}
        shared = self._shared_mask(len(ids), device)

        def attend(heads: Heads) -> Tensor:
            layer = self.layers[heads.block]
            parts = {"keys": heads.keys, "values": heads.values, "positions": places.expand(len(heads.keys), -1)}
            if self.rotary is not None:
                parts["unturned"] = self.rotary.unturned(heads.block, heads.keys, rotary)
            layer.append(**parts)
            n = layer.count
            mask = shared
            if heads.window is not None and self.seen + len(ids) > heads.window:
                mask = visible(places, layer.positions[:, :n], heads.window)
                mask = mask.repeat_interleave(len(heads.queries) // len(heads.keys), 0)
            output = _attention(heads, layer.keys[:, :n], layer.values[:, :n], mask)
            if self.watch is not None:
                self.watch(heads, layer.keys[:, :n], layer.positions[:, :n])
            qkv = projected.pop(heads.block)[0] if "heads" in self.policy.needs else None
            scores = entry_scores(self.policy, self._view(heads, layer, places, qkv, decoding))
            layer.scores[:, n - scores.shape[1] : n] = scores
            return output

        self.most = max(self.most, self.held + len(ids))
        tokens = torch.tensor(list(ids), device=device)
        if "heads" in self.policy.needs:
            with self.decoder.projections() as projected:
                hidden = own_attention(self.decoder, tokens, rotary, attend)
        else:
            hidden = own_attention(self.decoder, tokens, rotary, attend)
        self.seen += len(ids)
        return hidden

    def _view(self, heads: Heads, layer: Layer, places: Tensor, qkv: Tensor | None, decoding: bool) -> View:
        """What the policy sees of a block; `qkv` (T, I) is the projections' output, before norms and rotation."""
        predicted = labels = None
        if qkv is not None and self.heads is not None:
            predicted = self.heads.score(heads.block, qkv).T.float().cpu().numpy()
        text = places.cpu().numpy()
        if self.labels is not None:
            own = self.labels[heads.block]
            labels = np.where(text < own.shape[1], own[:, np.minimum(text, own.shape[1] - 1)], np.float32(np.inf))

        def attention(window: int) -> Floats:
            keys, queries = layer.keys[:, : layer.count], heads.queries[:, -window:]
            seen = visible(places[-window:], layer.positions[:, : layer.count], heads.window)
            logits = _logits(heads, queries, keys).masked_fill(~seen[:, None], -torch.inf)
            return logits.softmax(-1).mean(2).cpu().numpy()

        return View(heads.block, len(heads.keys), text, decoding, predicted, attention, labels)

    def _shared_mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """The mask (T, n) of T new tokens without a sliding window, the same for all heads; None if none is needed."""
        if tokens == 1 or self.held == 0:
            return None
        columns = torch.arange(self.held + tokens, device=device)
        return columns <= columns[self.held :, None]

    def _make_room(self) -> None:
        """Evict one entry per head if the cache is full."""
        assert self.settings.budget is not None
        if self.held >= self.settings.budget + self.settings.local:
            self._keep(self.held - 1, self.settings.local)

    def _evict(self, protected: int) -> None:
        """Keep each head's best entries, as many as the budget allows."""
        if self.settings.budget is not None and self.held > self.settings.budget:
            self._keep(self.settings.budget, protected)

    def _keep(self, count: int, protected: int) -> None:
        for block, layer in enumerate(self.layers):
            layer.keep(best(layer.scores[:, : layer.count], count, protected))
            if self.rotary is not None and layer.unturned is not None:
                places = torch.arange(count, device=layer.keys.device)
                layer.keys[:, :count] = self.rotary.turned(block, layer.unturned[:, :count], places)


def _logits(heads: Heads, queries: Tensor, keys: Tensor) -> Tensor:
    """Attention logits (G, query heads per KV head, T, n) in float32 of queries (heads, T, d)."""
    grouped = queries.reshape(len(keys), -1, *queries.shape[1:])
    return (grouped @ keys[:, None].transpose(-1, -2)).float() * heads.scaling


def answer_labels(cache: KVCache, answer: Sequence[int]) -> list[Tensor]:
    """Labels (G, N) per block for the N prompt tokens of a cache that has evicted nothing.

    A key's label is its largest attention logit over the queries of the true answer, which is read after the prompt.
    Keys that no such query sees (sliding windows) get -inf.
    """
    if cache.held != cache.seen or not answer:
        raise ValueError("labels need a cache that has evicted nothing, and an answer")
    prompt = cache.seen
    labels: dict[int, Tensor] = {}

    def watch(heads: Heads, keys: Tensor, places: Tensor) -> None:
        seen = visible(places[0, -heads.queries.shape[1] :], places[:, :prompt], heads.window)
        logits = _logits(heads, heads.queries, keys[:, :prompt]).masked_fill(~seen[:, None], -torch.inf)
        largest, before = logits.amax((1, 2)), labels.get(heads.block)
        labels[heads.block] = largest if before is None else torch.maximum(before, largest)

    cache.watch = watch
    cache.read_on(answer)
    return [labels[block] for block in range(len(cache.layers))]


def _attention(heads: Heads, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention output (heads, T, d). Without a mask it is causal for several tokens, and unmasked for a single one."""
    causal = mask is None and heads.queries.shape[1] > 1
    return torch.nn.functional.scaled_dot_product_attention(
        heads.queries[None], keys[None], values[None], mask, is_causal=causal, scale=heads.scaling, enable_gqa=True
    )[0]
