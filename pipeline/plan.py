"""`compress plan`: what a recipe will take, from configuration files alone.

The figures are sums of the large parts (weights, caches, optimizer states, kept activations, logits); the runtime's
own few hundred megabytes come on top.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..data.config import DataConfig, DatasetConfig, DatasetsConfig, LlamaCppEngine, MagpieConfig
from ..distill.config import Cached, Copy, DistillConfig, Full, Lora, Shared, needs_teacher
from ..errors import UserError
from ..merge.config import SHARD, MergeConfig
from ..modeling.source import parse_source
from ..prune.config import PruneConfig
from .recipe import LoadedRecipe, ModelSpec
from .report.html import megabytes

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
BITS = {"nf4": 0.56, "int8": 1.06}  # bytes per weight, block scales included
EXPORT_BITS = {"F16": 16, "Q8_0": 8.5, "Q6_K": 6.6, "Q4_K_M": 4.9, "Q4_0": 4.6, "int4": 5.7, "int8": 9, "fp32": 32}


@dataclass(frozen=True)
class Geometry:
    """A decoder's shape."""

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Geometry:
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
            bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def block_parameters(self) -> int:
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    def parameters(self, blocks: int) -> int:
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return blocks * self.block_parameters + embeddings + self.hidden

    def kv_bytes(self, tokens: int, size: int) -> int:
        return 2 * self.blocks * self.kv_heads * self.head_size * tokens * size


@dataclass(frozen=True)
class StagePlan:
    """Estimates for one stage."""

    name: str
    memory: int  # bytes
    disk: int  # bytes
    note: str


@dataclass(frozen=True)
class Plan:
    name: str
    source: str
    parameters: int
    parameters_after: int
    blocks: tuple[int, int]
    stages: list[StagePlan]


def make_plan(loaded: LoadedRecipe, dtype: str, cache: Path, shards: int = 1) -> Plan:
    """Estimates for a recipe; memory is per process where full tuning is spread over `shards`.

    Raises `UserError` where the model's configuration cannot be had.
    """
    shape = Geometry.of(_read_config(loaded, cache))
    size, recipe = BYTES[dtype], loaded.recipe
    dropped = _dropped(recipe.prune, shape) if recipe.prune else 0
    if dropped >= shape.blocks:
        raise UserError(f"prune.blocks is {dropped}, but the model has {shape.blocks} blocks")
    kept = shape.blocks - dropped
    stages = [_stage(name, loaded, shape, kept, size, shards) for name in loaded.order]
    return Plan(
        recipe.name, loaded.source, shape.parameters(shape.blocks), shape.parameters(kept), (shape.blocks, kept), stages
    )


def _dropped(config: PruneConfig, shape: Geometry) -> int:
    """How many blocks go; of `auto` what can be told beforehand, for the rest none: an upper bound of everything."""
    if config.blocks != "auto":
        return config.blocks
    if config.goal is None or config.goal.size is None:
        return 0
    sizes = [shape.parameters(shape.blocks - n) / shape.parameters(shape.blocks) for n in range(shape.blocks)]
    return next((n for n, size in enumerate(sizes) if size <= config.goal.size), shape.blocks - 1)


def _prune(config: PruneConfig, shape: Geometry, kept: int, size: int) -> StagePlan:
    tokens = config.calibration.batch * config.calibration.length
    states = (shape.blocks + 1) * tokens * shape.hidden * size
    inner = shape.intermediate if config.heal.kind == "refit" else shape.hidden
    sums = 4 * inner * (inner + 2 * shape.hidden) * 8  # fitted, held out, both, and the solution's own copies
    work = tokens * (4 * shape.hidden + 3 * shape.intermediate) * size + sums
    note = f"{kept} of {shape.blocks} blocks stay"
    if config.blocks == "auto" and kept == shape.blocks:
        note = "as many blocks go as the goal allows"
    if config.splits and config.scores_healed:  # prune/moments.py
        longest = shape.blocks // 2 if config.blocks == "auto" else config.blocks
        statistics = (longest + 1) * shape.blocks * shape.hidden**2 * 4
        work += statistics
        note += f"; statistics of all gaps {megabytes(statistics)}"
    whole, small = shape.parameters(shape.blocks), shape.parameters(kept)
    return StagePlan("prune", whole * size + states + work, small * size, note)


def _stage(name: str, loaded: LoadedRecipe, shape: Geometry, kept: int, size: int, shards: int) -> StagePlan:
    whole, small = shape.parameters(shape.blocks), shape.parameters(kept)
    section = loaded.section(name)
    if name == "data":
        return _data(section, shape, size)
    if name == "prune":
        return _prune(section, shape, kept, size)
    if name == "distill":
        return _distill(section, shape, kept, size, shards)
    if name == "merge":
        return _merge(section, shape, kept, size)
    if name == "export":
        kinds = [*section.gguf, *section.onnx]
        disk = sum(int(small * EXPORT_BITS[kind] / 8) for kind in kinds)
        return StagePlan(
            name, small * max(size, 4 if section.onnx else size) * (2 if section.onnx else 1), disk, ", ".join(kinds)
        )
    logs = section.tokens * shape.vocab * 4
    return StagePlan(name, whole * size + 128 * shape.vocab * 12, 0, f"{megabytes(logs)} of scratch disk")


def _data(config: DataConfig, shape: Geometry, size: int) -> StagePlan:
    whole, rows, prompt = shape.parameters(shape.blocks) * size, config.rows or 0, 0
    if isinstance(config, (DatasetConfig, DatasetsConfig)):
        memory, note = _rewriting(config, shape, whole, size)
        targets = config.length  # at most
    else:
        chat = isinstance(config, MagpieConfig)
        targets = config.max_tokens if chat else config.tokens
        prompt = config.max_prompt_tokens + 64 if chat else 0
        memory, note = whole + _sampling(shape, config.batch, targets + prompt, size), f"{config.batch} rows at once"
    if config.teacher is None:
        return StagePlan("data", memory, 0, note)
    k = min(config.teacher.top_k, shape.vocab)
    per_target = k * (2 if shape.vocab <= 1 << 16 else 4) + (k + 1) * 2 + 8  # data/teacher_cache.py
    running = config.teacher.batch * config.length * (4 * shape.hidden + 3 * shape.intermediate) * size
    memory = max(memory, whole + running + 256 * shape.vocab * 4 * 3)
    note += f"; teacher: {per_target} bytes per learned token"
    return StagePlan("data", memory, rows * targets * per_target, note)


def _sampling(shape: Geometry, rows: int, tokens: int, size: int) -> int:
    return shape.kv_bytes(rows * tokens, size) + rows * shape.vocab * 4 * 3


def _rewriting(config: DatasetConfig | DatasetsConfig, shape: Geometry, weights: int, size: int) -> tuple[int, str]:
    note = "rows of a data set" if len(config.parts) == 1 else f"rows of {len(config.parts)} data sets"
    kinds = [part.rewrite for part in config.parts if part.rewrite is not None]
    if not kinds:
        return 500_000_000, note
    if isinstance(config.engine, LlamaCppEngine):
        weights, size = weights // size, 2  # at most 8 bits per weight, and a cache in float16
    # The prompt has the row in it, and what is asked.
    tokens = config.length + 128 + max(kind.max_tokens for kind in kinds)
    memory = weights + _sampling(shape, config.batch, tokens, size)
    return memory, f"{note}, {config.batch} rewritten at once by {config.engine.kind}"


def _distill(config: DistillConfig, shape: Geometry, kept: int, size: int, shards: int) -> StagePlan:
    if config.variants is None:
        return _student(config, shape, kept, size, shards)
    # One after another: the largest one's memory, everyone's disk.
    plans = [_student(config.of(variant), shape, kept, size, shards) for variant in config.variants]
    most = max(plans, key=lambda plan: plan.memory)
    return StagePlan(
        "distill", most.memory, sum(plan.disk for plan in plans), f"{len(plans)} variants; the largest: {most.note}"
    )


def _merge(config: MergeConfig, shape: Geometry, kept: int, size: int) -> StagePlan:
    whole, small = shape.parameters(shape.blocks), shape.parameters(kept)
    saved = BYTES.get(config.out_dtype or "", size)
    head = shape.vocab * shape.hidden * size  # of the unpruned model, kept while each model is measured
    merging = min(small * saved, SHARD) + 4 * shape.vocab * shape.hidden * BYTES[config.dtype]
    measuring = max(whole * size, small * size + head)
    return StagePlan("merge", max(merging, measuring), small * saved, f"{config.method}, then measured")


def _student(config: DistillConfig, shape: Geometry, kept: int, size: int, shards: int) -> StagePlan:
    tokens = config.batch * config.length
    student = shape.parameters(kept)
    teacher, beforehand, how = _teacher(config, shape, size)
    if isinstance(config.tune, Full):
        weights, trained = student * 4, student
        note = "full tuning"
    else:
        bits = BITS.get(config.tune.quantize_base or "", size)
        weights = 0 if how == "shared" else int(student * bits)
        trained = lora_parameters(config.tune, shape, kept)
        note = f"LoRA, {trained / 1e6:.1f} M trained"
    optimizer = trained * (4 + 4 + (2 if config.optimizer == "adamw_8bit" else 8))
    if shards > 1:
        if not isinstance(config.tune, Full):
            raise UserError("--shards: only full tuning is spread (distill.tune: full)")
        # Whole at any time are two blocks, one in use and one being gathered, and what is not in blocks.
        whole = (2 * shape.block_parameters + shape.parameters(0)) * size
        weights, optimizer = weights // shards + whole, optimizer // shards
        note += f", per process of {shards}"
    per_block = shape.hidden if config.gradient_checkpointing else 14 * shape.hidden + 5 * shape.intermediate
    activations = tokens * kept * per_block * size
    logits = config.chunk * shape.vocab * 4 * 6 + tokens * shape.hidden * 8
    memory = max(beforehand, weights + teacher + optimizer + activations + logits)
    return StagePlan("distill", memory, student * size, f"{note}; teacher: {how}")


def _teacher(config: DistillConfig, shape: Geometry, size: int) -> tuple[int, int, str]:
    """Bytes of the teacher while training, bytes of the unpruned model that looks at the held-out rows before it, and
    how it is held."""
    whole, way = shape.parameters(shape.blocks), config.teacher
    if needs_teacher(config.objective) and isinstance(way, Shared) and isinstance(config.tune, Lora):
        healed = shape.hidden * shape.intermediate  # of one gap, beside the original
        held = int((whole + healed) * BITS.get(config.tune.quantize_base or "", size))  # the student is in it
        return held, 0, "shared"
    held = int(whole * BITS.get((way.quantize if isinstance(way, Copy) else None) or "", size))
    if not needs_teacher(config.objective):
        return 0, held, "none"
    return (0, held, "cached") if isinstance(way, Cached) else (held, 0, "copy")


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


def _read_config(loaded: LoadedRecipe, cache: Path) -> dict[str, Any]:
    model = loaded.recipe.model
    if isinstance(model, ModelSpec) and model.config:
        return _json(loaded.folder / model.config)
    source = parse_source(loaded.source, loaded.folder)
    if source.kind == "folder":
        assert source.path is not None
        return _json(source.path / "config.json")
    if source.kind == "gguf":
        assert source.path is not None
        return _gguf_config(source.path)
    if source.kind == "random":
        from ..modeling.load import load_config, resolve

        return load_config(resolve(loaded.source, cache)).to_dict()
    from huggingface_hub import hf_hub_download

    try:
        return _json(Path(hf_hub_download(source.text, "config.json", revision=source.revision)))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the configuration of {source.text} could not be had from the Hub ({type(error).__name__}); "
            "name a local copy under model.config"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} could not be read as JSON: {error}") from error


def _gguf_config(file: Path) -> dict[str, Any]:
    import gguf

    try:
        fields = gguf.GGUFReader(file).fields
        arch = fields["general.architecture"].contents()

        def value(key: str, default: Any = None) -> Any:
            return fields[f"{arch}.{key}"].contents() if f"{arch}.{key}" in fields else default

        return {
            "num_hidden_layers": value("block_count"),
            "hidden_size": value("embedding_length"),
            "intermediate_size": value("feed_forward_length"),
            "num_attention_heads": value("attention.head_count"),
            "num_key_value_heads": value("attention.head_count_kv"),
            "head_dim": value("attention.key_length"),
            "vocab_size": len(fields["tokenizer.ggml.tokens"].data),
            "tie_word_embeddings": "output.weight" not in {t.name for t in gguf.GGUFReader(file).tensors},
        }
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"{file} is not a readable GGUF file: {error}") from error


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan as a table."""
    before, after = (_count(number) for number in (plan.parameters, plan.parameters_after))
    console.print(f"{plan.source}: {before} parameters in {plan.blocks[0]} blocks → {after} in {plan.blocks[1]}")
    table = Table("stage", title=f"{plan.name}: estimates", title_justify="left")
    for column in ("memory", "disk"):
        table.add_column(column, justify="right")
    table.add_column("")
    for stage in plan.stages:
        table.add_row(stage.name, megabytes(stage.memory), megabytes(stage.disk), stage.note)
    console.print(table)
    free = megabytes(shutil.disk_usage(".").free)
    console.print(f"free here: {free} of disk; the runtime's own memory (about 0.5 GB) comes on top")
