"""Bundles with retaining heads: made, verified, described, extracted from, and run at a budget."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import compress.export.onnx_retaining as onnx_retaining
import gguf
import numpy as np
import onnx
import pytest
import torch
from compress import api
from compress.cli import main as cli
from compress.cli.inspect_table import inspection_table
from compress.core.errors import UserError
from compress.core.stage import Context
from compress.export.config import ExportConfig
from compress.export.extract import extract
from compress.export.onnx import write_onnx
from compress.export.stage import export_checkpoint
from compress.kv.settings import HeadSettings, KvBudget, choose_budget
from compress.modeling.blocks import Decoder
from compress.modeling.checkpoint import link_files
from compress.modeling.load import load_config, load_model
from compress.modeling.retaining import RetainingHeads, load_heads, save_heads
from compress.modeling.shape import AttentionShape
from compress.runtime.bundle import read_bundle
from compress.runtime.onnx_engine import OnnxEngine
from compress.runtime.session import Session, Settings, depth_artifacts
from rich.console import Console
from safetensors.numpy import load_file

IDS = [(37 * i) % 440 + 3 for i in range(60)]
MADE_FOR = HeadSettings(budget=24, chunk=12, stabilizers=6, local=8)


@pytest.fixture(scope="module")
def checkpoint(shaken, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kv") / "checkpoint"
    link_files(shaken("qwen2", initializer_range=0.2), folder)
    config = load_config(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        save_heads(RetainingHeads(config.num_hidden_layers, AttentionShape.of(config), 24), MADE_FOR, folder)
    return folder


@pytest.fixture
def kv_bundle(checkpoint, inline_builder) -> Path:
    """Made once."""
    out = checkpoint.with_name("bundle")
    if out.exists():
        return out
    verify = {"tokens": 32, "window": 32, "kl": {"int4": 2.0}}
    config = ExportConfig.model_validate(
        {"gguf": ["F16"], "onnx": ["int4", "fp32"], "depths": [2, 4], "verify": verify}
    )
    export_checkpoint(checkpoint, out, config, Context(), "tiny")
    return out


def compress(*arguments: object) -> None:
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


def torch_scores(checkpoint: Path) -> list[np.ndarray]:
    model = load_model(checkpoint)
    heads = load_heads(checkpoint, model.config)
    with torch.no_grad(), Decoder(model).projections() as seen:
        model(torch.tensor([IDS]))
        return [heads.score(block, seen[block])[0].numpy() for block in range(4)]


def test_every_depths_graph_scores_its_blocks(kv_bundle, checkpoint):
    expected, manifest = torch_scores(checkpoint), read_bundle(kv_bundle, hashes=True)
    for kind, tolerance in (("fp32", 1e-5), ("int4", 0.5)):
        for depth, entry in depth_artifacts(manifest, "onnx", kind).items():
            with OnnxEngine(kv_bundle / entry.path, 1) as engine:
                found = engine.retaining_scores(IDS)
            assert len(found) == depth and found[0].shape == (60, 2) and found[0].dtype == np.float32
            for mine, theirs in zip(found, expected, strict=False):
                assert np.sqrt(np.mean((mine - theirs) ** 2) / np.mean(theirs**2)) < tolerance
            agreement = entry.verification.retaining_agreement
            assert agreement is not None and 0.5 < agreement <= 1 and (kind == "int4" or agreement > 0.99999)
    folder = kv_bundle / depth_artifacts(manifest, "onnx", "int4")[4].path
    graph = onnx.load(str(folder / "model.onnx")).graph
    heads = [tensor for tensor in graph.initializer if tensor.name.startswith("retaining.")]
    assert len(heads) == 8 and {tensor.data_type for tensor in heads} == {onnx.TensorProto.FLOAT}


def test_what_the_heads_take_is_not_counted_as_bits_of_the_weights(shaken, kv_bundle, tmp_path, inline_builder):
    info = write_onnx(shaken("qwen2", initializer_range=0.2), tmp_path / "plain", "int4")
    entry = depth_artifacts(read_bundle(kv_bundle), "onnx", "int4")[4]
    assert entry.bits_per_weight == pytest.approx(info.bits_per_weight, abs=0.02)
    assert entry.bytes > info.bytes + 4 * 4 * 24 * 128


def test_the_bundle_holds_the_heads(kv_bundle, checkpoint):
    entry = read_bundle(kv_bundle).retaining
    assert entry is not None and entry.width == 24
    assert (entry.budget, entry.chunk, entry.stabilizers, entry.local, entry.pool, entry.sinks) == (24, 12, 6, 8, 9, 4)
    plain = load_file(kv_bundle / entry.path)
    for name, value in load_file(checkpoint / "retaining" / "heads.safetensors").items():
        np.testing.assert_array_equal(plain[name], value)
    assert json.loads((kv_bundle / "retaining" / "settings.json").read_text())["budget"] == 24
    reader = gguf.GGUFReader(kv_bundle / entry.gguf)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == len(plain) == 8
    for block in range(4):
        for part in (1, 2):
            np.testing.assert_array_equal(
                tensors[f"blk.{block}.retain_{part}.weight"], plain[f"blocks.{block}.w{part}.weight"]
            )
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert values["general.architecture"] == "compress-retain"
    names = ("budget", "chunk", "stabilizers", "local", "pool", "sinks", "width", "block_count")
    assert [values[f"compress.retain.{name}"] for name in names] == [24, 12, 6, 8, 9, 4, 24, 4]


def test_a_wrong_graph_is_not_delivered(checkpoint, tmp_path, inline_builder, monkeypatch):
    """Scores read behind the projections' bias of another block; heads that were rounded."""
    config = ExportConfig.model_validate({"onnx": ["fp32"], "verify": {"tokens": 32, "window": 32}})
    projected, weight = onnx_retaining._projected, onnx_retaining._weight
    monkeypatch.setattr(onnx_retaining, "_projected", lambda m, a, s: projected(m, a, s).producer().inputs[0])
    with pytest.raises(UserError, match="onnx-fp32: its retaining scores differ"):
        export_checkpoint(checkpoint, tmp_path / "a", config, Context())
    monkeypatch.setattr(onnx_retaining, "_projected", projected)

    def rounded(model: Any, block: int, part: str, head: Any) -> Any:
        value = weight(model, block, part, head)
        value.const_value.numpy()[:] = value.const_value.numpy().astype(np.float16)
        return value

    monkeypatch.setattr(onnx_retaining, "_weight", rounded)
    with pytest.raises(UserError, match=r"retaining head blocks\.0\.w1\.weight differs from the checkpoint's"):
        export_checkpoint(checkpoint, tmp_path / "b", config, Context())


def shown(path: Path) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(inspection_table(api.inspect(path)))
    return out.getvalue()


def test_inspect_and_the_card_tell_of_heads(kv_bundle, checkpoint, capsys, monkeypatch):
    for text in (shown(checkpoint), shown(kv_bundle)):
        assert "retaining heads" in text and "width 24" in text and "budget" in text
    assert "retaining scores │ 4 blocks" in shown(kv_bundle / "onnx/int4/d2/d4")
    assert "compress-retain" in shown(kv_bundle / "retaining/heads.gguf")
    command = re.search(r"    (compress generate \. .*--kv-budget .*) < text", (kv_bundle / "README.md").read_text())
    assert command is not None
    where = [str(kv_bundle) if word == "." else word for word in command[1].split()[1:]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the way of many people " * 40)))
    compress(*where, "--max-tokens", 4)
    assert "24 keys and values per head (retaining)" in capsys.readouterr().err


def test_an_extracted_onnx_folder_keeps_its_scores(kv_bundle, tmp_path):
    extract(kv_bundle, "int4", 2, tmp_path / "m")
    with OnnxEngine(tmp_path / "m", 1) as engine:
        assert len(engine.retaining_scores(IDS)) == 2
    assert "heads are in a file of their own" in api.extract(kv_bundle, tmp_path / "m.gguf", type="F16", depth=2)
    assert "includes the retaining heads' scores" in api.extract(kv_bundle, tmp_path / "n", type="int4", depth=4)


def test_heads_say_how_they_are_used_unless_the_user_does(kv_bundle, tmp_path):
    assert choose_budget(kv_bundle, 30) == KvBudget(30, 12, 6, 8, pool=9, sinks=4)
    assert choose_budget(kv_bundle, 5, stabilizers=2, local=None) == KvBudget(5, 12, 2, 8, pool=9, sinks=4)
    with pytest.raises(UserError, match="6 stabilizers"):
        choose_budget(kv_bundle, 5)
    assert choose_budget(tmp_path, 100, policy="recent", chunk=9) == KvBudget(100, 9, policy="recent")
    with pytest.raises(UserError, match=r"no retaining heads.*`retain` section"):
        choose_budget(tmp_path, 100)


def test_a_session_at_a_budget_at_every_depth(kv_bundle):
    kv = choose_budget(kv_bundle, 200)
    with (
        Session(kv_bundle, kind="fp32", threads=1, kv_budget=kv) as tight,
        Session(kv_bundle, "onnx", "fp32", threads=1) as full,
    ):
        assert tight.engine == "onnx"
        for depth in (2, 4):
            settings = Settings(max_tokens=12, depth=depth)
            same = [[p.text for p in s.complete("the way of many people " * 6, settings)] for s in (tight, full)]
            assert same[0] == same[1]
        with pytest.raises(UserError, match="--kv-positions contiguous"):
            tight.complete("the way of many people " * 200)
    with pytest.raises(UserError, match="with true positions only"):
        Session(kv_bundle, "llama.cpp", kv_budget=replace(kv, positions="contiguous"))
    with pytest.raises(UserError, match="cannot be combined with a draft"):
        Session(kv_bundle, "onnx", kv_budget=kv, draft=kv_bundle)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--kv-chunk", 9], "--kv-chunk has no effect without --kv-budget; add --kv-budget N"),
        (["generate", "--kv-budget", 30, "--draft-depth", 2], "cannot be combined with drafts or early exit"),
        (
            ["generate", "--kv-budget", 30, "--engine", "llama.cpp", "--kv-positions", "contiguous"],
            "use the onnx engine",
        ),
        (["generate", "--kv-budget", 30, "--kv-policy", "newest"], "unknown KV policy 'newest'. Known: "),
        (["generate", "--kv-budget", 30, "--kv-policy", "snapkv"], "attention, which ONNX Runtime does not give"),
        (["bench", "--kv-budget", 30, "--speculate"], "--speculate cannot be combined with --kv-budget"),
    ],
    ids=str,
)
def test_misuse_is_one_message(kv_bundle, arguments, message):
    command, *rest = arguments
    with pytest.raises(UserError, match=message):
        compress(command, kv_bundle, *rest, *(["--prompt", "hi"] if command == "generate" else []))


def test_a_server_keeps_a_budget(kv_bundle, monkeypatch):
    seen = []
    monkeypatch.setattr("compress.runtime.serve.server.serve", lambda session, *_, **__: seen.append(session.kv))
    compress("serve", kv_bundle, "--port", 0, "--kv-budget", 30, "--kv-policy", "recent")
    assert seen[0].budget == 30 and seen[0].policy == "recent"


def test_chat_and_bench_keep_a_budget(kv_bundle, capsys, monkeypatch):
    talk = "the way of many people and the water\nwhat time is it\n/depth 2\nand now\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(talk.encode())))
    compress("chat", kv_bundle, "--kv-budget", 24, "--kv-evict-decoding", "--max-tokens", 6, "--engine", "onnx")
    said = capsys.readouterr()
    assert said.out.count("\n") >= 3 and "error" not in said.err
    compress(
        *("bench", kv_bundle, "--type", "int4", "--kv-budget", 24, "--kv-positions", "contiguous", "--json"),
        *("--prompt-tokens", 700, "--new-tokens", 4, "--repeat", 1),
    )
    found = json.loads(capsys.readouterr().out)
    assert found["kv"]["budget"] == 24 and [entry["prompt_tokens"] for entry in found["depths"]] == [700, 700]
