"""Tokens per step, rate, epochs and rank by the number of tokens to learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compress.core.cost import RowCounts, Setting
from compress.core.stage import Context, Inputs
from compress.data.config import TextsConfig
from compress.data.stage import run as make_rows
from compress.distill.config import DistillConfig
from compress.distill.stage import run
from compress.modeling.geometry import geometry_of
from compress.modeling.load import load_config
from compress.pipeline.stages import STAGES
from compress.records.curves import CURVES, TrainingStep, student_lines
from compress.records.figures import DistillFigures
from compress.training.budget import UNKNOWN, Pace, epochs, learning_rate, pace, rank, tokens_per_step
from compress.training.config import Full, Lora


def section(**keys: Any) -> DistillConfig:
    return DistillConfig.model_validate({"objective": "kd", **keys})


@pytest.mark.parametrize(
    ("learned", "per_step", "rate", "passes", "ranks"),
    [
        (1, 256, 1e-3, 4, 16),
        (2_048, 256, 1e-3, 4, 16),
        (4_096, 256, 1e-3, 2, 16),
        (8_192, 256, 1e-3, 1, 16),
        (11_000, 256, 1e-3, 1, 16),
        (100_000, 256, 1e-3, 1, 16),
        (200_000, 512, 7.8e-4, 1, 16),
        (400_000, 1024, 6.2e-4, 1, 16),
        (1_000_000, 2048, 4.5e-4, 1, 16),
        (3_000_000, 2048, 3e-4, 1, 32),
        (10_000_000, 2048, 2e-4, 1, 32),
        (10**9, 2048, 2e-4, 1, 64),
    ],
)
def test_the_rule(learned: int, per_step: int, rate: float, passes: float, ranks: int) -> None:
    assert (tokens_per_step(learned), rank(learned)) == (per_step, ranks)
    assert learning_rate(learned, Lora()) == rate and learning_rate(learned, Full()) == 2e-5
    assert epochs(learned) == passes


def test_more_tokens_never_mean_smaller_steps_or_a_higher_rate() -> None:
    sizes = [round(10 ** (k / 20)) for k in range(180)]
    for few, many in itertools.pairwise(sizes):
        assert tokens_per_step(few) <= tokens_per_step(many) and rank(few) <= rank(many)
        assert learning_rate(few, Lora()) >= learning_rate(many, Lora())
        assert epochs(few) >= epochs(many)


def test_explicit_values_always_win() -> None:
    given = {"epochs": 3, "lr": 5e-4, "accumulate": 7, "eval_every": 2, "tune": {"kind": "lora", "rank": 5, "alpha": 9}}
    config = section(**given, batch=2, length=128)
    for learned in (None, 100, 10**8):
        assert pace(config, learned, 64) == Pace(
            UNKNOWN if learned is None else learned, 3, 5e-4, 128, 7, config.tune, 2
        )
    for key, value in given.items():  # each alone, too
        found = pace(section(**{key: value}), 10_000, 200)
        plain = pace(section(), 10_000, 200)
        differ = {name for name in vars(plain) if getattr(found, name) != getattr(plain, name)}
        assert key in differ <= {key, "width"} if key == "accumulate" else differ == {key}


@pytest.mark.parametrize(
    ("keys", "learned", "longest", "world", "width", "accumulate"),
    [
        ({}, 10_000, 200, 1, 256, 1),  # rows of 200 tokens fit a step of 256
        ({}, 10_000, 300, 1, 300, 1),  # a row is never cut
        ({}, 10_000, 512, 1, 512, 1),
        ({}, 10_000, None, 1, 512, 1),
        ({"length": 128}, 10_000, 128, 1, 128, 2),
        ({"batch": 2}, 10_000, 100, 1, 128, 1),
        ({"batch": 8}, 1_000_000, 200, 1, 256, 1),
        ({}, 1_000_000, 200, 1, 512, 4),  # as before there was a rule
        ({"length": 4096}, 1_000_000, 4000, 1, 4000, 1),
        ({}, 10_000, 200, 3, 256, 3),  # each process has a part of every step
        ({"accumulate": 2}, 10_000, 200, 1, 512, 2),
    ],
)
def test_sequences_are_no_wider_than_a_step(
    keys: dict[str, Any], learned: int, longest: int | None, world: int, width: int, accumulate: int
) -> None:
    found = pace(section(**keys), learned, longest, world)
    assert (found.width, found.accumulate) == (width, accumulate)


def test_measurements_are_no_more_than_sixteen() -> None:
    assert pace(section(), 10_000, 200).eval_every == 10
    found = pace(section(), 100_000, 200)
    assert found.eval_every == math.ceil(100_000 / 256 / 16)
    assert pace(section(max_steps=320), 10_000, 200).eval_every == 20


def test_a_training_follows_the_rule_and_records_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny()
    data, out = tmp_path / "data", tmp_path / "out"
    for folder in (data, out):
        folder.mkdir()
    rows = TextsConfig(source="texts", rows=40, batch=40, tokens=60, heldout=0.2, length=64)
    make_rows(rows, Inputs(base, base), data, Context())
    metrics = run(section(), Inputs(base, base, {"data": data}), out, Context())
    found = DistillFigures.model_validate(metrics).pace
    assert found is not None
    lines = [line for line in student_lines(out / CURVES) if isinstance(line, TrainingStep)]
    assert (found.tokens_per_step, found.lr, found.rank, found.eval_every) == (256, 1e-3, 16, 10)
    assert found.epochs == epochs(found.learned) == 4
    assert sum(line.tokens for line in lines) == found.epochs * found.learned  # all tokens, as often as it says
    assert max(line.lr for line in lines) == pytest.approx(1e-3) and max(line.tokens for line in lines) <= 256
    assert len(lines) == metrics["steps"]


def test_the_plan_follows_the_rule(tiny: Callable[..., Path]) -> None:
    shape = geometry_of(load_config(tiny()).to_dict())
    few = RowCounts(100, 20_000, 0.1, 1_800, 16_000, 200)
    at = Setting(shape, 4, "float32", rows=few)
    cost = STAGES["distill"].cost

    def work(config: DistillConfig, where: Setting) -> float:
        found = cost.work(config, where)
        assert found is not None
        return found.total

    written = {"accumulate": 1, "length": 256, "lr": 1e-3, "epochs": 1, "eval_every": 10}
    plain, explicit = section(), section(**written, tune={"kind": "lora", "rank": 16})
    assert cost.need(plain, at) == cost.need(explicit, at)  # sequences of 256 tokens, adapters of rank 16
    assert work(plain, at) == pytest.approx(work(explicit, at), rel=0.1)  # held-out rows are packed by `length`
    assert work(section(epochs=4), at) > 2 * work(plain, at)
    many = replace(at, rows=RowCounts(10**5, 2 * 10**7, 0.01, 10**5, 19 * 10**6, 200))
    assert cost.need(plain, many).parts["adapters"] == 4 * cost.need(plain, at).parts["adapters"]
    more = replace(at, rows=replace(few, tokens=400_000))  # prompts, which `learn: all` learns too
    assert cost.need(section(learn="all"), more).peak > cost.need(plain, more).peak
    unknown = replace(at, rows=None)
    assert cost.need(plain, unknown) == cost.need(section(accumulate=4, tune={"kind": "lora", "rank": 16}), unknown)
    assert ("distill.batch=2",) in list(cost.changes(section(batch=4), at))
    assert ("distill.batch=2", "distill.accumulate=6") in list(cost.changes(section(batch=4, accumulate=3), at))
