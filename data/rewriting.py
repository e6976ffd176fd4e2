"""Self-data from gold answers: the unpruned model rewrites them in its own words (arXiv 2402.13669, 2410.09982).

Rewrites are likely under the unpruned model, so training on them moves the pruned model back toward it, where answers
from elsewhere would move it away. Gold is kept where the rewrite is rejected, and the row records why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.stage import Context
from ..modeling.load import load_config
from ..modeling.types import ModelTokenizer
from ..records.figures import RewriteShares
from .asking import last_answer, leaks, own_prompt, rewrite_prompt
from .chat import encode_row, special_tokens
from .checks import Truth
from .config import EngineConfig, General
from .magpie import query
from .parts import in_rounds
from .rows import Messages, Origin, Row
from .sampling import Sampled, Sampling, row_seed
from .writing import Writer

WINDOW = 8  # batches within which rows are sorted by length


@dataclass(frozen=True)
class Gold:
    """A row as read from its data set."""

    row: Row
    rewrite: General | None
    answer: str = ""  # the final answer, if a column has it
    tests: str = ""


@dataclass(frozen=True)
class RewriteOutcome:
    """The result for one row, as stored in a part file."""

    id: int
    origin: Origin
    why: str
    seed: int
    text: str = ""  # the model's last answer, accepted or not
    drawn: int = 0  # tokens sampled


class Rewriter:
    """Rewrites rows batch by batch. The batches depend on the rows alone, and each is saved atomically to its own part
    file, so a killed and resumed run ends with the same rows."""

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        base: Path,
        length: int,
        batch: int,
        engine: EngineConfig,
        context: Context,
        work: Path,
    ):
        self.tokenizer, self.length, self.batch, self.context = tokenizer, length, batch, context
        self.base, self.engine, self.seed = base, engine, context.seed
        self.config = load_config(base)
        asked = query(tokenizer, base)
        self.stop = asked.stop
        self.banned = [token for token in asked.banned if token < self.config.vocab_size]
        self.special = list(special_tokens(tokenizer).values())
        self.parts = work / "rewrites"

    def run(self, golds: Sequence[Gold]) -> tuple[list[RewriteOutcome], float | None]:
        """The outcome of each row with `rewrite` set, and tokens sampled per second, if any were."""
        batches = list(self._batches(golds))
        longest = max((_how(gold).max_tokens + size for batch in batches for gold, size in batch), default=0)
        outcomes: list[RewriteOutcome] = []
        with (
            Writer(self.engine, self.base, longest, self.batch, self.context) as writer,
            self.context.progress.bar("rewriting", sum(map(len, batches))) as advance,
        ):

            def draw(number: int) -> list[dict[str, Any]]:
                return [asdict(outcome) for outcome in self._draw([gold for gold, _ in batches[number]], writer)]

            for records in in_rounds(self.parts, len(batches), self.context.group, draw):
                outcomes += [RewriteOutcome(**record) for record in records]
                taken = sum(outcome.origin != "gold" for outcome in outcomes)
                advance(len(records), f"{taken} of {len(outcomes)} accepted")
        return outcomes, writer.speed()

    def _batches(self, golds: Sequence[Gold]) -> Iterator[list[tuple[Gold, int]]]:
        """Batches of (row, prompt length): rows with the same settings together, sorted by length within a window to
        reduce padding and to group rows that end late."""
        kinds: dict[str, list[Gold]] = {}
        for gold in golds:
            if gold.rewrite is not None:
                kinds.setdefault(gold.rewrite.model_dump_json(), []).append(gold)
        for several in kinds.values():
            for start in range(0, len(several), WINDOW * self.batch):
                window = [(gold, self._prompt_length(gold)) for gold in several[start : start + WINDOW * self.batch]]
                window.sort(key=lambda pair: pair[1])  # of the same length: in their order
                for i in range(0, len(window), self.batch):
                    yield window[i : i + self.batch]

    def _prompt_length(self, gold: Gold) -> int:
        """The prompt's tokens; 0 if it cannot be rendered."""
        try:
            return len(
                self._tokens(rewrite_prompt(self.tokenizer, last_answer(_turns(gold), gold.row.tools), _how(gold)))
            )
        except UserError:
            return 0

    def _draw(self, golds: list[Gold], writer: Writer) -> list[RewriteOutcome]:
        outcomes: dict[int, RewriteOutcome] = {}
        open_golds = []
        for gold in golds:
            why = self._hopeless(gold)
            if why:
                outcomes[gold.row.id] = RewriteOutcome(
                    gold.row.id, "gold", why, row_seed(self.seed, gold.row.id, "rewrite")
                )
            else:
                open_golds.append(gold)
        how = golds[0].rewrite
        if how is not None and how.own_answer_first:
            own = self._round(open_golds, writer, "own")
            outcomes |= {outcome.id: outcome for outcome in own}
            open_golds = [gold for gold in open_golds if outcomes[gold.row.id].origin == "gold"]
        for outcome in self._round(open_golds, writer, "rewritten"):
            before = outcomes.get(outcome.id)
            outcomes[outcome.id] = replace(outcome, drawn=outcome.drawn + (before.drawn if before else 0))
        return [outcomes[gold.row.id] for gold in golds]

    def _round(self, golds: list[Gold], writer: Writer, origin: Origin) -> list[RewriteOutcome]:
        """One model answer per row: its own, or a rewrite of gold."""
        if not golds:
            return []
        make = own_prompt if origin == "own" else rewrite_prompt
        how = _how(golds[0])
        prompts = [self._tokens(make(self.tokenizer, last_answer(_turns(gold), gold.row.tools), how)) for gold in golds]
        seeds = [row_seed(self.seed, gold.row.id, origin) for gold in golds]
        sampling = Sampling(how.max_tokens, how.temperature, how.top_p, how.top_k)
        drawn = writer.sample(prompts, seeds, sampling, stop=self.stop, banned=self.banned)
        return [
            self._judged(gold, sampled, seed, origin) for gold, sampled, seed in zip(golds, drawn, seeds, strict=True)
        ]

    def _judged(self, gold: Gold, sampled: Sampled, seed: int, origin: Origin) -> RewriteOutcome:
        text = self.tokenizer.decode(sampled.tokens, clean_up_tokenization_spaces=False).strip()
        why = self._fault(gold, sampled, text, origin)
        outcome = RewriteOutcome(gold.row.id, origin, "", seed, text, len(sampled.tokens))
        if why:
            return replace(outcome, origin="gold", why=why)
        return replace(outcome, why=_how(gold).check.passed)

    def _fault(self, gold: Gold, sampled: Sampled, text: str, origin: Origin) -> str:
        """Why an answer is rejected; empty if it is accepted."""
        how, asked = _how(gold), last_answer(_turns(gold), gold.row.tools)
        if not text:
            return "empty"
        if not sampled.ended:
            return "repetitive" if sampled.looped else "unfinished"
        if any(token in text for token in self.special):
            return "special_token"
        if origin == "rewritten" and leaks(text, asked):
            return "leak"
        try:
            encoded = encode_row(self.tokenizer, rewritten_row(gold.row, text))
        except UserError:
            return "template"
        if len(encoded.input_ids) > self.length:
            return "too_long"
        return "" if how.check.agrees(text, _truth(gold, asked.gold)) else "differs"

    def _hopeless(self, gold: Gold) -> str:
        """Why no answer to this row could be accepted, known before sampling; empty if one could."""
        how, asked = _how(gold), last_answer(_turns(gold), gold.row.tools)
        if not asked.by_user:
            return "not_asked"
        if not asked.rewritable:
            return "calls_tools"
        if _turns(gold)[-1].get("weight") == 0:
            return "not_learned"
        try:
            prompt = self._tokens(rewrite_prompt(self.tokenizer, asked, how))
        except UserError:
            return "template"
        if len(prompt) + how.max_tokens > self._context():
            return "too_long"
        return "" if how.check.comparable(_truth(gold, asked.gold)) else "uncheckable"

    def _context(self) -> int:
        """The model's context length in tokens."""
        return int(getattr(self.config, "max_position_embeddings", None) or 1 << 30)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def rewritten_row(row: Row, text: str) -> Row:
    """The row with its last answer replaced."""
    assert row.messages is not None
    return replace(row, messages=[*row.messages[:-1], {"role": "assistant", "content": text}])


def settle_row(gold: Gold, outcome: RewriteOutcome | None) -> Row:
    """The row to train on."""
    if outcome is None:
        return gold.row
    row = replace(gold.row, why=outcome.why)
    if outcome.origin == "gold":
        return row
    return replace(rewritten_row(row, outcome.text), origin=outcome.origin, seed=outcome.seed)


def examples(golds: Sequence[Gold], outcomes: Sequence[RewriteOutcome], count: int = 3) -> list[dict[str, str]]:
    """A few rows with gold beside the model's answer: the first accepted and the first rejected ones, by id."""
    by_id = {gold.row.id: gold for gold in golds}
    written = sorted((outcome for outcome in outcomes if outcome.text), key=lambda outcome: outcome.id)
    taken = [outcome for outcome in written if outcome.origin != "gold"][:count]
    kept = [outcome for outcome in written if outcome.origin == "gold"][:count]
    shown = []
    for outcome in [*taken, *kept]:
        asked = last_answer(_turns(by_id[outcome.id]))
        shown.append(
            {
                "prompt": asked.before[-1]["content"],
                "gold": asked.gold,
                "written": outcome.text,
                "origin": outcome.origin,
                "why": outcome.why,
            }
        )
    return shown


def shares(rows: Sequence[Row]) -> RewriteShares:
    """Counts for rows with a rewrite requested: by origin, and by the reason gold was kept."""
    asked = [row for row in rows if row.why]
    origins = Counter(row.origin for row in asked)
    reasons = Counter(row.why for row in asked if row.origin == "gold")
    return RewriteShares(
        asked=len(asked),
        origins=dict(sorted(origins.items())),
        taken_share=round(1 - origins["gold"] / len(asked), 4) if asked else 0.0,
        gold_kept=dict(sorted(reasons.items())),
    )


def _turns(gold: Gold) -> Messages:
    assert gold.row.messages is not None
    return gold.row.messages


def _how(gold: Gold) -> General:
    assert gold.rewrite is not None
    return gold.rewrite


def _truth(gold: Gold, answer: str) -> Truth:
    """What a row says of the right answer, which as a whole is `answer`."""
    how = _how(gold)
    return Truth(answer, gold.answer, gold.tests, how.marker, how.timeout, how.memory)
