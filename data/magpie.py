"""Magpie (arXiv 2406.08464): given the start of a user turn, the model writes the user's message, then answers it.

No data set is needed, and the rows are what the model itself finds likely: as in self-data distillation, but with
prompts written by the model too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import UserError
from ..core.stage import Context
from ..modeling.types import ModelTokenizer
from .chat import encode_row, end_tokens, render, special_tokens
from .config import MagpieConfig
from .drafts import KEPT, Draft, Drafts, normalised
from .rows import Messages, Row
from .sampling import Sampled, Sampling, row_seed

_SENTINEL = "USERCONTENTSTANDSHERE"
_CLOSING = 12  # last tokens searched for a closing text; such texts ("[/INST]") are a few tokens long


@dataclass(frozen=True)
class Query:
    """The parts of a chat template that Magpie needs."""

    before: str  # the text before the user's message
    closing: str  # the text after it, up to the assistant's header, if no special token follows; else empty
    stop: frozenset[int]  # tokens that end a turn
    banned: list[int]  # all other special tokens


def query(tokenizer: ModelTokenizer, base: Path, topic: str | None = None) -> Query:
    """Find the user's turn in the chat template of the model in the folder `base`, by rendering one with a marker as
    its message.

    Raises `UserError` if there is no template, or if it changes the user's message.
    """
    system = [{"role": "system", "content": f"You are a helpful assistant. The user asks about {topic}."}]
    messages = [*(system if topic else []), {"role": "user", "content": _SENTINEL}]
    text = render(tokenizer, messages, answer=True)
    if text.count(_SENTINEL) != 1:
        raise UserError("the model's chat template does not render the user's message once, unchanged; use a data set")
    before, after = text.split(_SENTINEL)
    special = special_tokens(tokenizer)
    follows = tokenizer(after, add_special_tokens=False)["input_ids"]
    end = next((token for token in follows if token in special), None)
    # If the template ends the user turn with plain text (Mistral's [/INST]), sampling stops at that text.
    closing = "" if end is not None and not after[: after.index(special[end])].strip() else after.strip()
    stop = set(end_tokens(tokenizer, base)) | ({end} if end is not None and not closing else set())
    if not stop and not closing:
        raise UserError("the model has no end-of-turn token, so its text would never end; use a data set")
    # A space before the message belongs to its first token; left in the prompt, the model would write a second one.
    return Query(before.rstrip(" "), closing, frozenset(stop), [token for token in special if token not in stop])


class Magpie(Drafts):
    """Samples conversations: prompts first, then answers to the usable ones."""

    config: MagpieConfig

    def __init__(self, config: MagpieConfig, base: Path, tokenizer: ModelTokenizer, context: Context, work: Path):
        self.queries = [query(tokenizer, base, topic) for topic in config.topics or [None]]
        super().__init__(config, base, tokenizer, context, work)
        self.banned = sorted({t for q in self.queries for t in q.banned if t < self.vocab_size})
        self.stop = frozenset(t for q in self.queries for t in q.stop)

    def longest(self) -> int:
        asking = max(len(self._tokens(asked.before)) for asked in self.queries)
        answering = len(self._tokens(render(self.tokenizer, [{"role": "user", "content": ""}], answer=True)))
        # Re-encoding a prompt's text may give more tokens than were sampled.
        return max(asking, answering) + 2 * self.config.max_prompt_tokens + self.config.max_tokens

    def draw(self, ids: range) -> list[Draft]:
        drafts = self._prompts(ids)
        open_drafts = [draft for draft in drafts if draft.status == KEPT]
        answered = {draft.id: draft for draft in self._answers(open_drafts)} if open_drafts else {}
        return [answered.get(draft.id, draft) for draft in drafts]

    def identity(self, draft: Draft) -> str:
        return normalised(draft.prompt)

    def _prompts(self, ids: range) -> list[Draft]:
        queries = [self.queries[row % len(self.queries)] for row in ids]
        seeds = [row_seed(self.seed, row, "prompt") for row in ids]
        how = Sampling(self.config.max_prompt_tokens, self.config.temperature, self.config.top_p, self.config.top_k)
        drawn = self._sample(
            [self._tokens(asked.before) for asked in queries], seeds, how, self._watch(queries[0].closing)
        )
        drafts, seen = [], set()
        for row, seed, sampled, asked in zip(ids, seeds, drawn, queries, strict=True):
            text = self._text(sampled).removesuffix(asked.closing).strip() if asked.closing else self._text(sampled)
            status = KEPT
            if not text:
                status = "empty"
            elif not sampled.ended:
                status = "repetitive" if sampled.looped else "long_prompt"
            elif normalised(text) in seen:
                status = "duplicate"  # and is not answered
            seen.add(normalised(text))
            drafts.append(Draft(row, seed, status, text, drawn=len(sampled.tokens)))
        return drafts

    def _answers(self, drafts: list[Draft]) -> list[Draft]:
        prompts = [self._tokens(render(self.tokenizer, _asked(draft), answer=True)) for draft in drafts]
        seeds = [row_seed(self.seed, draft.id, "answer") for draft in drafts]
        config = self.config
        how = Sampling(config.max_tokens, config.answer_temperature, config.answer_top_p, config.top_k)
        drawn = self._sample(prompts, seeds, how, None)
        return [self._answered(draft, sampled) for draft, sampled in zip(drafts, drawn, strict=True)]

    def _answered(self, draft: Draft, sampled: Sampled) -> Draft:
        text = self._text(sampled)
        draft = replace(draft, answer=text, drawn=draft.drawn + len(sampled.tokens))
        if not text:
            return replace(draft, status="empty")
        if sampled.looped:
            return replace(draft, status="repetitive")
        if not sampled.ended and self.config.unfinished == "drop":
            return replace(draft, status="unfinished")
        draft = replace(draft, cut=not sampled.ended)
        return replace(draft, status=self._fits(draft))

    def _fits(self, draft: Draft) -> str:
        """KEPT, unless the encoded row is too long or the template cannot express it."""
        try:
            encoded = encode_row(self.tokenizer, to_row(draft))
        except UserError:
            return "template"
        return KEPT if len(encoded.input_ids) <= self.config.length else "too_long"

    def _sample(
        self, prompts: list[list[int]], seeds: list[int], how: Sampling, stopped: Callable[[list[int]], bool] | None
    ) -> list[Sampled]:
        return self.writer.sample(prompts, seeds, how, stop=self.stop, banned=self.banned, stopped=stopped)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _watch(self, closing: str) -> Callable[[list[int]], bool] | None:
        """A test whether the tokens end with `closing`, for templates without an end-of-turn token; else None."""
        if not closing:
            return None
        return lambda tokens: self.tokenizer.decode(tokens[-_CLOSING:]).rstrip().endswith(closing)

    def _text(self, sampled: Sampled) -> str:
        return self.tokenizer.decode(sampled.tokens, clean_up_tokenization_spaces=False).strip()


def to_row(draft: Draft) -> Row:
    """The training row of a kept draft; its split is chosen later."""
    messages = _asked(draft, draft.answer)
    return Row(draft.id, "train", messages=messages, source="magpie", seed=draft.seed, cut=draft.cut, origin="own")


def _asked(draft: Draft, answer: str | None = None) -> Messages:
    turns = [{"role": "user", "content": draft.prompt}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]
