"""The options that clients send and that are not served: which values of them ask for nothing, and are taken.

A value that would change the answer is refused by name and with the reason. So is an option that nobody knows here,
for it might.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.suggest import similar
from .refusal import wrong


@dataclass(frozen=True)
class Unserved:
    """An option that is not served; null and empty values of it ask for nothing, and so do those in `nothing`."""

    why: str
    nothing: tuple[Any, ...] = ()


# What says who asks, how it is billed, kept, cached or scheduled: the text does not depend on it.
LABELS = frozenset(
    "user metadata safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options service_tier "
    "prediction cache_prompt cache_salt id_slot slot_id keep_alive ttl priority request_id".split()
)
# How far, how fast, from which on something works that an option beside it switches on.
DETAILS = frozenset(
    "repeat_last_n dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_threshold mirostat_tau "
    "mirostat_eta dynatemp_exponent parallel_tool_calls".split()
)
_PENALTY = Unserved("penalties are not served; only 0 is", (0,))
_REPETITION = Unserved("penalties are not served; only 1 is", (1,))
_TOOLS = Unserved(
    "tools are not called here; leave them out, or say tool_choice: none, and the model answers in plain text"
)
_SAMPLER = "this way of drawing tokens is not served (temperature and top_p are)"
_FORM = "answers of a prescribed form are not served; only plain text is"
_MEDIA = "only text is read and written here"

BOTH: dict[str, Unserved] = {
    "n": Unserved("one answer is written per request; send the request again for another", (1,)),
    "best_of": Unserved("one answer is written per request, and none is chosen from", (1,)),
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "logit_bias": Unserved("biases are not served"),
    # Options of other servers, which clients send at their defaults.
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
    "use_beam_search": Unserved("beams are not searched", (False,)),
    "early_stopping": Unserved("beams are not searched", (False,)),
    "length_penalty": Unserved("beams are not searched", (1,)),
    "repetition_penalty": _REPETITION,
    "repeat_penalty": _REPETITION,
    "dry_multiplier": _PENALTY,
    "no_repeat_ngram_size": _PENALTY,
    "n_predict": Unserved("name it max_tokens", (-1,)),
    "n_probs": Unserved("probabilities of tokens are not given", (0,)),
    "prompt_logprobs": Unserved("probabilities of tokens are not given"),
    "return_tokens_as_token_ids": Unserved("answers are text", (False,)),
    "min_tokens": Unserved("an answer ends where the model ends it", (0,)),
    "ignore_eos": Unserved("an answer ends where the model ends it", (False,)),
    "include_stop_str_in_output": Unserved("an answer ends before a stop text", (False,)),
    "skip_special_tokens": Unserved("special tokens are left out of answers", (True,)),
    "spaces_between_special_tokens": Unserved("special tokens are left out of answers", (True, False)),
    "guided_json": Unserved(_FORM),
    "guided_regex": Unserved(_FORM),
    "guided_choice": Unserved(_FORM),
    "guided_grammar": Unserved(_FORM),
    "structured_outputs": Unserved(_FORM),
    "grammar": Unserved(_FORM),
    "json_schema": Unserved(_FORM),
}
CHAT: dict[str, Unserved] = BOTH | {
    "store": Unserved("answers are not stored", (False,)),
    "logprobs": Unserved("probabilities of tokens are not given", (False,)),
    "top_logprobs": Unserved("probabilities of tokens are not given", (0,)),
    "tools": _TOOLS,
    "functions": _TOOLS,
    "tool_choice": Unserved("tools are not called here", ("none", "auto")),
    "function_call": Unserved("tools are not called here", ("none", "auto")),
    "response_format": Unserved(_FORM, ({"type": "text"},)),
    "modalities": Unserved(_MEDIA, (["text"],)),
    "audio": Unserved(_MEDIA),
    "web_search_options": Unserved("nothing is searched here"),
    "moderation": Unserved("answers are not moderated"),
    "verbosity": Unserved("models do not know it here; only medium is taken", ("medium",)),
    "echo": Unserved("the conversation is not repeated in the answer", (False,)),
    "add_generation_prompt": Unserved("an answer is always begun", (True,)),
    "continue_final_message": Unserved("an answer is a message of its own", (False,)),
    "include_reasoning": Unserved("the answer is the model's whole text", (True,)),
    "documents": Unserved("documents are not put into the prompt"),
    "chat_template": Unserved("the model's own template is used"),
}
COMPLETION: dict[str, Unserved] = BOTH | {
    "echo": Unserved("the prompt is not repeated in the answer", (False,)),
    "logprobs": Unserved("probabilities of tokens are not given", (False,)),
    "suffix": Unserved("text is not filled in before a suffix"),
    "store": Unserved("answers are not stored", (False,)),
}
STREAM: dict[str, Unserved] = {
    # Pads OpenAI's own streams against eavesdroppers.
    "include_obfuscation": Unserved("", (True, False)),
    "continuous_usage_stats": Unserved("usage is counted once, at the end", (False,)),
}


def served(
    values: Mapping[str, Any], known: Collection[str], unserved: Mapping[str, Unserved], within: str = ""
) -> dict[str, Any]:
    """The options that are served: those of `known` that are not null. `Refused` for any other that asks for something.

    `within` is the path of the field that holds them, with a dot.
    """
    values = _without_tools_that_nobody_calls(values)
    found = {}
    for name, value in values.items():
        if value is None:
            continue
        if name in known:
            found[name] = value
        elif name not in LABELS | DETAILS and not _asks_for_nothing(name, value, unserved):
            raise wrong(within + name, _why(name, value, known, unserved))
    return found


def _without_tools_that_nobody_calls(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where no tool may be called, tools ask for nothing."""
    if "none" not in (values.get("tool_choice"), values.get("function_call")):
        return values
    return {name: value for name, value in values.items() if name not in ("tools", "functions")}


def _asks_for_nothing(name: str, value: Any, unserved: Mapping[str, Unserved]) -> bool:
    if isinstance(value, (str, list, dict)) and not value:
        return True
    if name == "logit_bias" and isinstance(value, dict):
        return all(_same(bias, 0) for bias in value.values())
    return name in unserved and any(_same(value, nothing) for nothing in unserved[name].nothing)


def _same(value: Any, other: Any) -> bool:
    """Equality as JSON has it: 1 and 1.0 are the same, 1 and true are not."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _why(name: str, value: Any, known: Collection[str], unserved: Mapping[str, Unserved]) -> str:
    if name in unserved:
        return unserved[name].why
    near = similar(name, [*known, *unserved], least=0.8)
    return "there is no such parameter here" + (f"; did you mean {near[0]}?" if near else "; leave it out")
