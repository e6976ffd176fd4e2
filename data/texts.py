"""Plain text the unpruned model writes from nothing: a random first token, then what it goes on with (LLM-QAT, arXiv
2305.17888).

No data set and no chat template is needed. Such rows wander over what the model was pretrained on, where conversations
keep to one register: calibrate on them what is to hold on any text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..stage import Context
from .chat import encode_text, special_tokens
from .config import TextsConfig
from .drafts import KEPT, Draft, Drafts, normalised
from .magpie import eos_ids
from .rows import Row
from .sampling import Sampled, Sampling, row_seed, sample


class Texts(Drafts):
    """Draws plain texts."""

    config: TextsConfig

    def __init__(self, config: TextsConfig, model: Any, tokenizer: Any, context: Context, work: Path):
        super().__init__(config, model, tokenizer, context, work)
        special = special_tokens(tokenizer)
        size = min(len(tokenizer), model.config.vocab_size)
        self.stop = frozenset(eos_ids(tokenizer, model))
        self.banned = [token for token in special if token < size and token not in self.stop]
        self.begin = list(tokenizer("")["input_ids"])  # what the tokenizer begins every text with, if anything
        self.first = [token for token in range(size) if token not in special and _is_text(tokenizer.decode([token]))]

    def draw(self, ids: range) -> list[Draft]:
        seeds = [row_seed(self.seed, row, "text") for row in ids]
        starts = [self._start(seed) for seed in seeds]
        config = self.config
        how = Sampling(config.tokens, config.temperature, config.top_p, config.top_k)
        prompts = [[*self.begin, start] for start in starts]
        drawn = sample(self.model, prompts, seeds, how, stop=self.stop, banned=self.banned)
        drafts: list[Draft] = []
        seen = set(self.seen)
        for row, seed, start, sampled in zip(ids, seeds, starts, drawn, strict=True):
            drafts.append(self._draft(row, seed, start, sampled, seen))
            seen.add(self.identity(drafts[-1]))
        return drafts

    def _start(self, seed: int) -> int:
        return self.first[seed % len(self.first)]

    def _draft(self, row: int, seed: int, start: int, sampled: Sampled, seen: set[str]) -> Draft:
        text = self.tokenizer.decode([start, *sampled.tokens], clean_up_tokenization_spaces=False)
        draft = Draft(row, seed, KEPT, answer=text, drawn=len(sampled.tokens))
        if sampled.looped:
            status = "repetitive"
        elif not encode_text(self.tokenizer, text):
            status = "empty"
        else:
            status = "duplicate" if self.identity(draft) in seen else KEPT
        return Draft(row, seed, status, answer=text, drawn=len(sampled.tokens))

    def identity(self, draft: Draft) -> str:
        return normalised(draft.answer)


def to_text_row(draft: Draft) -> Row:
    """The row a kept draft is learned as."""
    return Row(draft.id, "train", text=draft.answer, source="texts", seed=draft.seed, origin="own")


def _is_text(piece: str) -> bool:
    """Whether a token begins a text: a letter or digit in it, and no half of a character."""
    return "\ufffd" not in piece and any(character.isalnum() for character in piece)
