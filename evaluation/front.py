"""Whether an exported file is on the front: what plain quantization of the unpruned model gives at its bytes.

Judged by KL to the unpruned model, position by position on the same tokens; tasks that tell the two apart and disagree
are named, and so is what the speeds say. A difference that its interval does not tell from none is a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..core.units import megabytes, number
from ..records.models import ArtifactFormat, Standing, TaskDissent
from ..runtime.artifact_sizes import target_of
from .statistics import Interval, clustered_interval, mean, paired_interval
from .suite import MeasuredModel

RUN = 32  # neighbouring tokens whose differences count as one: they resemble each other
MARGIN = 0.05  # of speeds: closer ones are the same, on a machine that does other things too
TITLES = {"gguf": "GGUF type", "onnx": "ONNX precision"}
Verdict = Literal["better", "worse", "tie"]


@dataclass(frozen=True)
class RivalPair:
    """An artifact and its rival in one format, measured."""

    artifact: MeasuredModel
    format: ArtifactFormat  # of the rival
    rival: MeasuredModel | None  # none where nothing is as small
    kind: str  # the rival's type or size, else the smallest plain type
    bytes: int  # its size
    least: int | None = None  # without a rival: bytes of the smallest file with a type per tensor, where there are such


def judge(pair: RivalPair, spans: Sequence[int]) -> Standing:
    """The artifact's standing; `spans` are the positions measured in each window, in order."""
    if pair.rival is None:
        return _alone(pair)
    ours, theirs = pair.artifact, pair.rival
    differences = [a - b for a, b in zip(ours.kls, theirs.kls, strict=True)]
    found = clustered_interval(_runs(differences, spans))
    verdict: Verdict = "better" if found.high < 0 else "worse" if found.low > 0 else "tie"
    dissent = _dissent(verdict, ours, theirs)
    faster = _faster(ours, theirs)
    finite = math.isfinite(found.high - found.low)
    return Standing(
        format=pair.format,
        verdict=verdict,
        on_front=verdict == "better" or (True if faster else None if verdict == "tie" else False),
        rival=theirs.role,
        difference=mean(differences),
        difference_low=found.low if finite else None,
        difference_high=found.high if finite else None,
        dissent=dissent,
        sentence=" ".join(
            [_quality(pair, theirs, verdict, differences, found), *(_otherwise(verdict, task) for task in dissent)]
        ),
        conclusion=_conclusion(verdict, faster, ours, theirs),
    )


def _alone(pair: RivalPair) -> Standing:
    ours, about = pair.artifact, "about " if pair.format == "onnx" else ""
    least = f", and {megabytes(pair.least)} with a type per tensor" if pair.least is not None else ""
    return Standing(
        format=pair.format,
        verdict="alone",
        on_front=True,
        smallest=pair.kind,
        smallest_bytes=pair.bytes,
        smallest_sized_bytes=pair.least,
        sentence=f"No {TITLES[pair.format]} of the unpruned model is as small as {ours.role} "
        f"({megabytes(ours.bytes)}): the smallest is {pair.kind} at {about}{megabytes(pair.bytes)}{least}.",
    )


def _runs(values: Sequence[float], spans: Sequence[int]) -> list[Sequence[float]]:
    """Runs of neighbouring values, none across two windows."""
    found, start = [], 0
    for span in spans:
        found += [values[at : min(at + RUN, start + span)] for at in range(start, start + span, RUN)]
        start += span
    return found


def _quality(
    pair: RivalPair, theirs: MeasuredModel, verdict: Verdict, differences: Sequence[float], found: Interval
) -> str:
    ours = pair.artifact
    manner = "with a type per tensor" if target_of(pair.kind) is not None else f"in {pair.kind}"
    rival = f"the unpruned model {manner} ({megabytes(pair.bytes)}"
    rival += f", {theirs.runtime})" if theirs.runtime != ours.runtime else ")"
    at, a, b = megabytes(ours.bytes), number(_kl(ours)), number(_kl(theirs))
    if verdict == "better":
        return f"At {at} {ours.role} is better than {rival}: KL {a} against {b}{_range(differences, found)}."
    if verdict == "worse":
        return f"At {at} {rival} is better than {ours.role}: KL {b} against {a}{_range(differences, found)}."
    tokens = f"{len(differences):,} tokens"
    if not math.isfinite(found.high - found.low):
        return f"At {at} {ours.role} and {rival} have KL {a} and {b}; {tokens} are too few to tell them apart."
    enough = _enough(differences, found)
    tells = f"; if it is real, about {enough:,} tokens would tell" if enough else ""
    return (
        f"At {at} {ours.role} and {rival} are a tie: KL {a} against {b}{_range(differences, found)} on {tokens}{tells}."
    )


def _kl(model: MeasuredModel) -> float:
    assert model.kl_to_base is not None, "the unpruned model is measured before its rivals"
    return model.kl_to_base


def _range(differences: Sequence[float], found: Interval) -> str:
    low, high = f"{found.low:+.2g}", f"{found.high:+.2g}"
    return f" (difference {mean(differences):+.2g}, 95 % interval {low} to {high})"


def _enough(differences: Sequence[float], found: Interval) -> int | None:
    """How many tokens would tell a difference of this size from none, to two digits; None where there is none."""
    difference, half = mean(differences), (found.high - found.low) / 2
    if not difference:
        return None
    wanted = len(differences) * (half / difference) ** 2
    if wanted > 1e9:
        return None
    step = 10 ** max(0, math.floor(math.log10(wanted)) - 1)
    return math.ceil(wanted / step) * step


def _dissent(verdict: Verdict, ours: MeasuredModel, theirs: MeasuredModel) -> list[TaskDissent]:
    """Tasks that tell the two apart otherwise than KL does."""
    found = []
    for name, mine in ours.tasks.items():
        other = theirs.tasks.get(name)
        if other is None or len(mine.scores) < 2 or len(mine.scores) != len(other.scores):
            continue
        span = paired_interval(other.scores, mine.scores)
        if not mine.higher_is_better:
            span = Interval(-span.high, -span.low)
        better, worse = span.low > 0, span.high < 0
        if (better and verdict != "better") or (worse and verdict != "worse"):
            found.append(TaskDissent(task=name, artifact=mine.value, rival=other.value, low=span.low, high=span.high))
    return found


def _otherwise(verdict: Verdict, task: TaskDissent) -> str:
    """What is said of a task that disagrees with a verdict."""
    says = "tells them apart" if verdict == "tie" else "says otherwise"
    better = "it" if task.low > 0 else "the unpruned model"
    return (
        f"{task.task} {says}: {number(task.artifact)} against the unpruned model's {number(task.rival)}, so {better} "
        f"is better there (95 % interval of the difference {task.low:+.2f} to {task.high:+.2f})."
    )


def _faster(ours: MeasuredModel, theirs: MeasuredModel) -> list[str]:
    """In what the artifact is faster than its rival."""
    pairs = {
        "reading": (ours.prefill_tokens_per_second, theirs.prefill_tokens_per_second),
        "writing": (ours.tokens_per_second, theirs.tokens_per_second),
    }
    return [name for name, (a, b) in pairs.items() if a is not None and b is not None and a > (1 + MARGIN) * b]


def _conclusion(verdict: Verdict, faster: list[str], ours: MeasuredModel, theirs: MeasuredModel) -> str:
    """Whether the artifact is on the front, and what its speed has to do with it."""
    speeds = [
        f"{name} {number(a)} tokens/s against {number(b)}"
        for name, a, b in (
            ("reads", ours.prefill_tokens_per_second, theirs.prefill_tokens_per_second),
            ("writes", ours.tokens_per_second, theirs.tokens_per_second),
        )
        if a is not None and b is not None
    ]
    if verdict == "better":
        front = "is on the front."
    elif faster:
        alone = " alone, not for its quality" if verdict == "worse" else ""
        front = f"is on the front for {' and '.join(faster)} faster{alone}."
    elif verdict == "tie":
        front = "is not told from plain quantization."
    else:
        front = "is not on the front."
    return f"It {' and '.join(speeds)}: {ours.role} {front}" if speeds else f"{ours.role} {front}"
