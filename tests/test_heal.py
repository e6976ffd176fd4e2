"""Linear healing against least squares on stored activations, in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.data.chat import Encoded
from compress.data.packing import Batch, pack
from compress.errors import UserError
from compress.modeling.blocks import Decoder, drop_blocks
from compress.modeling.load import load_model
from compress.prune.config import LinearHeal
from compress.prune.heal import capture, gaps, heal_linear, replaced
from torch import Tensor

SIZES = [40, 33, 48, 29, 37, 45, 26, 44, 31, 48, 39, 28]  # none fits beside another: row i is packed sequence i
SIZE = 32
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3"]


def rows(count: int = len(SIZES)) -> list[list[int]]:
    draw = random.Random(11)
    return [[draw.randrange(3, 300) for _ in range(size)] for size in SIZES[:count]]


def packed(ids: list[list[int]], pad: int = 9) -> list[Batch]:
    batches = pack([Encoded(row, [True] * len(row)) for row in ids], 48, 5, pad)
    assert sum(len(batch.input_ids) for batch in batches) == len(ids)
    return batches


@pytest.fixture
def build(tiny: Callable[..., Path]) -> Callable[..., Any]:
    def make(family: str = "llama", blocks: int = 6, **options: Any) -> Any:
        folder = tiny(family, blocks=blocks, hidden=SIZE, heads=2, kv_heads=1, intermediate=48, **options)
        model = load_model(folder)
        if options.get("mlp_bias"):
            draw = torch.Generator().manual_seed(3)
            for layer in model.model.layers:
                layer.mlp.down_proj.bias.data.normal_(generator=draw)
        return model

    return make


def store(
    model: Any, ids: list[list[int]], skip: Collection[int] = (), maps: Mapping[int, Tensor] | None = None
) -> dict[str, list[list[Tensor]]]:
    """ "mlp" and "output" of every block for each row, float64; some blocks skipped, some MLPs followed by a map.

    Every row runs alone, unpadded. The model is left as it was.
    """
    layers, handles = model.model.layers, []
    seen: dict[str, list[list[Tensor]]] = {name: [[] for _ in layers] for name in ("mlp", "output", "logits")}

    def on_mlp(number: int) -> Any:
        def hook(_m: Any, _a: Any, out: Tensor) -> Tensor | None:
            seen["mlp"][number].append(out[0].double())
            return (out.double() @ maps[number]).to(out.dtype) if maps and number in maps else None

        return hook

    def on_block(number: int) -> Any:
        def hook(_m: Any, args: Any, out: Tensor) -> Tensor | None:
            seen["output"][number].append(out[0].double())
            return args[0] if number in skip else None

        return hook

    for number, layer in enumerate(layers):
        handles += [layer.mlp.register_forward_hook(on_mlp(number)), layer.register_forward_hook(on_block(number))]
    with torch.no_grad():
        for row in ids:
            seen["logits"][0].append(model(input_ids=torch.tensor([row]), use_cache=False).logits[0])
    for handle in handles:
        handle.remove()
    return seen


def fit(m: Tensor, d: Tensor, ridge: float, toward: str = "identity") -> Tensor:
    """argmin ‖M·T − D‖² + α‖T − T₀‖² as one plain least-squares problem; α = ridge · ‖M‖² / H."""
    weight = (ridge * m.square().sum() / SIZE).sqrt() * torch.eye(SIZE, dtype=torch.float64)
    below = weight if toward == "identity" else torch.zeros_like(weight)
    return torch.linalg.lstsq(torch.cat([m, weight]), torch.cat([d, below]), driver="gelsd").solution


def problem(whole: dict[str, Any], behind: dict[str, Any], gap: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """M and D of each row: from the pruned model's block before the gap towards the whole model's last dropped one."""
    mlp, output = behind["mlp"][gap[0] - 1], behind["output"][gap[0] - 1]
    return mlp, [z - (o - m) for z, o, m in zip(whole["output"][gap[1]], output, mlp, strict=True)]


def silent(n: int = 1, note: str = "") -> None:
    return None


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model: Any, expected: dict[str, Tensor], *, besides: Collection[str] = ()) -> None:
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])}
    assert changed == set(besides)


@pytest.mark.parametrize(("family", "options"), [*((f, {}) for f in FAMILIES), ("llama", {"mlp_bias": True})])
def test_the_healed_model_applies_the_least_squares_map(build: Any, family: str, options: dict[str, Any]) -> None:
    model, ids = build(family, **options), rows()
    before = state(model)
    whole = store(model, ids)
    m, d = problem(whole, whole, (2, 3))
    transform = fit(torch.cat(m), torch.cat(d), 1e-9)
    assert (transform - torch.eye(SIZE)).abs().max() > 0.1
    (record,) = heal_linear(model, [2, 3], packed(ids), LinearHeal(ridge=[1e-9]), silent)
    assert (record.block, record.gap, record.tokens) == (1, (2, 3), sum(SIZES))
    changed = ["model.layers.1.mlp.down_proj." + name for name in ("weight", *(["bias"] if options else []))]
    assert_state(model, before, besides=changed)
    for name in changed:
        torch.testing.assert_close(
            model.state_dict()[name].double(), transform.T @ before[name].double(), rtol=2e-4, atol=2e-5
        )
    drop_blocks(model, [2, 3])
    fused = store(model, ids)["logits"][0]
    model = build(family, **options)
    for found, wanted in zip(fused, store(model, ids, [2, 3], {1: transform})["logits"][0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    assert (fused[0] - store(model, ids, [2, 3])["logits"][0][0]).abs().max() > 0.1


@pytest.mark.parametrize("toward", ["identity", "zero"])
@pytest.mark.parametrize(("count", "ridge"), [(3, 1.0), (12, 1e-3)])
def test_held_out_rows_choose_the_ridge(build: Any, count: int, ridge: float, toward: Any) -> None:
    """Few rows ask for a strong pull, many for a weak one; every fourth row is held out, then all rows are fitted."""
    model, ids, candidates = build(), rows(count), [1e-6, 1e-3, 1.0, 1e3]
    config = LinearHeal(ridge=candidates, held_out=0.25, toward=toward)
    whole = store(model, ids)
    m, d = problem(whole, whole, (3, 3))
    every = min(4, count)
    held = range(every - 1, count, every)
    m_fit, d_fit = (torch.cat([part for i, part in enumerate(parts) if i not in held]) for parts in (m, d))
    m_held, d_held = (torch.cat([parts[i] for i in held]) for parts in (m, d))
    size = d_held.square().sum()
    errors = {r: float((m_held @ fit(m_fit, d_fit, r, toward) - d_held).square().sum() / size) for r in candidates}
    before = model.model.layers[2].mlp.down_proj.weight.detach().clone()
    (record,) = heal_linear(model, [3], packed(ids), config, silent)
    assert record.errors == pytest.approx({f"{r:g}": error for r, error in errors.items()}, rel=1e-4)
    assert record.ridge == min(errors, key=lambda r: errors[r]) == ridge
    assert record.unhealed_error == pytest.approx(float((m_held - d_held).square().sum() / size), rel=1e-4)
    wanted = fit(torch.cat(m), torch.cat(d), record.ridge, toward).T @ before.double()
    torch.testing.assert_close(model.model.layers[2].mlp.down_proj.weight.double(), wanted, rtol=1e-3, atol=1e-4)


def test_several_gaps_are_healed_each_behind_the_healed_ones(build: Any) -> None:
    dropped, ids = [6, 1, 4, 3], rows()
    model = build(blocks=8)
    weights = [layer.mlp.down_proj.weight.detach().clone() for layer in model.model.layers]
    whole, maps, skip = store(model, ids), {}, []
    for first, last in [(1, 1), (3, 4), (6, 6)]:
        m, d = problem(whole, store(model, ids, skip, maps), (first, last))
        maps[first - 1] = fit(torch.cat(m), torch.cat(d), 1e-4)
        skip += range(first, last + 1)
    m, d = problem(whole, whole, (6, 6))
    alone = fit(torch.cat(m), torch.cat(d), 1e-4)
    assert (maps[5] - alone).abs().max() > 0.05  # the third gap is another problem behind healed ones
    seen: list[int] = []
    report = heal_linear(model, dropped, packed(ids), LinearHeal(ridge=[1e-4]), lambda n=1, note="": seen.append(n))
    assert [(r.block, r.gap) for r in report] == [(0, (1, 1)), (2, (3, 4)), (5, (6, 6))]
    assert sum(seen) == 3 * sum(SIZES)
    for number, layer in enumerate(model.model.layers):
        found = layer.mlp.down_proj.weight
        if number in maps:
            wanted = maps[number].T @ weights[number].double()
            torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(found, weights[number])


def test_padding_never_enters_the_fit(build: Any) -> None:
    healed = []
    for pad in (9, 250):
        model = build()
        (record,) = heal_linear(model, [2], packed(rows(), pad), LinearHeal(), silent)
        healed.append((record, model.model.layers[1].mlp.down_proj.weight))
    assert healed[0][0] == healed[1][0] and torch.equal(healed[0][1], healed[1][1])


def test_nothing_dropped_changes_nothing(build: Any) -> None:
    for family in ("llama", "gemma3_text"):
        model = build(family)
        before = state(model)
        assert heal_linear(model, [], packed(rows(1)), LinearHeal(), silent) == []
        assert_state(model, before)


@pytest.mark.parametrize(
    ("family", "dropped", "count", "message"),
    [
        ("llama", [5], 4, "the last block must stay"),
        ("llama", [1, 4, 5], 4, "the last block must stay"),
        ("llama", [0, 1], 4, "needs a kept block before each gap"),
        ("llama", [0, 3], 4, "needs a kept block before each gap"),
        ("gemma3_text", [2], 4, r"cannot be fused into a gemma3_text model.*use heal: none"),
        ("llama", [2], 1, r"at least two packed calibration rows; raise prune\.calibration\.tokens"),
    ],
)
def test_what_cannot_be_healed_is_refused_and_left_alone(
    build: Any, family: str, dropped: list[int], count: int, message: str
) -> None:
    model = build(family)
    before = state(model)
    with pytest.raises(UserError, match=message):
        heal_linear(model, dropped, packed(rows(count)), LinearHeal(), silent)
    assert_state(model, before)


def test_a_singular_fit_is_refused(build: Any) -> None:
    model = build()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    with pytest.raises(UserError, match=r"no solution with the ridge 0\.1 on \d+ tokens"):
        heal_linear(model, [2], packed(rows(4)), LinearHeal(ridge=[0.1]), silent)


def test_replaced_and_capture_restore_everything(build: Any) -> None:
    model = build(mlp_bias=True)
    decoder, before, ids = Decoder(model), state(model), rows(1)
    transform = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = store(model, ids, maps={1: transform, 3: 2 * transform})["logits"][0][0]
    untouched = store(model, ids)

    class Stop(Exception):
        pass

    with pytest.raises(Stop), capture(decoder, (3, 4)) as seen, replaced(decoder, {1: transform, 3: 2 * transform}):
        found = store(model, ids)["logits"][0][0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(found, untouched["logits"][0][0], atol=0.1)
        raise Stop
    assert sorted(seen) == ["mlp", "output", "target"]
    assert_state(model, before)
    assert not any(module._forward_hooks for module in model.modules())
    with capture(decoder, (3, 4)) as seen:
        decoder.hidden(input_ids=torch.tensor(ids))
    for name, (kind, block) in {"mlp": ("mlp", 2), "output": ("output", 2), "target": ("output", 4)}.items():
        assert torch.equal(seen[name][0].double(), untouched[kind][block][0])


def test_gaps_are_runs_of_adjacent_blocks() -> None:
    assert gaps([]) == []
    assert gaps([7, 2, 3, 5, 4]) == [(2, 5), (7, 7)]
