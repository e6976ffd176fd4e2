"""The cost of writing and checking the artifacts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..core.cost import Need, Overrides, Parts, PlannedFile, Setting, StageCost, halves, worst
from ..core.units import kilobytes
from ..core.work import Work, forward
from ..runtime.artifact_sizes import Target, target_of
from ..runtime.artifact_types import GGUF_TYPES, ONNX_TYPES
from ..runtime.cost import QUANTIZING, artifact_bytes, cache_type, kv_bytes_per_token, scoring
from ..training.cost import saved_per_token
from ..training.objectives import HEAD_COPIES_ANCHORED
from .config import ExportConfig, TrainScales

RUNTIME = 720e6  # measured after a whole run of SmolLM2; includes freed memory that glibc keeps
ROW = 2048  # longest held-out row that is encoded; its beginning is the probe
LONG_TOKENS, LONG_STEP = 1024, 8  # of the text that an int8 cache is tried on; every so many are compared
CACHE_TOKENS, CACHE_ROW = 4096, 1024  # that the scales of an int8 cache are measured on, in rows of at most so many
DEPTH_GGUF = 64  # bytes per token of the vocabulary, which every depth of a GGUF type has once more
DEPTH_ONNX = 9_000  # bytes per block of the graph that every depth of an ONNX type has
CHUNK = 256  # positions whose logits exist at once while scales are trained
# Of trained scales, per weight: the code, and for one in 32 the scale, its move, gradient, two moments and the best.
SCALED = 1 + 6 * 4 / 32
# Bytes per weight and step, beside the products: dequantizing twice, and summing the gradient over blocks.
SCALING = 5 + 5 + 13
# A size instead of a type: tokens that sensitivity is measured on, those of a text, and the share of the weights that
# is rounded to every type.
SENSED, TEXT = 2048, 256
ROUNDED, TYPES_TRIED = 0.2, 10
RIVALS_TRIED = 2  # GGUF types of the unpruned model that are made for an artifact, the largest that fit
RIVAL_SHARED = 0.02  # of an artifact's bytes: a rival that is smaller by less, and measured already, stands beside it
LEAST_BITS, LEAST_BITS_BY_32 = 1.5625, 4.25  # per weight: IQ1_S, and MXFP4 where rows fit no blocks of 256
RIVAL_TOKENS, RIVAL_WINDOW = 256, 128  # of training rows, on which they are compared


def _exported(config: ExportConfig, at: Setting) -> Sequence[int]:
    """The depths to export."""
    return config.depths or at.depths or [at.kept]


def _listed(config: ExportConfig) -> list[tuple[str, str]]:
    """Format and type of all that is exported."""
    return [*(("gguf", kind) for kind in config.gguf), *(("onnx", kind) for kind in config.onnx)]


def _sized(kinds: Iterable[str]) -> bool:
    """Whether types are chosen tensor by tensor."""
    return any(target_of(kind) is not None for kind in kinds)


def _leaves(config: ExportConfig, at: Setting) -> Setting:
    if config.depths:
        at.check_depths("export.depths", config.depths)
    files = [PlannedFile(*kind, depth) for kind in _listed(config) for depth in _exported(config, at)]
    return replace(at, artifacts=tuple(files), weighed=0 if config.imatrix is False else config.imatrix_tokens)


def _need(config: ExportConfig, at: Setting) -> Need:
    """The checkpoint; for ONNX the builder's process, which holds it again in float32."""
    kinds = [*config.gguf, *config.onnx]
    small = at.shape.parameters(at.kept)
    disk = sum(int(artifact_bytes(kind, small)) for kind in kinds)
    *less, _ = _exported(config, at)
    disk += len(less) * len(config.gguf) * DEPTH_GGUF * at.shape.vocab + sum(less) * len(config.onnx) * DEPTH_ONNX
    note = ", ".join(kinds) + (f" at {len(less) + 1} depths" if less else "") + f"; {_context_note(config, at)}"
    runtime = {"runtime": at.runtime(RUNTIME)}
    reference = runtime | {"weights": at.small, "activations": ROW * at.shape.state * at.size}
    if less:  # each depth's distributions on the probe text
        reference["logits"] = (len(less) + 1) * config.verify.tokens * at.shape.vocab * 4
    if config.kv != "float32":
        positions = (len(less) + 1) * LONG_TOKENS // LONG_STEP
        reference["logits"] = reference.get("logits", 0) + positions * at.shape.vocab * 4
    moments = [reference]
    if _sized(kinds):  # one text's activations of every block, and its logits with what their gradient needs
        width = 12 * at.shape.hidden + 3 * at.shape.intermediate
        kept = TEXT * (at.kept * width * at.size + 4 * at.shape.vocab * 4)
        moments.append(runtime | {"weights": at.small, "activations": kept})
    building = {"runtime": int(2 * RUNTIME), "weights": small * 4}
    if config.onnx and not at.cuda:
        moments.append(building)
    if config.train_scales and config.trained:
        moments.append(runtime | _training(config.train_scales, at, len(less) + 1))
    host = sum(building.values()) if config.onnx and at.cuda else 0
    # The float32 graph that the others are made from; before it the F16 file that llama.cpp's graph is checked with.
    checked = 2 * small if config.gguf and "F16" not in config.gguf else 0
    return Need(worst(*moments), disk, note, max(4 * small if config.onnx else 0, checked), host)


def _context_note(config: ExportConfig, at: Setting) -> str:
    """What keys and values take at the greatest depth."""
    caches = dict.fromkeys(cache_type(form, config.kv) for form, _ in reversed(_listed(config)))
    each = (f"{kilobytes(kv_bytes_per_token(at.shape, at.kept, cache))} in {cache}" for cache in caches)
    return f"keys and values of a token: {', '.join(each)}"


def _training(config: TrainScales, at: Setting, depths: int) -> Parts:
    """The memory of training scales: codes in place of the checkpoint's matrices, and one matrix dequantized."""
    shape, tokens = at.shape, config.batch * min(config.length, _longest(at, config.length))
    blocks, ends = at.kept * shape.block_products, shape.parameters(0)
    per_block = shape.hidden if config.gradient_checkpointing else saved_per_token(shape)
    seen = config.steps * tokens * depths * shape.hidden * at.size
    largest = shape.hidden * shape.intermediate * (4 * 3 + at.size)
    return {
        "weights": int(blocks * SCALED + ends * at.size + largest),
        "teacher": shape.vocab * shape.hidden * at.size + seen,
        "activations": tokens * (at.kept * per_block + shape.state) * at.size,
        "logits": CHUNK * shape.vocab * 4 * HEAD_COPIES_ANCHORED,
        "mapped": 0 if at.cuda else blocks * at.size,
    }


def _longest(at: Setting, limit: int) -> int:
    """Tokens of a row, if that is known."""
    return limit if at.rows is None else at.rows.tokens // at.rows.count


def _training_work(config: TrainScales, at: Setting, types: int, depths: int) -> Work:
    """The checkpoint's look at the rows, once; for each type the steps, and the held-out rows again and again."""
    length = min(config.length, _longest(at, config.length))
    tokens = config.steps * config.batch * length
    held = config.held_out if at.rows is None else min(config.held_out, int(at.rows.tokens * at.rows.heldout))
    rows = tokens if at.rows is None else min(tokens, at.rows.count * length)
    # Forward, and backward through weights and to them; two heads, and the gradient to the states before one.
    step = forward(at.shape, at.kept, tokens, length / 2, tokens * depths) * (3 + config.gradient_checkpointing)
    measured = forward(at.shape, at.kept, held, length / 2, 2 * held * depths) * (1 + config.steps // config.eval_every)
    looking = Work(forward(at.shape, at.kept, rows + held, length / 2, 0))
    read = SCALING * config.steps * at.kept * at.shape.block_products
    return looking + Work(types * (step + measured), types * read)


def _work(config: ExportConfig, at: Setting) -> Work:
    """The checkpoint on the probe and for the importance matrix; each type written, read back and tried, and the graph
    tried at high precision."""
    small, verify = at.shape.parameters(at.kept), config.verify
    work = Work(forward(at.shape, at.kept, config.imatrix_tokens + verify.tokens, 256))
    for form, kind in _listed(config):
        plain = kind in ("F16", "fp32")
        work = work + Work(host_flops=0 if plain else QUANTIZING * small, host_read=4 * 4 * small)
        for depth in _exported(config, at):
            work = work + scoring(at.shape, PlannedFile(form, kind, depth), verify.tokens, verify.window)
    if config.train_scales:
        work = work + _training_work(config.train_scales, at, len(config.trained), len(_exported(config, at)))
    if _sized([*config.gguf, *config.onnx]):
        work = work + _choosing(at, at.kept, _sized(config.gguf) + _sized(config.onnx))
    for form, precise, kinds in (("gguf", "F16", config.gguf), ("onnx", "fp32", config.onnx)):  # the graph, once each
        written = bool(kinds) and precise == "F16" and precise not in kinds
        work = work + Work(host_read=(4 + 2) * small if written else 0)
        for depth in _exported(config, at) if kinds else ():
            work = work + scoring(at.shape, PlannedFile(form, precise, depth), verify.tokens, verify.window)
    if config.kv != "float32":
        for depth in _exported(config, at):
            work = work + Work(forward(at.shape, depth, LONG_TOKENS, LONG_TOKENS / 2, LONG_TOKENS / LONG_STEP))
            work = work + scoring(at.shape, PlannedFile("onnx", "fp32", depth), LONG_TOKENS, LONG_TOKENS)
        work = work + scoring(at.shape, PlannedFile("onnx", "fp32", at.kept), CACHE_TOKENS, CACHE_ROW)
    return work


def _choosing(at: Setting, blocks: int, formats: int = 1) -> Work:
    """Measuring what each tensor loses in each type."""
    rounding = formats * ROUNDED * TYPES_TRIED * QUANTIZING * at.shape.parameters(blocks)
    return Work(3 * forward(at.shape, blocks, SENSED, TEXT / 2), host_flops=rounding)


@dataclass(frozen=True)
class PlannedRivals:
    """The unpruned model at the artifacts' sizes (`export/rivals.py`), as far as typical sizes tell."""

    made: Sequence[PlannedFile]  # what is written, each once
    measured: Sequence[PlannedFile]  # of them those that are set beside the artifacts
    scratch: int  # bytes of the files that are there at once


def rivals(at: Setting) -> PlannedRivals:
    """The rivals of all artifacts that the export leaves."""
    whole = at.shape.parameters(at.shape.blocks)
    made: dict[PlannedFile, None] = {}
    measured: dict[PlannedFile, float] = {}
    scratch = 0
    sized = {
        ("gguf", artifact_bytes(file.type, at.shape.parameters(file.blocks)))
        for file in at.artifacts
        if file.form == "gguf" and target_of(file.type) is not None
    }
    for limit, form in sorted(
        (artifact_bytes(file.type, at.shape.parameters(file.blocks)), file.form) for file in at.artifacts
    ):
        tried = []
        if not any((1 - RIVAL_SHARED) * limit <= size <= limit for size in measured.values()):
            plain = _fitting(list(GGUF_TYPES), whole, limit)[:RIVALS_TRIED]
            per_tensor = (not plain or (form, limit) in sized) and _least_gguf(at) <= limit
            tried.append(("gguf", [Target(bytes=int(limit)).name] * per_tensor + plain))
        if form == "onnx":
            tried.append(("onnx", _fitting(list(ONNX_TYPES), whole, limit)[:1]))
        for rival, kinds in tried:
            files = [PlannedFile(rival, kind, at.shape.blocks) for kind in kinds]
            made |= dict.fromkeys(files)
            measured |= {file: artifact_bytes(file.type, whole) for file in files[:1]}
            graph = 4 * whole if kinds and rival == "onnx" else 0
            scratch = max(scratch, graph + sum(int(artifact_bytes(kind, whole)) for kind in kinds))
    return PlannedRivals(list(made), list(measured), scratch)


def _least_gguf(at: Setting) -> float:
    """About the bytes of the smallest GGUF of the unpruned model: rows that are no multiple of 256 have no type below
    MXFP4."""
    shape = at.shape
    down = shape.hidden * shape.intermediate * shape.blocks
    rest = shape.parameters(shape.blocks) - down
    columns = ((shape.intermediate, down), (shape.hidden, rest))
    return sum(count * (LEAST_BITS if width % 256 == 0 else LEAST_BITS_BY_32) / 8 for width, count in columns)


def _fitting(kinds: list[str], parameters: int, limit: float) -> list[str]:
    """The types in which so many weights take at most `limit` bytes, largest first."""
    sizes = {kind: artifact_bytes(kind, parameters) for kind in kinds}
    return sorted((kind for kind in kinds if sizes[kind] <= limit), key=lambda kind: -sizes[kind])


def rival_work(at: Setting) -> Work:
    """Making them: the unpruned model read once for their importance matrix, each type written and tried."""
    found, whole, blocks = rivals(at), at.shape.parameters(at.shape.blocks), at.shape.blocks
    if not found.made:
        return Work()
    work = Work(forward(at.shape, blocks, at.weighed + RIVAL_TOKENS, 256))
    for file in found.made:
        plain = file.type in ("F16", "fp32")
        work = work + Work(host_flops=0 if plain else QUANTIZING * whole, host_read=4 * 4 * whole)
        if target_of(file.type) is not None:
            work = work + _choosing(at, blocks)
        if file.form == "gguf":
            work = work + scoring(at.shape, file, RIVAL_TOKENS, RIVAL_WINDOW)
    return work


def _changes(config: ExportConfig, _at: Setting) -> Iterable[Overrides]:
    """Recomputing leaves the result as it is; a row per step changes it."""
    if config.train_scales:
        if not config.train_scales.gradient_checkpointing:
            yield ("export.train_scales.gradient_checkpointing=true",)
        yield from ((f"export.train_scales.batch={size}",) for size in halves(config.train_scales.batch, 1))


COST = StageCost[ExportConfig](_need, _work, _leaves, _changes)
