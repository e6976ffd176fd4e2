"""The loss mask on the chat templates of many models, against a slow reference that knows nothing of templates: where
the assistant's words, which stand nowhere else, are in the rendered text, character by character."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from compress.data.chat import encode_row, render
from compress.data.rows import Message, Messages, Row
from compress.data.spans import TemplateError
from compress.modeling.random import build_tokenizer

FOLDER = Path(__file__).parents[2] / "build" / "templates"
MARKS = re.compile(
    r"<[|｜][^<>{}'\"\s]+?[|｜]>|</?s>|<(?:start|end)_of_turn>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
    r"|\[e~\[|<turn\|>|<\|turn>|<seed:[a-z:]+>|<\|[a-z_]+>"
)
# Written by hand, off the templates: what ends a turn of the assistant's; "" where the next header follows at once, or
# where what ends it is no special token of the tokenizer made here.
ENDS = {
    "Qwen-Qwen3-0.6B": "<|im_end|>",
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "Qwen-QwQ-32B": "<|im_end|>",
    "Qwen3-Coder": "<|im_end|>",
    "Qwen3.5-4B": "<|im_end|>",
    "HuggingFaceTB-SmolLM3-3B": "<|im_end|>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "meta-llama-Llama-3.2-3B-Instruct": "<|eot_id|>",
    "meta-llama-Llama-3.3-70B-Instruct": "<|eot_id|>",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "<｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "<｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V3.1": "<｜end▁of▁sentence｜>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "google-gemma-4-31B-it": "<turn|>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "mistralai-Mistral-Nemo-Instruct-2407": "<|im_end|>",  # eos_token, which of our tokenizer is this
    "Mistral-Small-3.2-24B-Instruct-2506": "<|im_end|>",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "<|im_end|>",
    "ibm-granite-granite-3.3-2B-Instruct": "<|end_of_text|>",
    "GLM-4.6": "",
    "GLM-4.7-Flash": "",
    "Apertus-8B-Instruct": "",
    "llama-cpp-rwkv-world": "",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|END_RESPONSE|>",
    "MiniMax-M2": "[e~[",
    "LFM2-8B-A1B": "<|im_end|>",
    "Bielik-11B-v3.0-Instruct": "<|im_end|>",
    "ByteDance-Seed-OSS": "<seed:eos>",
    "upstage-Solar-Open-100B": "<|end|>",
}
NO_SYSTEM = {"google-gemma-2-2b-it"}
THINK = "<think>\nmuse1 on it\n</think>\n\n"


@cache
def tokenizer_of(name: str) -> Any:
    """A tokenizer with a published template, whose special tokens are those that the template has."""
    file = FOLDER / f"{name}.jinja"
    if not file.is_file():
        pytest.fail(f"{file.name} is not there; run `python tests/fetch_llamacpp.py`", pytrace=False)
    template = file.read_text(encoding="utf-8")
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(MARKS.findall(template)))})
    tokenizer.chat_template = template
    return tokenizer


def says(number: int, **more: Any) -> Message:
    return {"role": "assistant", "content": f"reply{number} the word is say{number}.", **more}


def asks(number: int) -> Message:
    return {"role": "user", "content": f"ask{number} what is word{number}"}


def talk(turns: int, system: bool) -> Messages:
    messages = [message for i in range(turns) for message in (asks(i), says(i))]
    return [{"role": "system", "content": "be brief"}, *messages] if system else messages


def learned(tokenizer: Any, messages: Messages, tools: Any = None) -> list[str]:
    """The stretches of tokens that are learned, as text."""
    encoded = encode_row(tokenizer, Row(0, "train", messages, tools=tools))
    found: list[list[int]] = [[]]
    for token, mask in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if mask:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(tokens).strip(" \n") for tokens in found if tokens]


def reference(tokenizer: Any, messages: Messages, end: str) -> tuple[list[int], list[bool]]:
    """By brute force: every token that overlaps the assistant's words, and the one token that ends each turn."""
    text = render(tokenizer, messages)
    flags = [False] * len(text)
    for message in messages:
        if message["role"] == "assistant":
            assert text.count(message["content"]) == 1
            start = text.index(message["content"])
            stop = start + len(message["content"])
            if end:
                stop = text.index(end, stop) + len(end)
                assert text[start + len(message["content"]) : stop - len(end)].strip() == ""
            flags[start:stop] = [True] * (stop - start)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], [any(flags[a:b]) for a, b in encoding["offset_mapping"]]


@pytest.mark.parametrize("name", sorted(ENDS))
def test_every_turn_of_every_template_is_learned_and_nothing_else(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for turns in (1, 2, 3, 4):
        for system in (False, True):
            if system and name in NO_SYSTEM:
                continue
            messages = talk(turns, system)
            ids, mask = reference(tokenizer, messages, ENDS[name])
            encoded = encode_row(tokenizer, Row(0, "train", messages))
            assert encoded.input_ids == ids
            texts = tokenizer.batch_decode([[i] for i in ids])
            wrong = [t for t, a, b in zip(texts, encoded.loss_mask, mask, strict=True) if a != b and t.strip()]
            assert wrong == [], (turns, system, wrong)
            assert sum(mask) > 4 * turns


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "Qwen3.5-4B", "GLM-4.6", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"])
def test_a_block_that_the_template_inserts_is_not_learned(name: str) -> None:
    tokenizer, messages = tokenizer_of(name), talk(2, False)
    assert "</think>" in render(tokenizer, messages)  # there is one
    assert "think" not in "".join(learned(tokenizer, messages))


@pytest.mark.parametrize("as_content", [False, True])
def test_reasoning_that_is_written_is_learned_and_that_of_earlier_turns_is_not_missed(as_content: bool) -> None:
    def thinks(number: int) -> Message:
        thought, answer = f"muse{number} on it", f"reply{number} the word is say{number}."
        if as_content:
            return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{answer}"}
        return {"role": "assistant", "content": answer, "reasoning_content": thought}

    messages = [asks(0), thinks(0), asks(1), thinks(1)]
    first, last = "reply0 the word is say0.", "reply1 the word is say1."
    assert learned(tokenizer_of("Qwen-Qwen3-0.6B"), messages) == [f"{first}<|im_end|>", f"{THINK}{last}<|im_end|>"]
    glm = learned(tokenizer_of("GLM-4.6"), messages)
    assert glm == [first, f"<think>muse1 on it</think>\n{last}"]
    both = learned(tokenizer_of("Bielik-11B-v3.0-Instruct"), messages)
    block = "<think>\nmuse{0} on it\n</think>\n"
    assert both == [f"{block.format(0)}{first}<|im_end|>", f"{block.format(1)}{last}<|im_end|>"]


CALL = {"type": "function", "function": {"name": "look", "arguments": {"x": "arg", "n": 1}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
TOOL["function"]["parameters"] = {"type": "object", "properties": {"x": {"type": "string", "description": "it"}}}  # type: ignore[index]
HERMES = '<tool_call>\n{"name": "look", "arguments": {"x": "arg", "n": 1}}\n</tool_call><|im_end|>'
CALLS = {
    "Qwen-Qwen3-0.6B": HERMES,
    "Qwen-Qwen2.5-7B-Instruct": HERMES,
    "Qwen3-Coder": "<tool_call>\n<function=look>\n<parameter=x>\narg\n</parameter>\n<parameter=n>\n1\n</parameter>\n"
    "</function>\n</tool_call><|im_end|>",
    "meta-llama-Llama-3.1-8B-Instruct": '{"name": "look", "parameters": {"x": "arg", "n": 1}}<|eot_id|>',
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": '<tool_call>\n{"name": "look", "arguments": {"x": "arg", "n": 1}}\n'
    "</tool_call><|im_end|>",
    "mistralai-Mistral-Nemo-Instruct-2407": '[TOOL_CALLS][{"name": "look", "arguments": {"x": "arg", "n": 1}, "id": '
    '"abcdefghi"}]<|im_end|>',
    "deepseek-ai-DeepSeek-V3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{"x": "arg", "n": 1}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_calls_are_learned_with_their_marks_and_results_are_not(name: str) -> None:
    tokenizer = tokenizer_of(name)
    calls: Message = {"role": "assistant", "content": None, "tool_calls": [{"id": "abcdefghi", **CALL}]}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "name": "look", "content": "found it"}
    messages = [asks(0), calls, result, says(0), asks(1), says(1)]
    end = ENDS.get(name, "<|im_end|>")
    assert learned(tokenizer, messages, [TOOL]) == [
        CALLS[name],
        f"reply0 the word is say0.{end}",
        f"reply1 the word is say1.{end}",
    ]
    assert learned(tokenizer, messages[:2], [TOOL]) == [CALLS[name]]


@pytest.mark.parametrize("name", ["google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct", "llama-cpp-rwkv-world"])
def test_a_call_that_the_template_leaves_out_is_refused(name: str) -> None:
    calls: Message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    with pytest.raises(TemplateError, match=r"omits tool calls.*look") as caught:
        encode_row(tokenizer_of(name), Row(0, "train", [asks(0), calls], tools=[TOOL]))
    assert caught.value.reason == "tool_call"


def test_words_that_the_template_changes_are_refused_and_no_other_turns() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content | upper if m.role == 'assistant' "
        "else m.content) + '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(TemplateError, match="changes the assistant's turn") as caught:
        encode_row(tokenizer, Row(0, "train", talk(1, False)))
    assert caught.value.reason == "template"


def test_a_header_that_is_written_differently_once_the_answer_is_there() -> None:
    """It cannot be told where the header ends, so the words themselves are learned, a space before them included."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% if add_generation_prompt %}A{% else %}B{% for m in messages %}{{ '<|im_start|> ' + m.content }}"
        "{% endfor %}{% endif %}"
    )
    messages = [{"role": "user", "content": "the way"}, {"role": "assistant", "content": "the people"}]
    assert learned(tokenizer, messages) == ["the people"]


def test_an_answer_that_does_not_count_is_not_learned() -> None:
    tokenizer = build_tokenizer()
    assert learned(tokenizer, [asks(0), says(0, weight=0), asks(1), says(1)]) == ["reply1 the word is say1.<|im_end|>"]
