"""A uniform view of a decoder: embedding, blocks, final norm, head, and what changes when blocks are removed.

Only this module and the records in `families` know where modules are and which configuration values exist once per
block. Everything else in the package works with blocks, hidden states and the head.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from .config import DEPTHS, KEPT_BLOCKS, RECORDS
from .families import BLOCKS, Family, block_number, family_of
from .types import CausalModel, ModelConfig


class Decoder:
    """A view of a Hugging Face causal language model as embedding, blocks, norm and head.

    The view holds no state: it always shows the model as it is now, also inside `without_blocks`.
    """

    def __init__(self, model: CausalModel):
        self.family: Family = family_of(model.config)
        self.model = model
        self.config = model.config

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.model.layers

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.model.embed_tokens

    @property
    def norm(self) -> nn.Module:
        return self.model.model.norm

    @property
    def head_module(self) -> nn.Linear:
        return self.model.lm_head

    @property
    def head_weight(self) -> Tensor:
        """(V, H); the embedding's own weight where the two are tied."""
        return self.model.lm_head.weight

    @property
    def softcap(self) -> float | None:
        """c in logits ← c·tanh(logits / c), or None."""
        return self.config.final_logit_softcapping if self.family.softcap else None

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def can_fuse_after_mlp(self) -> bool:
        """Whether any linear map of the MLP's output fits into `down_proj`; if not, only a scale per channel."""
        return self.family.block.added_norms is None

    def down_proj(self, block: int) -> nn.Linear:
        """The last linear layer of block `block`'s MLP, weight (H, intermediate)."""
        return self.blocks[block].get_submodule(self.family.block.mlp_out)  # type: ignore[union-attr, return-value]

    def _adding(self, block: int) -> list[Any]:
        """The two modules whose outputs a block adds to the residual stream: attention's and the MLP's."""
        names = self.family.block
        paths = names.added_norms or (names.attention_out, names.mlp_out)
        return [self.blocks[block].get_submodule(path) for path in paths]

    def _scaled_norm(self, norm: Any, factor: Tensor | float) -> Tensor:
        """The weight (float64) that makes a norm's output `factor` times as large."""
        offset = self.family.norm_offset
        return (offset + norm.weight.detach().double()) * factor - offset

    @contextmanager
    def mlp_addition(self, block: int) -> Iterator[dict[str, Tensor]]:
        """Fills a dict during forward passes: "mlp" (B, T, H), what the block's MLP adds to the residual stream, and
        "inner" (B, T, intermediate), what `down_proj` is given."""
        seen: dict[str, Tensor] = {}
        linear, added = self.down_proj(block), self._adding(block)[1]
        handles = [
            linear.register_forward_hook(lambda _m, args, _o: seen.__setitem__("inner", args[0])),
            added.register_forward_hook(lambda _m, _a, output: seen.__setitem__("mlp", output)),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def projections(self) -> Iterator[dict[int, Tensor]]:
        """Fills a dict during forward passes: block → (B, T, I), q, k and v concatenated as the projections give them
        (biases added; before their norms and before rotary positions)."""
        seen: dict[int, Tensor] = {}
        handles = []
        for number, block in enumerate(self.blocks):
            *first, final = (block.get_submodule(path) for path in self.family.block.qkv)
            parts: list[Tensor] = []
            for linear in first:
                handles.append(linear.register_forward_hook(lambda _m, _a, out, parts=parts: parts.append(out)))

            def last(_m: object, _a: object, out: Tensor, n: int = number, parts: list[Tensor] = parts) -> None:
                seen[n] = torch.cat([*parts, out], -1) if parts else out
                parts.clear()

            handles.append(final.register_forward_hook(last))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def fused(self, block: int, map: Tensor) -> dict[nn.Parameter, Tensor]:
        """Parameters of a block and the values (float64) that make its MLP add u·T instead of u.

        `map` is T, (H, H), or (H,) for a scale per channel. Raises `ValueError` for a full map in families that
        normalise what the MLP adds.
        """
        if self.can_fuse_after_mlp:
            turned = map.double().diag() if map.ndim == 1 else map.double().T
            return {p: turned @ p.detach().double() for p in self.down_proj(block).parameters()}  # weight and bias
        if map.ndim != 1:
            raise ValueError(
                f"a {self.config.model_type} model's MLP output can only be scaled per channel, not multiplied by a "
                "matrix"
            )
        norm = self._adding(block)[1]
        return {norm.weight: self._scaled_norm(norm, map.double())}

    def rescaled(self, block: int, factor: float) -> dict[nn.Parameter, Tensor]:
        """Parameters of a block and the values (float64) that scale everything it adds by `factor`."""
        modules = self._adding(block)
        if self.can_fuse_after_mlp:
            return {p: factor * p.detach().double() for linear in modules for p in linear.parameters()}
        return {norm.weight: self._scaled_norm(norm, factor) for norm in modules}

    def adds_scaled(self, block: int, other: Decoder, other_block: int) -> float:
        """s where a block adds s times what another model's block adds, by the weights that attention ends in."""
        new, old = (
            decoder._adding(number)[0].weight.detach().float() + (0.0 if decoder.can_fuse_after_mlp else offset)
            for decoder, number, offset in (
                (self, block, self.family.norm_offset),
                (other, other_block, other.family.norm_offset),
            )
        )
        return float((new * old).sum() / old.square().sum())

    def hidden(self, **inputs: Any) -> Tensor:
        """Hidden states after the final norm, (B, T, H); no logits are computed."""
        return self.model.model(**inputs).last_hidden_state

    def hidden_at(self, depths: Sequence[int], **inputs: Any) -> list[Tensor]:
        """Hidden states (B, T, H) after the first d blocks and the final norm, for each depth d: those of the models
        truncated there, from one forward pass. `depths` ascend; the last is the number of blocks."""
        if depths[-1] != self.num_blocks:
            raise ValueError(f"depths {list(depths)} must end with the model's {self.num_blocks} blocks")
        seen: dict[int, Tensor] = {}

        def keep(depth: int) -> Any:
            return lambda _module, _inputs, output: seen.__setitem__(depth, output)

        handles = [self.blocks[depth - 1].register_forward_hook(keep(depth)) for depth in depths[:-1]]
        try:
            deepest = self.hidden(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return [*(self.norm(seen[depth]) for depth in depths[:-1]), deepest]

    def embed(self, input_ids: Tensor) -> Tensor:
        """The first block's input hidden states, (B, T, H)."""
        return self.embedding(input_ids)

    def run(self, hidden: Tensor, blocks: Sequence[int], position_ids: Tensor) -> Tensor:
        """Hidden states (B, T, H) after some of the blocks, in the order given; the final norm is not applied.

        `position_ids` (B, T) restart at every packed row, as in a whole forward pass; nothing is cached.
        """
        if not blocks:
            return hidden
        norm = self.model.model.norm
        self.model.model.norm = nn.Identity()
        try:
            with _only(self.model, list(blocks)):
                return self.hidden(inputs_embeds=hidden, position_ids=position_ids, use_cache=False)
        finally:
            self.model.model.norm = norm

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., H) that have passed the final norm."""
        logits = self.model.lm_head(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def kept_blocks(config: ModelConfig) -> list[int]:
    """The indices, in the unpruned model, of this model's blocks."""
    kept = getattr(config, KEPT_BLOCKS, None)
    return list(kept) if kept is not None else list(range(config.num_hidden_layers))


def depths(config: ModelConfig) -> list[int]:
    """Depths the model was trained to run at, ascending: its first d blocks, then the final norm and the head.
    For a model not trained for several depths, only its number of blocks."""
    recorded = getattr(config, DEPTHS, None)
    return list(recorded) if recorded is not None else [config.num_hidden_layers]


def forget_depths(config: ModelConfig) -> None:
    """Undo `record_depths`, for a model that was trained further at its full depth only."""
    if hasattr(config, DEPTHS):
        delattr(config, DEPTHS)


def record_depths(config: ModelConfig, found: Sequence[int]) -> None:
    """Record in a configuration the depths its model runs at; the deepest must be all of its blocks."""
    if sorted(set(found)) != list(found) or found[0] < 1 or found[-1] != config.num_hidden_layers:
        raise ValueError(f"depths {list(found)} must ascend to the model's {config.num_hidden_layers} blocks")
    setattr(config, DEPTHS, list(found))


def config_at(config: ModelConfig, depth: int) -> Any:
    """A copy of a configuration for the model's first `depth` blocks, or for the whole model."""
    if not 1 <= depth <= config.num_hidden_layers:
        raise ValueError(f"a model of {config.num_hidden_layers} blocks has no depth {depth}")
    shortened = copy.deepcopy(config)
    if depth < config.num_hidden_layers:
        _cut_config(shortened, list(range(depth)))
    return shortened


def drop_blocks(model: CausalModel, dropped: Collection[int]) -> None:
    """Remove blocks in place; re-index the rest and every per-block configuration value.

    Indices are the model's current ones. The kept blocks' indices in the unpruned model are recorded in the
    configuration. Raises `UserError` for indices out of range and when no block would be left.
    """
    count = model.config.num_hidden_layers
    _check_dropped(dropped, count)
    kept = [i for i in range(count) if i not in set(dropped)]
    if len(kept) == count:
        return
    _apply(model, kept)


@contextmanager
def replaced(values: Mapping[nn.Parameter, Tensor]) -> Iterator[dict[nn.Parameter, Tensor]]:
    """The model with some parameters replaced inside the context, which yields the previous values; restored exactly
    afterwards."""
    before = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value.to(parameter)
        yield before
    finally:
        for parameter, data in before.items():
            parameter.data = data


@contextmanager
def without_blocks(model: CausalModel, dropped: Collection[int]) -> Iterator[None]:
    """The model without some blocks inside the context; restored exactly afterwards."""
    count = model.config.num_hidden_layers
    _check_dropped(dropped, count)
    with _only(model, [i for i in range(count) if i not in set(dropped)]):
        yield


@dataclass(frozen=True)
class Arrangement:
    """A model's blocks, and every configuration value that depends on them."""

    blocks: nn.ModuleList
    values: dict[str, Any]
    records: dict[str, Any]  # what the configuration notes of earlier drops, and of depths


def arrangement(model: CausalModel) -> Arrangement:
    """A model's current arrangement."""
    values = {name: getattr(model.config, name) for name in _per_block_names(model.config)}
    records = {name: getattr(model.config, name) for name in RECORDS if hasattr(model.config, name)}
    return Arrangement(model.model.layers, values, records)


@contextmanager
def arranged(model: CausalModel, other: Arrangement) -> Iterator[None]:
    """The model with the blocks of another arrangement of it inside the context; restored exactly afterwards."""
    before = arrangement(model)
    _arrange(model, other)
    try:
        yield
    finally:
        _arrange(model, before)


def _arrange(model: CausalModel, wanted: Arrangement) -> None:
    config = model.config
    model.model.layers = wanted.blocks
    for name, value in wanted.values.items():
        setattr(config, name, value)
    for name in RECORDS:
        if name in wanted.records:
            setattr(config, name, wanted.records[name])
        elif hasattr(config, name):
            delattr(config, name)
    _reindex(wanted.blocks)


@contextmanager
def _only(model: CausalModel, kept: list[int]) -> Iterator[None]:
    before = arrangement(model)
    _apply(model, kept)
    try:
        yield
    finally:
        _arrange(model, before)


def dropped_since(config: ModelConfig, base: ModelConfig) -> list[int]:
    """The blocks of the model with configuration `base` that the model with configuration `config` lacks."""
    kept = set(kept_blocks(config))
    return [number for number, block in enumerate(kept_blocks(base)) if block not in kept]


def name_before(name: str, kept: Sequence[int]) -> str:
    """A weight's name before all blocks but `kept` were dropped, from its name after."""
    number = block_number(name)
    if number is None:
        return name
    return f"{BLOCKS}.{kept[number]}{name.removeprefix(f'{BLOCKS}.{number}')}"


def _per_block_names(config: ModelConfig) -> list[str]:
    family = family_of(config)
    names = ["num_hidden_layers", *family.block_numbers, *family.per_block]
    return [name for name in names if getattr(config, name, None) is not None]


def _apply(model: CausalModel, kept: list[int]) -> None:
    _cut_config(model.config, kept)
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in kept)
    _reindex(model.model.layers)


def _cut_config(config: ModelConfig, kept: list[int]) -> None:
    numbers, family = kept_blocks(config), family_of(config)
    for name in family.per_block:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[i] for i in kept])
    for name in family.block_numbers:
        first = getattr(config, name, None)
        if first is not None:
            setattr(config, name, sum(i < first for i in kept))
    config.num_hidden_layers = len(kept)
    setattr(config, KEPT_BLOCKS, [numbers[i] for i in kept])
    if hasattr(config, DEPTHS):  # what was trained for several depths had these blocks
        delattr(config, DEPTHS)


def _reindex(blocks: nn.ModuleList) -> None:
    # The KV cache is addressed by `layer_idx`, which attention modules (and some blocks) carry.
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]


def _check_dropped(dropped: Collection[int], count: int) -> None:
    wrong = sorted(i for i in set(dropped) if not 0 <= i < count)
    if wrong:
        raise UserError(f"cannot drop blocks {wrong}: the model has blocks 0 to {count - 1}")
    if len(set(dropped)) == count:
        raise UserError(f"cannot drop all {count} blocks: at least one must stay")
