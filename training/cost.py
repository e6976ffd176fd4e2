"""Cost of training students, for the stages that do it.

Operations per weight and token: 2 forward, 2 backward, 2 for the weight's own gradient (frozen weights have none), and
2 per weight of the unpruned model where it is the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..core.cost import GRADIENT, INT8, MOMENTS, NF4, Need, Overrides, Setting, halves, worst
from ..core.errors import UserError
from ..core.geometry import Geometry
from ..core.work import Work, batches, decoding, forward
from ..runtime.cost import QUANTIZING
from .budget import Pace, pace
from .config import RANK, Cached, Copy, Full, Lora, OnPolicy, Shared, TrainingConfig

RUNTIME = 612e6  # measured with a tiny model on Linux, torch 2.13 for CPUs
# Weights that are trained rounded: bytes of the scales in use per weight, and bytes per weight and step of following.
SCALES, FOLLOWING = 0.5, 24
WEIGHED = 8192  # tokens that their importance matrix is computed from
SAMPLED = 4 + 4 + 8  # bytes per logit of a sampled token: logits, probabilities and their float64 cumulative sums
SMALLEST_CHUNK, SHORTEST = 32, 128  # the least that is proposed where memory is short


def training_need(config: TrainingConfig, at: Setting) -> Need:
    """Students one after another: the memory of the largest, the disk space of all."""
    students = [_student_need(student, at) for student in config.students]
    if len(students) == 1:
        return students[0]
    most = max(students, key=lambda need: need.peak)
    note = f"{len(students)} variants; the largest: {most.note}"
    return Need(most.parts, sum(need.disk for need in students), note)


def _student_need(config: TrainingConfig, at: Setting) -> Need:
    """Student, teacher, saved activations and one chunk of logits; depths run one after another."""
    shape, chosen = at.shape, pace_at(config, at)
    tokens = config.batch * (chosen.width + _longer(config.on_policy, chosen, at))
    student = shape.parameters(at.kept)
    anchored = config.objective.needs_teacher
    shared = anchored and isinstance(config.teacher, Shared) and isinstance(config.tune, Lora)
    if isinstance(config.tune, Full):
        weights, adapters, trained = student * 4, 0, student
        note = "full tuning"
    else:
        bytes_per_weight = NF4 if config.tune.quantize_base else at.size
        # All blocks are shared; of what healing changed both versions are held: one gap's down_proj.
        held = shape.parameters(shape.blocks) + shape.hidden * shape.intermediate if shared else student
        if shared and at.recovered:  # recovery changed every linear layer
            held += at.kept * shape.block_products
        weights = int(held * bytes_per_weight)
        trained = lora_parameters(config.tune, shape, at.kept, chosen.rank)
        trained += shape.hidden * (shape.vocab * config.tune.train_head + config.tune.train_norm)
        adapters = trained * 4
        note = f"LoRA, {trained / 1e6:.1f} M trained"
        if config.tune.quantize_as:
            # Beside them the rounded blocks; the unpruned model's ends where they are not in a copy of it.
            weights += int(at.kept * shape.block_products * (at.size + SCALES)) + trained * 4
            weights += 0 if anchored and isinstance(config.teacher, Copy) else shape.parameters(0) * at.size
            note += f", rounded as {config.tune.quantize_as}"
    optimizer = trained * (GRADIENT + MOMENTS[config.optimizer])
    if at.shards > 1:
        if not isinstance(config.tune, Full):
            raise UserError(f"--shards: only full tuning can be sharded ({config.stage}.tune: full)")
        # Unsharded at any time: two blocks, one in use and one being gathered, and everything outside the blocks.
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
    logits = config.chunk * shape.vocab * 4 * config.objective.head_copies
    per_block = shape.hidden if config.gradient_checkpointing else saved_per_token(shape)
    runtime = {"runtime": at.runtime(RUNTIME)}
    training = runtime | {
        "weights": weights,
        "teacher": beside,
        "adapters": adapters,
        "optimizer": optimizer,
        "activations": tokens * (at.kept * per_block + shape.state) * at.size
        + tokens * shape.hidden * 8 * config.passes,
        "logits": logits,
    }
    writing = {}
    if config.on_policy is not None:
        rows = config.on_policy.batch
        writing = {name: training[name] for name in ("runtime", "weights", "teacher", "adapters", "optimizer")}
        writing |= {
            "kv": shape.kv_bytes(rows * config.length, at.size, at.kept),
            "logits": rows * shape.vocab * SAMPLED,
        }
    looking = {} if shared else runtime | {"teacher": copy, "activations": tokens * shape.state * at.size}
    return Need(worst(training, writing, looking), at.small, f"{note}; teacher: {how}")


def _longer(own: OnPolicy | None, chosen: Pace, at: Setting) -> int:
    """Tokens by which a sequence may grow where written answers are longer than its rows' own."""
    if own is None:
        return 0
    rows = at.rows
    if rows is None:
        return own.max_tokens
    answer = rows.learned / max(1.0, rows.count * (1 - rows.heldout))
    return math.ceil(own.share * max(0.0, own.max_tokens - answer) * chosen.width * rows.count / rows.tokens)


def saved_per_token(shape: Geometry) -> int:
    """Activations per token and block that are saved for the backward pass."""
    return 14 * shape.hidden + 5 * shape.intermediate


def pace_at(config: TrainingConfig, at: Setting, share: float = 1.0) -> Pace:
    """The settings of a student that learns from a share of the rows, if their tokens are known."""
    rows = at.rows
    if rows is None or not rows.learned:
        return pace(config, None)
    learned = rows.tokens * (1 - rows.heldout) if config.learn == "all" else rows.learned
    return pace(config, math.ceil(learned * share), min(rows.longest, config.length) or None)


def lora_parameters(tune: Lora, shape: Geometry, blocks: int, rank: int | None = None) -> int:
    """Parameters of the adapters; `rank` is theirs where the recipe leaves it out."""
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
    return blocks * (tune.rank or rank or RANK) * sum(sizes.get(name, 2 * h) for name in names)


def training_work(config: TrainingConfig, at: Setting, shares: Sequence[float] = (1.0,)) -> Work | None:
    """Steps and measurements of all students, each on its share of the training rows."""
    if at.rows is None:
        return None
    work, held = Work(), at.rows.tokens * at.rows.heldout
    for student, share in zip(config.students, shares, strict=True):
        chosen = pace_at(student, at, share)
        work = work + _student_work(student, chosen, at, at.rows.tokens * (1 - at.rows.heldout) * share, held)
    return work + Work(forward(at.shape, at.shape.blocks, held, config.length / 2))


def _student_work(config: TrainingConfig, chosen: Pace, at: Setting, train: float, held: float) -> Work:
    """One student's steps and measurements, the rounding of its weights, and writing its own rows."""
    per_step = config.batch * chosen.width * chosen.accumulate
    steps = config.max_steps or max(1, math.ceil(chosen.epochs * train / per_step))
    student = forward(at.shape, at.kept, 1, chosen.width / 2, config.passes)
    factor = 3 if isinstance(config.tune, Full) else 2  # forward and backward; the weights' own gradients
    factor += config.gradient_checkpointing
    flops = steps * per_step * student * factor
    if config.objective.needs_teacher and not isinstance(config.teacher, Cached):
        flops += steps * per_step * forward(at.shape, at.shape.blocks, 1, chosen.width / 2)
    heads = len(config.depth_weights(at.kept))
    measured = forward(at.shape, at.kept, held, config.length / 2, held * heads)
    measurements = 1 + math.ceil(steps / chosen.eval_every)
    work = Work(flops + measured * measurements)
    if config.on_policy is not None:
        work += _writing(config, config.on_policy, at, steps, per_step)
    if not (isinstance(config.tune, Lora) and config.tune.quantize_as):
        return work
    weights = at.kept * at.shape.block_products
    weighing = forward(at.shape, at.kept, WEIGHED, config.length / 2, 0)
    return work + Work(weighing, read=FOLLOWING * steps * weights, host_flops=QUANTIZING * measurements * weights)


def _writing(config: TrainingConfig, own: OnPolicy, at: Setting, steps: int, per_step: int) -> Work:
    """Writing the answers of a share of the rows that the steps go through, each of maximum length."""
    assert at.rows is not None
    a_row = at.rows.tokens / at.rows.count
    prompt = max(1, round(a_row - at.rows.learned / max(1.0, at.rows.count * (1 - at.rows.heldout))))
    rows = max(1, round(own.share * steps * per_step / a_row))
    at_once = max(1, round(own.share * min(own.refresh, steps) * per_step / a_row))
    size = 4 if isinstance(config.tune, Full) else at.size
    weights = at.shape.parameters(at.kept) * size
    return decoding(at.shape, at.kept, rows, batches(at_once, own.batch), prompt, own.max_tokens, weights, at.size)


def training_changes(config: TrainingConfig, _at: Setting) -> Iterable[Overrides]:
    """First changes that leave the result the same, then fewer bits, then shorter sequences."""
    section = config.stage
    yield from ((f"{section}.chunk={size}",) for size in halves(config.chunk, SMALLEST_CHUNK))
    if not config.gradient_checkpointing:
        yield (f"{section}.gradient_checkpointing=true",)
    for size in halves(config.batch, 1):  # the same sequences per optimizer step
        if config.accumulate is None:  # it follows the batch
            yield (f"{section}.batch={size}",)
        else:
            yield (f"{section}.batch={size}", f"{section}.accumulate={config.accumulate * config.batch // size}")
    if isinstance(config.teacher, Copy) and isinstance(config.tune, Lora):
        yield (f"{section}.teacher=shared",)
    if isinstance(config.teacher, Copy) and config.teacher.quantize is None:
        yield (f"{section}.teacher.kind=copy", f"{section}.teacher.quantize=nf4")
    if config.optimizer == "adamw":
        yield (f"{section}.optimizer=adamw_8bit",)
    if isinstance(config.tune, Lora) and not (config.tune.quantize_base or config.tune.quantize_as):
        yield (f"{section}.tune.kind=lora", f"{section}.tune.quantize_base=nf4")
    yield from ((f"{section}.length={size}",) for size in halves(config.length, SHORTEST))
