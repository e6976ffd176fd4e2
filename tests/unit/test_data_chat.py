"""Encoding against a slow reference: templates written out by hand, one character at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compress.core.errors import UserError
from compress.data.chat import encode_row, encode_text, load_encoded
from compress.data.rows import Messages, Row, read_rows, write_rows
from compress.modeling.load import load_tokenizer
from compress.modeling.random import CHAT_TEMPLATE, build_tokenizer

Pieces = list[tuple[str, bool]]  # text, and whether it is learned
BOS = "{{ '<|begin|>' }}"


def chatml(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        learned = m["role"] == "assistant"
        pieces += [(f"<|im_start|>{m['role']}\n", False), (m["content"] + "<|im_end|>", learned), ("\n", False)]
    return pieces


def smollm(messages: Messages) -> Pieces:
    default = [{"role": "system", "content": "You are helpful"}]
    return chatml(messages if messages[0]["role"] == "system" else default + messages)


def llama3(messages: Messages) -> Pieces:
    pieces: Pieces = [("<|begin|>", False)]
    for m in messages:
        head = f"<|start_header|>{m['role']}<|end_header|>\n\n"
        pieces += [(head, False), (m["content"].strip() + "<|eot|>", m["role"] == "assistant")]
    return pieces


def phi3(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        learned = m["role"] == "assistant"
        pieces += [(f"<|{m['role']}|>\n", False), (m["content"] + "<|end|>", learned), ("\n", False)]
    return [*pieces, ("<|endoftext|>", False)]


def gemma(messages: Messages) -> Pieces:
    pieces: Pieces = [("<|begin|>", False)]
    for m in messages:
        role = "model" if m["role"] == "assistant" else m["role"]
        pieces += [(f"<start_of_turn>{role}\n", False)]
        pieces += [(m["content"].strip() + "<end_of_turn>", role == "model"), ("\n", False)]
    return pieces


def mistral(messages: Messages) -> Pieces:
    pieces: Pieces = [("<|begin|>", False)]
    for m in messages:
        answer = m["role"] == "assistant"
        pieces += [(f" {m['content']}</s>", True)] if answer else [(f"[INST] {m['content']} [/INST]", False)]
    return pieces


def plain(messages: Messages) -> Pieces:
    """No special token ends a turn, so the content alone is learned."""
    pieces: Pieces = []
    for m in messages:
        pieces += [(f"### {m['role']}:\n", False), (m["content"].strip(), m["role"] == "assistant"), ("\n\n", False)]
    return pieces


_ASK = "{% if add_generation_prompt %}{{ '"
TEMPLATES: dict[str, tuple[str, Callable[[Messages], Pieces]]] = {
    "chatml": (CHAT_TEMPLATE, chatml),
    "smollm": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        + CHAT_TEMPLATE,
        smollm,
    ),
    "llama3": (
        BOS + "{% for m in messages %}{{ '<|start_header|>' + m['role'] + '<|end_header|>\n\n' + m['content'] | trim "
        "+ '<|eot|>' }}{% endfor %}" + _ASK + "<|start_header|>assistant<|end_header|>\n\n' }}{% endif %}",
        llama3,
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        + _ASK
        + "<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        phi3,
    ),
    "gemma": (
        BOS + "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
        "{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim "
        "+ '<end_of_turn>\n' }}{% endfor %}" + _ASK + "<start_of_turn>model\n' }}{% endif %}",
        gemma,
    ),
    "mistral": (
        BOS + "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}{% else %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}",
        mistral,
    ),
    "plain": (
        "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] | trim + '\n\n' }}{% endfor %}"
        + _ASK
        + "### assistant:\n' }}{% endif %}",
        plain,
    ),
}
SPECIAL = ["<|begin|>", "<|start_header|>", "<|end_header|>", "<|eot|>", "<|user|>", "<|assistant|>", "<|system|>"]
SPECIAL += ["<|end|>", "<start_of_turn>", "<end_of_turn>", "</s>"]


def tokenizer_with(template: str) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def reference(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[bool]]:
    """A token is learned if every character it covers is in a learned piece."""
    text = "".join(piece for piece, _ in pieces)
    flags = [flag for piece, flag in pieces for _ in piece]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], [a < b and all(flags[a:b]) for a, b in encoding["offset_mapping"]]


WORDS = ["the", "way ", "numbers:", "\n", " é", "🙂🙃", "中文", "=", "  spaced", "<b>", "a'b", "assistant", "\u00a0x"]


def conversation(seed: int) -> Messages:
    draw = random.Random(seed)
    turns = []
    if seed % 3 == 0:
        turns.append({"role": "system", "content": "Speak so"})
    for i in range(2 * draw.randint(1, 3)):
        words = "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 9))) + "."
        turns.append({"role": "assistant" if i % 2 else "user", "content": words})
    return turns


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_loss_mask_matches_the_slow_reference(name: str) -> None:
    template, write = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    for seed in range(30):
        messages = conversation(seed)
        ids, mask = reference(tokenizer, write(messages))
        encoded = encode_row(tokenizer, Row(0, "train", messages))
        assert encoded.input_ids == ids
        assert encoded.loss_mask == mask, (seed, tokenizer.convert_ids_to_tokens(ids))
        assert any(mask)


def test_learned_tokens_decode_to_the_answers_and_their_ends() -> None:
    tokenizer = build_tokenizer()
    messages = conversation(4)
    encoded = encode_row(tokenizer, Row(0, "train", messages))
    learned = [i for i, m in zip(encoded.input_ids, encoded.loss_mask, strict=True) if m]
    expected = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    assert tokenizer.decode(learned) == expected


def test_a_cut_answer_is_learned_without_its_end() -> None:
    tokenizer = build_tokenizer()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I was about to"}]
    encoded = encode_row(tokenizer, Row(0, "train", messages, cut=True))
    learned = [i for i, m in zip(encoded.input_ids, encoded.loss_mask, strict=True) if m]
    assert tokenizer.decode(learned) == "I was about to"
    whole = encode_row(tokenizer, Row(0, "train", messages))
    assert whole.input_ids[: len(encoded.input_ids)] == encoded.input_ids
    assert len(whole.input_ids) == len(encoded.input_ids) + 2


def test_content_that_repeats_or_starts_with_a_newline() -> None:
    tokenizer = build_tokenizer()
    turns = [("user", "so"), ("assistant", "so"), ("user", "so"), ("assistant", "\nso\n")]
    messages = [{"role": role, "content": content} for role, content in turns]
    encoded = encode_row(tokenizer, Row(0, "train", messages))
    ids, mask = reference(tokenizer, chatml(messages))
    assert (encoded.input_ids, encoded.loss_mask) == (ids, mask)


def test_max_length_cuts_tokens_and_mask() -> None:
    tokenizer = build_tokenizer()
    row = Row(0, "train", conversation(1))
    whole, cut = encode_row(tokenizer, row), encode_row(tokenizer, row, 17)
    assert cut.input_ids == whole.input_ids[:17] and cut.loss_mask == whole.loss_mask[:17]


def test_beginning_of_text_is_not_doubled() -> None:
    tokenizer = tokenizer_with(TEMPLATES["llama3"][0])
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.convert_tokens_to_ids("<|begin|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", begin)]
    )
    assert tokenizer("x")["input_ids"][0] == begin  # this tokenizer does add it of itself
    assert encode_row(tokenizer, Row(0, "train", conversation(1))).input_ids.count(begin) == 1
    assert [e.input_ids.count(begin) for e in encode_text(tokenizer, "the way " * 9, 8)] == [1, 0, 0]


def test_refusals_say_what_to_do() -> None:
    tokenizer = build_tokenizer()
    answer_first = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    with pytest.raises(UserError, match="starts with an assistant turn"):
        encode_row(tokenizer, Row(0, "train", answer_first))
    good = [{"role": "user", "content": "y"}, {"role": "assistant", "content": "abc"}]
    for template, message in {
        "": "has no chat template.*`text: COLUMN`",
        "{{ raise_exception('no such turns') }}": "refuses a conversation .* user, assistant: no such turns",
        "{% for m in messages %}{{ m['role'] + m['content'] | upper }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}": "changes the assistant's turn",
    }.items():
        tokenizer.chat_template = template or None
        with pytest.raises(UserError, match=message):
            encode_row(tokenizer, Row(0, "train", good))


def test_templates_that_print_the_date_do_not_depend_on_today() -> None:
    tokenizer = tokenizer_with("{{ strftime_now('%Y-%m-%d') + ' ' + date_string }}" + CHAT_TEMPLATE)
    encoded = encode_row(tokenizer, Row(0, "train", conversation(1)))
    assert tokenizer.decode(encoded.input_ids).startswith("2024-07-26 26 Jul 2024<|im_start|>")


def test_text_is_cut_into_windows_that_cover_it() -> None:
    tokenizer = build_tokenizer()
    text = "the way of many people é🙂 " * 7
    whole = tokenizer(text)["input_ids"]
    windows = encode_text(tokenizer, text, 10)
    joined = [i for window in windows for i in window.input_ids]
    assert joined == whole[: len(joined)] and len(whole) - len(joined) <= 1
    assert all(len(w.input_ids) <= 10 and w.loss_mask == [False] + [True] * (len(w.input_ids) - 1) for w in windows)
    assert encode_text(tokenizer, "", 10) == []
    assert len(encode_text(tokenizer, text)) == 1


def test_load_encoded_reads_one_split_and_refuses_rows_without_targets(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    rows = [Row(0, "train", conversation(1)), Row(1, "train", text="the way " * 8), Row(2, "heldout", conversation(2))]
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path) == rows
    loaded = load_encoded(tmp_path, tokenizer, "train", 12)
    windows = encode_text(tokenizer, "the way " * 8, 12)  # the conversation's answer starts later than that
    assert loaded == [replace(window, row=1) for window in windows]
    assert len(load_encoded(tmp_path, tokenizer, "train", 512)) == 2
    assert load_encoded(tmp_path, tokenizer, "heldout", 512) == [encode_row(tokenizer, rows[2])]
    with pytest.raises(UserError, match=r"no heldout row .* first 8 tokens"):
        load_encoded(tmp_path, tokenizer, "heldout", 8)
    with pytest.raises(UserError, match=r"has no rows\.parquet"):
        read_rows(tmp_path / "elsewhere")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 half a file")
    with pytest.raises(UserError, match="is broken"):
        read_rows(tmp_path)


@pytest.mark.real  # here, not in tests/real: it needs the reference above
def test_smollm2_inserts_its_system_prompt_and_masks_exactly(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    for seed in range(10):
        messages = conversation(seed)
        system = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
        full = messages if messages[0]["role"] == "system" else [system, *messages]
        encoded = encode_row(tokenizer, Row(0, "train", messages))
        assert (encoded.input_ids, encoded.loss_mask) == reference(tokenizer, chatml(full))
