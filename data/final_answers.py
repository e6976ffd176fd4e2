"""The final answer of a text: a number, a choice letter, or a text.

The final answer is taken from the last `\\boxed{…}`; else from after the last `####` (GSM8K); else from after the last
"answer is", "answer:" or the recipe's own marker; else, for numbers, it is the last number in the text.
"""

from __future__ import annotations

import re
from fractions import Fraction

_ANSWER = r"\banswer\s*(?:is|:)"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\w))?|\.\d+"
# A sign after a letter, digit or bracket, or before a space, is a minus or a dash. Fractions may be mixed: 1 1/2.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}])[-+−])?(?:[$€£]\s?)?"
    rf"(?:(?:(?P<whole>\d+)\s+)?(?P<over>\d+)\s?/\s?(?P<under>\d+)(?![\d/])|(?P<plain>{_DIGITS}))"
)
_LATEX = re.compile(r"([-−]?)\s*\\[dt]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)(\d))")
# Allowed beside a number without making it a formula: words, but not single letters; cm^2, degrees, percent.
_UNIT = re.compile(
    r"(?:[\s%.,:;*$€£°'\"]|\\%|\^?\{?\\circ\}?|\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|[^\W\d_]{2,}+(?:\^\{?\d\}?)?)*+"
)
_LETTER = r"[A-J]"
_CHOICE_FIRST = re.compile(rf"\s*(?:\\text)?[\s:*({{\[]*(?:option|choice)?\s*\(?({_LETTER})(?![\w'’])", re.IGNORECASE)
_CHOICE_ANYWHERE = re.compile(rf"\(({_LETTER})\)|\b(?:option|choice)\s+\(?({_LETTER})\b")


def final_number(text: str, marker: str | None = None) -> Fraction | None:
    """The final number of a text, exactly: signs, thousands separators, decimals, fractions, currencies."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return stated_number(boxed)
    text = _without_latex(text)
    place = located(text, marker)
    if place is not None:
        match = _NUMBER.search(place)
        return _value(match) if match else None
    matches = list(_NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def stated_number(text: str) -> Fraction | None:
    """The number that a short text states, without unit and currency. None for formulas, pairs and anything else that
    a single number does not identify."""
    text = _without_latex(text)
    match = _NUMBER.search(text)
    if match is None or not _UNIT.fullmatch(text[: match.start()] + " " + text[match.end() :]):
        return None
    return _value(match)


def _without_latex(text: str) -> str:
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$").replace("\\,", "")
    return _LATEX.sub(lambda m: f" {m[1]}{m[2] or m[4]}/{m[3] or m[5]} ", text)


def final_choice(text: str, marker: str | None = None) -> str | None:
    """The letter, A to J, that a text chooses."""
    place = located(text, marker)
    first = _CHOICE_FIRST.match(text if place is None else place)
    # At the start of text not introduced as an answer, "A" may be an article; in "A) ..." or "A" alone it is a choice.
    if first and (place is not None or re.match(r"\s*(?:[).:\]*]|$)", text[first.end() :])):
        return first[1].upper()
    named = [a or b for a, b in _CHOICE_ANYWHERE.findall(text)]
    return named[-1] if named else None


def final_text(text: str, marker: str | None = None) -> str | None:
    """The introduced answer, or else the whole text, ignoring case, spacing, and punctuation around words."""
    place = located(text, marker)
    words = (text if place is None else place).casefold().split()
    normal = " ".join(word for word in (word.strip(".,;:!?\"'`*()[]{}$") or word for word in words))
    return normal or None


def located(text: str, marker: str | None = None) -> str | None:
    """The text after the words that introduce the final answer, to the end of the line; None without such words."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in ("####", re.escape(marker) if marker else _ANSWER):
        matches = list(re.finditer(pattern, text, re.IGNORECASE))
        if matches:
            rest = text[matches[-1].end() :].lstrip(" \t\n:*")
            return rest.partition("\n")[0]
    return None


def _last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{…}, its braces balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] in ("-", "−") else 1
    if match["plain"]:
        return sign * Fraction(match["plain"].replace(",", ""))
    if int(match["under"]) == 0:
        return None
    return sign * (int(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"])))
