"""Intervals, paired differences and kept shares against published values, exact laws and simulation."""

from __future__ import annotations

import math
import random

import pytest
from compress.evaluation.statistics import TaskOutcome, compare, interval, kept_above_chance, paired_interval, wilson
from scipy.stats import binomtest


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (81, 263), (0, 1), (999, 1000)])
def test_wilson_is_scipys(hits, n):
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_interval_of_other_scores_is_the_normal_one():
    scores = [0.25, 0.5, 0.75, 0.5]
    deviation = math.sqrt(sum((s - 0.5) ** 2 for s in scores) / 3)
    assert interval(scores) == pytest.approx((0.5 - 1.96 * deviation / 2, 0.5 + 1.96 * deviation / 2), abs=1e-4)
    assert interval([0, 1, 1, 0]) == wilson(2, 4)
    assert interval([0.5]).high == math.inf


def test_the_paired_interval_covers_what_it_says():
    """Of models that differ on a tenth and a fifth of the questions, whose true difference is 0.1."""
    draw = random.Random(3)
    for n in (20, 100):
        inside = 0
        for _ in range(1500):
            kinds = [draw.random() for _ in range(n)]
            base = [float(k < 0.1 or k > 0.7) for k in kinds]
            other = [float(0.1 <= k < 0.3 or k > 0.7) for k in kinds]
            low, high = paired_interval(base, other)
            inside += low <= 0.1 <= high
        assert 0.93 < inside / 1500 < 0.98


def test_pairing_tells_more_than_two_intervals():
    base = [1.0] * 50 + [0.0] * 50
    other = [1.0] * 44 + [0.0] * 56  # loses six questions and wins none
    low, high = paired_interval(base, other)
    assert low < -0.06 < high < 0  # a difference
    assert interval(other).high > interval(base).low  # which the two intervals alone do not show
    same_low, same_high = paired_interval(base, base)
    assert same_low < 0 < same_high  # a hundred questions do not show that models are the same
    shuffled = other[::-1]
    assert paired_interval(base, shuffled) != paired_interval(base, other)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_interval(base, other[1:])


def test_paired_differences_of_other_scores():
    assert paired_interval([0.5, 0.25, 1.0], [0.75, 0.5, 1.25]) == pytest.approx((0.25, 0.25))


def outcome(hits: int, n: int, chance: float | None = 0.25, **changes) -> TaskOutcome:
    scores = [1.0] * hits + [0.0] * (n - hits)
    return TaskOutcome("choice", "accuracy_norm", scores, hits / n, n, chance, **changes)


def test_kept_shares():
    base, other = outcome(65, 100), outcome(45, 100)
    found = compare(other, base)
    assert found.kept == pytest.approx(45 / 65)
    assert found.kept_above_chance == pytest.approx(0.2 / 0.4)
    assert found.difference == pytest.approx(-0.2)
    assert found.low < 0.45 < found.high and found.difference_low < -0.2 < found.difference_high
    given = compare(base, None).model_fields_set
    assert "kept" not in given and "low" in given
    assert kept_above_chance(0.2, base) == pytest.approx(-0.125)  # worse than guessing is less than nothing


def test_there_is_nothing_to_keep_of_guessing():
    base = outcome(28, 100)
    assert interval(base.scores).low < 0.25 < base.value
    assert compare(outcome(26, 100), base).kept_above_chance is None
    nothing = compare(outcome(1, 100), outcome(0, 100, 0.0))
    assert (nothing.kept, nothing.kept_above_chance) == (None, None)
    assert compare(outcome(1, 9, None), outcome(8, 9, None)).kept_above_chance is None


def test_metrics_that_are_no_shares():
    base = TaskOutcome("other", "word_perplexity", [], 12.0, 5, None, {}, higher_is_better=False)
    found = compare(TaskOutcome("other", "word_perplexity", [], 15.0, 5, None, {}, higher_is_better=False), base)
    assert found.difference == 3.0
    assert not {"low", "high", "difference_low", "kept", "kept_above_chance"} & found.model_fields_set
