"""Cost of measuring checkpoints and artifacts, without lm-eval tasks."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.cost import Need, Overrides, PlannedFile, Setting, StageCost, halves, worst
from ..core.work import Work, batches, decoding, forward
from ..export.cost import rival_work, rivals
from ..runtime.cost import artifact_bytes, scoring, writing
from .config import BUILTIN, EvaluateConfig, RetrievalConfig

RUNTIME = 880e6  # measured after a whole run of SmolLM2; includes freed memory that glibc keeps
CHUNK = 128  # positions per logits chunk
ANSWERS, PROMPT = 16, 128  # prompts a checkpoint answers at once, and the approximate length of a built-in one
BUILTIN_ROWS = 64  # rows of a built-in task without a limit
LEAST = 512  # fewest tokens suggested when memory is short


def measured_tokens(config: EvaluateConfig, at: Setting) -> int:
    """Number of tokens that an evaluation scores."""
    return config.tokens if config.text or at.rows is None else min(config.tokens, at.rows.targets)


def makes_rivals(config: EvaluateConfig, at: Setting) -> bool:
    """Whether the unpruned model is measured at the artifacts' sizes."""
    cut = at.kept < at.shape.blocks or any(depth < at.shape.blocks for *_, depth in at.artifacts)
    return config.wants_rivals(cut or at.recovered or bool(at.depths))


def _files(config: EvaluateConfig, at: Setting) -> list[PlannedFile]:
    """Every artifact and rival that is measured."""
    return [*(at.artifacts if config.artifacts else ()), *(rivals(at).measured if makes_rivals(config, at) else ())]


def _need(config: EvaluateConfig, at: Setting) -> Need:
    """The unpruned model, and its log-probabilities at every position in a memory-mapped file."""
    shape = at.shape
    scratch = measured_tokens(config, at) * shape.vocab * 2
    parts = {
        "runtime": at.runtime(RUNTIME),
        "weights": at.whole,
        "activations": config.window * shape.state * at.size,
        "logits": CHUNK * shape.vocab * 4 * 3,
        "mapped": 0 if at.cuda else scratch,
    }
    answering = dict(parts)
    if config.tasks:
        answering["kv"] = shape.kv_bytes(ANSWERS * (PROMPT + config.max_tokens), at.size)
    reading = dict(parts)
    if config.retrieval:  # the full cache, a copy per question about a text, and a copy of that to decode with
        reading["kv"] = shape.kv_bytes(3 * max(config.retrieval.lengths), at.size)
    files, own = _files(config, at), at.artifacts if config.artifacts else ()
    sizes = [int(artifact_bytes(file.type, shape.parameters(file.blocks))) for file in files]
    host = max(sizes, default=0) if at.cuda else 0
    note = f"{len(at.measured)} checkpoints" + (f", {len(own)} artifacts" if own else "")
    note += f", {len(files) - len(own)} rivals" if len(files) > len(own) else ""
    if config.harness_tasks:
        note += f"; {', '.join(config.harness_tasks)} on top"
    plain = rivals(at).scratch if makes_rivals(config, at) else 0
    return Need(worst(parts, answering, reading), 0, note, scratch + plain, host)


def _work(config: EvaluateConfig, at: Setting) -> Work:
    """Every checkpoint and every artifact on the same text and tasks."""
    shape, tokens, speed = at.shape, measured_tokens(config, at), config.speed
    written = [config.limit or BUILTIN_ROWS for task in config.tasks if task in BUILTIN]
    written += [config.limit for task in config.tasks if task.endswith(".jsonl") and config.limit]
    timed = speed.new_tokens * (speed.repeat + 1) if speed is not None else 0
    work = Work()
    for blocks in at.measured:
        weights = shape.parameters(blocks) * at.size
        work = work + Work(forward(shape, blocks, tokens, config.window / 2))
        for rows in written:
            together = batches(rows, ANSWERS)
            work = work + decoding(shape, blocks, rows, together, PROMPT, config.max_tokens, weights, at.size)
        if speed is not None:
            work = work + decoding(shape, blocks, 1, 1, speed.prompt_tokens, timed, weights, at.size)
    for file in _files(config, at):
        _, kind, depth = file
        work = work + scoring(shape, file, tokens, config.window)
        for rows in written:
            work = work + writing(shape, kind, depth, rows, PROMPT, config.max_tokens)
        if speed is not None:
            weights = artifact_bytes(kind, shape.parameters(depth))
            work = work + decoding(shape, depth, 1, 1, speed.prompt_tokens, timed, weights, at.size).beside()
    if makes_rivals(config, at):
        work = work + rival_work(at)
    return work + _retrieval(config.retrieval, at) if config.retrieval else work


def _retrieval(config: RetrievalConfig, at: Setting) -> Work:
    """Long prompts, read once per policy and budget; questions about one text share most of the reading."""
    work = Work()
    texts = config.rows * sum(len(config.depths) if task == "passkey" else 1 for task in config.tasks)
    for length in config.lengths:
        for policy in config.policies:
            for budget in [length] if policy == "full" else [config.entries(b, length) for b in config.budgets]:
                keys = min(budget, length / 2)
                work = work + Work(texts * forward(at.shape, at.kept, length, keys, heads=1))
    return work


def _changes(config: EvaluateConfig, _at: Setting) -> Iterable[Overrides]:
    return ((f"evaluate.tokens={size}",) for size in halves(config.tokens, LEAST))


COST = StageCost[EvaluateConfig](_need, _work, changes=_changes)
