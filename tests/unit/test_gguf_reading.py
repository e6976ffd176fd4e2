"""Reading GGUF files as models: the same model and the same file again, or a refusal that names what is in the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.core.gguf_header import read_metadata, read_tensors
from compress.export.gguf import write_gguf
from compress.export.gguf_family import family_name, write_family
from compress.modeling.gguf import convert_gguf, read_tensor
from compress.modeling.gguf_layout import llama3_factors, llama3_parameters
from compress.modeling.load import load_config, load_model, load_tokenizer, resolve
from compress.runtime.llamacpp_engine import LlamaCppEngine
from gguf import GGUFReader, GGUFWriter

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "untied": ("llama", {"tied": False}),
    "multi-head": ("llama", {"kv_heads": 4}),
    "head size": ("llama", {"head_dim": 32}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "longrope": ("llama", {"rope_parameters": LONG}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"tied": False}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN}),
    "phi3": ("phi3", {}),
    "phi3 partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3 longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "gemma3": ("gemma3_text", {}),
    "gemma3 scales": ("gemma3_text", {"query_pre_attn_scalar": 20, "final_logit_softcapping": 5.0}),
    "gemma3 linear": ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}}),
    "gemma3 pattern": ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_read_in_and_written_out_a_file_is_the_same_to_the_byte(shaken, tmp_path, kind):
    family, options = KINDS[kind]
    source = shaken(family, blocks=3, **options)
    write_gguf(source, tmp_path / "a.gguf", "F16", name="model")
    convert_gguf(tmp_path / "a.gguf", tmp_path / "read")
    write_gguf(tmp_path / "read", tmp_path / "b.gguf", "F16", name="model")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    first, second = load_model(source), load_model(tmp_path / "read")
    size = first.config.vocab_size
    ids = torch.randint(3, size, (1, 160), generator=torch.Generator().manual_seed(0))  # beyond the original context
    with torch.no_grad():
        a, b = (model(ids).logits[0].double().log_softmax(-1) for model in (first, second))
    assert float((a.exp() * (a - b)).sum(-1).max()) < 1e-4  # F16 alone
    text = "Hello, <|im_start|>user\n The 42 words é 🚀<|im_end|>\n"
    ours, theirs = (cast(Any, load_tokenizer(folder)) for folder in (tmp_path / "read", source))
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert (ours.chat_template, ours.eos_token) == (theirs.chat_template, theirs.eos_token)


@pytest.mark.parametrize("quantized", ["Q8_0", "Q4_0", "Q4_K_M", "Q6_K"])
def test_quantized_tensors_are_read_as_ggml_dequantizes_them(shaken, tmp_path, quantized):
    file = tmp_path / "m.gguf"
    write_gguf(shaken("qwen2", tied=False, hidden=256, intermediate=512), file, quantized)
    found = {name: read_tensor(place) for name, place in read_tensors(file).items()}
    for tensor in GGUFReader(file).tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found[tensor.name], expected.reshape(found[tensor.name].shape)), tensor.name


def test_a_model_in_several_files_is_read_whole(shaken, tmp_path):
    source = shaken(tied=False)
    write_family(source, tmp_path / "m", "F16", [2, 4], name="m")
    write_gguf(source, tmp_path / "whole.gguf", "F16", name="m")
    first = tmp_path / "m" / family_name("m", 4, 1, [2, 4])
    convert_gguf(first, tmp_path / "read")
    write_gguf(tmp_path / "read", tmp_path / "again.gguf", "F16", name="m")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    folder = resolve(str(first), tmp_path / "cache")
    assert load_config(folder).num_hidden_layers == 4
    with pytest.raises(UserError, match="is part 2 of a model; name the first"):
        resolve(str(tmp_path / "m" / family_name("m", 4, 2, [2, 4])), tmp_path / "cache")
    (tmp_path / "m" / family_name("m", 4, 4, [2, 4])).unlink()
    with pytest.raises(UserError, match=r"of which .*00004-of-00004\.gguf is missing"):
        resolve(str(first), tmp_path / "cache")


Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def rewritten(file: Path, out: Path, edit: Edit) -> Path:
    """A GGUF file with other metadata and tensors; `edit` changes {key: value} and {name: array} in place."""
    reader = GGUFReader(file)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    values = {key: field.contents() for key, field in fields.items()}
    kinds = {key: (field.types[0], field.types[-1] if len(field.types) > 1 else None) for key, field in fields.items()}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    edit(values, tensors)
    writer = GGUFWriter(out, values["general.architecture"])
    for key, value in values.items():
        if key != "general.architecture":
            guess = gguf.GGUFValueType.get_type(value)
            kind, inner = kinds.get(key, (guess, None))
            if isinstance(value, list) and kind != gguf.GGUFValueType.ARRAY:
                kind, inner = guess, None
            writer.add_key_value(key, value, kind, inner)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def key(name: str, value: Any) -> Edit:
    return lambda values, tensors: values.__setitem__(name, value)


def without(name: str) -> Edit:
    def edit(values: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        values.pop(name, None)
        tensors.pop(name, None)

    return edit


def tensor(name: str, *shape: int, value: float = 0.5) -> Edit:
    return lambda values, tensors: tensors.__setitem__(name, np.full(shape, value, np.float32))


REFUSED: dict[str, tuple[str, Edit, str]] = {
    "logit scale": ("llama", key("llama.logit_scale", 0.0625), r"llama\.logit_scale \(0\.0625\) cannot be expressed"),
    "query scale": (
        "llama",
        key("llama.attention.scale", 0.5),
        r"llama\.attention\.scale \(0\.5\) cannot be expressed",
    ),
    "experts": ("llama", key("llama.expert_count", 8), r"llama\.expert_count \(8\)"),
    "scale by temperature": ("llama", key("llama.attention.temperature_scale", 0.1), "temperature_scale"),
    "soft-capped attention": ("gemma3_text", key("gemma3.attn_logit_softcapping", 50.0), "attn_logit_softcapping"),
    "not causal": ("qwen3", key("qwen3.attention.causal", False), r"qwen3\.attention\.causal \(False\)"),
    "a list per block": ("llama", key("llama.feed_forward_length", [96, 96, 64, 96]), "a value per block"),
    "yarn's own limits": ("qwen2", key("qwen2.rope.scaling.yarn_beta_fast", 16.0), "yarn_beta_fast"),
    "an unknown scaling": (
        "llama",
        key("llama.rope.scaling.type", "dynamic"),
        "rope scaling 'dynamic' is not supported",
    ),
    "a scale of attention": ("llama", key("llama.rope.scaling.attn_factor", 1.2), r"attn_factor 1\.2"),
    "longrope without factors": ("phi3", key("phi3.rope.scaling.type", "longrope"), "has no rope_factors_long"),
    "factors of no rule": ("llama", tensor("rope_freqs.weight", 8, value=0.5), "rotary factors"),
    "partial rotation": ("llama", key("llama.rope.dimension_count", 8), "8 of a head's 16 dimensions are rotated"),
    "a bias of the output": ("llama", tensor("output.bias", 503), r"output\.bias, which cannot be expressed"),
    "norms of queries": ("qwen2", tensor("blk.0.attn_q_norm.weight", 16), r"blk\.0\.attn_q_norm\.weight, which cannot"),
    "a block too many": ("llama", tensor("blk.4.attn_norm.weight", 64), r"blk\.4\.attn_norm\.weight, which cannot"),
    "a block too few": ("llama", key("llama.block_count", 5), r"lacks blk\.4\."),
    "a tensor missing": ("qwen3", without("blk.1.ffn_down.weight"), r"lacks blk\.1\.ffn_down\.weight"),
    "a bias missing": ("qwen2", without("blk.1.attn_k.bias"), r"lacks blk\.1\.attn_k\.bias"),
    "a norm missing": ("llama", without("output_norm.weight"), r"lacks output_norm\.weight"),
    "another width": ("llama", key("llama.feed_forward_length", 64), r"blk\.0\.ffn_down\.weight has shape"),
    "not finite": ("llama", tensor("output_norm.weight", 64, value=float("nan")), "output_norm.weight contains NaN"),
    "an adapter": ("llama", key("general.type", "adapter"), "general.type is 'adapter'"),
    "another architecture": ("llama", key("general.architecture", "mamba"), "'mamba', which is not supported"),
    "an unknown splitter": (
        "llama",
        key("tokenizer.ggml.pre", "chameleon"),
        "pre-tokenizer 'chameleon' is not supported",
    ),
    "a suppressed token": ("llama", key("tokenizer.ggml.suppress_tokens", [5]), "tokenizer.ggml.suppress_tokens"),
    "a unigram": ("llama", key("tokenizer.ggml.model", "t5"), "tokenizer model 't5' is not supported"),
    "no merges": ("llama", without("tokenizer.ggml.merges"), "has no merges"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_in_a_checkpoint_is_refused_by_name(shaken, tmp_path, case):
    family, edit, message = REFUSED[case]
    write_gguf(shaken(family), tmp_path / "good.gguf", "F16", name="m")
    file = rewritten(tmp_path / "good.gguf", tmp_path / "bad.gguf", edit)
    with pytest.raises(UserError, match=message) as refused:
        convert_gguf(file, tmp_path / "read")
    assert "bad.gguf" in str(refused.value) and "\n" not in str(refused.value)


NEUTRAL: dict[str, Edit] = {
    "no experts": key("llama.expert_count", 0),
    "notes of a quantizer": key("mradermacher.quantized_by", "somebody"),
    "how the matrix was made": key("quantize.imatrix.file", "imatrix.dat"),
    "where it was": key("llama.tensor_data_layout", "Meta AI original pth"),
    "linear by one": key("llama.rope.scaling.type", "linear"),
    "factors of one": tensor("rope_freqs.weight", 8, value=1.0),
    "no length of values": without("llama.attention.value_length"),
    "no vocabulary size": without("llama.vocab_size"),
}


@pytest.mark.parametrize("case", NEUTRAL)
def test_what_asks_for_nothing_is_no_reason_to_refuse(shaken, tmp_path, case):
    source = shaken()
    write_gguf(source, tmp_path / "good.gguf", "F16", name="m")
    convert_gguf(rewritten(tmp_path / "good.gguf", tmp_path / "other.gguf", NEUTRAL[case]), tmp_path / "read")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        a, b = (load_model(folder)(ids).logits for folder in (source, tmp_path / "read"))
    assert torch.allclose(a, b, atol=0.02)


def test_one_bias_of_attention_is_read_and_the_others_are_zero(shaken, tmp_path):
    """llama.cpp takes single biases; transformers' Llama has all of them or none."""
    write_gguf(shaken(tied=False), tmp_path / "good.gguf", "F16", name="m")
    bias = np.linspace(-1, 1, 32, dtype=np.float32)
    file = rewritten(
        tmp_path / "good.gguf",
        tmp_path / "biased.gguf",
        lambda values, tensors: (
            tensors.update({f"blk.{i}.attn_{p}.bias": bias for i in range(4) for p in ("k", "v")})
            or tensors.update({f"blk.{i}.attn_q.bias": np.zeros(64, np.float32) for i in range(4)})
        ),
    )
    convert_gguf(file, tmp_path / "read")
    ids = list(range(3, 40))
    with torch.no_grad():
        expected = load_model(tmp_path / "read")(torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy()
    with LlamaCppEngine(file, 1, context=256, slots=1) as engine:
        found = engine.next_token_logprobs([*ids, 5], [len(ids)])[0]
    assert np.abs(found.logprobs - expected[found.token_ids]).max() < 0.02


def test_several_chat_templates_and_ends_come_back(shaken, tmp_path):
    write_gguf(shaken(), tmp_path / "good.gguf", "F16", name="m")
    edits: dict[str, Any] = {
        "tokenizer.chat_template.tool_use": "TOOLS",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.ggml.eot_token_id": 7,
    }
    file = rewritten(tmp_path / "good.gguf", tmp_path / "b.gguf", lambda values, tensors: values.update(edits))
    folder = resolve(str(file), tmp_path / "cache")
    write_gguf(folder, tmp_path / "again.gguf", "F16", name="m")
    before, after = read_metadata(file), read_metadata(tmp_path / "again.gguf")
    assert {k: after.get(k) for k in edits} == edits
    assert {k: v for k, v in before.items() if k.startswith("tokenizer.")} == {
        k: v for k, v in after.items() if k.startswith("tokenizer.")
    }


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("theta", "factor", "low", "high", "context"),
    [
        (500000.0, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        (500000.0, 32.0, 1.0, 4.0, 8192),  # Llama 3.2
        (10000.0, 8.0, 1.0, 4.0, 64),
        (1000000.0, 4.0, 2.0, 6.0, 4096),  # another scale: an equal rule is found
    ],
)
def test_rotary_factors_tell_their_rule(size, theta, factor, low, high, context):
    rope = {"rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    factors = llama3_factors(rope | {"original_max_position_embeddings": context}, size)
    found = llama3_parameters(factors, theta, size)
    if found is None:  # dimensions so few that none turns slowly: nothing is scaled
        assert np.all(factors == 1)
        return
    assert np.allclose(llama3_factors(found, size), factors, rtol=1e-5)
    if low == 1.0 and size >= 64:
        assert (found["high_freq_factor"], found["original_max_position_embeddings"]) == (high, context)


def test_a_damaged_file_is_one_line(shaken, tmp_path):
    write_gguf(shaken(), tmp_path / "m.gguf", "F16", name="m")
    data = (tmp_path / "m.gguf").read_bytes()
    places = read_tensors(tmp_path / "m.gguf")
    for cut in (0, 3, 20, 400, min(place.offset for place in places.values()) + 5, len(data) - 200):
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(UserError, match=re.escape("cut.gguf")) as refused:
            convert_gguf(tmp_path / "cut.gguf", tmp_path / "read")
        assert "\n" not in str(refused.value)
