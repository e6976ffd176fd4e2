"""Unsupported options that clients send; those of their values that have no effect are accepted.

A value that would change the answer is rejected with the reason. So is an unknown option, which might change it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.suggest import similar
from .refusal import wrong


@dataclass(frozen=True)
class Unserved:
    """An unsupported option. Null, empty and the values in `nothing` have no effect and are accepted."""

    why: str
    nothing: tuple[Any, ...] = ()


# Identity, billing, retention, caching and scheduling: the text does not depend on them.
LABELS = frozenset(
    "user metadata safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options service_tier "
    "prediction cache_prompt cache_salt id_slot slot_id keep_alive ttl priority request_id".split()
)
# Parameters of features that another option would have to enable.
DETAILS = frozenset(
    "repeat_last_n dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_threshold mirostat_tau "
    "mirostat_eta dynatemp_exponent parallel_tool_calls".split()
)
_PENALTY = Unserved("penalties are not supported; only 0 is", (0,))
_REPETITION = Unserved("penalties are not supported; only 1 is", (1,))
_TOOLS = Unserved(
    "tool calls are not supported; leave tools out, or send tool_choice: none for an answer in plain text"
)
_SAMPLER = "this sampling option is not supported (temperature and top_p are)"
_FORM = "structured output is not supported; answers are plain text"
_MEDIA = "only text input and output are supported"

BOTH: dict[str, Unserved] = {
    "n": Unserved("only one answer per request is supported; send the request again for another", (1,)),
    "best_of": Unserved("only one answer per request is supported", (1,)),
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "logit_bias": Unserved("logit biases are not supported"),
    # Other servers' options, which clients send with default values.
    "top_k": Unserved(_SAMPLER, (0, -1)),
    "min_p": Unserved(_SAMPLER, (0,)),
    "top_a": Unserved(_SAMPLER, (0,)),
    "tfs_z": Unserved(_SAMPLER, (1,)),
    "typical_p": Unserved(_SAMPLER, (1,)),
    "mirostat": Unserved(_SAMPLER, (0,)),
    "mirostat_mode": Unserved(_SAMPLER, (0,)),
    "xtc_probability": Unserved(_SAMPLER, (0,)),
    "dynatemp_range": Unserved(_SAMPLER, (0,)),
    "smoothing_factor": Unserved(_SAMPLER, (0,)),
    "use_beam_search": Unserved("beam search is not supported", (False,)),
    "early_stopping": Unserved("beam search is not supported", (False,)),
    "length_penalty": Unserved("beam search is not supported", (1,)),
    "repetition_penalty": _REPETITION,
    "repeat_penalty": _REPETITION,
    "dry_multiplier": _PENALTY,
    "no_repeat_ngram_size": _PENALTY,
    "n_predict": Unserved("use max_tokens instead", (-1,)),
    "n_probs": Unserved("token log-probabilities are not supported", (0,)),
    "prompt_logprobs": Unserved("token log-probabilities are not supported"),
    "return_tokens_as_token_ids": Unserved("answers are text, not token ids", (False,)),
    "min_tokens": Unserved("an answer always ends where the model ends it", (0,)),
    "ignore_eos": Unserved("an answer always ends where the model ends it", (False,)),
    "include_stop_str_in_output": Unserved("stop strings are never part of the answer", (False,)),
    "skip_special_tokens": Unserved("special tokens are always left out of answers", (True,)),
    "spaces_between_special_tokens": Unserved("special tokens are always left out of answers", (True, False)),
    "guided_json": Unserved(_FORM),
    "guided_regex": Unserved(_FORM),
    "guided_choice": Unserved(_FORM),
    "guided_grammar": Unserved(_FORM),
    "structured_outputs": Unserved(_FORM),
    "grammar": Unserved(_FORM),
    "json_schema": Unserved(_FORM),
}
CHAT: dict[str, Unserved] = BOTH | {
    "store": Unserved("storing answers is not supported", (False,)),
    "logprobs": Unserved("token log-probabilities are not supported", (False,)),
    "top_logprobs": Unserved("token log-probabilities are not supported", (0,)),
    "tools": _TOOLS,
    "functions": _TOOLS,
    "tool_choice": Unserved("tool calls are not supported", ("none", "auto")),
    "function_call": Unserved("tool calls are not supported", ("none", "auto")),
    "response_format": Unserved(_FORM, ({"type": "text"},)),
    "modalities": Unserved(_MEDIA, (["text"],)),
    "audio": Unserved(_MEDIA),
    "web_search_options": Unserved("web search is not supported"),
    "moderation": Unserved("moderation is not supported"),
    "verbosity": Unserved("only medium is supported", ("medium",)),
    "echo": Unserved("repeating the conversation in the answer is not supported", (False,)),
    "add_generation_prompt": Unserved("an answer always starts a new turn", (True,)),
    "continue_final_message": Unserved(
        "continuing the last message is not supported; an answer is a new message", (False,)
    ),
    "include_reasoning": Unserved("the answer always includes the model's reasoning", (True,)),
    "documents": Unserved("documents are not supported; put their text into a message"),
    "chat_template": Unserved("a custom template is not supported; the model's own is used"),
}
COMPLETION: dict[str, Unserved] = BOTH | {
    "echo": Unserved("repeating the prompt in the answer is not supported", (False,)),
    "logprobs": Unserved("token log-probabilities are not supported", (False,)),
    "suffix": Unserved("filling in text before a suffix is not supported"),
    "store": Unserved("storing answers is not supported", (False,)),
}
STREAM: dict[str, Unserved] = {
    # Padding that OpenAI adds to its streams against eavesdroppers.
    "include_obfuscation": Unserved("", (True, False)),
    "continuous_usage_stats": Unserved("usage is only reported once, at the end", (False,)),
}


def served(
    values: Mapping[str, Any], known: Collection[str], unserved: Mapping[str, Unserved], within: str = ""
) -> dict[str, Any]:
    """The supported options: those of `known` that are not null. `Refused` for any other that would have an effect.

    `within` is the path of the field that holds them, with a dot.
    """
    values = _without_tools_that_nobody_calls(values)
    bundles = {}
    for name, value in values.items():
        if value is None:
            continue
        if name in known:
            bundles[name] = value
        elif name not in LABELS | DETAILS and not _asks_for_nothing(name, value, unserved):
            raise wrong(within + name, _why(name, value, known, unserved))
    return bundles


def _without_tools_that_nobody_calls(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """With tool_choice: none, tools have no effect."""
    if "none" not in (values.get("tool_choice"), values.get("function_call")):
        return values
    return {name: value for name, value in values.items() if name not in ("tools", "functions")}


def _asks_for_nothing(name: str, value: object, unserved: Mapping[str, Unserved]) -> bool:
    if isinstance(value, (str, list, dict)) and not value:
        return True
    if name == "logit_bias" and isinstance(value, dict):
        return all(_same(bias, 0) for bias in value.values())
    return name in unserved and any(_same(value, nothing) for nothing in unserved[name].nothing)


def _same(value: object, other: object) -> bool:
    """Equality as JSON has it: 1 and 1.0 are the same, 1 and true are not."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _why(name: str, value: object, known: Collection[str], unserved: Mapping[str, Unserved]) -> str:
    if name in unserved:
        return unserved[name].why
    near = similar(name, [*known, *unserved], least=0.8)
    return "unknown parameter" + (f"; did you mean {near[0]}?" if near else "; leave it out")
