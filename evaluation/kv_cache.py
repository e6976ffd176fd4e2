"""A KV cache of fixed size in torch: what is held of a long prompt, per block and KV head, is chosen by a policy.

The prompt is read in chunks; after each, the `budget` best-scored entries of every head stay, in their original order,
and after each but the last the newest `stabilizers` are among them whatever their score. The last `local` tokens of a
prompt are read after that, and nothing of them goes (Locret, arXiv 2410.01805). Shapes are of one row; T tokens are
read at once, n entries are held by each of G KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..core.errors import UserError
from ..modeling.attention import Heads, own_attention
from ..modeling.blocks import Decoder
from ..modeling.rotary import Rotary, check_positions
from ..modeling.shape import AttentionShape

Positions = Literal["true", "contiguous"]


@dataclass(frozen=True)
class CacheSettings:
    """How a prompt is read, and what is held of it. Raises `UserError` for what cannot be."""

    budget: int | None  # entries held per block and KV head before the local tail; None: all
    chunk: int = 256  # tokens read between evictions
    stabilizers: int = 64  # newest entries that stay after every chunk but the last
    local: int = 100  # last tokens of the prompt, read after all evictions
    positions: Positions = "true"  # contiguous: what is held is rotated anew to 0, 1, 2, …
    evict_while_decoding: bool = False  # then budget + local entries are held at most; else every new one stays

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.local < 0 or self.stabilizers < 0:
            raise UserError("a KV cache needs a chunk of 1 token or more, and no negative numbers")
        if self.budget is not None and self.budget < max(1, self.stabilizers):
            raise UserError(
                f"a KV budget of {self.budget} has no room for {self.stabilizers} stabilizers, which are part of it; "
                "raise the budget or lower the stabilizers"
            )
        if self.evict_while_decoding and (self.budget is None or self.local < 1):
            raise UserError("eviction while decoding needs a budget, and a local tail of 1 token or more")


@dataclass(frozen=True)
class Step:
    """Tokens `start` to `end` of a prompt, read in one forward pass."""

    start: int
    end: int
    evicts: bool  # afterwards
    protected: int = 0  # newest entries that stay


def steps(length: int, settings: CacheSettings) -> list[Step]:
    """How a prompt of `length` tokens is read."""
    body = max(0, length - settings.local)
    evicts = settings.budget is not None
    found = []
    for start in range(0, body, settings.chunk):
        end = min(start + settings.chunk, body)
        found.append(Step(start, end, evicts, settings.stabilizers if end < body else 0))
    return [*found, Step(body, length, False)] if body < length else found


def reach(length: int, new: int, settings: CacheSettings) -> tuple[int, int]:
    """Entries held at most, and the highest rotary position, with up to `new` tokens read after up to `length` of a
    prompt."""
    held = most = length
    if settings.budget is not None:
        most, held = (min(length, settings.budget + more) for more in (settings.chunk, settings.local))
    held += new
    if settings.evict_while_decoding and settings.budget is not None:
        held = min(held, settings.budget + settings.local)
    room = max(most, held)
    return room, (room if settings.positions == "contiguous" else length + new) - 1


def shared_steps(prompts: Sequence[Sequence[int]], settings: CacheSettings) -> int:
    """How many of their first steps all prompts have in common, at least the last of each left out."""
    plans = [steps(len(prompt), settings)[:-1] for prompt in prompts]
    count = 0
    for together in zip(*plans, strict=False):
        end = together[0].end
        if any(step != together[0] for step in together) or any(p[:end] != prompts[0][:end] for p in prompts):
            break
        count += 1
    return count


@dataclass(frozen=True)
class View:
    """What a policy sees of one block when T tokens have been read: T of the n entries are new."""

    heads: Heads  # of the T tokens
    projections: Tensor | None  # (T, I): q, k, v before norms and rotary positions, where the policy needs them
    keys: Tensor  # (G, n, d)
    positions: Tensor  # (G, n): the entries' places in the text
    scores: Tensor  # (G, n - T) float32, as given before
    decoding: bool

    @property
    def new(self) -> Tensor:
        """Places of the new entries, (G, T)."""
        return self.positions[:, self.scores.shape[1] :]


class Policy(Protocol):
    """Says what to keep."""

    needs_projections: bool

    def score(self, view: View) -> Tensor:
        """Scores (G, n), float32, of all entries; the greater ones stay."""
        ...


def best(scores: Tensor, budget: int, protected: int = 0) -> Tensor:
    """Indices (G, budget), ascending, of the greatest of scores (G, n), n ≥ budget, the last `protected` among them; of
    equal ones the first."""
    if protected:
        scores = scores.clone()
        scores[:, scores.shape[1] - protected :] = torch.inf
    return scores.argsort(dim=1, descending=True, stable=True)[:, :budget].sort(1).values


def all_but_worst(scores: Tensor, local: int) -> Tensor:
    """Indices (G, n - 1), ascending, without the smallest of scores (G, n) but the last `local`; of equal ones the last
    goes."""
    count = scores.shape[1]
    worst = count - local - 1 - scores[:, : count - local].flip(1).argmin(1, keepdim=True)
    index = torch.arange(count - 1, device=scores.device).expand(len(scores), -1)
    return index + (index >= worst)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether queries at places (T,) see keys at places (G, n): (G, T, n)."""
    distance = queries[:, None] - keys[:, None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


class Layer:
    """One block's entries, in buffers that have room for `room` of them per head."""

    def __init__(self, shape: AttentionShape, room: int, like: Tensor, turning: bool):
        size = (shape.kv_heads, room)
        self.keys, self.values = (like.new_empty((*size, shape.size)) for _ in range(2))
        self.unturned = like.new_empty((*size, shape.size)) if turning else None  # keys without rotary positions
        self.positions = torch.empty(size, dtype=torch.long, device=like.device)
        self.scores = torch.empty(size, device=like.device)
        self.count = 0

    def append(self, **parts: Tensor) -> None:
        """Entries behind those that are there; each part (G, T, …)."""
        tokens = parts["keys"].shape[1]
        for name, part in parts.items():
            getattr(self, name)[:, self.count : self.count + tokens] = part
        self.count += tokens

    def keep(self, index: Tensor) -> None:
        """Only the entries at `index` (G, m), in that order."""
        for name, buffer in self._buffers():
            wide = index if buffer.ndim == 2 else index[..., None].expand(-1, -1, buffer.shape[-1])
            buffer[:, : index.shape[1]] = buffer[:, : self.count].gather(1, wide)
            setattr(self, name, buffer)
        self.count = index.shape[1]

    def copy(self) -> Layer:
        twin = object.__new__(Layer)
        for name, buffer in self._buffers():
            other = torch.empty_like(buffer)
            other[:, : self.count] = buffer[:, : self.count]
            setattr(twin, name, other)
        twin.count = self.count
        if self.unturned is None:
            twin.unturned = None
        return twin

    def _buffers(self) -> list[tuple[str, Tensor]]:
        names = ("keys", "values", "unturned", "positions", "scores")
        return [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]


class KVCache:
    """Reads one prompt with a model, then what follows it. `length` and `new` are the most tokens either has.

    Raises `UserError` where positions go beyond what the model was trained for.
    """

    def __init__(self, decoder: Decoder, policy: Policy, settings: CacheSettings, length: int, new: int = 0):
        self.decoder, self.policy, self.settings = decoder, policy, settings
        self.rotary = Rotary(decoder) if settings.positions == "contiguous" else None
        room, last = reach(length, new, settings)
        hint = "shorten it" + ("" if self.rotary else ", or use contiguous positions with a budget")
        check_positions(decoder, last, f"a prompt of {length} tokens with {new} after it", hint)
        shape, weight = AttentionShape.of(decoder.config), decoder.embedding.weight
        self.layers = [Layer(shape, room, weight, self.rotary is not None) for _ in range(decoder.num_blocks)]
        self.seen = 0  # tokens read
        self.most = 0  # entries that each head has held

    @property
    def held(self) -> int:
        """Entries of each block and KV head."""
        return self.layers[0].count

    @property
    def bytes(self) -> int:
        """Of the keys and values, when most were held."""
        one = self.layers[0].keys[:, :1]
        return 2 * one.numel() * one.element_size() * self.most * len(self.layers)

    def copy(self) -> KVCache:
        """The same state once more, to read on in another way."""
        twin = object.__new__(KVCache)
        twin.__dict__ = {**self.__dict__, "layers": [layer.copy() for layer in self.layers]}
        return twin

    @torch.inference_mode()
    def read_prompt(self, prompt: Sequence[int], count: int | None = None) -> Tensor:
        """Read a prompt, or on where it was left: its first `count` steps. Logits (V,) after what was read."""
        if not prompt:
            raise UserError("the prompt has no tokens")
        hidden = None
        for step in steps(len(prompt), self.settings)[:count]:
            if step.start >= self.seen:
                hidden = self._read(prompt[step.start : step.end], step)
        if hidden is None:
            raise ValueError("all of these steps have been read")
        return self.decoder.head(hidden[-1])

    @torch.inference_mode()
    def read_on(self, ids: Sequence[int]) -> Tensor:
        """Read tokens after the prompt; logits (T, V) after each. One by one where they evict, else in chunks."""
        size = 1 if self.settings.evict_while_decoding else self.settings.chunk
        found = []
        for start in range(0, len(ids), size):
            if self.settings.evict_while_decoding:
                self._make_room()
            found.append(self.decoder.head(self._read(ids[start : start + size], None)))
        return torch.cat(found)

    def write(self, logits: Tensor, tokens: int, stop: frozenset[int]) -> list[int]:
        """Tokens decoded greedily, `logits` (V,) first, until one of `stop` or `tokens` of them."""
        written: list[int] = []
        while len(written) < tokens and (token := int(logits.argmax())) not in stop:
            written.append(token)
            if len(written) < tokens:
                logits = self.read_on([token])[0]
        return written

    def _read(self, ids: Sequence[int], step: Step | None) -> Tensor:
        """Hidden states (T, H) of tokens after those seen; `step` None: after the prompt."""
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
            found = _attention(heads, layer.keys[:, :n], layer.values[:, :n], mask)
            before = layer.scores[:, : n - len(ids)]
            qkv = projected.pop(heads.block)[0] if self.policy.needs_projections else None
            view = View(heads, qkv, layer.keys[:, :n], layer.positions[:, :n], before, step is None)
            layer.scores[:, :n] = self.policy.score(view)
            budget = self.settings.budget
            if step is not None and step.evicts and budget is not None and n > budget:
                self._keep(heads.block, best(layer.scores[:, :n], budget, step.protected))
            return found

        self.most = max(self.most, self.held + len(ids))
        tokens = torch.tensor(list(ids), device=device)
        if self.policy.needs_projections:
            with self.decoder.projections() as projected:
                hidden = own_attention(self.decoder, tokens, rotary, attend)
        else:
            hidden = own_attention(self.decoder, tokens, rotary, attend)
        self.seen += len(ids)
        return hidden

    def _shared_mask(self, tokens: int, device: Any) -> Tensor | None:
        """(T, n): what T new tokens see where no window slides, the same for all heads; None: all before them."""
        if tokens == 1 or self.held == 0:
            return None
        columns = torch.arange(self.held + tokens, device=device)
        return columns <= columns[self.held :, None]

    def _make_room(self) -> None:
        """Evict one entry of every head where the cache is full."""
        assert self.settings.budget is not None
        if self.held >= self.settings.budget + self.settings.local:
            for block, layer in enumerate(self.layers):
                self._keep(block, all_but_worst(layer.scores[:, : layer.count], self.settings.local))

    def _keep(self, block: int, index: Tensor) -> None:
        layer = self.layers[block]
        layer.keep(index)
        if self.rotary is not None and layer.unturned is not None:
            places = torch.arange(layer.count, device=index.device)
            layer.keys[:, : layer.count] = self.rotary.turned(block, layer.unturned[:, : layer.count], places)


def _attention(heads: Heads, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """(heads, T, d). Without a mask a prompt's first tokens see those before them, and a single token all there is."""
    causal = mask is None and heads.queries.shape[1] > 1
    return torch.nn.functional.scaled_dot_product_attention(
        heads.queries[None], keys[None], values[None], mask, is_causal=causal, scale=heads.scaling, enable_gqa=True
    )[0]
