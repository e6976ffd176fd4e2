"""Settings that follow from how many tokens there are to learn, where a recipe leaves them out. No torch.

    tokens per step   256 up to 100,000 tokens, then about 400 steps per epoch, at most 2,048
    learning rate     LoRA: 1e-3 up to 100,000 tokens, 2e-4 from 10 million on, geometric between; full tuning: 2e-5
    epochs            1; below 8,192 tokens as many as make 8,192 (32 steps), at most 4
    rank              16 up to a million tokens, 32 up to 10 million, 64 above
    measurements      every 10 steps, at most 16 of them

Explicit values win. docs/explanation/objectives.md says what this rests on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import RANK, Full, Lora, TrainingConfig, Tune

PER_STEP = (256, 2048)  # tokens per optimizer step: for few tokens, and at most
STEPS = 400  # per epoch, while the tokens per step are between these
FEW, MANY = 100_000, 10_000_000  # tokens to learn
LORA_RATE = (1e-3, 2e-4)  # for few tokens, and for many
FULL_RATE = 2e-5  # the published one of full tuning (arXiv 2509.23753)
FEWEST, MOST_EPOCHS = 8192, 4  # tokens learned in all, and passes at most to reach them
MEASURED_EVERY, MEASUREMENTS = 10, 16
UNKNOWN = 1_000_000  # tokens to learn that are assumed where a recipe does not tell


@dataclass(frozen=True)
class Pace:
    """How a student is trained on its rows."""

    learned: int  # tokens to learn in its training rows, once
    epochs: float
    lr: float
    width: int  # tokens per packed sequence, at most
    accumulate: int  # forward passes per step, over all processes
    tune: Tune  # with its rank
    eval_every: int

    @property
    def rank(self) -> int | None:
        """The adapters' rank; None for full tuning."""
        return self.tune.rank if isinstance(self.tune, Lora) else None


def tokens_per_step(learned: int) -> int:
    """Tokens of an optimizer step: a power of two."""
    fewest, most = PER_STEP
    wanted = max(learned / STEPS, 1)
    return min(max(2 ** round(math.log2(wanted)), fewest), most)


def learning_rate(learned: int, tune: Tune) -> float:
    """The peak learning rate, to two digits."""
    if isinstance(tune, Full):
        return FULL_RATE
    way = min(max(math.log(max(learned, 1) / FEW) / math.log(MANY / FEW), 0.0), 1.0)
    return float(f"{LORA_RATE[0] * (LORA_RATE[1] / LORA_RATE[0]) ** way:.1e}")


def epochs(learned: int) -> float:
    """Passes over the rows."""
    return float(min(max(math.ceil(FEWEST / max(learned, 1)), 1), MOST_EPOCHS))


def rank(learned: int) -> int:
    """The rank of the adapters."""
    return RANK * (1 if learned <= UNKNOWN else 2 if learned <= MANY else 4)


def pace(config: TrainingConfig, learned: int | None, longest: int | None = None, world: int = 1) -> Pace:
    """The settings for rows with `learned` tokens to learn, the longest of which has `longest` tokens; None: unknown.

    Without `accumulate` sequences are packed no wider than a step needs, but never narrower than the longest row, and
    `accumulate` is a multiple of the `world` processes. With it they are as wide as `length`.
    """
    known = UNKNOWN if learned is None else learned
    per_step, width, accumulate = tokens_per_step(known), config.length, config.accumulate
    if accumulate is None:
        width = min(width, max(per_step // config.batch, longest or width))
        accumulate = max(1, round(per_step / (config.batch * width)))
        accumulate += -accumulate % world
    per_step = config.batch * width * accumulate
    passes = config.epochs or epochs(known)
    tune = config.tune
    if isinstance(tune, Lora) and tune.rank is None:
        tune = tune.model_copy(update={"rank": rank(known)})
    steps = config.max_steps or passes * known / per_step
    return Pace(
        known,
        passes,
        config.lr or learning_rate(known, config.tune),
        width,
        accumulate,
        tune,
        config.eval_every or max(MEASURED_EVERY, math.ceil(steps / MEASUREMENTS)),
    )


def total_steps(config: TrainingConfig, pace: Pace, batches: int) -> int:
    """Optimizer steps of a run over `batches` batches per epoch."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(pace.epochs * math.ceil(batches / pace.accumulate)))
