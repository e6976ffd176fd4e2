"""What writing, checking and measuring the artifacts takes, and measuring the checkpoints.

Stock llama.cpp and ONNX Runtime run on the processors beside a card. llama.cpp is asked position by position: each
costs one decoded token, of which several texts' are decoded together.
"""

from __future__ import annotations

from ...evaluation.config import BUILTIN, EvaluateConfig, RetrievalConfig
from ...export.config import ExportConfig
from ...merge.config import MergeConfig
from .devices import Work
from .memory import ANSWERS, EXPORT_BITS, PROMPT, Setting, measured_tokens
from .writing import batches, decoding, forward

SLOTS = 4  # texts that llama.cpp scores side by side
BUILTIN_ROWS = 64  # of a built-in task without a limit
# Operations' worth of time per weight and type: choosing scales. From the default recipe's export on `cpu-2core`.
QUANTIZING = 13_000


def merge_work(config: MergeConfig, at: Setting, models: int, held: float) -> Work:
    """Reading all models and writing one; then the unpruned model, the variants and their merge on held-out rows."""
    measured = forward(at.shape, at.shape.blocks, held, 512)
    measured += (models + 1) * forward(at.shape, at.kept, held, 512)
    return Work(measured, host_read=(2 * models + 2) * at.small)


def export_work(config: ExportConfig, at: Setting) -> Work:
    """The checkpoint on the probe and for the importance matrix; each type written, read back and tried, and the graph
    tried at high precision."""
    small = at.shape.parameters(at.kept)
    work = Work(forward(at.shape, at.kept, config.imatrix_tokens + config.verify.tokens, 256))
    for kind in [*config.gguf, *config.onnx]:
        plain = kind in ("F16", "fp32")
        work = work + Work(host_flops=0 if plain else QUANTIZING * small, host_read=4 * 4 * small)
        for depth in at.exported(config):
            work = work + _scored(at, kind, depth, config.verify.tokens, config.verify.window)
    for precise, kinds in (("F16", config.gguf), ("fp32", config.onnx)):  # the graph, once per format
        written = bool(kinds) and precise == "F16" and precise not in kinds
        work = work + Work(host_read=(4 + 2) * small if written else 0)
        for depth in at.exported(config) if kinds else ():
            work = work + _scored(at, precise, depth, config.verify.tokens, config.verify.window)
    return work


def _scored(at: Setting, kind: str, depth: int, tokens: int, window: int) -> Work:
    """An artifact's predictions at `tokens` positions."""
    weights = at.shape.parameters(depth) * EXPORT_BITS[kind] / 8
    steps = 1.0 if kind in ONNX else tokens / SLOTS
    return Work(forward(at.shape, depth, tokens, window / 2), steps * weights).beside()


ONNX = ("int4", "int8", "fp32")


def evaluate_work(config: EvaluateConfig, at: Setting) -> Work:
    """Every checkpoint and every artifact on the same text and tasks; tasks of lm-eval are not counted."""
    tokens, half = measured_tokens(config, at), config.window / 2
    written = [config.limit or BUILTIN_ROWS for task in config.tasks if task in BUILTIN]
    written += [config.limit for task in config.tasks if task.endswith(".jsonl") and config.limit]
    work = Work()
    for blocks in at.measured:
        weights = at.shape.parameters(blocks) * at.size
        work = work + Work(forward(at.shape, blocks, tokens, half))
        for rows in written:
            work = work + decoding(at, blocks, rows, batches(rows, ANSWERS), PROMPT, config.max_tokens, weights)
        work = work + _speed(config, at, blocks, weights)
    for kind, depth in at.artifacts if config.artifacts else ():
        weights = at.shape.parameters(depth) * EXPORT_BITS[kind] / 8
        work = work + _scored(at, kind, depth, tokens, config.window)
        for rows in written:  # one after another
            work = work + decoding(at, depth, rows, 1, PROMPT, config.max_tokens, weights, 2).beside()
        work = work + _speed(config, at, depth, weights).beside()
    return work + _retrieval(config.retrieval, at) if config.retrieval else work


def _speed(config: EvaluateConfig, at: Setting, blocks: int, weights: float) -> Work:
    if config.speed is None:
        return Work()
    new = config.speed.new_tokens * (config.speed.repeat + 1)
    return decoding(at, blocks, 1, 1, config.speed.prompt_tokens, new, weights)


def _retrieval(config: RetrievalConfig, at: Setting) -> Work:
    """Long prompts, read once by each policy at each budget; questions about one text share most of it."""
    work = Work()
    texts = config.rows * sum(len(config.depths) if task == "passkey" else 1 for task in config.tasks)
    for length in config.lengths:
        for policy in config.policies:
            for budget in [length] if policy == "full" else [config.entries(b, length) for b in config.budgets]:
                keys = min(budget, length / 2)
                work = work + Work(texts * forward(at.shape, at.kept, length, keys, heads=1))
    return work
