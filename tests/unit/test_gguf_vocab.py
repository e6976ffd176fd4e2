"""Vocabularies in GGUF: against llama.cpp's own vocabulary files, and in llama.cpp's own tokenizer."""

from __future__ import annotations

import json
import re
import struct
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
from compress.core.errors import UserError
from compress.export.gguf import write_gguf
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_tokenizer
from compress.modeling.pretokenizers import PRE_TOKENIZERS
from compress.modeling.random import random_checkpoint, random_model
from compress.runtime.llamacpp_engine import LlamaCppEngine
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

VOCABS = Path(__file__).parents[2] / "build" / "vocabs"
# Our name of each pre-tokenizer, and the family that a model with such a vocabulary is of.
FAMILIES = {"gpt-2": "llama", "llama-bpe": "llama", "qwen2": "qwen2", "llama-spm": "mistral", "phi-3": "phi3"}
SPECIAL = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "add_bos_token", "add_eos_token")
HARD = [  # no decomposed accents: llama.cpp does not compose them for Qwen2 (NFC)
    "The year 2024, 3.14159 and 1,000,000",
    "I'm sure they'LL say it's fine\r\n\r\n\tindented   twice  ",
    "naïve café Ωμέγα Привет 你好世界 🚀🦙",
    "def f(x):\n    return {'a': [x for x in range(10)]}  # comment\n\n\n",
]


class Vocabulary(NamedTuple):
    original: dict[str, Any]  # metadata of llama.cpp's file
    exported: dict[str, Any]  # metadata of ours
    tokenizer: Any
    gguf: Path
    cases: list[tuple[str, list[int]]]  # llama.cpp's test texts and their token ids


def read_metadata(path: Path) -> dict[str, Any]:
    """Every metadata value of a GGUF file (gguf-py takes half a minute for a large vocabulary)."""
    data, place = path.read_bytes(), 24
    formats = dict(enumerate("B b H h I i f ?".split())) | {10: "Q", 11: "q", 12: "d"}

    def scalar(kind: str) -> Any:
        nonlocal place
        place += struct.calcsize(kind)
        return struct.unpack_from("<" + kind, data, place - struct.calcsize(kind))[0]

    def value(kind: int) -> Any:
        nonlocal place
        if kind == 8:
            length = scalar("Q")
            place += length
            return data[place - length : place].decode()
        if kind == 9:
            inner = scalar("I")
            return [value(inner) for _ in range(scalar("Q"))]
        return scalar(formats[kind])

    return {value(8): value(scalar("I")) for _ in range(struct.unpack_from("<Q", data, 16)[0])}


def as_published(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json of the model that a vocabulary belongs to, as its makers published it."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    there = [i for i, token in enumerate(tokens) if not re.fullmatch(r"\[PAD\d+\]", token)]
    added = [(i, types[i]) for i in there if types[i] in (3, 4) or (i == 0 and tokens[0] == "<unk>")]
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    entries = [
        {"id": i, "content": tokens[i], "special": t != 4, "rstrip": name == "phi-3" and i > 1, **flags}
        for i, t in added
    ]
    hidden = {i for i, _ in added} if fields["tokenizer.ggml.model"] == "gpt2" else set()
    known = {tokens[i]: i for i in there if i not in hidden}
    model: dict[str, Any] = {"type": "BPE", "vocab": known, "byte_fallback": False, "ignore_merges": False}
    first = []
    if fields["tokenizer.ggml.model"] == "gpt2":
        normalizer, pre_tokenizer = PRE_TOKENIZERS[name]
        model |= {"merges": fields["tokenizer.ggml.merges"], "ignore_merges": name == "llama-bpe"}
        decoder: Any = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        first = ["<|begin_of_text|>"] if name == "llama-bpe" else []
    else:
        scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
        plain = {token: i for token, i in known.items() if types[i] == 1}
        merges = [list(pair) for pair in generate_merges(plain, {token: scores[token] for token in plain})]
        model |= {"merges": merges, "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
        pre_tokenizer, decoder, first = None, None, ["<s>"]
    single = [{"SpecialToken": {"id": t, "type_id": 0}} for t in first] + [{"Sequence": {"id": "A", "type_id": 0}}]
    ids = {t: {"id": t, "ids": [tokens.index(t)], "tokens": [t]} for t in first}
    post = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ids}
    parts = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post, "decoder": decoder}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": entries, **parts, "model": model}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """vocabulary(name) -> llama.cpp's vocabulary, exported again from a tiny model that carries it."""
    root = tmp_path_factory.mktemp("vocabularies")

    @cache
    def make(name: str) -> Vocabulary:
        file = VOCABS / f"ggml-vocab-{name}.gguf"
        if not file.is_file():
            pytest.fail(f"{file.name} is not there; run `python tests/fetch_llamacpp.py`", pytrace=False)
        original = read_metadata(file)
        folder = root / name
        folder.mkdir()
        (folder / "published.json").write_text(json.dumps(as_published(name, original)), encoding="utf-8")
        tokens = original["tokenizer.ggml.tokens"]
        special = {
            f"{ours}_token": tokens[original[key]]
            for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if (key := f"tokenizer.ggml.{theirs}_token_id") in original
        }
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "published.json"), **special)
        (folder / "published.json").unlink()
        model = random_model(FAMILIES[name], vocab_size=len(tokens), blocks=1, hidden=32, heads=2, intermediate=32)
        save_checkpoint(model, tokenizer, folder)
        write_gguf(folder, root / f"{name}.gguf", "F16")
        texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
        ids = [[int(i) for i in line.split()] for line in Path(f"{file}.out").read_text().splitlines()]
        cases = list(zip(texts, ids, strict=False))
        return Vocabulary(original, read_metadata(root / f"{name}.gguf"), tokenizer, root / f"{name}.gguf", cases)

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_published_tokenizers_become_the_vocabulary_llama_cpp_ships(vocabularies, name):
    _, exported, *_ = vocabulary = vocabularies(name)
    original = vocabulary.original
    for key in ("model", "tokens", "merges"):
        assert exported.get(f"tokenizer.ggml.{key}") == original.get(f"tokenizer.ggml.{key}"), key
    assert exported["tokenizer.ggml.pre"] == original["tokenizer.ggml.pre"]
    theirs, ours = (fields["tokenizer.ggml.token_type"] for fields in (original, exported))
    wrong = [
        (token, a, b)
        for token, a, b in zip(original["tokenizer.ggml.tokens"], theirs, ours, strict=True)
        # llama.cpp's files say of unk now this, now that, and of unused tokens what its converter no longer says.
        if b != (5 if token.startswith("[PAD") else a) and not (token == "<unk>" and b == 3)
    ]
    assert not wrong
    for key in SPECIAL:
        if f"tokenizer.ggml.{key}" in original:
            assert exported[f"tokenizer.ggml.{key}"] == original[f"tokenizer.ggml.{key}"], key


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_tokenizes_like_the_checkpoint(vocabularies, name):
    """llama.cpp's own cases, and harder texts, through our file in llama.cpp and through the tokenizer itself."""
    _, _, tokenizer, file, cases = vocabularies(name)
    assert len(cases) > 40
    with LlamaCppEngine(file, threads=1, slots=1, context=64) as engine:
        found = [engine.tokenize(text) for text, _ in cases]
        assert found == [ids for _, ids in cases]
        assert [tokenizer.encode(text, add_special_tokens=False) for text, _ in cases] == found
        for text in HARD:
            assert engine.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_scores_order_the_pieces_as_sentencepiece_does(vocabularies, name):
    original, exported, *_ = vocabularies(name)
    normal = np.asarray(original["tokenizer.ggml.token_type"]) == 1
    theirs, ours = (np.asarray(f["tokenizer.ggml.scores"])[normal] for f in (original, exported))
    reached = (ours > ours.min()) & (theirs > -1e9)  # no merge makes the others, or they have no order
    assert reached.sum() > 25_000
    assert np.array_equal(np.argsort(-theirs[reached], kind="stable"), np.argsort(-ours[reached], kind="stable"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen2", "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"),
        ("llama-bpe", "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"),
        ("phi-3", "<|user|>\nHi there<|end|>\n<|assistant|>\n"),
    ],
)
def test_special_tokens_in_a_chat_are_recognised(vocabularies, name, text):
    _, _, tokenizer, file, _ = vocabularies(name)
    with LlamaCppEngine(file, threads=1, slots=1, context=64) as engine:
        found = engine.tokenize(text)
    assert found == tokenizer.encode(text, add_special_tokens=False)
    assert found[0] == tokenizer.convert_tokens_to_ids(re.match(r"<\|\w+\|>", text)[0])  # type: ignore[index]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_splits_alike_in_llama_cpp(tmp_path, pre):
    folder = random_checkpoint(tmp_path / "model", pre=pre, blocks=1)
    write_gguf(folder, tmp_path / "model.gguf", "F16")
    fields = read_metadata(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.pre"] == pre
    assert fields["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    tokenizer = load_tokenizer(folder)
    with LlamaCppEngine(tmp_path / "model.gguf", threads=1, slots=1) as engine:
        for text in [*HARD, "<|im_start|>user\n12345 words<|im_end|>\n"]:
            assert engine.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_tokens_beyond_the_tokenizer_are_unused(tmp_path):
    folder = random_checkpoint(tmp_path / "model", blocks=1, vocab_size=640)
    write_gguf(folder, tmp_path / "model.gguf", "F16")
    fields, size = read_metadata(tmp_path / "model.gguf"), len(load_tokenizer(folder))
    assert fields["tokenizer.ggml.tokens"][size:] == [f"[PAD{i}]" for i in range(size, 640)]
    assert set(fields["tokenizer.ggml.token_type"][size:]) == {gguf.TokenType.UNUSED}


def change_tokenizer(folder: Path, change: Any) -> None:
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8")


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path):
    folder = random_checkpoint(tmp_path / "model", blocks=1)
    change_tokenizer(folder, lambda t: t.update(pre_tokenizer={"type": "Punctuation", "behavior": "Isolated"}))
    with pytest.raises(UserError, match=r"matches none of the supported ones, gpt-2, llama-bpe.*smollm.*Punctuation"):
        write_gguf(folder, tmp_path / "model.gguf", "F16")
    assert not list(tmp_path.glob("*.gguf"))


def test_other_tokenizers_are_refused(tmp_path):
    folder = random_checkpoint(tmp_path / "model", blocks=1)
    change_tokenizer(folder, lambda t: t["model"].update(type="Unigram"))
    with pytest.raises(UserError, match="a Unigram tokenizer cannot be exported"):
        write_gguf(folder, tmp_path / "model.gguf", "F16")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        write_gguf(folder, tmp_path / "model.gguf", "F16")


def test_more_tokens_than_embeddings_are_refused(tmp_path):
    folder = random_checkpoint(tmp_path / "model", blocks=1, vocab_size=300)
    with pytest.raises(UserError, match=r"tokens, but the model has only 300 embeddings"):
        write_gguf(folder, tmp_path / "model.gguf", "F16")
