"""Drafts and early exit of the real SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compress.export.onnx import write_onnx
from compress.runtime.block_chain import CachedText
from compress.runtime.generator import Request, RequestWork
from compress.runtime.onnx_engine import OnnxEngine
from compress.runtime.onnx_generator import OnnxGenerator
from compress.runtime.text import Tokenizer


@pytest.fixture(scope="module")
def real_int4(smollm2, builder_here, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "int4"
    with builder_here():
        write_onnx(smollm2, folder, "int4")
    return folder


def rounds_alike() -> bool:
    """Whether the processor has the matrix kernels that round a row alone as among others."""
    found = Path("/proc/cpuinfo")
    return found.exists() and "avx512f" in found.read_text().split()


@pytest.mark.real
def test_the_real_model_drafts_and_exits_to_the_bit(real_int4, smollm2):
    """int4 rounds activations to 8 bits: the least difference between passes would grow to half a unit of logits. On
    processors without AVX-512 it does, and what is written must be what any pass could have written: near ties."""
    depths = (12, 24, 30)
    apart = 0.0 if rounds_alike() else 2.0  # logits
    tokenizer = Tokenizer(smollm2)
    text = "The lighthouse keeper woke before dawn, because the sea had changed its voice. He"
    ids = tokenizer.encode(text)
    with OnnxGenerator(real_int4, depths, 1) as generator:

        def logits(written: list[int]) -> np.ndarray:
            whole = CachedText(generator._chain)
            whole.add(ids + written)
            return whole.logits(30, len(ids) + len(written))

        plain = list(generator.generate(Request(ids, 40, 30), RequestWork()))
        rows = logits(plain)
        ways: list[dict[str, Any]] = [{"draft_depth": 12}, {"draft_depth": 24}, {"exits": {12: 1.0, 24: 1.0}}]
        for options in ways:
            work = RequestWork()
            written = list(generator.generate(Request(ids, 40, 30, **options), work))
            assert "exits" in options or work.drafted > 40
            if apart == 0:
                assert written == plain
            seen = logits(written)[len(ids) - 1 : -1]
            assert len(seen) == len(written) == 40
            assert (seen.max(1) - seen[range(40), written]).max() <= apart
        lazy = CachedText(generator._chain)
        for number, token in enumerate(ids + plain):
            lazy.add([token])
            lazy.logits(depths[number % 2])
        np.testing.assert_allclose(lazy.logits(30, 1), rows[-1:], rtol=0, atol=apart)
    with OnnxEngine(real_int4, 1) as stock:  # the graph as it is shipped, the whole text in one pass
        np.testing.assert_allclose(stock.logits(ids + plain)[0], rows, rtol=0, atol=apart)
