"""Products by oneDNN against torch's own in float64: values, gradients, and when they are not for it."""

from __future__ import annotations

import copy

import pytest
import torch
from compress.modeling import linear as module
from compress.modeling.linear import SMALLEST, Linear, linear
from compress.modeling.load import load_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

ROWS, COLUMNS = 512, 300  # more weights than SMALLEST, and no multiple of any vector's length


@pytest.fixture
def products(monkeypatch) -> list[torch.Size]:
    """The shapes of what oneDNN has multiplied."""
    assert ROWS * COLUMNS >= SMALLEST
    seen, plain = [], module._product

    def counted(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(inputs.shape)
        return plain(inputs, weight, bias)

    monkeypatch.setattr(module, "_product", counted)
    return seen


def operands(*shape: int, bias: bool = True) -> list[Tensor | None]:
    torch.manual_seed(0)
    made = [torch.randn(*shape, COLUMNS), torch.randn(ROWS, COLUMNS), torch.randn(ROWS) if bias else None]
    return [None if tensor is None else tensor.requires_grad_() for tensor in made]


@pytest.mark.skipif(not module._available(), reason="oneDNN is used on x86 alone")
class TestOneDnn:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (2, 1, 4)])
    def test_values_and_gradients_are_torchs(self, products, shape, bias):
        mine = operands(*shape, bias=bias)
        exact = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in mine]
        weights = torch.randn(*shape, ROWS)
        found, wanted = linear(*mine), functional.linear(*exact)  # type: ignore[arg-type]
        assert found.shape == wanted.shape and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
        (found * weights).sum().backward()
        (wanted * weights.double()).sum().backward()
        for own, true in zip(mine, exact, strict=True):
            if own is not None and true is not None:
                assert own.grad is not None and true.grad is not None
                torch.testing.assert_close(own.grad.double(), true.grad, rtol=1e-4, atol=3e-4)
        assert len(products) == 3  # the value, and the gradients of inputs and weight

    def test_views_and_spread_gradients(self, products):
        inputs, weight, _ = operands(6, 4)
        assert inputs is not None and weight is not None
        turned = linear(inputs.transpose(0, 1), weight)
        torch.testing.assert_close(turned, functional.linear(inputs, weight).transpose(0, 1), rtol=1e-5, atol=1e-4)
        turned.sum().backward()  # a gradient whose numbers are all one
        torch.testing.assert_close(inputs.grad, weight.sum(0).expand(6, 4, -1), rtol=1e-4, atol=3e-4)
        narrow = linear(torch.randn(4, ROWS), weight.t())  # the other way round
        assert narrow.shape == (4, COLUMNS) and len(products) == 4

    def test_what_is_frozen_gets_no_gradient_and_keeps_nothing(self, products):
        inputs, weight, _ = operands(4)
        assert inputs is not None and weight is not None
        weight.requires_grad_(False)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
            out = linear(inputs, weight)
        out.sum().backward()
        assert weight.grad is None and inputs.grad is not None and len(products) == 2
        assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]  # the inputs are not needed

    def test_under_checkpointing(self, products):
        inputs, weight, bias = operands(4)
        straight = torch.autograd.grad(linear(inputs, weight, bias).square().sum(), [inputs, weight, bias])  # type: ignore[arg-type, list-item]
        again = checkpoint(linear, inputs, weight, bias, use_reentrant=False)
        for a, b in zip(straight, torch.autograd.grad(again.square().sum(), [inputs, weight, bias]), strict=True):  # type: ignore[arg-type, list-item, union-attr]
            assert torch.equal(a, b)
        assert len(products) == 7  # three, and one more forward pass

    def test_a_loaded_models_layers_use_it(self, tiny, products):
        folder = tiny(blocks=2, hidden=128, heads=4, intermediate=ROWS)
        model = load_model(folder)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert layers and {type(m) for m in layers} == {Linear}
        ids = torch.arange(20)[None] % 50
        found = model(ids).logits
        assert products
        with torch.backends.mkldnn.flags(enabled=False):
            count = len(products)
            plain = copy.deepcopy(model)(ids).logits
            assert len(products) == count
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)

    def test_it_is_for_float32_on_cpus_with_weights_enough(self, products):
        inputs, weight, bias = operands(4)
        assert inputs is not None and weight is not None and bias is not None
        for kind in (torch.float64, torch.bfloat16, torch.float16):
            given = [tensor.detach().to(kind) for tensor in (inputs, weight, bias)]
            assert torch.equal(linear(*given), functional.linear(*given))
        small = weight[:100]
        assert torch.equal(linear(inputs, small), functional.linear(inputs, small))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(inputs, weight, bias).dtype == torch.bfloat16
        assert linear(inputs[:0], weight, bias).shape == (0, ROWS)
        assert linear(inputs[0], weight, bias).shape == (ROWS,)
        with torch.device("meta"):
            assert linear(torch.empty(2, COLUMNS), torch.empty(ROWS, COLUMNS)).device.type == "meta"
        assert not products


def test_without_onednn_it_is_torchs_own(monkeypatch):
    monkeypatch.setattr(module, "_available", lambda: False)
    monkeypatch.setattr(module, "_product", lambda *_: pytest.fail("there is no oneDNN"))
    inputs, weight, bias = operands(4)
    assert torch.equal(linear(inputs, weight, bias), functional.linear(inputs, weight, bias))  # type: ignore[arg-type]
