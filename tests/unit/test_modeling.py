"""The view of a decoder, checkpoints and sources."""

from __future__ import annotations

import json
import shutil
from typing import Any, cast

import pytest
import torch
from compress.core.errors import UserError
from compress.export.gguf import write_gguf
from compress.modeling.blocks import (
    Decoder,
    config_at,
    depths,
    drop_blocks,
    kept_blocks,
    record_depths,
    without_blocks,
)
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.families import FAMILIES, block_number
from compress.modeling.gguf import convert_gguf
from compress.modeling.load import load_config, load_model, load_tokenizer, resolve
from compress.modeling.pretokenizers import PRE_TOKENIZERS, recognise
from compress.modeling.random import build_tokenizer
from compress.modeling.source import fingerprint_source, hash_file, parse_source
from transformers import AutoModelForCausalLM

IDS = torch.arange(3, 43).reshape(2, 20)
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
OPTIONS = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "gemma3_text": {"layer_types": MIXED, "sliding_window": 8},
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_nothing_is_bit_identical(tiny, family):
    model = load_model(tiny(family, **OPTIONS.get(family, {})))
    before = logits(model)
    drop_blocks(model, [])
    assert torch.equal(before, logits(model))
    assert kept_blocks(model.config) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropped", [[1, 2], [0, 3], [0, 1, 2]])
def test_dropped_blocks_are_skipped_saved_and_loaded_plainly(tiny, tmp_path, family, dropped):
    """Against the unpruned model run with the dropped blocks turned into the identity."""
    folder = tiny(family, **OPTIONS.get(family, {}))
    whole = load_model(folder)
    handles = [
        whole.model.layers[i].register_forward_hook(lambda _m, args, kwargs, _o: args[0], with_kwargs=True)
        for i in dropped
    ]
    expected = logits(whole)
    for handle in handles:
        handle.remove()

    pruned = load_model(folder)
    drop_blocks(pruned, dropped)
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=0)
    kept = [i for i in range(4) if i not in dropped]
    assert next(m.layer_idx for b in pruned.model.layers for m in b.modules() if hasattr(m, "layer_idx")) == 0
    layer_types = getattr(whole.config, "layer_types", None)
    if layer_types is not None:
        assert pruned.config.layer_types == [layer_types[i] for i in kept]

    save_checkpoint(pruned, load_tokenizer(folder), tmp_path / "pruned")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert loaded.config.num_hidden_layers == len(kept)
    assert kept_blocks(loaded.config) == kept
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    with torch.no_grad():  # the KV cache is addressed by the new block numbers
        generated = loaded.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=-1, use_cache=True)
        plain = loaded.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=-1, use_cache=False)
    assert torch.equal(generated, plain)


def test_dropping_twice_keeps_the_unpruned_numbers(tiny):
    model = load_model(tiny())
    drop_blocks(model, [1])
    drop_blocks(model, [1])
    assert kept_blocks(model.config) == [0, 3]


def test_max_window_layers_counts_kept_blocks(tiny):
    model = load_model(tiny("qwen2", **OPTIONS["qwen2"]))
    drop_blocks(model, [0])
    assert model.config.max_window_layers == 1


@pytest.mark.parametrize("dropped", [[4], [-1], [0, 1, 2, 3]])
def test_impossible_drops_are_refused(tiny, dropped):
    with pytest.raises(UserError, match="cannot drop"):
        drop_blocks(load_model(tiny()), dropped)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_without_blocks_restores_everything(tiny, family):
    model = load_model(tiny(family, **OPTIONS.get(family, {})))
    before, config = logits(model), model.config.to_dict()
    with without_blocks(model, [1]):
        assert model.config.num_hidden_layers == 3
        assert not torch.equal(before, logits(model))
    assert model.config.to_dict() == config
    assert torch.equal(before, logits(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_hidden_and_head_make_the_logits(tiny, family, tied):
    model = load_model(tiny(family, tied=tied))
    decoder = Decoder(model)
    with torch.no_grad():
        found = decoder.head(decoder.hidden(input_ids=IDS))
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-6)
    assert (decoder.head_weight.data_ptr() == decoder.embedding.weight.data_ptr()) is tied


def test_checkpoints_have_the_same_bytes_and_no_paths(tiny, tmp_path):
    folder = tiny()
    for name in ("a", "b"):
        save_checkpoint(load_model(folder), load_tokenizer(folder), tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    for name in files:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert str(folder).encode() not in content


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|end_of_text|>"])
@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_a_gguf_file_is_read_as_the_checkpoint_it_was_made_from(tiny, tmp_path, pre, end):
    """Also where the vocabulary lacks a token that transformers' reader would add: Llama-3's has no <|endoftext|>."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny(pre=pre), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|endoftext|>", end), encoding="utf-8")
    write_gguf(folder, tmp_path / "model.gguf", "F16")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "read")
    torch.testing.assert_close(logits(load_model(tmp_path / "read")), logits(load_model(folder)), rtol=0, atol=1e-2)
    original, read = (cast(Any, load_tokenizer(home)) for home in (folder, tmp_path / "read"))
    assert len(read) == len(original)
    for text in ("The time 2024 people\n\n wrote, they'd think", "<|im_start|>user\nwater 1.5<|im_end|>", "Cửa Việt"):
        assert read(text).input_ids == original(text).input_ids
    assert (read.bos_token, read.eos_token, read.chat_template) == (
        original.bos_token,
        original.eos_token,
        original.chat_template,
    )
    assert read.backend_tokenizer.model.ignore_merges is (pre == "llama-bpe")


def test_unsupported_families_are_refused_with_the_list(tiny, tmp_path):
    shutil.copytree(tiny(), tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UserError, match=r"'mamba'.*gemma3_text, llama, mistral, phi3, qwen2, qwen3"):
        resolve(str(tmp_path / "other"), tmp_path)


def test_broken_safetensors_are_named(tiny, tmp_path):
    shutil.copytree(tiny(), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(tmp_path / "cut")


def test_missing_weights_are_an_error(tiny, tmp_path):
    folder = tiny(blocks=3)
    shutil.copytree(folder, tmp_path / "more")
    config = json.loads((tmp_path / "more" / "config.json").read_text())
    (tmp_path / "more" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match="lacks 9 weights"):
        load_model(tmp_path / "more")


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="only safetensors are read"):
        parse_source(str(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("./nowhere", "does not exist"),
        ("nowhere.gguf", "does not exist"),
        ("package:no_such_package/x.gguf", "'no_such_package' is not installed"),
        ("package:pytest/x.gguf", "has no file 'x.gguf'"),
        ("just-a-word", "is not a Hub id"),
        ("random:mamba", "no random model of family 'mamba'"),
    ],
)
def test_missing_sources_say_what_is_missing(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        resolve(text, tmp_path / "cache", base_dir=tmp_path)


def test_an_unreachable_hub_is_one_clear_message(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    def fail(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", fail)
    with pytest.raises(UserError, match=r"'nobody/nothing'.*Hub cannot be reached"):
        resolve("nobody/nothing", tmp_path)


def test_random_source_is_made_once(tmp_path):
    first = resolve("random:qwen3", tmp_path)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve("random:qwen3", tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert load_config(first).num_hidden_layers == 8


def test_fingerprints_follow_content_not_place(tiny, tmp_path):
    folder = tiny()
    shutil.copytree(folder, tmp_path / "copy")
    original = fingerprint_source(parse_source(str(folder), tmp_path), tmp_path / "c1")
    assert fingerprint_source(parse_source("copy", tmp_path), tmp_path / "c2") == original
    weights = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(weights)
    assert fingerprint_source(parse_source("copy", tmp_path), tmp_path / "c2") != original


def test_hash_cache_survives_damage(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_file(file, tmp_path) == expected
    (tmp_path / "hashes.json").write_text("{broken")
    assert hash_file(file, tmp_path) == expected


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_are_recognised_by_structure(name):
    backend = json.loads(build_tokenizer(name).backend_tokenizer.to_str())
    assert recognise(backend["normalizer"], backend["pre_tokenizer"]) == name
    changed = json.loads(
        json.dumps(backend["pre_tokenizer"]).replace('"add_prefix_space": false', '"add_prefix_space": true')
    )
    assert recognise(backend["normalizer"], changed) is None


def test_broken_gguf_files_are_named(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UserError, match=r"broken\.gguf"):
        resolve(str(tmp_path / "broken.gguf"), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("broken-*[!l]"))


def test_depths_are_recorded_saved_and_lost_with_a_block(tiny, tmp_path):
    model = load_model(tiny(blocks=4))
    assert depths(model.config) == [4]
    record_depths(model.config, [2, 4])
    with without_blocks(model, [3]):
        assert depths(model.config) == [3]
    assert depths(model.config) == [2, 4]
    model.save_pretrained(tmp_path)
    assert depths(load_config(tmp_path)) == [2, 4]
    drop_blocks(model, [0])
    assert depths(model.config) == [3]


@pytest.mark.parametrize("wrong", [[2, 3], [4, 2], [2, 2, 4], [0, 4]])
def test_depths_that_the_model_does_not_have_are_refused(tiny, wrong):
    with pytest.raises(ValueError, match="must ascend"):
        record_depths(load_model(tiny(blocks=4)).config, wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_at_a_depth_is_that_of_a_cut_model(tiny, family):
    model = load_model(tiny(family, **OPTIONS.get(family, {})))
    whole = load_config(tiny(family, **OPTIONS.get(family, {})))
    record_depths(whole, [1, 3, 4])
    for depth in (1, 3):
        with without_blocks(model, range(depth, 4)):
            assert config_at(whole, depth).to_dict() == model.config.to_dict()
    assert config_at(whole, 4).to_dict() == whole.to_dict() and depths(whole) == [1, 3, 4]
    for wrong in (0, 5):
        with pytest.raises(ValueError, match="has no depth"):
            config_at(whole, wrong)


def test_weights_know_their_block(tiny):
    numbers = [block_number(name) for name in load_model(tiny()).state_dict()]
    assert sorted({n for n in numbers if n is not None}) == [0, 1, 2, 3] and numbers.count(None) == 3
