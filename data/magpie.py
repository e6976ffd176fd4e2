"""Magpie (arXiv 2406.08464): the model, shown where a user would speak, writes what the user says, then answers it.

No data set is needed, and what comes out is what the model itself finds likely: the self-data of self-data
distillation with the prompts thrown in.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..stage import Context
from .chat import encode_row, render, special_tokens
from .config import MagpieConfig
from .rows import Messages, Row
from .sampling import Sampled, Sampling, row_seed, sample

KEPT = "kept"
_SENTINEL = "USERCONTENTSTANDSHERE"
_CLOSING = 12  # tokens looked at for a closing text; such texts ("[/INST]") are a few tokens long


@dataclass(frozen=True)
class Query:
    """A chat template as Magpie needs it."""

    before: str  # the text up to where the user's words begin
    closing: str  # what follows them up to the assistant's header, if no special token does; else empty
    stop: frozenset[int]  # tokens that end a turn
    banned: list[int]  # special tokens that do not


@dataclass(frozen=True)
class Draft:
    """One drawn row, as a part file holds it."""

    id: int
    seed: int
    status: str  # KEPT, or why it was dropped
    prompt: str = ""
    answer: str = ""
    drawn: int = 0  # tokens sampled for it
    cut: bool = False  # kept although the answer was cut off


def query(tokenizer: Any, model: Any = None, topic: str | None = None) -> Query:
    """Read the user's turn off the chat template, by rendering one with a marker for its words.

    Raises `UserError` where there is no template or it does not show the user's words as they are.
    """
    system = [{"role": "system", "content": f"You are a helpful assistant. The user asks about {topic}."}]
    messages = [*(system if topic else []), {"role": "user", "content": _SENTINEL}]
    text = render(tokenizer, messages, answer=True)
    if text.count(_SENTINEL) != 1:
        raise UserError("the model's chat template does not show the user's words once and as they are; use a data set")
    before, after = text.split(_SENTINEL)
    special = special_tokens(tokenizer)
    follows = tokenizer(after, add_special_tokens=False)["input_ids"]
    end = next((token for token in follows if token in special), None)
    # A template whose user turn ends in plain text (Mistral's [/INST]) is watched for that text.
    closing = "" if end is not None and not after[: after.index(special[end])].strip() else after.strip()
    stop = set(_eos_ids(tokenizer, model)) | ({end} if end is not None and not closing else set())
    if not stop and not closing:
        raise UserError("the model has no end-of-turn token, so nothing it writes would end; use a data set")
    # A space before the words is part of the first word's token; given alone it would be followed by another.
    return Query(before.rstrip(" "), closing, frozenset(stop), [token for token in special if token not in stop])


def _eos_ids(tokenizer: Any, model: Any) -> list[int]:
    """Tokens that end what the model writes, by its generation configuration and by its tokenizer."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = eos if isinstance(eos, list) else [eos]
    return [token for token in [*listed, tokenizer.eos_token_id] if token is not None]


class Magpie:
    """Draws rows batch by batch. Batch k holds rows k·B … k·B + B − 1 and is written, whole, to a part file of its
    own, so that a run that was killed goes on with the batch it was in and ends with the same rows."""

    def __init__(self, config: MagpieConfig, model: Any, tokenizer: Any, context: Context, work: Path):
        self.config, self.model, self.tokenizer, self.seed = config, model, tokenizer, context.seed
        self.parts = work / "parts"
        self.parts.mkdir(parents=True, exist_ok=True)
        self.queries = [query(tokenizer, model, topic) for topic in config.topics or [None]]
        # Tokenizers may list special tokens that the model has no logit for.
        self.banned = sorted({t for q in self.queries for t in q.banned if t < model.config.vocab_size})
        self.stop = frozenset(t for q in self.queries for t in q.stop)
        self.seen: set[str] = set()  # prompts so far, normalised
        self.seconds = 0.0
        self.sampled = 0  # tokens drawn in this process

    def batches(self) -> Iterator[list[Draft]]:
        """All batches up to the cap on attempts; those whose part file is there are read."""
        size = self.config.batch
        for number in range(math.ceil(self.config.rows * self.config.max_attempts / size)):
            path = self.parts / f"{number:05d}.jsonl"
            if path.exists():
                drafts = [Draft(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
            else:
                drafts = self._draw(range(number * size, (number + 1) * size))
                _write_part(path, drafts)
            self.seen.update(normalised(draft.prompt) for draft in drafts)
            yield drafts

    def _draw(self, ids: range) -> list[Draft]:
        begun = time.perf_counter()
        drafts = self._prompts(ids)
        open_drafts = [draft for draft in drafts if draft.status == KEPT]
        answered = {draft.id: draft for draft in self._answers(open_drafts)} if open_drafts else {}
        drafts = [answered.get(draft.id, draft) for draft in drafts]
        self.sampled += sum(draft.drawn for draft in drafts)
        self.seconds += time.perf_counter() - begun
        return drafts

    def _prompts(self, ids: range) -> list[Draft]:
        queries = [self.queries[row % len(self.queries)] for row in ids]
        seeds = [row_seed(self.seed, row, "prompt") for row in ids]
        how = Sampling(self.config.max_prompt_tokens, self.config.temperature, self.config.top_p, self.config.top_k)
        drawn = self._sample([q.before for q in queries], seeds, how, self._watch(queries[0].closing))
        drafts, seen = [], set(self.seen)
        for row, seed, sampled, asked in zip(ids, seeds, drawn, queries, strict=True):
            text = self._text(sampled).removesuffix(asked.closing).strip() if asked.closing else self._text(sampled)
            status = KEPT
            if normalised(text) in seen:
                status = "duplicate" if text else "empty"
            elif not text:
                status = "empty"
            elif not sampled.ended:
                status = "repetitive" if sampled.looped else "long_prompt"
            seen.add(normalised(text))
            drafts.append(Draft(row, seed, status, text, drawn=len(sampled.tokens)))
        return drafts

    def _answers(self, drafts: list[Draft]) -> list[Draft]:
        texts = [render(self.tokenizer, _asked(draft), answer=True) for draft in drafts]
        seeds = [row_seed(self.seed, draft.id, "answer") for draft in drafts]
        config = self.config
        how = Sampling(config.max_tokens, config.answer_temperature, config.answer_top_p, config.top_k)
        drawn = self._sample(texts, seeds, how, None)
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
        """KEPT, unless the row as it will be learned is too long, or the template cannot express it."""
        try:
            encoded = encode_row(self.tokenizer, to_row(draft))
        except UserError:
            return "template"
        return KEPT if len(encoded.input_ids) <= self.config.length else "too_long"

    def _sample(
        self, texts: list[str], seeds: list[int], how: Sampling, stopped: Callable[[list[int]], bool] | None
    ) -> list[Sampled]:
        prompts = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return sample(self.model, prompts, seeds, how, stop=self.stop, banned=self.banned, stopped=stopped)

    def _watch(self, closing: str) -> Callable[[list[int]], bool] | None:
        """Whether the tokens' end says `closing`, for templates without an end-of-turn token; else None."""
        if not closing:
            return None
        return lambda tokens: self.tokenizer.decode(tokens[-_CLOSING:]).rstrip().endswith(closing)

    def _text(self, sampled: Sampled) -> str:
        return self.tokenizer.decode(sampled.tokens, clean_up_tokenization_spaces=False).strip()


def draw_rows(magpie: Magpie, context: Context) -> tuple[list[Draft], Counter[str]]:
    """The first `rows` rows kept, and how many were dropped for which reason; both by the drafts up to the last row
    kept, so that they say the same whatever the batch had in store.

    Raises `UserError` when hardly any row is usable; fewer than asked for are noted.
    """
    wanted = magpie.config.rows
    kept: list[Draft] = []
    counts: Counter[str] = Counter()
    with context.progress.bar("self-data", wanted) as advance:
        for drafts in magpie.batches():
            before = len(kept)
            for draft in drafts:
                if len(kept) < wanted:
                    counts[draft.status] += 1
                    kept += [draft] if draft.status == KEPT else []
            advance(len(kept) - before, f"{sum(counts.values())} drawn")
            if len(kept) == wanted:
                break
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != KEPT)
    if len(kept) < max(2, wanted // 10):
        raise UserError(
            f"of {sum(counts.values())} rows the model wrote, {len(kept)} are usable ({dropped}); it may not be an "
            "instruction-tuned model, or data.max_tokens and data.max_prompt_tokens are too small for it"
        )
    if len(kept) < wanted:
        context.progress.note(f"{len(kept)} rows instead of {wanted} after data.max_attempts ({dropped})")
    return kept, counts


def to_row(draft: Draft) -> Row:
    """The row a kept draft is learned as; its split is chosen later."""
    messages = _asked(draft, draft.answer)
    return Row(draft.id, "train", messages=messages, source="magpie", seed=draft.seed, cut=draft.cut)


def normalised(prompt: str) -> str:
    """What two prompts have in common that are the same but for case, spacing and punctuation."""
    return " ".join("".join(c if c.isalnum() else " " for c in prompt.casefold()).split()) or prompt.strip()


def _asked(draft: Draft, answer: str | None = None) -> Messages:
    turns = [{"role": "user", "content": draft.prompt}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def _write_part(path: Path, drafts: list[Draft]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(draft), ensure_ascii=True) + "\n" for draft in drafts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
