"""Peak memory of each stage, as the sum of its parts at the worst moment.

On a CPU the resident set is meant, as the run measures it: weights of a safetensors file count once they were
touched, because the file is mapped; so do the mapped log-probabilities of the evaluation. On CUDA it is what torch
allocates, and the context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...data.config import DatasetConfig, MagpieConfig
from ...distill.config import Asft, DistillConfig, Full, Kd, Lora
from ...evaluation.config import EvaluateConfig
from ...export.config import ExportConfig
from ...prune.config import PruneConfig
from ..report.html import megabytes
from .geometry import Geometry

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4, INT8 = 0.56, 1.06  # bytes per weight, block scales included
EXPORT_BITS = {"F16": 16, "Q8_0": 8.5, "Q6_K": 6.6, "Q4_K_M": 4.9, "Q4_0": 4.6, "int4": 5.7, "int8": 9, "fp32": 32}
PARTS = ("runtime", "weights", "teacher", "adapters", "optimizer", "activations", "kv", "logits", "other", "mapped")
Parts = dict[str, int]  # of PARTS, in bytes

# What the process holds without a model, by stage: Python, torch, transformers, and what each stage imports and leaves
# behind. Measured with a tiny model on Linux, torch 2.13 for CPUs.
RUNTIME = {"data": 585e6, "prune": 600e6, "distill": 612e6, "export": 635e6, "evaluate": 640e6}
CUDA_CONTEXT = 800e6  # assumed: context and cuBLAS workspaces
TEMPLATE = 32  # tokens a chat template puts around a turn
# Of a chunk's logits: the student's, their softmax, and the gradients of both; with a teacher its own two, its
# probabilities, the difference and the product, before the gradients.
HEAD_COPIES, HEAD_COPIES_ANCHORED = 4, 9
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

    def runtime(self, stage: str) -> int:
        return int(CUDA_CONTEXT if self.cuda else RUNTIME.get(stage, 600e6))


@dataclass(frozen=True)
class StageMemory:
    """One stage: its parts at the worst moment, what it writes, and a word on it."""

    parts: Parts
    disk: int = 0
    note: str = ""

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
    """Rows written by the unpruned model: its weights, and the cache of a whole batch."""
    runtime = {"runtime": at.runtime("data")}
    if isinstance(config, DatasetConfig):
        return StageMemory(runtime, 0, "rows of a data set")
    chat = isinstance(config, MagpieConfig)
    longest = TEMPLATE + config.max_prompt_tokens + config.max_tokens if chat else config.tokens
    parts = runtime | {
        "weights": at.whole,
        "kv": at.shape.kv_bytes(config.batch * longest, at.size),
        "logits": config.batch * at.shape.vocab * (4 + 4 + 8),  # logits, probabilities, their float64 sums
    }
    return StageMemory(worst(parts), 0, f"{config.batch} rows at once")


def prune_memory(config: PruneConfig, at: Setting) -> StageMemory:
    """One batch's hidden states between all blocks, and the sums of the least-squares fit."""
    shape = at.shape
    tokens = config.calibration.batch * config.calibration.length
    inner = shape.intermediate if config.heal.kind == "refit" else shape.hidden
    sums = 4 * inner * (inner + 2 * shape.hidden) * 8  # fitted, held out, both, and the solution's own copies
    note = f"{at.kept} of {shape.blocks} blocks stay"
    if config.blocks == "auto" and at.kept == shape.blocks:
        note = "as many blocks go as the goal allows"
    if config.splits and config.scores_healed:  # prune/moments.py
        longest = shape.blocks // 2 if config.blocks == "auto" else config.blocks
        statistics = (longest + 1) * shape.blocks * shape.hidden**2 * 4
        sums += statistics
        note += f"; statistics of all gaps {megabytes(statistics)}"
    states = (shape.blocks + 1) * tokens * shape.hidden * at.size
    parts = {
        "runtime": at.runtime("prune"),
        "weights": at.whole,
        "activations": states + tokens * shape.state * at.size,
        "other": sums,
    }
    return StageMemory(worst(parts), at.small, note)


def distill_memory(config: DistillConfig, at: Setting) -> StageMemory:
    """Student, teacher, what the backward pass needs, and one chunk of logits."""
    shape, tokens = at.shape, config.batch * config.length
    student = shape.parameters(at.kept)
    teacher = shape.parameters(shape.blocks)
    bits = {"nf4": NF4, "int8": INT8}
    if isinstance(config.tune, Full):
        weights, adapters, trained = student * 4, 0, student
        note = "full tuning"
    else:
        weights = int(student * (NF4 if config.tune.quantize_base else at.size))
        trained = lora_parameters(config.tune, shape, at.kept)
        adapters = trained * 4
        note = f"LoRA, {trained / 1e6:.1f} M trained"
    held = int(teacher * bits.get(config.teacher.quantize or "", at.size))
    logits = config.chunk * shape.vocab * 4 * (HEAD_COPIES_ANCHORED if anchored(config) else HEAD_COPIES)
    per_block = shape.hidden if config.gradient_checkpointing else saved_per_token(shape, config.tune)
    runtime = {"runtime": at.runtime("distill")}
    training = runtime | {
        "weights": weights,
        # The held-out figures keep a copy of the teacher's head.
        "teacher": (held if anchored(config) else 0) + shape.vocab * shape.hidden * at.size,
        "adapters": adapters,
        "optimizer": trained * (4 + (2 if config.optimizer == "adamw_8bit" else 8)),  # gradients and moments
        "activations": tokens * (at.kept * per_block + shape.state) * at.size + tokens * shape.hidden * 8,
        "logits": logits,
    }
    looking = runtime | {"teacher": held, "activations": tokens * shape.state * at.size}  # at the held-out rows
    return StageMemory(worst(training, looking), at.small, note)


def anchored(config: DistillConfig) -> bool:
    """Whether the teacher runs beside the student."""
    objective = config.objective
    return isinstance(objective, Kd) or (isinstance(objective, Asft) and objective.kl_weight > 0)


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
    """The checkpoint; for ONNX the builder's process, which holds it again in float32, and its graph."""
    kinds = [*config.gguf, *config.onnx]
    small = at.shape.parameters(at.kept)
    disk = sum(int(small * EXPORT_BITS[kind] / 8) for kind in kinds)
    runtime = {"runtime": at.runtime("export")}
    reference = runtime | {"weights": at.small, "activations": 2048 * at.shape.state * at.size}
    moments = [reference]
    if config.onnx and not at.cuda:
        moments.append({"runtime": 2 * at.runtime("export"), "weights": small * 4, "other": small * 4})
    return StageMemory(worst(*moments), disk, ", ".join(kinds))


def evaluate_memory(config: EvaluateConfig, at: Setting) -> StageMemory:
    """The unpruned model, and its log-probabilities of every position in a mapped file."""
    shape = at.shape
    tokens = config.tokens if config.text or at.heldout is None else min(config.tokens, at.heldout)
    scratch = tokens * shape.vocab * 4
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
    return StageMemory(worst(parts, answering), 0, f"{megabytes(scratch)} of scratch disk")


STAGE_MEMORY: dict[str, Callable[[Any, Setting], StageMemory]] = {
    "data": data_memory,
    "prune": prune_memory,
    "distill": distill_memory,
    "export": export_memory,
    "evaluate": evaluate_memory,
}
