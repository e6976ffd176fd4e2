"""Retrieval from long prompts with a bounded KV cache: every policy reads the same prompts.

A measurement is one text read with one policy and budget. The text is read once; each question about it continues from
a copy of the cache after the last chunk that all questions' prompts share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.files import check_file_exists, read_json_value, read_text, write_json
from ..core.stage import Advance, Context
from ..kv.policies import make
from ..kv.settings import HeadSettings, KvBudget, read_settings
from ..kv.steps import shared_steps
from ..modeling.blocks import Decoder
from ..modeling.retaining import RetainingHeads, has_heads, load_heads
from ..modeling.types import CausalModel, ModelTokenizer
from ..records.models import RetrievalResult, RetrievalTask
from .config import FULL, RetrievalConfig
from .generation import stops, text_of
from .kv_cache import KVCache, answer_labels
from .retrieval_tasks import Continuation, Filler, Reading, continuation, keys, passkey
from .statistics import wilson


@dataclass(frozen=True)
class Item:
    """A text to read."""

    task: str
    length: int  # maximum tokens of the prompt
    row: int
    depth: float | None  # of a passkey; None for other tasks


@dataclass(frozen=True)
class Measured:
    """One text, read with one policy and budget."""

    task: RetrievalTask
    length: int
    row: int
    depth: float | None
    policy: str
    budget: float | None  # as asked for; None: everything is kept
    entries: int | None  # the budget in keys per block and KV head
    bytes: int  # of keys and values, when most were held
    depths: list[float]  # of the hidden numbers
    hits: list[bool]
    nll: list[float]  # in nats, of each true answer, or of the continuation
    tokens: list[int]  # of these

    @property
    def key(self) -> str:
        return key(Item(self.task, self.length, self.row, self.depth), self.policy, self.budget)


def key(item: Item, policy: str, budget: float | None) -> str:
    """A measurement's unique name."""
    return f"{item.task}/{item.length}/{item.row}/{item.depth}/{policy}/{budget}"


class Retrieval:
    """The texts of one evaluation, for any number of models with the same tokenizer. Raises `UserError` if the text is
    missing or too short."""

    def __init__(self, config: RetrievalConfig, context: Context, tokenizer: ModelTokenizer):
        self.config, self.seed, self.tokenizer = config, context.seed, tokenizer
        text = read_text(_file(config, context)) if config.text is not None else None
        self.filler = Filler(text)
        self.text: list[int] = []
        if "continuation" in config.tasks and text is not None:
            self.text = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for item in self.items():
            if item.row == 0 and item.task != "passkey":
                self.made(item)

    def items(self) -> list[Item]:
        """All texts, shortest first."""
        config = self.config
        items = []
        for length in sorted(config.lengths):
            for task in config.tasks:
                depths = config.depths if task == "passkey" else [None]
                items += [Item(task, length, row, depth) for row in range(config.rows) for depth in depths]
        return items

    def made(self, item: Item) -> Reading | Continuation:
        seed = f"retrieval/{self.seed}/{item.row}"
        if item.task == "continuation":
            return continuation(self.tokenizer, self.text, item.length, self.config.continued, seed)
        if item.depth is not None:
            return passkey(self.tokenizer, self.filler, item.length, item.depth, seed)
        return keys(self.tokenizer, self.filler, item.length, self.config.depths, seed)

    def ways(self) -> list[tuple[str, float | None]]:
        """Policies with their budgets, in the order of the configuration."""
        ways: list[tuple[str, float | None]] = []
        for policy in self.config.policies:
            budgets: list[float | None] = [None] if policy == FULL else [*self.config.budgets]
            for budget in budgets:
                ways.append((policy, budget))
        return ways

    def collect(
        self,
        model: CausalModel,
        checkpoint: Path | None,
        file: Path,
        advance: Advance,
        told: Callable[[list[Measured]], None] = lambda _: None,
    ) -> list[Measured]:
        """`run`, but each measurement is saved to `file` at once, so a killed run can resume; the file's measurements
        of other texts or policies stay in it. `told` is called with all measurements after each new one."""
        before = read_json_value(file) if file.exists() else []
        measured = {entry.key: entry for entry in (Measured(**values) for values in before)}
        advance(sum(name in measured for name in self.names()))
        for entry in self.run(model, checkpoint, advance, list(measured)):
            measured[entry.key] = entry
            write_json(file, [asdict(entry) for entry in measured.values()])
            told(list(measured.values()))
        return [measured[name] for name in self.names()]

    def run(
        self, model: CausalModel, checkpoint: Path | None, advance: Advance, done: Collection[str] = ()
    ) -> Iterator[Measured]:
        """Measure a model. If a policy needs heads, they come from `checkpoint`: this model's, or those of the deeper
        model that this one is a depth of. Measurements in `done` are skipped."""
        decoder, heads, meant = Decoder(model), None, HeadSettings()
        if checkpoint is not None and has_heads(checkpoint):
            meant = read_settings(checkpoint)
        if self.config.needs_heads:
            if checkpoint is None:
                raise ValueError("these policies need a checkpoint with retaining heads")
            heads = load_heads(checkpoint, model.config)
        for item in self.items():
            todo = [way for way in self.ways() if key(item, *way) not in done]
            if todo:
                reader = Reader(decoder, self.made(item), self, heads, meant)
                for policy, budget in todo:
                    yield reader.measure(item, policy, budget)
                    advance(1)

    def names(self) -> list[str]:
        """Names of all measurements of one model."""
        return [key(item, *way) for item in self.items() for way in self.ways()]


class Reader:
    """Reads one text with several policies."""

    def __init__(
        self,
        decoder: Decoder,
        made: Reading | Continuation,
        retrieval: Retrieval,
        heads: RetainingHeads | None,
        meant: HeadSettings,
    ):
        self.decoder, self.made, self.heads, self.meant = decoder, made, heads, meant
        self.config, self.tokenizer, self.seed = retrieval.config, retrieval.tokenizer, retrieval.seed
        whole = isinstance(made, Continuation)
        self.prompts = [made.ids] if whole else [question.ids for question in made.questions]
        self.answers = [made.after] if whole else [question.answer_ids for question in made.questions]
        self.new = max(self.config.max_tokens, *map(len, self.answers))
        self.labels: list[Tensor] | None = None

    def settings(self, policy: str, entries: int | None) -> KvBudget:
        """The configuration's settings, else those that the heads were trained for."""
        config, meant = self.config, self.meant
        most = meant.stabilizers if entries is None else min(meant.stabilizers, entries // 4)
        return KvBudget(
            entries,
            meant.chunk if config.chunk is None else config.chunk,
            most if config.stabilizers is None else config.stabilizers,
            meant.local if config.local is None else config.local,
            "recent" if policy == FULL else policy,  # a full cache evicts nothing, so any policy will do
            config.evict_while_decoding and entries is not None,
            config.positions,
            meant.pool,
            meant.sinks,
        )

    def measure(self, item: Item, policy: str, budget: float | None) -> Measured:
        entries = None if budget is None else self.config.entries(budget, item.length)
        caches = self._caches(self.settings(policy, entries))
        hits, depths, size, nll = [], [], 0, []
        stop = stops(self.tokenizer)
        for number, (cache, logits) in enumerate(caches):
            if not isinstance(self.made, Continuation):
                question = self.made.questions[number]
                free = cache.copy()
                written = text_of(self.tokenizer, free.write(logits, self.config.max_tokens, stop))
                size = max(size, free.bytes)
                hits.append(question.is_right(written))
                depths.append(question.depth)
            nll.append(nll_after(cache, logits, self.answers[number]))
            size = max(size, cache.bytes)
        return Measured(**asdict(item), policy=policy, budget=budget, entries=entries, bytes=size, depths=depths,
                        hits=hits, nll=nll, tokens=[len(answer) for answer in self.answers])  # fmt: skip

    def _caches(self, settings: KvBudget) -> Iterator[tuple[KVCache, Tensor]]:
        """After each prompt: the cache, and the logits (V,). What the prompts share is read once."""
        length = max(map(len, self.prompts))
        common = shared_steps(self.prompts, settings) if len(self.prompts) > 1 else 0
        policy = make(settings, self.seed)
        if "labels" in policy.needs and self.labels is None:
            self.labels = self._labels()
        first = KVCache(self.decoder, policy, settings, length, self.new, heads=self.heads, labels=self.labels)
        if common:
            first.read_prompt(self.prompts[0], common)
        for number, prompt in enumerate(self.prompts):
            cache = first if number == len(self.prompts) - 1 else first.copy()
            yield cache, cache.read_prompt(prompt)

    def _labels(self) -> list[Tensor]:
        """The maximum over all questions of the true answers' labels: the oracle knows everything that is asked."""
        largest: list[Tensor] = []
        for number, (cache, _) in enumerate(self._caches(self.settings(FULL, None))):
            labels = answer_labels(cache, self.answers[number])
            largest = labels if not largest else [_greater(a, b) for a, b in zip(largest, labels, strict=True)]
        return largest


def nll_after(cache: KVCache, logits: Tensor, after: Sequence[int]) -> float:
    """Negative log-likelihood in nats of the tokens `after`, following what the cache has read; `logits` (V,) are its
    last ones."""
    after_each = torch.cat([logits[None], cache.read_on(after[:-1])]) if len(after) > 1 else logits[None]
    return -float(after_each.float().log_softmax(-1)[range(len(after)), list(after)].sum())


def _greater(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise maximum of labels (G, N) and (G, M), over the prompt tokens that both have."""
    count = min(a.shape[1], b.shape[1])
    return a[:, :count].maximum(b[:, :count])


def summarised(measured: Sequence[Measured]) -> list[RetrievalResult]:
    """The report's entries: one per task, length, depth, policy and budget."""
    cells: dict[tuple[str, int, float | None, str, float | None], _Cell] = {}
    for entry in measured:
        asked = (entry.depths, entry.hits) if entry.depths else ([None], [None])
        for depth, hit, nll, tokens in zip(*asked, entry.nll, entry.tokens, strict=True):
            cell = cells.setdefault((entry.task, entry.length, depth, entry.policy, entry.budget), _Cell(entry, depth))
            cell.kv_bytes = max(cell.kv_bytes, entry.bytes)
            cell.n += 1
            cell.hits += bool(hit)
            cell.nll += nll
            cell.tokens += tokens
    return [cell.figures() for cell in cells.values()]


@dataclass
class _Cell:
    """Sums over the texts of one task, length, depth, policy and budget."""

    first: Measured
    depth: float | None
    kv_bytes: int = 0
    n: int = 0
    hits: int = 0
    nll: float = 0.0
    tokens: int = 0

    def figures(self) -> RetrievalResult:
        """`value` is the share found with its Wilson interval, or a perplexity; `nats` are per token of the true
        answer."""
        nats = self.nll / self.tokens
        if self.first.task == "continuation":
            value, low, high = math.exp(min(nats, 700.0)), None, None
        else:
            value, (low, high) = self.hits / self.n, wilson(self.hits, self.n)
        return RetrievalResult(
            task=self.first.task,
            length=self.first.length,
            depth=self.depth,
            policy=self.first.policy,
            budget=self.first.budget,
            entries=self.first.entries,
            kv_bytes=self.kv_bytes,
            n=self.n,
            value=value,
            low=low,
            high=high,
            nats=nats,
        )


def check(config: RetrievalConfig, context: Context, tokenizer: ModelTokenizer) -> None:
    """Reject a text that is missing or too short, and prompts too short for their facts, before any work is done."""
    if config.text is not None:
        check_file_exists(_file(config, context), "evaluate.retrieval.text: ")
    Retrieval(config, context, tokenizer)


def _file(config: RetrievalConfig, context: Context) -> Path:
    assert config.text is not None
    return context.resolve(config.text)
