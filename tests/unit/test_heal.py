"""Every way to heal against plain least squares on stored activations, in float64, and against models in which all
that healing fuses into weights is done by hooks."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Advance, Progress
from compress.data.chat import Encoded
from compress.data.packing import Batch, pack
from compress.modeling.blocks import Decoder, drop_blocks, replaced
from compress.modeling.cuts import gaps
from compress.modeling.load import load_model
from compress.prune.hadamard import hadamard
from compress.prune.healing import fit_gaps, heal
from compress.prune.heals import Heal
from compress.prune.heals.cosine import CosineHeal
from compress.prune.heals.linear import LinearHeal
from compress.prune.heals.none import NoHeal
from compress.prune.heals.patch import PatchHeal
from compress.prune.heals.refit import RefitHeal
from torch import Tensor

SIZES = [40, 33, 48, 29, 37, 45, 26, 44, 31, 48, 39, 28]  # none fits beside another: row i is packed sequence i
TOKENS = sum(SIZES)
SIZE, INNER = 16, 24
CAST = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("llama", "mistral", "qwen2", "qwen3", "phi3")},
    "biased": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "gemma3": ("gemma3_text", {"layer_types": 4 * CAST, "sliding_window": 8}),
}
KINDS: list[type[Any]] = [LinearHeal, CosineHeal, PatchHeal, RefitHeal]
Change = Callable[[Tensor, Tensor], Tensor]  # (what `down_proj` is given, what the MLP adds) -> what it adds instead
Stored = dict[str, list[list[Tensor]]]


def rows(count: int = len(SIZES)) -> list[list[int]]:
    draw = random.Random(11)
    return [[draw.randrange(3, 300) for _ in range(size)] for size in SIZES[:count]]


def packed(ids: list[list[int]], pad: int = 9, length: int = 48) -> list[Batch]:
    return pack([Encoded(row, [True] * len(row)) for row in ids], length, 5, pad)


@pytest.fixture
def build(shaken: Callable[..., Path]) -> Callable[..., Any]:
    """build(name of MODELS) -> a model of 8 tiny blocks, with random norms and biases."""

    def make(name: str = "llama", **options: Any) -> Any:
        family, more = MODELS[name]
        sizes = {"blocks": 8, "hidden": SIZE, "heads": 2, "kv_heads": 1, "intermediate": INNER}
        return load_model(shaken(family, **sizes, **more, **options))

    return make


@torch.no_grad()
def store(
    model: Any,
    ids: list[list[int]],
    skip: Collection[int] = (),
    changes: Mapping[int, Change] | None = None,
    scales: Mapping[int, float] | None = None,
) -> Stored:
    """ "inner", "mlp", "residual" and "output" of each block for each row, and "logits" ([0]), float64.

    Some blocks are skipped; what some MLPs add is changed; the stream is multiplied by a scale behind some blocks.
    Every row runs alone, unpadded. The model is left as it was.
    """
    decoder, handles = Decoder(model), []
    changes, scales = changes or {}, scales or {}
    seen: Stored = {k: [[] for _ in range(8)] for k in ("inner", "mlp", "residual", "output", "logits")}
    added: dict[int, Tensor] = {}

    def on_mlp(number: int) -> Any:
        def hook(_m: Any, _a: Any, out: Tensor) -> Tensor:
            seen["mlp"][number].append(out[0].double())
            if number in changes:
                out = changes[number](seen["inner"][number][-1], out.double()).to(out.dtype)
            added[number] = out
            return out

        return hook

    def on_block(number: int) -> Any:
        def hook(_m: Any, args: Any, out: Tensor) -> Tensor:
            seen["residual"][number].append((out.double() - added[number].double())[0])
            out = args[0] if number in skip else out * scales.get(number, 1.0)
            seen["output"][number].append(out[0].double())
            return out

        return hook

    layer: Any
    for number, layer in enumerate(decoder.blocks):
        inner = seen["inner"][number]
        last = layer.mlp.down_proj if decoder.can_fuse_after_mlp else layer.post_feedforward_layernorm
        take = layer.mlp.down_proj.register_forward_hook(lambda _m, a, _o, inner=inner: inner.append(a[0][0].double()))
        handles += [take, last.register_forward_hook(on_mlp(number)), layer.register_forward_hook(on_block(number))]
    for row in ids:
        seen["logits"][0].append(model(input_ids=torch.tensor([row]), use_cache=False).logits[0].double())
    for handle in handles:
        handle.remove()
    return seen


def solve(
    x: Tensor, r: Tensor, z: Tensor, prior: Tensor, ridge: float, weight: Tensor | None = None, *, scaled: bool = False
) -> tuple[Tensor, float]:
    """argmin over X and s of Σ w²‖x·X + s·r − z‖² + α‖X − s·X₀‖², as one plain problem in all unknowns.

    α is `ridge` times the mean of the features' Σ (w·x)²; without `scaled`, s is 1.
    """
    if weight is not None:
        x, r, z = (part * weight[:, None] for part in (x, r, z))
    alpha = ridge * x.square().sum(0).mean()
    full = prior.ndim == 2
    wide = torch.kron(x, torch.eye(z.shape[1]).double()) if full else torch.diag_embed(x).flatten(0, 1)
    pull = alpha.sqrt() * torch.eye(prior.numel(), dtype=torch.float64)
    matrix = torch.cat([wide, pull])
    stream = torch.cat([r.flatten(), -alpha.sqrt() * prior.flatten()])[:, None]
    right = torch.cat([z.flatten(), torch.zeros(prior.numel()).double()])[:, None]
    if scaled:
        found = torch.linalg.lstsq(torch.cat([matrix, stream], 1), right, driver="gelsd").solution[:, 0]
        return found[:-1].reshape(prior.shape), float(found[-1])
    return torch.linalg.lstsq(matrix, right - stream, driver="gelsd").solution.reshape(prior.shape), 1.0


def through(mlp: Tensor, map: Tensor) -> Tensor:
    return mlp @ map if map.ndim == 2 else mlp * map


def same(model: Any) -> Tensor:
    ones = torch.ones(SIZE, dtype=torch.float64)
    return ones.diag() if Decoder(model).can_fuse_after_mlp else ones


def parts(whole: Stored, behind: Stored, gap: tuple[int, int], keep: Collection[int] | None = None) -> list[Tensor]:
    """inner, mlp, residual and target (N, ·) at a gap: the model pruned so far towards the whole one; of some rows."""
    before, after = gap[0] - 1, gap[1]
    lists = (*(behind[name][before] for name in ("inner", "mlp", "residual")), whole["output"][after])
    return [torch.cat([part for i, part in enumerate(per_row) if keep is None or i in keep]) for per_row in lists]


def reference(config: Heal, model: Any, block: int, inner: Tensor, u: Tensor, r: Tensor, z: Tensor) -> Any:
    """(change, scale, solution): what is done at a gap when the stream really is multiplied by its scale behind it."""
    (ridge,), one = config.ridge, same(model)  # type: ignore[union-attr]
    if isinstance(config, LinearHeal):
        map, scale = solve(u, r, z, one if config.toward == "identity" else 0 * one, ridge)
    elif isinstance(config, PatchHeal):
        basis = hadamard(SIZE)
        ratio = (z @ basis).abs().mean(0) / ((u + r) @ basis).abs().mean(0)
        scale = float(ratio.mean())
        map, _ = solve(u, r, (u + r) @ basis * ratio @ basis.T / scale, one, ridge)
    elif isinstance(config, RefitHeal) and one.ndim == 2:
        down = Decoder(model).down_proj(block)
        bias = torch.zeros(SIZE) if down.bias is None else down.bias.detach()
        prior = down.weight.detach().double().T
        found, scale = solve(inner, r + bias, z, prior, ridge, 1 / z.norm(dim=-1), scaled=config.scale)
        return lambda a, _m: (a @ found / scale + bias)[None], scale, found
    else:
        assert isinstance(config, RefitHeal)
        found, scale = solve(u, r, z, one, ridge, 1 / z.norm(dim=-1), scaled=config.scale)
        map = found / scale
    return lambda _a, m: through(m, map), scale, map


def stretch(model: Any, factors: Mapping[int, float], *, only: bool = False) -> list[Any]:
    """Hooks that make some blocks also multiply the stream by a factor, or do `only` that."""
    return [
        model.model.layers[block].register_forward_hook(lambda _m, args, out, f=f: (args[0] if only else out) * f)
        for block, f in factors.items()
    ]


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model: Any, expected: dict[str, Tensor], *, besides: Collection[str] = ()) -> None:
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])}
    assert changed == set(besides)
    assert not any(module._forward_hooks for module in model.modules())


def assert_logits(found: Stored, wanted: Stored, atol: float) -> None:
    for a, b in zip(found["logits"][0], wanted["logits"][0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def apart(a: Stored, b: Stored) -> float:
    return float((a["logits"][0][0] - b["logits"][0][0]).abs().max())


class Bars(Progress):
    """Counts; gives up at a bar of the name `until`."""

    def __init__(self, until: str = "") -> None:
        self.counts: dict[str, int] = {}
        self.until = until

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        def advance(n: int = 1, note: str = "") -> None:
            if label == self.until:
                raise KeyboardInterrupt
            self.counts[label] = self.counts.get(label, 0) + n

        yield advance


@pytest.mark.parametrize("name", MODELS)
def test_linear_is_the_least_squares_map(build: Any, name: str) -> None:
    """A full map in `down_proj`, or, behind Gemma's norm, a scale per channel in that norm's weight."""
    model, ids = build(name), rows()
    before, whole = state(model), store(model, ids)
    _, u, r, z = parts(whole, whole, (2, 3))
    map, _ = solve(u, r, z, same(model), 1e-9)
    assert (map - same(model)).abs().max() > 0.1
    (record,) = heal(model, [3, 2], packed(ids), LinearHeal(ridge=[1e-9]))
    assert (record.block, record.gap, record.tokens, record.scale) == (1, (2, 3), TOKENS, 1.0)
    place = "post_feedforward_layernorm" if name == "gemma3" else "mlp.down_proj"
    changed = [f"model.layers.1.{place}.{end}" for end in ("weight", *(["bias"] if name == "biased" else []))]
    assert_state(model, before, besides=changed)
    for key in changed:
        old = before[key].double()
        wanted = (1 + old) * map - 1 if name == "gemma3" else map.T @ old
        torch.testing.assert_close(model.state_dict()[key].double(), wanted, rtol=2e-4, atol=2e-5)
    drop_blocks(model, [2, 3])
    fused, model = store(model, ids), build(name)
    assert_logits(fused, store(model, ids, [2, 3], {1: lambda _a, m: through(m, map)}), atol=2e-4)
    assert apart(fused, store(model, ids, [2, 3])) > 0.1


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("name", ["llama", "phi3", "biased", "gemma3"])
def test_refit_is_one_weighted_least_squares_problem(build: Any, name: str, scale: bool) -> None:
    """W and s of Σ ‖a·W + s·r − z‖²/‖z‖² + α‖W − s·W₀‖²; and that the stream is not multiplied by s, but later blocks
    add 1/s as much, changes nothing (to 1e-3 of logits up to 5: float32, and norms' eps beside a mean square that is
    1/s² as large)."""
    model, ids, config = build(name), rows(), RefitHeal(ridge=[1e-3], scale=scale)
    hooks = stretch(model, {4: 2.0})
    before, whole = state(model), store(model, ids)
    change, wanted, solution = reference(config, model, 1, *parts(whole, whole, (2, 4)))
    assert 1.2 < wanted < 2.5 if scale else wanted == 1
    (record,) = heal(model, [2, 3, 4], packed(ids), config)
    hooks[0].remove()
    assert record.scale == pytest.approx(wanted, rel=1e-5) and record.tokens == TOKENS
    norms = ["post_attention_layernorm.weight", "post_feedforward_layernorm.weight"]
    linears = ["self_attn.o_proj.weight", "mlp.down_proj.weight"]
    if name == "biased":
        linears += ["self_attn.o_proj.bias", "mlp.down_proj.bias"]
    place = norms[1] if name == "gemma3" else linears[1]
    later = [f"model.layers.{n}.{key}" for n in (5, 6, 7) for key in (norms if name == "gemma3" else linears)]
    assert_state(model, before, besides=[f"model.layers.1.{place}", *(later if scale else [])])
    found = model.model.layers[1].get_parameter(place).double()
    fused = (1 + before[f"model.layers.1.{place}"].double()) * solution - 1 if name == "gemma3" else solution.T / wanted
    torch.testing.assert_close(found, fused, rtol=1e-3, atol=1e-4)
    drop_blocks(model, [2, 3, 4])
    healed, model = store(model, ids), build(name)
    assert_logits(healed, store(model, ids, [2, 3, 4], {1: change}, {1: wanted}), atol=1e-3)
    assert apart(healed, store(model, ids, [2, 3, 4], {1: change})) > 0.1 or not scale
    assert apart(healed, store(model, ids, [2, 3, 4])) > 0.1


@pytest.mark.parametrize(
    ("kind", "options"),
    [(LinearHeal, {}), (LinearHeal, {"toward": "zero"}), (RefitHeal, {}), (RefitHeal, {"scale": False})],
)
@pytest.mark.parametrize("count", [3, 12])
def test_held_out_rows_choose_the_ridge(build: Any, kind: Any, options: dict[str, Any], count: int) -> None:
    """Every fourth row is held out (of three the last one); all rows are fitted with the ridge that those prefer."""
    model, ids, ridges = build(), rows(count), [1e-6, 1e-3, 1.0, 1e3]
    whole = store(model, ids)
    held = [3, 7, 11] if count == 12 else [2]
    fit_on = [i for i in range(count) if i not in held]
    inner, u, r, z = parts(whole, whole, (3, 3), held)
    weight = 1 / z.norm(dim=-1, keepdim=True) if kind is RefitHeal else 1.0
    size = ((z - r) * weight).square().sum()
    errors = {}
    for ridge in ridges:
        config = kind(ridge=[ridge], **options)
        change, scale, _ = reference(config, model, 2, *parts(whole, whole, (3, 3), fit_on))
        missed = scale * (change(inner, u) + r) - z
        errors[f"{ridge:g}"] = float((missed * weight).square().sum() / size)
    (record,) = heal(model, [3], packed(ids), kind(ridge=ridges, held_out=0.25, **options))
    assert record.errors == pytest.approx(errors, rel=1e-4)
    assert f"{record.ridge:g}" == min(errors, key=lambda ridge: errors[ridge])
    if kind is LinearHeal:
        assert record.ridge == (1e-3 if count == 12 else 1.0)  # few rows ask for a strong pull, many for a weak one
    assert record.unhealed_error == pytest.approx(float(((u + r - z) * weight).square().sum() / size), rel=1e-4)
    change, scale, _ = reference(kind(ridge=[record.ridge], **options), build(), 2, *parts(whole, whole, (3, 3)))
    assert record.scale == pytest.approx(scale, rel=1e-4)
    drop_blocks(model, [3])
    assert_logits(store(model, ids), store(build(), ids, [3], {2: change}, {2: scale}), atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "biased", "gemma3"])
@pytest.mark.parametrize("kind", [LinearHeal, PatchHeal, RefitHeal])
def test_several_gaps_are_healed_each_behind_the_healed_ones(build: Any, name: str, kind: Any) -> None:
    """And where gaps before have scaled the stream, towards the unpruned model's divided by all of their scales."""
    dropped, ids, config, model = [6, 1, 4, 3], rows(), kind(ridge=[1e-3]), build(name)
    hooks = stretch(model, {1: 2.0, 4: 1.5, 6: 0.6})
    whole, behind = store(model, ids), store(model, ids)
    changes: dict[int, Change] = {}
    scales: dict[int, float] = {}
    skip: list[int] = []
    for first, last in [(1, 1), (3, 4), (6, 6)]:
        block = first - 1
        changes[block], scales[block], _ = reference(config, model, block, *parts(whole, behind, (first, last)))
        skip += range(first, last + 1)
        behind = store(model, ids, skip, changes, scales)
    assert kind is LinearHeal or all(abs(scale - 1) > 0.2 for scale in list(scales.values())[:2])
    progress = Bars()
    report = heal(model, dropped, packed(ids), config, progress)
    assert [(r.block, r.gap) for r in report] == [(0, (1, 1)), (2, (3, 4)), (5, (6, 6))]
    assert [r.scale for r in report] == pytest.approx(list(scales.values()), rel=1e-4)
    passes = 2 if kind is PatchHeal else 1
    assert progress.counts == {f"healing gap {n} of 3": passes * TOKENS for n in (1, 2, 3)}
    for hook in hooks:
        hook.remove()
    drop_blocks(model, dropped)
    found = store(model, ids)
    assert_logits(found, behind, atol=2e-3)
    change, scale, _ = reference(config, build(name), 5, *parts(whole, whole, (6, 6)))
    alone = store(build(name), ids, skip, {**changes, 5: change}, {**scales, 5: scale})
    assert apart(found, alone) > 0.01  # the third gap is another problem behind healed ones


@pytest.mark.parametrize("name", ["llama", "biased", "gemma3"])
@pytest.mark.parametrize("kind", [PatchHeal, RefitHeal])
def test_gaps_that_only_scale_the_stream_are_closed_exactly(build: Any, name: str, kind: Any) -> None:
    """Blocks made to multiply the stream by 3 and by 0.4: without them, the healed model is the unpruned one (to 1e-3
    of logits up to 5, for float32 and norms' eps)."""
    model, ids = build(name), rows()
    stretch(model, {2: 3.0, 5: 0.4}, only=True)
    with torch.no_grad():
        wanted = [model(torch.tensor([row])).logits[0].double() for row in ids]
    report = heal(model, [2, 5], packed(ids), kind())
    assert [record.scale for record in report] == pytest.approx([3.0, 0.4], rel=1e-5)
    assert max(min(record.errors.values()) for record in report) < 1e-9
    drop_blocks(model, [2, 5])
    assert_logits(store(model, ids), {"logits": [wanted]}, atol=1e-3)
    drop_blocks(unhealed := build(name), [2, 5])
    assert (store(unhealed, ids)["logits"][0][0] - wanted[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", KINDS)
def test_neither_padding_nor_packing_enters_the_fit(build: Any, kind: Any, name: str) -> None:
    """Other padding changes no bit; two rows per sequence change only rounding, as long as nothing is chosen."""
    healed = []
    for pad, length in ((9, 48), (250, 48), (9, 96)):
        model = build(name)
        batches = packed(rows(), pad, length)
        config = CosineHeal(ridge=[1e-2], iterations=1) if kind is CosineHeal else kind(ridge=[1e-2])
        (record,) = heal(model, [2, 3], batches, config)
        healed.append((record, state(model), sum(len(batch.input_ids) for batch in batches)))
    assert [count for *_, count in healed] == [12, 12, 6]
    assert healed[0][0] == healed[1][0] and healed[2][0].tokens == TOKENS
    for key, value in healed[0][1].items():
        assert torch.equal(value, healed[1][1][key])
        torch.testing.assert_close(value, healed[2][1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", [NoHeal, *KINDS])
def test_nothing_dropped_changes_nothing(build: Any, kind: Any, name: str) -> None:
    model = build(name)
    before = state(model)
    assert heal(model, [], packed(rows(1)), kind()) == []
    assert heal(model, [2], packed(rows(1)), NoHeal()) == []
    assert_state(model, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dropped", "count", "message"),
    [
        ([7], 4, "and the last block must stay"),
        ([1, 4, 7], 4, "and the last block must stay"),
        ([0, 1], 4, "heal: {kind} needs a kept block before each gap"),
        ([0, 3], 4, "heal: {kind} needs a kept block before each gap"),
        ([2], 1, r"at least two packed calibration rows; raise prune\.calibration\.tokens"),
        ([2, 4], 4, r"no solution on \d+ tokens; give prune\.heal\.ridge larger values"),  # at its second gap
    ],
)
def test_what_cannot_be_healed_is_refused_and_left_alone(
    build: Any, kind: Any, dropped: list[int], count: int, message: str
) -> None:
    model = build()
    model.model.layers[3].mlp.up_proj.weight.data.zero_()  # this MLP is given zeros, and adds zeros
    before = state(model)
    with pytest.raises(UserError, match=message.format(kind=kind().kind) if "{kind}" in message else message):
        heal(model, dropped, packed(rows(count)), kind())
    assert_state(model, before)


@pytest.mark.parametrize("name", ["biased", "gemma3"])
@pytest.mark.parametrize("kind", KINDS)
def test_fitting_leaves_the_model_as_it_is(build: Any, kind: Any, name: str) -> None:
    """Values come back for `replaced`, in which the model is the healed one; also where a fit is given up half-way."""
    model, ids = build(name), rows(4)
    before, config = state(model), kind(ridge=[1e-2])
    values, report = fit_gaps(model, [2, 5], packed(ids), config, Progress())
    assert_state(model, before)
    other = build(name)
    assert heal(other, [2, 5], packed(ids), config) == report
    with replaced(values):
        assert_state(model, state(other))
    assert_state(model, before)

    with pytest.raises(KeyboardInterrupt):
        fit_gaps(model, [2, 5], packed(ids), config, Bars(until="healing gap 2 of 2"))
    assert_state(model, before)
    assert model.config.num_hidden_layers == len(model.model.layers) == 8


@pytest.mark.parametrize("name", ["biased", "gemma3"])
def test_what_the_mlp_adds_is_seen_and_the_hooks_go(build: Any, name: str) -> None:
    model, ids = build(name), rows(1)
    before, whole = state(model), store(model, ids)
    with pytest.raises(ZeroDivisionError), Decoder(model).mlp_addition(2) as seen:
        model(input_ids=torch.tensor(ids), use_cache=False)
        raise ZeroDivisionError
    for part in ("inner", "mlp"):
        assert torch.equal(seen[part][0].double(), whole[part][2][0])
    assert_state(model, before)


def test_gaps_are_runs_of_adjacent_blocks() -> None:
    assert gaps([]) == []
    assert gaps([7, 2, 3, 5, 4]) == [(2, 5), (7, 7)]
