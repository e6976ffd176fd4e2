"""Plain text that the unpruned model writes from a random first token (LLM-QAT, arXiv 2305.17888).

This needs neither a data set nor a chat template. Such rows cover much of the pretraining distribution, where
conversations keep to one register: use them to calibrate for general text. For one kind of text, give a few openings
(first words) of that kind to replace the random token.
"""

from __future__ import annotations

from pathlib import Path

from ..core.stage import Context
from ..modeling.types import ModelTokenizer
from .chat import encode_text, end_tokens, special_tokens
from .config import TextsConfig
from .drafts import KEPT, Draft, Drafts, normalised
from .rows import Row
from .sampling import Sampled, Sampling, row_seed


class Texts(Drafts):
    """Samples plain texts."""

    config: TextsConfig

    def __init__(self, config: TextsConfig, base: Path, tokenizer: ModelTokenizer, context: Context, work: Path):
        self.begin = list(tokenizer("")["input_ids"])  # tokens that the tokenizer puts before every text, if any
        self.openings = [tokenizer(opening, add_special_tokens=False)["input_ids"] for opening in config.openings]
        super().__init__(config, base, tokenizer, context, work)
        special = special_tokens(tokenizer)
        size = min(len(tokenizer), self.vocab_size)
        self.stop = frozenset(end_tokens(tokenizer, base))
        self.banned = [token for token in special if token < size and token not in self.stop]
        self.first = [token for token in range(size) if token not in special and _is_text(tokenizer.decode([token]))]

    def longest(self) -> int:
        return len(self.begin) + max([1, *map(len, self.openings)]) + self.config.tokens

    def draw(self, ids: range) -> list[Draft]:
        seeds = [row_seed(self.seed, row, "text") for row in ids]
        starts = [self._start(row, seed) for row, seed in zip(ids, seeds, strict=True)]
        config = self.config
        how = Sampling(config.tokens, config.temperature, config.top_p, config.top_k)
        prompts = [[*self.begin, *start] for start in starts]
        drawn = self.writer.sample(prompts, seeds, how, stop=self.stop, banned=self.banned)
        return [self._draft(*drafted) for drafted in zip(ids, seeds, starts, drawn, strict=True)]

    def _start(self, row: int, seed: int) -> list[int]:
        """The tokens a text begins with."""
        if not self.openings:
            return [self.first[seed % len(self.first)]]
        return self.openings[row % len(self.openings)]

    def _draft(self, row: int, seed: int, start: list[int], sampled: Sampled) -> Draft:
        text = self.tokenizer.decode([*start, *sampled.tokens], clean_up_tokenization_spaces=False)
        status = KEPT
        if sampled.looped:
            status = "repetitive"
        elif not sampled.tokens or not encode_text(self.tokenizer, text):
            status = "empty"
        return Draft(row, seed, status, answer=text, drawn=len(sampled.tokens))

    def identity(self, draft: Draft) -> str:
        return normalised(draft.answer)


def to_text_row(draft: Draft) -> Row:
    """The training row of a kept draft."""
    return Row(draft.id, "train", text=draft.answer, source="texts", seed=draft.seed, origin="own")


def _is_text(piece: str) -> bool:
    """Whether a token can start a text: it has a letter or digit, and no incomplete character."""
    return "\ufffd" not in piece and any(character.isalnum() for character in piece)
