"""Keys and values in int8: the kernel, whole models and bundles against slow references in numpy and torch."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from compress import api
from compress.cli import main as cli
from compress.cli.inspect_table import inspection_table
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs
from compress.export.config import ExportConfig
from compress.export.onnx import write_onnx
from compress.export.onnx_depths import check_family, depth_folder, extract_depth, graph_of
from compress.export.onnx_kv import CacheScales, calibrate
from compress.export.stage import export_checkpoint, run
from compress.kv.settings import KvBudget
from compress.modeling.blocks import without_blocks
from compress.modeling.families import FAMILIES
from compress.modeling.load import load_config, load_model
from compress.modeling.shape import rotated_size
from compress.runtime.block_chain import BlockChain, CachedText
from compress.runtime.bounded_text import BoundedText
from compress.runtime.bundle import read_bundle
from compress.runtime.genai_engine import GenaiEngine
from compress.runtime.generator import Request, RequestWork
from compress.runtime.onnx_engine import PREFILL_CHUNK, OnnxEngine
from compress.runtime.onnx_generator import BoundedGenerator, OnnxGenerator
from onnx import TensorProto, helper
from pydantic import ValidationError
from rich.console import Console
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IDS = [(37 * i) % 440 + 3 for i in range(60)]
COARSE = 12  # times the calibrated scales: rounding is seen in every logit, and hardly any value is near a half
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "multi-head": ("llama", {"kv_heads": 4, "tied": False, "attention_bias": True}),
    "one key-value head": ("llama", {"hidden": 80, "heads": 5, "kv_heads": 1, "intermediate": 72}),
    "mistral's window": ("mistral", {"sliding_window": 8}),
    "gemma3's windows": ("gemma3_text", {"layer_types": MIXED, "sliding_window": 8}),
}


def rounded(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(…, T, D) to whole steps of `scales` (D,), at most 127 up and 128 down."""
    return (np.clip(np.round(x / scales), -128, 127) * scales).astype(np.float32)


# The kernel


def attention(heads: int, kv_heads: int, size: int, window: int) -> onnxruntime.InferenceSession:
    """A graph that is one GroupQueryAttention with an int8 cache, no rotation."""
    cache, number = [1, kv_heads, "past", size], TensorProto.FLOAT
    wide, narrow, scales = [1, "new", heads * size], [1, "new", kv_heads * size], [kv_heads * size]
    inputs: list[tuple[str, int, list[Any]]] = [
        ("q", number, wide),
        ("k", number, narrow),
        ("v", number, narrow),
        ("past_k", TensorProto.INT8, cache),
        ("past_v", TensorProto.INT8, cache),
        ("last", TensorProto.INT32, [1]),
        ("total", TensorProto.INT32, []),
        ("k_scale", number, scales),
        ("v_scale", number, scales),
    ]
    outputs = [("out", number, wide)] + [(f"now_{n}", TensorProto.INT8, [1, kv_heads, "all", size]) for n in "kv"]
    node = helper.make_node(
        "GroupQueryAttention",
        [*(name for name, *_ in inputs[:7]), *[""] * 5, "k_scale", "v_scale"],
        [name for name, *_ in outputs],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
        local_window_size=window,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=8,
    )
    given, taken = ([helper.make_tensor_value_info(*value) for value in values] for values in (inputs, outputs))
    model = helper.make_model(
        helper.make_graph([node], "attention", given, taken),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=8,
    )
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("window", [-1, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_the_kernel_attends_to_rounded_keys_and_values(heads, kv_heads, window):
    """One token or several, with or without a past: old and new entries are those of the integers."""
    size, draw = 16, np.random.default_rng(heads)
    session = attention(heads, kv_heads, size, window)
    for past, new in ((0, 1), (0, 33), (1, 1), (37, 1), (37, 5), (300, 33)):
        scales = draw.uniform(0.01, 0.03, (2, kv_heads, 1, size)).astype(np.float32)
        q, k, v = (draw.normal(size=(n, new, size)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
        held = draw.integers(-128, 128, (2, kv_heads, past, size)).astype(np.int8)
        flat = [x.transpose(1, 0, 2).reshape(1, new, -1) for x in (q, k, v)]
        feed = dict(zip("qkv", flat, strict=True)) | {"past_k": held[:1], "past_v": held[1:]}
        feed |= {"last": np.array([past + new - 1], np.int32), "total": np.array(past + new, np.int32)}
        feed |= {"k_scale": scales[0].reshape(-1), "v_scale": scales[1].reshape(-1)}
        results: Any = session.run(None, feed)
        out, keys, values = results
        fresh = np.stack([rounded(k, scales[0]), rounded(v, scales[1])])
        seen = np.concatenate([held * scales, fresh], axis=2)
        np.testing.assert_allclose(np.stack([keys[0], values[0]]) * scales, seen, atol=1e-6)
        distance = np.arange(past + new)[None] - np.arange(past, past + new)[:, None]
        hidden = (distance > 0) | ((distance <= -window) if window > 0 else False)
        for head in range(heads):
            scores = q[head] @ seen[0, head * kv_heads // heads].T / np.sqrt(size)
            weights = np.exp(np.where(hidden, -np.inf, scores - scores.max(-1, keepdims=True)))
            expected = weights / weights.sum(-1, keepdims=True) @ seen[1, head * kv_heads // heads]
            np.testing.assert_allclose(out[0].reshape(new, heads, size)[:, head], expected, atol=2e-5)


# Whole models


def slow_logits(checkpoint: Path, ids: list[int], scales: CacheScales | None, depth: int = 4) -> np.ndarray:
    """(T, V) of transformers' own forward pass, whose attention rounds keys and values first."""

    def attend(module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float, **more: Any) -> Any:
        block, kv_heads, size = module.layer_idx, key.shape[1], key.shape[3]
        if scales is not None:
            steps = [part[block].reshape(kv_heads, 1, size) for part in (scales.keys, scales.values)]
            key, value = (torch.from_numpy(rounded(x.numpy(), s)) for x, s in zip((key, value), steps, strict=True))
        group, length = query.shape[1] // kv_heads, query.shape[2]
        weights = scaling * query @ key.repeat_interleave(group, 1).transpose(2, 3)
        distance = torch.arange(length)[None] - torch.arange(length)[:, None]
        window = more.get("sliding_window") or length
        weights = weights.masked_fill((distance > 0) | (distance <= -window), float("-inf")).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    model = load_model(checkpoint)
    ALL_ATTENTION_FUNCTIONS["slow_rounded"] = attend
    model.config._attn_implementation = "slow_rounded"
    try:
        with torch.no_grad(), without_blocks(model, range(depth, 4)):
            return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    finally:
        del ALL_ATTENTION_FUNCTIONS["slow_rounded"]


def made(checkpoint: Path, folder: Path, coarse: float = COARSE, **how: Any) -> CacheScales:
    """A float folder, and one whose cache is int8 with scales so many times as coarse as calibrated."""
    write_onnx(checkpoint, folder / "float", "fp32")
    found = calibrate(folder / "float", [IDS], rotated_size(load_config(checkpoint)), 1)
    scales = CacheScales(found.keys * np.float32(coarse), found.values * np.float32(coarse))
    write_onnx(checkpoint, folder / "int8", how.pop("precision", "fp32"), kv=scales, **how)
    return scales


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_every_family_computes_with_rounded_keys_and_values(shaken, tmp_path, inline_builder, case):
    family, options = CASES[case]
    checkpoint = shaken(family, initializer_range=0.2, **options)
    scales = made(checkpoint, tmp_path)
    expected, exact = (slow_logits(checkpoint, IDS, s) for s in (scales, None))
    with OnnxEngine(tmp_path / "float", 1) as engine:
        assert largest(engine.logits(IDS)[0], exact) < 1e-4  # the reference itself
    with OnnxEngine(tmp_path / "int8", 1) as engine:
        found, past = engine.logits(IDS)
        assert past[0].dtype == past[1].dtype == np.int8 and len(past) == 8
    assert largest(found, expected) < 1e-3
    assert largest(exact, expected) > 2e-2  # what rounding changes is far above that


def test_scales_are_the_largest_keys_and_values(shaken, tmp_path, inline_builder):
    """By transformers' cache: a value's own magnitude, and of keys the length of the pair that rotates together."""
    checkpoint = shaken("qwen3")
    rows = [IDS, [5 + 3 * i % 400 for i in range(PREFILL_CHUNK + 9)]]
    write_onnx(checkpoint, tmp_path / "float", "fp32")
    scales = calibrate(tmp_path / "float", rows, rotated_size(load_config(checkpoint)), 1)
    caches = []
    with torch.no_grad():
        for row in rows:
            caches.append(load_model(checkpoint)(torch.tensor([row]), use_cache=True).past_key_values)
    for block in range(4):
        keys, values = (torch.cat([getattr(c.layers[block], n)[0] for c in caches], 1) for n in ("keys", "values"))
        first, second = keys.chunk(2, -1)
        length = torch.complex(first, second).abs().amax(1)
        np.testing.assert_allclose(scales.keys[block] * 127, torch.cat([length, length], -1).reshape(-1), rtol=1e-4)
        np.testing.assert_allclose(scales.values[block] * 127, values.abs().amax(1).reshape(-1), rtol=1e-4)
    scales.save(tmp_path / "scales.safetensors")
    again = CacheScales.load(tmp_path / "scales.safetensors")
    np.testing.assert_array_equal(again.keys, scales.keys)
    np.testing.assert_array_equal(again.values, scales.values)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_text_has_the_same_logits_however_it_is_read(shaken, tmp_path, inline_builder, precision):
    """In passes, token by token, and after a switch of depth: to the bit, as with a float cache."""
    made(shaken(initializer_range=0.3), tmp_path, precision=precision)
    chain = BlockChain(tmp_path / "int8", (2, 4), 1)
    assert chain.kv_type is np.int8
    whole, slow = CachedText(chain), CachedText(chain)
    whole.add(IDS * 5)
    expected = {depth: whole.logits(depth, 40) for depth in (2, 4)}
    slow.add((IDS * 5)[:260])
    for i, token in enumerate((IDS * 5)[260:]):
        slow.add([token])
        depth = (2, 4)[i % 3 == 0]
        np.testing.assert_array_equal(slow.logits(depth)[0], expected[depth][i])
    assert all(cache.dtype == np.int8 for cache in slow._caches)


def test_depths_share_weights_and_scales(shaken, tmp_path, inline_builder):
    checkpoint, depths = shaken(initializer_range=0.2), [1, 3, 4]
    scales = made(checkpoint, tmp_path, depths=depths)
    check_family(tmp_path / "int8", depths)
    assert len(list((tmp_path / "int8").rglob("*.data"))) == 1
    whole = OnnxGenerator(tmp_path / "int8" / depth_folder(4, depths), depths, 1)
    for depth in depths:
        folder = tmp_path / "int8" / depth_folder(depth, depths)
        expected = slow_logits(checkpoint, IDS, scales, depth)
        with OnnxEngine(folder, 1) as engine:
            assert largest(engine.logits(IDS)[0], expected) < 1e-3
        graph = onnx.load(str(graph_of(folder)), load_external_data=False).graph
        names = {tensor.name for tensor in graph.initializer if tensor.name.endswith("_scale")}
        assert names == {f"model.layers.{i}.attn.{n}_scale" for i in range(depth) for n in "kv"}
        (tmp_path / f"one-{depth}").mkdir()
        extract_depth(folder, tmp_path / f"one-{depth}")
        with GenaiEngine(tmp_path / f"one-{depth}", 1) as engine:  # stock
            tokens = list(engine.generate(IDS, 8))
        assert tokens == list(whole.generate(Request(IDS, 8, depth), RequestWork()))


def test_a_budget_keeps_integers(shaken, tmp_path, inline_builder):
    """Entries are moved, never rounded again: as the engine given the same past by hand."""
    made(shaken(initializer_range=0.2), tmp_path)
    chain = BlockChain(tmp_path / "int8", (4,), 1)
    settings = KvBudget(8, chunk=16, stabilizers=0, local=4, policy="recent", sinks=0)
    text = BoundedText(chain, settings)
    text.begin(IDS[:36], 4)
    found = text.read_prompt(IDS[:36])
    with OnnxEngine(tmp_path / "int8", 1) as engine:
        past, read = None, 0
        for count in (16, 16, 4):
            logits, past = engine.logits(IDS[read : read + count], past, [*range(read, read + count)])
            read += count
            if count == 16:
                past = [cache[:, :, [0, 1, 2, 3, -4, -3, -2, -1]] for cache in past]  # recent keeps the first four, too
    assert past is not None and text.held == 12
    for block in range(4):
        for mine, theirs in ((text.keys, past[2 * block]), (text.values, past[2 * block + 1])):
            assert mine[block].dtype == np.int8
            off = np.abs(mine[block][:, :, :12].astype(int) - theirs)  # the added row's kernel rounds otherwise
            assert off.max() <= 1 and (off > 0).mean() < 0.01
    assert largest(found, logits[-1]) < 1e-3
    whole = OnnxGenerator(tmp_path / "int8", (4,), 1)
    large = BoundedGenerator(tmp_path / "int8", (4,), KvBudget(400, policy="recent"), 1)
    request = Request(IDS * 4, 12, 4)
    assert list(large.generate(request, RequestWork())) == list(whole.generate(request, RequestWork()))
    with pytest.raises(UserError, match=r"has an int8 cache, whose keys cannot be renumbered.*--kv-positions true"):
        BoundedText(chain, KvBudget(8, stabilizers=0, policy="recent", positions="contiguous"))


# Bundles


def config(**values: Any) -> ExportConfig:
    verify = {"tokens": 32, "window": 32} | values.pop("verify", {})
    return ExportConfig.model_validate({"verify": verify, "threads": 1, "kv": "int8"} | values)


@pytest.fixture(scope="module")
def int8_bundle(shaken, talks, builder_here, tmp_path_factory) -> Path:
    """fp32 and int4 with an int8 cache, and F16, at depths 2 and 4."""
    out = tmp_path_factory.mktemp("kv-int8") / "bundle"
    keys = {"gguf": ["F16"], "onnx": ["fp32", "int4"], "depths": [2, 4], "verify": {"kl": {"int4": 2.0}}}
    with builder_here():
        export_checkpoint(shaken(initializer_range=0.1), out, config(**keys), Context(), "tiny", rows=talks)
    return out


def test_a_bundle_says_what_a_token_takes(int8_bundle, capsys):
    manifest = read_bundle(int8_bundle, hashes=True)
    told = {entry.role: (entry.kv, entry.kv_bytes_per_token) for entry in manifest.artifacts}
    # keys and values × blocks × KV heads × head size × bytes
    assert told == {
        "gguf-F16": ("f16", 2 * 4 * 2 * 16 * 2),
        "gguf-F16@2": ("f16", 2 * 2 * 2 * 16 * 2),
        "onnx-fp32": ("int8", 2 * 4 * 2 * 16),
        "onnx-fp32@2": ("int8", 2 * 2 * 2 * 16),
        "onnx-int4": ("int8", 2 * 4 * 2 * 16),
        "onnx-int4@2": ("int8", 2 * 2 * 2 * 16),
    }
    for entry in manifest.artifacts:
        found = entry.verification
        if entry.format == "gguf":
            assert found.kv_kl is None
        else:
            assert found.kv_kl is not None and found.graph_kl is not None
            assert found.graph_kl < 1e-7 < found.kv_kl < 0.02  # the graph itself was tried with a float cache
    out = io.StringIO()
    Console(file=out, width=300).print(inspection_table(api.inspect(int8_bundle)))
    assert "0.3 kB of keys and values per token (int8)" in out.getvalue()
    card = (int8_bundle / "README.md").read_text()
    assert "0.3 kB (int8)" in card and "0.5 kB (f16)" in card
    assert "ORTModelForCausalLM" not in card  # gives every cache the type of its logits
    words = ["bench", str(int8_bundle), "--engine", "onnx", "--type", "int4", "--prompt-tokens", "8"]
    cli.app([*words, "--new-tokens", "2", "--threads", "1", "--json"], standalone_mode=False)
    depths = json.loads(capsys.readouterr().out)["depths"]
    assert {d["role"]: d["kv_bytes_per_token"] for d in depths} == {"onnx-int4": 256, "onnx-int4@2": 128}


def test_killed_exports_calibrate_once(shaken, talks, tmp_path, inline_builder, monkeypatch):
    calls: list[int] = []

    def counted(folder: Path, rows: list[list[int]], *rest: Any) -> CacheScales:
        calls.append(sum(map(len, rows)))
        return calibrate(folder, rows, *rest)

    monkeypatch.setattr("compress.export.rounded_cache.calibrate", counted)
    inputs, checkpoint = {"data": talks}, shaken()
    with pytest.raises(UserError, match=r"int8 its predictions are .* \(limit 1e-09\)\. Export with kv: float32"):
        run(config(onnx=["int4"], verify={"kv": 1e-9}), Inputs(checkpoint, checkpoint, inputs), tmp_path, Context())
    run(config(onnx=["int4"]), Inputs(checkpoint, checkpoint, inputs), tmp_path, Context())
    assert len(calls) == 1 and calls[0] > 100


def test_impossible_wishes(shaken):
    with pytest.raises(ValidationError, match="kv: int8 is for ONNX, and no type is named under onnx"):
        config(gguf=["F16"])
    with pytest.raises(ValidationError, match="kv"):
        config(onnx=["int4"], kv="int4")


def test_broken_checkpoints_have_no_scales(shaken, tmp_path, inline_builder):
    checkpoint = shaken()
    write_onnx(checkpoint, tmp_path / "m", "fp32")
    file = tmp_path / "m" / "model.onnx.data"
    data = np.fromfile(file, np.float32)
    data[:] = np.nan
    data.tofile(file)
    with pytest.raises(UserError, match="infinite or no numbers"):
        calibrate(tmp_path / "m", [IDS], 16, 1)
