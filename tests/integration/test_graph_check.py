"""A wrong graph cannot pass: what rounding would hide is found at high precision, at every depth and position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compress.export.artifacts as artifacts
import compress.export.gguf as gguf_export
import compress.export.job as job
import pytest
import torch
from compress.core.errors import UserError
from compress.core.gguf_header import read_metadata
from compress.export.config import ExportConfig
from compress.export.ends import end_tokens
from compress.export.stage import check, export_checkpoint
from compress.export.verify import far_windows, gapped_reference, original_context, torch_reference
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.runtime.bundle import read_bundle
from compress.runtime.llamacpp_engine import LlamaCppEngine
from compress.runtime.text import stop_tokens

VERIFY = {"tokens": 32, "window": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 512,
}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
LARGE = {"initializer_range": 0.3}  # weights with which attention says something


def config(**values: Any) -> ExportConfig:
    return ExportConfig.model_validate({"verify": VERIFY, "threads": 1} | values)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit limits that let everything through: only the check of the graph is left."""
    monkeypatch.setattr("compress.export.verify.KL_LIMITS", dict.fromkeys(("Q4_0", "Q4_K_M", "int4"), 99.0))


@pytest.mark.parametrize("quantized", ["Q4_0", "Q4_K_M"])
def test_a_head_that_is_another_is_found_under_four_bits(shaken, tmp_path, context, monkeypatch, coarse, quantized):
    """A tied head in the place of the model's own: the file's rows are right, and the model is another."""
    checkpoint = shaken(tied=False, **LARGE)
    read = gguf_export.GgufSource.read

    def tied(self: Any, name: str, depth: int | None = None) -> Any:
        return read(self, "token_embd.weight" if name == "output.weight" else name, depth)

    monkeypatch.setattr(gguf_export.GgufSource, "read", tied)
    with pytest.raises(UserError, match=r"gguf: llama\.cpp does not compute the checkpoint's model: at F16"):
        export_checkpoint(checkpoint, tmp_path / "b", config(gguf=[quantized]), context)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("depths", [None, [2, 4]])
def test_rotary_scaling_that_is_lost_is_found_under_four_bits(shaken, tmp_path, context, monkeypatch, coarse, depths):
    checkpoint = shaken(rope_parameters=YARN, **LARGE)
    monkeypatch.setattr(gguf_export, "_write_scaling", lambda *_: None)
    with pytest.raises(UserError, match=r"gguf: llama\.cpp does not compute the checkpoint's model"):
        export_checkpoint(checkpoint, tmp_path / "b", config(gguf=["Q4_0"], depths=depths), context)


@pytest.mark.parametrize("depths", [None, [2, 4]])
def test_a_wrong_onnx_graph_is_found_under_four_bits(
    shaken, tmp_path, context, inline_builder, monkeypatch, coarse, depths
):
    build = job.build_graph

    def wrong(checkpoint: Path, folder: Path, progress: Any) -> Path:
        import onnx

        made = build(checkpoint, folder, progress)
        model = onnx.load(str(made / "model.onnx"), load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                for attribute in node.attribute:
                    if attribute.name == "scale":
                        attribute.f *= 0.5
        onnx.save(model, str(made / "model.onnx"))
        return made

    monkeypatch.setattr(job, "build_graph", wrong)
    with pytest.raises(UserError, match="onnx: onnxruntime does not compute the checkpoint's model: at fp32"):
        export_checkpoint(shaken(**LARGE), tmp_path / "b", config(onnx=["int4"], depths=depths), context)


def test_no_recipe_raises_the_limit_of_the_graph(shaken, tmp_path, context, monkeypatch):
    monkeypatch.setattr("compress.modeling.gguf_layout.interleave", lambda values, _heads: values)
    loose = config(gguf=["F16"], verify=VERIFY | {"kl": {"F16": 50.0}})
    with pytest.raises(UserError, match="does not compute the checkpoint's model") as refused:
        export_checkpoint(shaken(**LARGE), tmp_path / "b", loose, context)
    assert "export.verify" not in str(refused.value) and "accept" not in str(refused.value)


def test_rounding_past_its_limit_advises_a_finer_type(shaken, tmp_path, context, monkeypatch):
    monkeypatch.setattr("compress.export.verify.KL_LIMITS", {"Q4_0": 1e-9})
    with pytest.raises(UserError, match=r"gguf-Q4_0: quantized to Q4_0, .* Use a type with more bits") as refused:
        export_checkpoint(shaken(), tmp_path / "b", config(gguf=["Q4_0"]), context)
    assert "export.verify" not in str(refused.value)


def test_the_graph_is_checked_once_and_its_files_go(shaken, tmp_path, context, inline_builder, monkeypatch):
    written = []
    write = artifacts.write_gguf

    def counted(checkpoint: Path, out: Path, kind: str, **options: Any) -> Any:
        written.append((kind, out.is_relative_to(tmp_path / ".b.partial" / ".work")))
        return write(checkpoint, out, kind, **options)

    monkeypatch.setattr(artifacts, "write_gguf", counted)
    export_checkpoint(shaken(), tmp_path / "b", config(gguf=["Q4_0", "Q8_0"], onnx=["int4", "int8"]), context)
    assert written == [("Q4_0", False), ("F16", True), ("Q8_0", False)]
    found = {artifact.role: artifact.verification.graph_kl for artifact in read_bundle(tmp_path / "b").artifacts}
    assert found["gguf-Q4_0"] == found["gguf-Q8_0"] < 1e-4 and found["onnx-int4"] == found["onnx-int8"] < 1e-6
    assert not list((tmp_path / "b").rglob("*F16*"))
    written.clear()
    export_checkpoint(shaken(), tmp_path / "c", config(gguf=["Q4_0", "F16"]), context)
    assert written == [("Q4_0", False), ("F16", False)]


@pytest.mark.parametrize(
    ("family", "rope", "options"),
    [
        ("llama", LLAMA3, {}),
        ("llama", YARN, {}),
        ("llama", LONG, {"max_positions": 1024}),
        ("mistral", LINEAR, {}),
        ("qwen2", YARN, {}),
        ("qwen3", YARN, {"head_dim": 32}),
        ("phi3", LONG, {"max_positions": 1024, "original_max_position_embeddings": 512}),
        ("gemma3_text", {"full_attention": LINEAR, "sliding_attention": LOCAL}, {}),
    ],
)
def test_scaled_positions_beyond_the_original_context_are_right_in_llamacpp(
    shaken, tmp_path, context, family, rope, options
):
    checkpoint = shaken(family, rope_parameters=rope, **options, **LARGE)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    original = original_context(model.config)
    (window,) = far_windows(tokenizer, model.config, 1024, 10**6)
    assert original is not None and len(window.ids) == original + 24
    export_checkpoint(checkpoint, tmp_path / "b", config(gguf=["F16"]), context)


@pytest.mark.parametrize(
    ("family", "rope", "options"),
    [
        ("llama", LLAMA3, {}),
        ("mistral", LINEAR, {}),
        ("phi3", LONG, {"max_positions": 1024, "original_max_position_embeddings": 512}),
        ("gemma3_text", {"full_attention": LINEAR, "sliding_attention": LOCAL}, {}),
    ],
)
def test_scaled_positions_beyond_the_original_context_are_right_in_onnx(
    shaken, tmp_path, context, inline_builder, family, rope, options
):
    checkpoint = shaken(family, rope_parameters=rope, **options, **LARGE)
    export_checkpoint(checkpoint, tmp_path / "b", config(onnx=["fp32"]), context)


def test_a_text_with_a_gap_is_that_text_at_those_positions(shaken):
    """Against attention worked out one query at a time, by a cache that is turned to where it belongs."""
    checkpoint = shaken(rope_parameters=LLAMA3, **LARGE)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    gapped = gapped_reference(model, tokenizer, 512)
    assert gapped is not None and gapped.position_ids[24] == 64 and gapped.position_ids[-1] == 87
    first, ids = gapped.window.ids[:24], gapped.window.ids
    with torch.no_grad():
        cache = model(torch.tensor([first]), use_cache=True).past_key_values
        for number in range(24, 30):
            out = model(
                torch.tensor([[ids[number]]]),
                position_ids=torch.tensor([[gapped.position_ids[number]]]),
                past_key_values=cache,
                use_cache=True,
            )
            expected = out.logits[0, -1].log_softmax(-1).numpy()
            assert abs(gapped.scores[number].logprobs - expected).max() < 1e-3, number


def test_a_text_too_long_to_run_is_not_run(tiny):
    checkpoint = tiny(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 8192}, max_positions=131072)
    tokenizer, model = load_tokenizer(checkpoint), load_config(checkpoint)
    assert len(far_windows(tokenizer, model, 131072, 10**9)[0].ids) == 8192 + 24
    assert far_windows(tokenizer, model, 131072, 8 * 10**9) == []
    assert far_windows(tokenizer, load_config(tiny()), 512, 10**6) == []


PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gelu": ("llama", {"hidden_act": "gelu"}, "MLP uses gelu, llama.cpp's llama graph silu. Export ONNX instead"),
    "exact gelu": (
        "gemma3_text",
        {"hidden_activation": "gelu"},
        "uses gelu, llama.cpp's gemma3_text graph gelu_pytorch",
    ),
    "soft cap": (
        "gemma3_text",
        {"attn_logit_softcapping": 30.0},
        "attention is soft-capped.* ONNX is not possible either",
    ),
    "both ways": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "is bidirectional.* ONNX is not possible either",
    ),
    "part of a head": (
        "llama",
        {"rope_parameters": PARTIAL},
        r"rotates 0\.5 of each head.* ONNX is not possible either",
    ),
    "dynamic": ("llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, "'dynamic' is not one of llama.cpp's"),
    "llama3 in qwen": ("qwen2", {"rope_parameters": LLAMA3}, "does not support rope scaling 'llama3' for qwen2"),
    "yarn's limits": ("llama", {"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast 16, llama.cpp's 32"),
    "yarn's factor": ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.0}}, "attention_factor 1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llamacpp_computes_otherwise_is_refused_before_any_work(tiny, context, case):
    family, options, message = REFUSED[case]
    checkpoint = tiny(family, **options)
    with pytest.raises(UserError, match=message):
        check(config(gguf=["Q4_K_M"]), checkpoint, context)


def test_the_advice_to_export_gguf_is_given_where_gguf_takes_the_model(tiny, context):
    scaled = {"rope_parameters": LINEAR}
    with pytest.raises(UserError, match=r"rope scaling 'linear' is not supported. Export GGUF instead"):
        check(config(onnx=["int4"]), tiny("llama", **scaled), context)
    with pytest.raises(UserError, match=r"'linear' is not supported. GGUF is not possible either: .* uses gelu"):
        check(config(onnx=["int4"]), tiny("llama", **scaled, hidden_act="gelu"), context)


@pytest.mark.parametrize("window", [8, 64])
def test_a_sliding_window_bounds_the_probe_of_llamacpp(shaken, tmp_path, context, window):
    checkpoint = shaken("mistral", sliding_window=window)
    if window == 64:
        export_checkpoint(checkpoint, tmp_path / "b", config(gguf=["F16"], verify={"tokens": 192}), context)
        assert read_metadata(next((tmp_path / "b").rglob("*.gguf")))["llama.context_length"] == 64
        return
    with pytest.raises(UserError, match=r"limited to the window's 8 tokens, which is too short. Export ONNX"):
        export_checkpoint(checkpoint, tmp_path / "b", config(gguf=["F16"]), context)


def with_ends(folder: Path, generation: Any, eos: str, out: Path) -> Path:
    """A copy of a checkpoint that names these ends."""
    save_checkpoint(load_model(folder), load_tokenizer(folder), out)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    settings = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": eos}))
    return out


@pytest.mark.parametrize(
    ("generation", "eos", "expected"),
    [
        (2, "<|im_end|>", {0, 2}),  # llama.cpp ends at <|endoftext|> by its text, so all do
        (40, "<|im_end|>", {0, 2, 40}),
        ([40, 41], "<|im_end|>", {0, 2, 40, 41}),
        (None, "<|endoftext|>", {0, 2}),
    ],
)
def test_texts_end_at_the_same_tokens_in_every_runtime(
    shaken, tmp_path, context, inline_builder, generation, eos, expected
):
    checkpoint = with_ends(shaken(), generation, eos, tmp_path / "model")
    assert set(end_tokens(checkpoint)) == expected
    bundle = tmp_path / "b"
    export_checkpoint(checkpoint, bundle, config(gguf=["F16"], onnx=["fp32"]), context)
    assert stop_tokens(bundle) == expected
    genai = json.loads((bundle / "onnx/fp32/genai_config.json").read_text())
    assert set(genai["model"]["eos_token_id"]) == expected
    assert stop_tokens(bundle / "onnx/fp32") == expected
    with LlamaCppEngine(next(bundle.rglob("*.gguf")), 1, context=256, slots=1) as engine:
        assert {token for token in range(45) if engine.ends_at(token)} == expected
    listed = {line.split(None, 2)[2] for line in (bundle / "Modelfile").read_text().splitlines() if "stop" in line}
    tokenizer: Any = load_tokenizer(checkpoint)
    assert {json.loads(text) for text in listed} == {tokenizer.convert_ids_to_tokens(token) for token in expected}


def test_more_ends_than_a_gguf_can_name_are_refused(shaken, tmp_path, context):
    checkpoint = with_ends(shaken(), [40, 41, 42], "<|im_end|>", tmp_path / "model")
    with pytest.raises(UserError, match="a GGUF file can name only three"):
        export_checkpoint(checkpoint, tmp_path / "b", config(gguf=["F16"]), context)


@pytest.mark.parametrize("name", ["genai_config.json", "generation_config.json", "chat_template.jinja"])
def test_a_file_that_says_otherwise_fails_the_export(shaken, tmp_path, context, inline_builder, monkeypatch, name):
    write = artifacts.write_onnx

    def changed(checkpoint: Path, out: Path, *args: Any, **options: Any) -> Any:
        info = write(checkpoint, out, *args, **options)
        file = out / name
        if name.endswith(".jinja"):
            file.write_text("{{ messages }}")
        else:
            values = json.loads(file.read_text())
            values.get("model", values)["eos_token_id"] = 5
            file.write_text(json.dumps(values))
        return info

    monkeypatch.setattr(artifacts, "write_onnx", changed)
    with pytest.raises(UserError, match=r"its end-of-text tokens are|its chat template differs from the checkpoint's"):
        export_checkpoint(shaken(), tmp_path / "b", config(onnx=["fp32"]), context)


def test_the_reference_of_the_probe_is_the_models(shaken):
    """Nothing of the far and gapped texts enters the probe's own figures."""
    model, tokenizer = load_model(shaken(rope_parameters=LLAMA3)), load_tokenizer(shaken(rope_parameters=LLAMA3))
    windows = far_windows(tokenizer, model.config, 512, 10**6)
    reference = torch_reference(model, windows)
    assert len(reference.flat) == 24 and reference.far is None
