"""Whether a file is on the front, from made-up figures."""

from __future__ import annotations

import math
import random

import pytest
from compress.evaluation.front import RUN, RivalPair, judge
from compress.evaluation.statistics import TaskOutcome, clustered_interval, interval
from compress.evaluation.suite import MeasuredModel
from compress.records.models import ArtifactFormat

SPANS = [100, 300, 240]
POSITIONS = sum(SPANS)
DRAW = random.Random(5)
NOISE = [DRAW.gauss(0, 0.1) for _ in range(POSITIONS)]


def model(role: str, kls: list[float], size: int, **changes: object) -> MeasuredModel:
    values = {
        "role": role,
        "runtime": "onnxruntime" if "onnx" in role else "llama.cpp",
        "blocks": 3,
        "parameters": 10,
        "bytes": size,
        "perplexity": 5.0,
        "kl_to_base": math.fsum(kls) / len(kls),
        "positions": len(kls),
        "tasks": {},
        "kls": kls,
    }
    return MeasuredModel.model_validate(values | changes)


def cut(kl: float, **changes: object) -> MeasuredModel:
    return model("gguf-Q4_K_M", [kl + noise for noise in NOISE], 90_900_000, **changes)


def plain(kl: float, **changes: object) -> MeasuredModel:
    return model("base-gguf-Q3_K_S", [kl - noise for noise in NOISE], 88_200_000, **changes)


def beside(ours: MeasuredModel, theirs: MeasuredModel | None, form: ArtifactFormat = "gguf") -> RivalPair:
    return RivalPair(ours, form, theirs, "Q3_K_S", 88_200_000 if theirs else 91_700_000)


def answers(*right: int, n: int = 40) -> TaskOutcome:
    scores = [float(i < right[0]) for i in range(n)]
    return TaskOutcome("generation", "exact_match", scores, sum(scores) / n, n, 0.0)


def test_a_worse_cut_is_said_to_be_worse():
    found = judge(beside(cut(0.82), plain(0.43)), SPANS)
    assert (found.verdict, found.on_front, found.rival) == ("worse", False, "base-gguf-Q3_K_S")
    assert found.difference == pytest.approx(0.39 + 2 * sum(NOISE) / POSITIONS)
    assert found.difference_low is not None and found.difference_high is not None
    assert 0 < found.difference_low < found.difference < found.difference_high
    start = "At 90.9 MB the unpruned model in Q3_K_S (88.2 MB) is better than gguf-Q4_K_M: KL 0.4"
    assert found.sentence.startswith(start) and "95 % interval +0.3" in found.sentence
    assert found.conclusion == "gguf-Q4_K_M is not on the front."


def test_a_better_cut_is_on_the_front():
    found = judge(beside(cut(0.2), plain(0.43)), SPANS)
    assert (found.verdict, found.on_front) == ("better", True)
    assert "gguf-Q4_K_M is better than the unpruned model in Q3_K_S (88.2 MB): KL 0.1" in found.sentence
    assert found.conclusion == "gguf-Q4_K_M is on the front."


def test_a_rival_of_a_size_is_named_as_such():
    found = judge(RivalPair(cut(0.82), "gguf", plain(0.43), "90.9MB", 90_890_000), SPANS)
    start = "At 90.9 MB the unpruned model with a type per tensor (90.9 MB) is better than gguf-Q4_K_M: KL 0.4"
    assert found.sentence.startswith(start)


def test_what_the_tokens_do_not_tell_apart_is_a_tie():
    found = judge(beside(cut(0.43), plain(0.43)), SPANS)
    assert (found.verdict, found.on_front) == ("tie", None)
    assert "are a tie" in found.sentence and "on 640 tokens; if it is real, about" in found.sentence
    assert found.conclusion == "gguf-Q4_K_M is not told from plain quantization."
    few = judge(beside(model("gguf-X", [0.9] * RUN, 9), model("base-gguf-Y", [0.1] * RUN, 8)), [RUN])
    assert (few.verdict, few.difference_low, few.difference_high) == ("tie", None, None)
    assert "32 tokens are too few to tell them apart" in few.sentence
    same = judge(beside(model("gguf-X", NOISE, 9), model("base-gguf-Y", NOISE, 8)), SPANS)
    assert same.verdict == "tie" and "if it is real" not in same.sentence  # no number of tokens tells nothing apart


def test_a_cut_that_no_plain_type_reaches_is_alone():
    found = judge(beside(cut(0.8), None), SPANS)
    assert (found.verdict, found.on_front, found.rival, found.smallest) == ("alone", True, None, "Q3_K_S")
    assert found.sentence == (
        "No GGUF type of the unpruned model is as small as gguf-Q4_K_M (90.9 MB): the smallest is Q3_K_S at 91.7 MB."
    )
    assert "is Q3_K_S at about 91.7 MB" in judge(beside(cut(0.8), None, "onnx"), SPANS).sentence


def test_a_worse_cut_may_be_on_the_front_for_its_speed():
    speeds = {"tokens_per_second": 100.0, "prefill_tokens_per_second": 500.0}
    slow = {"tokens_per_second": 98.0, "prefill_tokens_per_second": 300.0}
    found = judge(beside(cut(0.8, **speeds), plain(0.4, **slow)), SPANS)
    assert (found.verdict, found.on_front) == ("worse", True)
    assert found.conclusion == (
        "It reads 500 tokens/s against 300 and writes 100 tokens/s against 98: gguf-Q4_K_M is on the front for reading "
        "faster alone, not for its quality."
    )
    other = judge(beside(cut(0.8, **slow), plain(0.4, **speeds)), SPANS)
    assert other.on_front is False and other.conclusion.endswith("gguf-Q4_K_M is not on the front.")


def test_tasks_that_disagree_are_named():
    ours, theirs = {"copy": answers(38), "same": answers(20)}, {"copy": answers(9), "same": answers(20)}
    found = judge(beside(cut(0.8, tasks=ours), plain(0.4, tasks=theirs)), SPANS)
    (task,) = found.dissent
    assert (task.task, task.artifact, task.rival) == ("copy", 0.95, 0.225) and 0 < task.low < task.high
    assert "copy says otherwise: 0.95 against the unpruned model's 0.225, so it is better there" in found.sentence
    agrees = judge(beside(cut(0.8, tasks=theirs), plain(0.4, tasks=ours)), SPANS)
    assert agrees.dissent == []
    tie = judge(beside(cut(0.43, tasks=theirs), plain(0.43, tasks=ours)), SPANS)
    assert "copy tells them apart" in tie.sentence and "so the unpruned model is better there" in tie.sentence


def test_the_interval_of_neighbours_covers_what_it_says():
    """Values of one group share a part; taken for independent ones, their interval is far too narrow."""
    draw, hits, naive = random.Random(11), 0, 0
    for _ in range(400):
        groups = []
        for _ in range(40):
            shared = draw.gauss(0, 1)
            groups.append([shared + draw.gauss(0, 1) for _ in range(draw.choice((8, 16)))])
        found = clustered_interval(groups)
        hits += found.low <= 0 <= found.high
        alone = interval([value for group in groups for value in group])
        naive += alone.low <= 0 <= alone.high
    assert 0.91 < hits / 400 < 0.98 and naive / 400 < 0.75


def test_runs_do_not_cross_windows():
    """A window's last run is short; all positions count once."""
    ours = model("gguf-X", [1.0] * 40 + [0.0] * 40, 9)
    found = judge(beside(ours, model("base-gguf-Y", [0.5] * 80, 8)), [40, 40])
    assert found.difference == pytest.approx(0) and found.verdict == "tie"
