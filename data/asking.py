"""Prompts that ask the unpruned model to rewrite a gold answer, and a test for answers that mention the reference."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..modeling.types import ModelTokenizer
from .chat import render
from .config import General, Maths
from .rows import Messages

# The instructions, the same for every row, come first: the prefix that prompts share is computed once per batch.
_GENERAL = """\
You will get a request and a reference answer to it. Take the reference as your guide and answer the request yourself, \
in your own words and in the way you would normally write. Keep to the facts and the result that it gives. Write \
nothing but your answer: no title, and no word about these instructions or about having seen a reference.

### Request
{prompt}

### Reference answer
{gold}

### Now answer the request"""
_MATHS = """\
You are an expert in mathematics. You will get a problem and a reference solution. Take the reference as your guide \
and solve the problem yourself, in your own words, step by step, with a short reason for every step. Close with a \
sentence that says what the answer is. Say nothing about having seen a reference.

### Problem
{prompt}

### Reference solution
{gold}

### Now solve the problem"""
_OPENING = "Let us solve this step by step.\n"

# Phrases that refer to something only the prompt contains. The patterns are narrow, so that ordinary language does not
# match: "the expression can be rewritten", "the correct answer", "the solution is given by".
_ANSWER = r"(?:answer|response)s?"
_LEAKS = [
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        rf"\b(?:reference|gold|provided|given|sample)\s+{_ANSWER}\b",
        r"\b(?:the|this|that)\s+(?:reference|provided|given)\s+(?:solution|text)s?\b",
        r"\b(?:the|this|that|a)\s+reference\b(?!\s+(?:to|for|frame|point|book)\b)",
        rf"\b{_ANSWER}\s+(?:that\s+)?(?:(?:you|i)\s+(?:have\s+|was\s+)?)?(?:provided|given|shown|gave)\b",
        r"\b(?:my|your)\s+(?:own\s+)?(?:response|rewrite|rewording)\b",
        r"\bin\s+(?:my|your)\s+own\s+words\b",
        rf"\b(?:rewritten|rephrased|paraphrased|reworded)\s+(?:{_ANSWER}|solution|text|version)\b",
        rf"\bhere(?:'s|’s|\s+is)\s+(?:my|your|the|a)\s+(?:\w+\s+)?(?:{_ANSWER}|rewrite)\b",
        rf"\b(?:{_ANSWER}|solution)\s+as\s+(?:a|my|your)\s+guide\b",
        rf"\b{_ANSWER}\s+to\s+(?:the|this|that|your)\s+(?:given\s+)?(?:request|problem\s+above)\b",
        r"\b(?:the|this)\s+request\s+(?:above|asks?|says?)\b",
        r"^\s*#{2,}\s*(?:request|reference|problem|question|now)\b",
    )
]


@dataclass(frozen=True)
class LastAnswer:
    """A conversation up to its last answer, and that answer."""

    before: Messages
    gold: str
    rewritable: bool = True  # whether the answer is text only, without tool calls
    tools: list[Any] | None = None  # tool definitions of the conversation

    @property
    def by_user(self) -> bool:
        """Whether the answer replies to a user message, not to a tool result."""
        return self.before[-1]["role"] == "user"


def last_answer(messages: Messages, tools: list[Any] | None = None) -> LastAnswer:
    """The answer to rewrite, with the conversation before it; conversations end with an assistant turn."""
    last = messages[-1]
    return LastAnswer(messages[:-1], last["content"] or "", not last.get("tool_calls"), tools)


def own_prompt(tokenizer: ModelTokenizer, asked: LastAnswer, how: General) -> str:
    """The prompt for the model's own answer, without gold."""
    return render(tokenizer, asked.before, answer=True, tools=asked.tools) + _opening(how)


def rewrite_prompt(tokenizer: ModelTokenizer, asked: LastAnswer, how: General) -> str:
    """The prompt for a rewrite, which shows gold; raises `UserError` as `render` does."""
    words = _MATHS if isinstance(how, Maths) else _GENERAL
    last = {"role": "user", "content": words.format(prompt=asked.before[-1]["content"], gold=asked.gold)}
    return render(tokenizer, [*asked.before[:-1], last], answer=True, tools=asked.tools) + _opening(how)


def leaks(text: str, asked: LastAnswer) -> bool:
    """Whether an answer mentions the reference it was shown, in words found in neither the request nor gold."""
    known = (asked.before[-1]["content"] or "") + "\n" + asked.gold
    return any(not _says(known, match[0]) for pattern in _LEAKS for match in pattern.finditer(text))


def _says(known: str, phrase: str) -> bool:
    return " ".join(phrase.casefold().split()) in " ".join(known.casefold().split())


def _opening(how: General) -> str:
    return _OPENING if isinstance(how, Maths) else ""
