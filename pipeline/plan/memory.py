"""Peak memory of each stage, as the sum of its parts at the worst moment.

On a CPU the resident set is meant, as the run measures it: weights of a safetensors file count once they were
touched, because the file is mapped; so do the mapped log-probabilities of the evaluation. On CUDA it is what torch
allocates, and the context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...core.errors import UserError
from ...data.config import DatasetConfig, DatasetsConfig, LlamaCppEngine, MagpieConfig, VllmEngine
from ...evaluation.config import EvaluateConfig
from ...export.config import ExportConfig
from ...merge.config import SHARD, MergeConfig
from ...prune.config import PruneConfig, RefitHeal
from ...retain.config import RetainConfig, head_width
from ...sort.config import SortConfig
from ...training.config import Copy, Full, Lora, Shared, TrainingConfig
from ..report.html import megabytes
from .geometry import Geometry

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
NF4, INT8 = 0.56, 1.06  # bytes per weight, block scales included
EXPORT_BITS = {"F16": 16, "Q8_0": 8.5, "Q6_K": 6.6, "Q4_K_M": 4.9, "Q4_0": 4.6, "int4": 5.7, "int8": 9, "fp32": 32}
PARTS = ("runtime", "weights", "teacher", "adapters", "optimizer", "activations", "kv", "logits", "other", "mapped")
Parts = dict[str, int]  # of PARTS, in bytes

# What the process holds without a model, by stage: Python, torch, transformers, and what each stage imports and leaves
# behind. Measured with a tiny model on Linux, torch 2.13 for CPUs; those of export and evaluate behind a whole run of
# SmolLM2, of whose freed memory glibc keeps some.
RUNTIME = {
    "data": 585e6,
    "prune": 600e6,
    "distill": 612e6,
    "sort": 612e6,
    "merge": 612e6,
    "retain": 612e6,
    "export": 720e6,
    "evaluate": 880e6,
}
CUDA_CONTEXT = 800e6  # assumed: context and cuBLAS workspaces
TEMPLATE = 32  # tokens a chat template puts around a turn
# Of a chunk's logits: the student's, their softmax, and the gradients of both; with a teacher its own two, its
# probabilities, the difference and the product, before the gradients.
HEAD_COPIES, HEAD_COPIES_ANCHORED = 4, 9
DEPTH_GGUF = 64  # bytes per token of the vocabulary, which every depth of a GGUF type has once more
DEPTH_ONNX = 9_000  # bytes per block of the graph that every depth of an ONNX type has
LABELLED = 128 * 1024  # queries and keys whose products exist at once where retaining heads get their labels
SCORED_CUTS = 256  # positions whose logits exist at once where cuts are scored
HELD_STATES = 1024  # tokens whose states around every block are kept to choose ridges by
GGUF_BITS = 8.5  # per weight of a GGUF file that writes text, at most
LLAMACPP_ROWS, VLLM_ROWS = 8, 256  # that are written at once, at most
VLLM_OTHER = 1.5e9  # assumed: what vLLM holds on a GPU beside weights and cache
SCORED = 128  # positions whose logits exist at once in an evaluation
ANSWERS, PROMPT = 16, 128  # prompts answered at once in an evaluation, and what a built-in one is long


@dataclass(frozen=True)
class Setting:
    """The model, and how its weights are held."""

    shape: Geometry
    kept: int  # blocks after pruning
    dtype: str
    cuda: bool = False
    heldout: int | None = None  # tokens that the data stage's held-out rows have to measure on, at most
    recovered: bool = False  # whether a distill stage comes before
    shards: int = 1  # processes that full tuning is spread over; memory is that of one
    sorted: tuple[int, ...] = ()  # depths that a sort stage trains for
    room: int | None = None  # bytes of memory that there are, if that is known
    measured: tuple[int, ...] = ()  # blocks of each checkpoint that an evaluation measures
    artifacts: tuple[tuple[str, int], ...] = ()  # type and blocks of each exported file
    variants: int = 1  # students, to be merged

    @property
    def size(self) -> int:
        return BYTES[self.dtype]

    @property
    def whole(self) -> int:
        """Bytes of the unpruned model."""
        return self.shape.parameters(self.shape.blocks) * self.size

    @property
    def small(self) -> int:
        """Bytes of the pruned model."""
        return self.shape.parameters(self.kept) * self.size

    def exported(self, config: ExportConfig) -> list[int]:
        """The depths that are exported."""
        return config.depths or list(self.sorted) or [self.kept]

    def runtime(self, stage: str) -> int:
        return int(CUDA_CONTEXT if self.cuda else RUNTIME.get(stage, 600e6))


@dataclass(frozen=True)
class StageMemory:
    """One stage: its parts at the worst moment, what it leaves and what it writes meanwhile, and a word on it."""

    parts: Parts
    disk: int = 0
    note: str = ""
    scratch: int = 0  # bytes on disk while it works
    host: int = 0  # of a stage on a GPU: bytes of the machine's own memory

    @property
    def peak(self) -> int:
        """What a run will show."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """What there has to be: pages of a mapped scratch file are given back when memory is short."""
        return self.peak - self.parts.get("mapped", 0)


def worst(*moments: Parts) -> Parts:
    """The moment that holds most, its parts in order and without empty ones."""
    most = max(moments, key=lambda parts: sum(parts.values()))
    return {name: int(most[name]) for name in PARTS if most.get(name)}


def stage_memory(stage: str, section: Any, setting: Setting) -> StageMemory:
    """The estimate for one stage of a recipe."""
    return STAGE_MEMORY[stage](section, setting)


def data_memory(config: Any, at: Setting) -> StageMemory:
    """Rows written by the unpruned model: its weights, and the cache of a whole batch; then what it says of them."""
    shape, runtime = at.shape, {"runtime": at.runtime("data")}
    chat, host = isinstance(config, MagpieConfig), 0
    if isinstance(config, (DatasetConfig, DatasetsConfig)):
        writing, note, host = _rewriting(config, at)
        targets = config.length  # at most
    else:
        targets = config.max_tokens if chat else config.tokens
        longest = TEMPLATE + config.max_prompt_tokens + config.max_tokens if chat else config.tokens
        writing, note = {"weights": at.whole} | _sampling(at, config.batch, longest), f"{config.batch} rows at once"
    if config.teacher is None:
        return StageMemory(worst(runtime | writing), 0, note, host=host)
    k = min(config.teacher.top_k, shape.vocab)
    per_target = k * (2 if shape.vocab <= 1 << 16 else 4) + (k + 1) * 2 + 8  # data/teacher_cache.py
    looking = runtime | {
        "weights": at.whole,
        "activations": config.teacher.batch * config.length * shape.state * at.size,
        "logits": 256 * shape.vocab * 4 * 3,
    }
    note += f"; teacher: {per_target} bytes per learned token"
    disk = (config.rows or 0) * targets * per_target
    return StageMemory(worst(runtime | writing, looking), disk, note, host=host)


def _sampling(at: Setting, rows: int, tokens: int, size: int | None = None) -> Parts:
    # Of the logits: themselves, probabilities, their float64 sums.
    kv = at.shape.kv_bytes(rows * tokens, size or at.size)
    return {"kv": kv, "logits": rows * at.shape.vocab * (4 + 4 + 8)}


def _rewriting(config: DatasetConfig | DatasetsConfig, at: Setting) -> tuple[Parts, str, int]:
    """Parts on the device, a word, and the machine's own memory."""
    note = "rows of a data set" if len(config.parts) == 1 else f"rows of {len(config.parts)} data sets"
    kinds = [part.rewrite for part in config.parts if part.rewrite is not None]
    if not kinds:
        return {}, note, 0
    # The prompt has the row in it, and what is asked.
    tokens = config.length + 128 + max(kind.max_tokens for kind in kinds)
    engine = config.engine
    if isinstance(engine, VllmEngine):
        gpus = f" on {engine.gpus} GPUs" if engine.gpus > 1 else ""
        return _vllm(config, engine, at, tokens), f"{note}, rewritten by vllm{gpus}", 0
    note += f", {config.batch} rewritten at once by {engine.kind}"
    if isinstance(engine, LlamaCppEngine):  # at most 8 bits per weight, and a cache in float16; beside a GPU
        rows = min(config.batch, LLAMACPP_ROWS)
        held = {"weights": int(at.shape.parameters(at.shape.blocks) * GGUF_BITS / 8)} | _sampling(at, rows, tokens, 2)
        return ({}, note, sum(held.values())) if at.cuda else (held, note, 0)
    return {"weights": at.whole} | _sampling(at, config.batch, tokens), note, 0


def _vllm(config: DatasetConfig | DatasetsConfig, engine: VllmEngine, at: Setting, tokens: int) -> Parts:
    """Of one GPU: its part of the weights, and a cache that fills the share that vLLM may take; at the least it must
    hold one row. On a CPU the cache is as large as the rows need."""
    shape, weights = at.shape, at.whole // engine.gpus
    if not at.cuda:
        return {"weights": at.whole, "kv": shape.kv_bytes(min(config.batch, VLLM_ROWS) * (tokens + 128), at.size)}
    other, row = int(VLLM_OTHER), shape.kv_bytes(tokens, at.size) // engine.gpus
    share = engine.memory * (at.room if at.room is not None else 0)
    kv = int(share) - weights - other - at.runtime("data")
    if kv < row and at.room is not None:  # then what there would have to be, for the share to be enough
        kv = int((weights + other + row + at.runtime("data")) / engine.memory) - weights - other - at.runtime("data")
    return {"weights": weights, "kv": max(kv, row), "other": other}


def prune_memory(config: PruneConfig, at: Setting) -> StageMemory:
    """One batch's hidden states between all blocks, and the sums of the least-squares fit."""
    shape = at.shape
    tokens = config.calibration.batch * config.calibration.length
    inner = shape.intermediate if isinstance(config.heal, RefitHeal) else shape.hidden
    one = inner * (inner + 2 * shape.hidden) * 8  # the sums of the rows that are fitted, or held out
    sums = 0 if config.heal.kind == "none" else 4 * one  # both, and the solution's own copies
    note = f"{at.kept} of {shape.blocks} blocks stay"
    if config.blocks == "auto" and at.kept == shape.blocks:
        note = "as many blocks go as the goal allows"
    states = (shape.blocks + 1) * tokens * shape.hidden * at.size
    holding = {"runtime": at.runtime("prune"), "weights": at.whole}
    scanning = holding | {"activations": states + tokens * shape.state * at.size}
    host = 0
    if at.cuda:  # solved in the machine's own memory; here the sums, and the matrix before
        healing = holding | {"activations": tokens * (4 * shape.hidden + shape.state) * at.size}
        healing["other"], host = (sums // 2 + inner * shape.hidden * 8 if sums else 0), sums
    else:
        healing = scanning | {"other": sums}
    searching = dict(scanning)
    if config.splits:
        searching["logits"] = SCORED_CUTS * shape.vocab * 4 * 4  # and their logarithms, probabilities, and the products
    if config.splits and config.scores_healed:  # prune/moments.py
        longest = shape.blocks // 2 if config.blocks == "auto" else config.blocks
        square = shape.blocks * shape.hidden**2 * 4
        statistics = (longest + 1) * square
        held = 2 * shape.blocks * min(HELD_STATES, config.calibration.tokens // 8) * shape.hidden * 4
        kept = statistics + held  # until the blocks are chosen
        maps = longest * square // 2  # that are tried out
        if at.cuda:  # all in the machine's own memory; here one batch's states, and a map and what it is solved from
            searching["other"] = max(2 * states, 6 * shape.hidden**2 * 8)
            host = kept + maps + (sums if config.blocks == "auto" else 0)
            host = max(host, sums)
        else:
            searching["other"] = kept + max(2 * states, maps)
            if config.blocks == "auto":  # heals cuts while it chooses
                healing["other"] += kept
        note += f"; statistics of all gaps {megabytes(statistics)}"
    return StageMemory(worst(scanning, searching, healing), at.small, note, host=host)


def training_memory(config: TrainingConfig, at: Setting) -> StageMemory:
    """Students one after another: the largest one's memory, everyone's disk."""
    students = [_student_memory(student, at) for student in config.students]
    if len(students) == 1:
        return students[0]
    most = max(students, key=lambda found: found.peak)
    note = f"{len(students)} variants; the largest: {most.note}"
    return StageMemory(most.parts, sum(found.disk for found in students), note)


def _student_memory(config: TrainingConfig, at: Setting) -> StageMemory:
    """Student, teacher, what the backward pass needs, and one chunk of logits, at one depth after another."""
    shape, tokens = at.shape, config.batch * config.length
    student = shape.parameters(at.kept)
    anchored = config.objective.needs_teacher
    shared = anchored and isinstance(config.teacher, Shared) and isinstance(config.tune, Lora)
    if isinstance(config.tune, Full):
        weights, adapters, trained = student * 4, 0, student
        note = "full tuning"
    else:
        bytes_per_weight = NF4 if config.tune.quantize_base else at.size
        # Shared are all blocks, with what healing changed beside the original: one gap's down_proj.
        held = shape.parameters(shape.blocks) + shape.hidden * shape.intermediate if shared else student
        if shared and isinstance(config, SortConfig) and at.recovered:  # which changed every linear layer
            held += at.kept * shape.block_products
        weights = int(held * bytes_per_weight)
        trained = lora_parameters(config.tune, shape, at.kept)
        trained += shape.hidden * (shape.vocab * config.tune.train_head + config.tune.train_norm)
        adapters = trained * 4
        note = f"LoRA, {trained / 1e6:.1f} M trained"
    optimizer = trained * (4 + (2 if config.optimizer == "adamw_8bit" else 8))  # gradients and moments
    if at.shards > 1:
        if not isinstance(config.tune, Full):
            raise UserError(f"--shards: only full tuning is spread ({config.stage}.tune: full)")
        # Whole at any time are two blocks, one in use and one being gathered, and what is not in blocks.
        whole = (2 * shape.block_parameters + shape.parameters(0)) * at.size
        weights, optimizer = weights // at.shards + whole, optimizer // at.shards
        note += f", per process of {at.shards}"
    way = config.teacher
    bits = config.tune.quantize_base if isinstance(config.tune, Lora) and isinstance(way, Shared) else None
    quantize = way.quantize if isinstance(way, Copy) else bits
    copy = int(shape.parameters(shape.blocks) * {"nf4": NF4, "int8": INT8}.get(quantize or "", at.size))
    beside = copy if anchored and isinstance(way, Copy) else 0
    if isinstance(config.tune, Full) and not beside:
        beside = shape.vocab * shape.hidden * at.size  # the unpruned model's head, for the held-out figures
    how = "none" if not anchored else way.kind
    logits = config.chunk * shape.vocab * 4 * (HEAD_COPIES_ANCHORED if anchored else HEAD_COPIES)
    per_block = shape.hidden if config.gradient_checkpointing else saved_per_token(shape, config.tune)
    runtime = {"runtime": at.runtime(config.stage)}
    training = runtime | {
        "weights": weights,
        "teacher": beside,
        "adapters": adapters,
        "optimizer": optimizer,
        "activations": tokens * (at.kept * per_block + shape.state) * at.size
        + tokens * shape.hidden * 8 * config.passes,
        "logits": logits,
    }
    looking = {} if shared else runtime | {"teacher": copy, "activations": tokens * shape.state * at.size}
    return StageMemory(worst(training, looking), at.small, f"{note}; teacher: {how}")


def merge_memory(config: MergeConfig, at: Setting) -> StageMemory:
    """One shard of merged weights and the tensors it is made of; then one model after another is measured."""
    shape, runtime = at.shape, {"runtime": at.runtime("merge")}
    saved = shape.parameters(at.kept) * BYTES[config.out_dtype or at.dtype]
    head = shape.vocab * shape.hidden
    merging = runtime | {"weights": min(saved, SHARD), "other": 4 * head * BYTES[config.dtype]}
    measuring = runtime | {"weights": at.small, "teacher": head * at.size}
    unpruned = runtime | {"weights": at.whole}
    return StageMemory(worst(merging, measuring, unpruned), saved, f"{config.method}, then measured")


def retain_memory(config: RetainConfig, at: Setting) -> StageMemory:
    """The model, and a pass over the longest row; then, one after another, a block's pairs and its head."""
    shape, tokens = at.shape, config.longest(at.shape.positions)
    width, heads = head_parameters(config, at)
    own = heads // at.kept
    pair = shape.qkv * 2 + shape.kv_heads * 4  # bytes of a token: bfloat16, and float32 labels
    kept = (config.rows + config.heldout) * config.tokens * pair  # of a block, at most
    holding = {
        "runtime": at.runtime("retain"),
        "weights": at.small,
        "adapters": 2 * heads * 4,  # and the untrained ones they are compared with
    }
    reading = holding | {
        "activations": tokens * (shape.state + shape.qkv) * at.size,
        "logits": 2 * shape.heads * LABELLED * 4,
    }
    learning = holding | {
        "optimizer": own * 12,  # gradients and moments
        "activations": config.batch * (shape.qkv * 6 + 4 * width * 4),
        "other": kept,
    }
    note = f"heads, {heads / 1e6:.1f} M trained; rows of up to {tokens} tokens"
    # The model beside them is the one before, by links.
    return StageMemory(worst(reading, learning), heads * 4, note, kept * at.kept)


def head_parameters(config: RetainConfig, at: Setting) -> tuple[int, int]:
    """The width of retaining heads, and how many parameters those of all blocks have."""
    width = head_width(config.width, at.shape.hidden)
    return width, at.kept * width * (at.shape.qkv + at.shape.kv_heads)


def saved_per_token(shape: Geometry, tune: Lora | Full) -> int:
    """Numbers per token and block that the backward pass needs."""
    return 14 * shape.hidden + 5 * shape.intermediate


def lora_parameters(tune: Lora, shape: Geometry, blocks: int) -> int:
    """Parameters of the adapters."""
    q, kv, h, i = shape.heads * shape.head_size, shape.kv_heads * shape.head_size, shape.hidden, shape.intermediate
    sizes = {
        "q_proj": h + q,
        "k_proj": h + kv,
        "v_proj": h + kv,
        "o_proj": q + h,
        "gate_proj": h + i,
        "up_proj": h + i,
        "down_proj": i + h,
    }
    names = sizes if tune.targets == "all-linear" else tune.targets
    return blocks * tune.rank * sum(sizes.get(name, 2 * h) for name in names)


def export_memory(config: ExportConfig, at: Setting) -> StageMemory:
    """The checkpoint; for ONNX the builder's process, which holds it again in float32."""
    kinds = [*config.gguf, *config.onnx]
    small = at.shape.parameters(at.kept)
    disk = sum(int(small * EXPORT_BITS[kind] / 8) for kind in kinds)
    *less, _ = at.exported(config)
    disk += len(less) * len(config.gguf) * DEPTH_GGUF * at.shape.vocab + sum(less) * len(config.onnx) * DEPTH_ONNX
    note = ", ".join(kinds) + (f" at {len(less) + 1} depths" if less else "")
    runtime = {"runtime": at.runtime("export")}
    reference = runtime | {"weights": at.small, "activations": 2048 * at.shape.state * at.size}
    if less:  # each depth's distributions on the probe text
        reference["logits"] = (len(less) + 1) * config.verify.tokens * at.shape.vocab * 4
    moments = [reference]
    building = {"runtime": int(2 * RUNTIME["export"]), "weights": small * 4}
    if config.onnx and not at.cuda:
        moments.append(building)
    host = sum(building.values()) if config.onnx and at.cuda else 0
    # The float32 graph that the others are made from; before it the F16 file that llama.cpp's graph is checked with.
    checked = 2 * small if config.gguf and "F16" not in config.gguf else 0
    return StageMemory(worst(*moments), disk, note, max(4 * small if config.onnx else 0, checked), host)


def measured_tokens(config: EvaluateConfig, at: Setting) -> int:
    """Tokens that an evaluation measures on."""
    return config.tokens if config.text or at.heldout is None else min(config.tokens, at.heldout)


def evaluate_memory(config: EvaluateConfig, at: Setting) -> StageMemory:
    """The unpruned model, and its log-probabilities of every position in a mapped file."""
    shape = at.shape
    scratch = measured_tokens(config, at) * shape.vocab * 2
    parts = {
        "runtime": at.runtime("evaluate"),
        "weights": at.whole,
        "activations": config.window * shape.state * at.size,
        "logits": SCORED * shape.vocab * 4 * 3,
        "mapped": 0 if at.cuda else scratch,
    }
    answering = dict(parts)
    if config.tasks:
        answering["kv"] = shape.kv_bytes(ANSWERS * (PROMPT + config.max_tokens), at.size)
    reading = dict(parts)
    if config.retrieval:  # the full cache, a copy for each question about one text, and one of that to write on
        reading["kv"] = shape.kv_bytes(3 * max(config.retrieval.lengths), at.size)
    files = at.artifacts if config.artifacts else ()
    sizes = [int(shape.parameters(depth) * EXPORT_BITS[kind] / 8) for kind, depth in files]
    host = max(sizes, default=0) if at.cuda else 0
    note = f"{len(at.measured)} checkpoints" + (f", {len(files)} artifacts" if files else "")
    if config.harness_tasks:
        note += f"; {', '.join(config.harness_tasks)} on top"
    return StageMemory(worst(parts, answering, reading), 0, note, scratch, host)


STAGE_MEMORY: dict[str, Callable[[Any, Setting], StageMemory]] = {
    "data": data_memory,
    "prune": prune_memory,
    "distill": training_memory,
    "sort": training_memory,
    "merge": merge_memory,
    "retain": retain_memory,
    "export": export_memory,
    "evaluate": evaluate_memory,
}
