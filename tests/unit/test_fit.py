"""The pure parts of a fit, each against an obvious reference."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.core.geometry import Geometry
from compress.export.cost import DEPTH_ONNX
from compress.export.gguf import write_gguf
from compress.fit.candidates import Combination, combinations, front
from compress.fit.choice import Found, difference, doubts, next_candidate, reason, recommend
from compress.fit.damage import divergences
from compress.fit.ledger import Clock, Ledger
from compress.fit.limits import Limits
from compress.fit.measuring import OnnxBench
from compress.fit.prediction import (
    FileSize,
    Knowledge,
    MeasuredSpeeds,
    PlannedSpeeds,
    Timing,
    _two_rates,
    prediction_errors,
)
from compress.fit.request import make_request, removable
from compress.fit.rows import Effort, pieces
from compress.fit.sizes import GgufFileSizes, OnnxFileSizes
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_config, load_model, load_tokenizer
from compress.pipeline.plan import find_device
from compress.records.fit import FitFigures
from compress.runtime.artifact_types import GGUF_TYPES
from compress.runtime.cost import kv_bytes_per_token
from compress.runtime.engine import Speed, distributions, divergence
from compress.runtime.measure import Measurement

SHAPE = Geometry(30, 576, 1536, 9, 3, 64, 49152, True, 2048)


def figures(kl: float, size: int = 80, memory: int = 100, latency: float = 0.01, prefill: float = 0.001) -> FitFigures:
    return FitFigures(kl=kl, bytes=size, memory=memory, latency=latency, prefill=prefill)


def test_every_combination_is_there_once_and_plain_mixes_come_first():
    found = combinations([0, 2], ["Q8_0", "Q4_0"], ["f16", "q8_0"])
    assert len(set(found)) == len({c.name for c in found}) == len(found) == 8
    assert [c.plain for c in found] == [True, True] + [False] * 6
    assert found[0].name == "Q8_0" and Combination(1, "Q4_0", "q8_0").name == "Q4_0, 1 block cut, 8-bit cache"


def test_the_front_is_what_pairwise_comparison_leaves():
    draw = random.Random(3)
    for _ in range(30):
        items = [(draw.randrange(6), draw.randrange(6), number) for number in range(12)]
        found = front(items, lambda i: i[0], lambda i: i[1])
        beaten = {
            b
            for a, b in itertools.permutations(items, 2)
            if a[0] <= b[0] and a[1] <= b[1] and (a[:2] != b[:2] or a[2] < b[2])
        }
        assert found == [item for item in items if item not in beaten]


@pytest.mark.parametrize("seed", range(5))
def test_rates_are_the_nonnegative_least_squares_of_relative_errors(seed):
    draw = np.random.default_rng(seed)
    points = [(draw.uniform(50, 200), draw.integers(12, 31), draw.uniform(3, 9)) for _ in range(4)]
    rows = np.array([(x / t, y / t) for x, y, t in points])
    grid = np.linspace(0, 0.4, 401)
    errors = [((rows @ [a, b] - 1) ** 2).sum() for a in grid for b in grid]
    best = min(errors)
    found = _two_rates(points)
    assert min(found) >= 0 and ((rows @ np.array(found) - 1) ** 2).sum() <= best + 1e-9


def test_rates_of_exact_times_are_found_and_one_point_is_all_bandwidth():
    points = [(read, blocks, 2e-3 * read + 0.05 * blocks) for read, blocks in ((90.0, 30), (140.0, 30), (75.0, 24))]
    assert _two_rates(points) == pytest.approx((2e-3, 0.05))
    assert _two_rates(points[:1]) == (pytest.approx(points[0][2] / 90), 0.0)


def test_speeds_of_timed_files_are_what_was_measured_and_of_others_between():
    def timing(mix: str, read: int, blocks: int, factor: float = 1.0) -> Timing:
        return Timing(mix, FileSize(read, read), blocks, factor * (1e-9 * read + 1e-4 * blocks), factor * 1e-5 * blocks)

    speeds = MeasuredSpeeds((timing("Q8_0", 143_000_000, 30), timing("Q4_0", 90_000_000, 30)))
    size = FileSize(70_000_000, 70_000_000)
    assert speeds.decode("Q6_K", size, 24) == pytest.approx(0.07 + 2.4e-3, rel=1e-6)
    assert speeds.prefill("Q6_K", size, 24) == pytest.approx(24e-5)
    slow = MeasuredSpeeds((*speeds.timings, timing("Q6_K", 120_000_000, 30, 1.5)))
    assert slow.decode("Q6_K", size, 24) > 1.2 * slow.decode("Q4_0", size, 24)
    assert slow.prefill("Q6_K", size, 24) == pytest.approx(1.5 * 24e-5)


def test_a_prediction_is_the_sum_of_its_parts():
    known = Knowledge(SHAPE, {(6, "Q4_0"): FileSize(80, 78)}, {"Q4_0": 0.2}, {0: 0.0, 6: 0.5}, overhead=1000)
    known.caches["q8_0"] = 0.01
    speeds = PlannedSpeeds(find_device("cpu-2core"), SHAPE)
    found = known.predict(Combination(6, "Q4_0", "q8_0"), 512, speeds)
    numbers = 2 * 24 * 3 * 64 * 512  # keys and values, 24 blocks, 3 heads of 64
    assert found.kl == pytest.approx(0.71) and found.bytes == 80
    assert found.memory == 80 + 1000 + numbers * 34 // 32
    assert 512 * kv_bytes_per_token(SHAPE, 24, "f16") == 2 * numbers
    assert not known.knows(Combination(5, "Q4_0")) and not known.knows(Combination(6, "Q8_0"))


def test_errors_are_medians_of_relative_ones():
    pairs = [(figures(k, 80, 100, t), figures(0.2, 80, 50, 0.01)) for k, t in ((0.1, 0.01), (0.3, 0.02), (0.26, 0.01))]
    errors = prediction_errors(pairs, pairs)
    assert (errors.kl, errors.bytes, errors.memory, errors.latency) == (pytest.approx(0.5), 0, 1, 0)
    assert prediction_errors(pairs, pairs, timed=False).latency is None
    assert (prediction_errors(pairs, pairs[1:2]).latency, prediction_errors(pairs, []).memory) == (1, None)


def found(removed: int, mix: str, kl: list[float], **values: Any) -> Found:
    return Found(Combination(removed, mix), figures(float(np.mean(kl)), **values), tuple(kl))


def test_what_is_measured_next():
    limits = Limits(90, None, 512, None)
    predicted = {
        Combination(0, "Q8_0"): figures(0.01, 140, latency=0.02),
        Combination(0, "Q4_0"): figures(0.2, 85),
        Combination(0, "Q3_K_S"): figures(0.5, 70, latency=0.005),
        Combination(2, "Q4_0"): figures(0.28, 80, latency=0.008),
        Combination(6, "Q4_0"): figures(0.9, 75, latency=0.009),
    }
    measured: dict[Combination, FitFigures] = {}
    order = []
    while (chosen := next_candidate(predicted, measured, limits)) is not None:
        order.append(chosen)
        measured[chosen] = predicted[chosen]
    # The best plain one, the best cut, nothing more that is promising; then the front: what is too large, what is fast.
    assert order == [Combination(0, "Q4_0"), Combination(2, "Q4_0"), Combination(0, "Q8_0"), Combination(0, "Q3_K_S")]


def test_the_best_is_recommended_unless_a_plainer_one_cannot_be_told_from_it():
    draw = np.random.default_rng(1)
    noise = draw.exponential(0.2, 400)
    limits = Limits(90, None, 512, None)
    cut_better, plain = found(2, "Q4_0", list(noise)), found(0, "Q4_0", list(noise + 0.05))
    assert recommend([plain, cut_better], limits) is cut_better
    close = found(0, "Q4_0", list(noise + draw.normal(0.001, 0.1, 400)))
    assert recommend([close, cut_better], limits) is close
    too_large = found(0, "Q8_0", list(noise / 10), size=140)
    assert recommend([too_large, plain, cut_better], limits) is cut_better
    smaller = found(0, "Q3_K_S", list(noise + 0.05 + draw.normal(0, 0.1, 400)), size=70)
    assert recommend([plain, smaller], limits) is smaller


def test_differences_are_of_pairs_and_say_what_would_tell():
    draw = np.random.default_rng(2)
    noise = draw.exponential(0.2, 900)
    a, b = found(0, "Q4_0", list(noise)), found(0, "Q4_1", list(noise + draw.normal(0.001, 0.03, 900)))
    gap = difference(b, a)
    values = np.array(b.kl) - np.array(a.kl)
    assert gap.mean == pytest.approx(values.mean()) and gap.error == pytest.approx(values.std(ddof=1) / 30)
    assert not gap.sure and gap.needed is not None and gap.needed > 900
    assert replace(gap, positions=gap.positions, error=gap.error * (900 / gap.needed) ** 0.5).sure
    (said,) = doubts(a, [a, b], Limits(90, None, 512, None))
    assert "900 tokens do not tell Q4_1 from Q4_0" in said and f"about {gap.needed:,} would" in said


def test_the_reason_names_the_rival():
    limits, smallest = Limits(80_000_000, None, 512, None), ("Q4_0", 91_000_000)
    cut_only = found(6, "Q4_0", [0.9, 0.8], size=79_000_000)
    assert "No plain file of the unpruned model is that small: Q4_0 has 91.0 MB." in reason(
        cut_only, [cut_only], smallest, limits
    )
    plain = found(0, "Q2_K", [1.4, 1.5], size=78_000_000)
    told = reason(cut_only, [cut_only, plain], smallest, limits)
    assert told.endswith("the best that was measured; the best without a cut, Q2_K (78.0 MB, KL 1.45), is worse.")
    better = found(0, "IQ4_XS", [0.4, 0.3], size=79_500_000)
    told = reason(better, [cut_only, plain, better], smallest, limits)
    assert told == (
        "Do not cut. Within --size 80.0 MB, the unpruned model as IQ4_XS (79.5 MB, KL 0.35) was the best that was "
        "measured; the best with a cut, Q4_0, 6 blocks cut (79.0 MB, KL 0.85)."
    )
    told = reason(plain, [cut_only, plain], smallest, limits)  # they cannot be told apart
    assert "Q2_K (78.0 MB, KL 1.45) changes the model least of those that cannot be told from the best on" in told
    assert told.endswith("these rows, Q4_0, 6 blocks cut (79.0 MB, KL 0.85).")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(60, None, 512, None), r"--size 0\.0 MB: nothing comes that low; the least predicted is 0\.0 MB \(a\)"),
        (Limits(None, None, 512, 4), r"--latency-ms 4: nothing comes that low; the least predicted is 5 ms \(b\)"),
        (
            Limits(75, None, 512, 6),
            r"--size 0\.0 MB and --latency-ms 6 contradict each other: of what meets the first, the least predicted "
            r"for the second is 10 ms \(a\)",
        ),
    ],
)
def test_what_contradicts_what(limits, message):
    candidates = [("a", figures(0.5, 70, latency=0.01)), ("b", figures(0.1, 90, latency=0.005))]
    with pytest.raises(UserError, match=message):
        raise limits.refuse(candidates, "predicted")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to fit to: give --size"),
        ({"size": "small"}, "--size small: write a size such as 80MB"),
        ({"size": 0}, "--size 0: must be more than 0"),
        ({"memory": "lots"}, "--memory lots: write a size such as 24GB"),
        ({"latency_ms": -1.0}, "--latency-ms -1.0: must be more than 0"),
        ({"on": "rtx4090"}, "did you mean rtx-4090"),
        ({"memory": "1GB", "context": 4096}, "--context 4096: the model was made for 2048 tokens"),
    ],
)
def test_requests_that_cannot_be(options, message):
    asked = {"size": None, "memory": None, "context": None, "latency_ms": None, "on": None} | options
    with pytest.raises(UserError, match=message):
        make_request(SHAPE, **asked)


def test_requests():
    asked: dict[str, Any] = {"size": "80MB", "memory": None, "context": None, "latency_ms": None, "on": None}
    found = make_request(SHAPE, **asked)
    assert found.limits == Limits(80_000_000, None, 2048, None) and found.caches == ("f16",)
    found = make_request(SHAPE, **asked | {"memory": "1GiB", "context": 512})
    assert found.limits == Limits(80_000_000, 2**30, 512, None) and found.caches == ("f16", "q8_0")
    assert make_request(replace(SHAPE, head_size=80), **asked | {"context": 512}).caches == ("f16",)
    card = make_request(SHAPE, **asked | {"on": "rtx-4090"})
    assert card.limits.memory == find_device("rtx-4090").host.memory and card.place == "rtx-4090"  # type: ignore[union-attr]
    assert list(removable(SHAPE)) == list(range(16)) and list(removable(replace(SHAPE, blocks=2))) == [0]


def test_onnx_requests_and_the_memory_of_a_cache_that_grows(tiny):
    asked: dict[str, Any] = {"size": None, "memory": "1GB", "latency_ms": None, "on": None, "engine": "onnx"}
    assert make_request(replace(SHAPE, head_size=80), **asked | {"context": 100}).caches == ("float32", "int8")
    request = make_request(SHAPE, **asked | {"context": 100})
    damage: Any = SimpleNamespace(base=tiny(blocks=4), effort=Effort(prompt=30, answer=10))
    found = Measurement(Speed(1.0, 1.0), 5_000_000, 0.0)
    for cache, bytes_each in (("float32", 4), ("int8", 1)):  # 3 blocks, 2 heads of 16, the 60 tokens not read
        filled = 2 * 3 * 2 * 16 * 60 * bytes_each
        assert OnnxBench(damage, request, "a")._memory(found, Combination(1, "int4", cache)) == 5_000_000 + filled
    short = make_request(SHAPE, **asked | {"context": 20})  # fewer than are timed at least
    assert OnnxBench(damage, short, "a")._memory(found, Combination(0, "int4", "int8")) == 5_000_000


def test_sizes_of_onnx_folders_shrink_with_the_blocks(tiny):
    sizes = OnnxFileSizes(tiny(blocks=4, hidden=128), "a")
    whole, cut = (sizes.size(removed, "fp32").bytes for removed in (0, 1))
    config = load_config(tiny(blocks=4, hidden=128))
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv = config.num_key_value_heads * (width // heads)
    block = 2 * width * width + 2 * width * kv + 3 * width * inner + 2 * width
    assert whole - cut == 4 * block + DEPTH_ONNX
    table = sizes.table([0, 1], ["int4"])
    between = table[0, "int4"].bytes - 1  # too little for the whole model, enough without a block
    assert list(sizes.sized(table, between)) == [(1, f"{between / 1000:.12g}kB")]
    assert sizes.sized(table, 10**9) == {} and sizes.distinct(["int4"]) == {"int4": []}


def test_a_size_is_a_mix_of_its_own_and_a_cut_gives_it_more_bits():
    sized = Combination(0, "80MB")
    assert sized.sized and not sized.plain and Combination(2, "80MB").name == "types for 80MB, 2 blocks cut"
    known = Knowledge(SHAPE, {(2, "80MB"): FileSize(80, 78)}, {"80MB": 0.4}, {0: 0.0, 2: 0.1})
    known.roomier[2, "80MB"] = 0.5
    speeds = PlannedSpeeds(find_device("cpu-2core"), SHAPE)
    assert known.predict(Combination(2, "80MB"), 8, speeds).kl == pytest.approx(0.4 * 0.5 + 0.1)
    assert not known.knows(sized)  # no such file


def test_a_ledger_keeps_what_was_found_through_a_kill(tmp_path):
    file = tmp_path / "work" / "ledger.jsonl"
    ledger = Ledger(file)
    assert ledger.recorded("a", lambda: {"x": 1}) == {"x": 1} and ledger.recorded("b", lambda: [2.5]) == [2.5]
    file.write_text(file.read_text() + '["c", {"val')  # killed while writing
    again = Ledger(file)
    assert again.spent == 0 and again.has("b") and not again.has("c")
    assert again.recorded("a", lambda: pytest.fail("was known")) == {"x": 1}
    assert again.spent == again.seconds("a") and again.last("b") == 0.0
    assert again.recorded("c", lambda: 3) == 3 and Ledger(file).has("c")


def test_a_clock_counts_what_was_asked_for():
    ledger = Ledger(Path("nowhere"))
    ledger._known, ledger._used = {"a": {"value": 1, "seconds": 40.0}, "b": {"value": 1, "seconds": 500.0}}, {"a"}
    clock = Clock(ledger, 100)
    assert clock.allows(0.5) and clock.allows(0.5, 10.0) and not clock.allows(0.5, 11.0)


@pytest.mark.parametrize("top_k", [None, 8])
def test_divergences_are_those_of_the_runtimes(top_k):
    draw = np.random.default_rng(5)
    p, q = (torch.from_numpy(draw.normal(0, 3, (6, 50))).log_softmax(-1).float() for _ in range(2))
    wanted = torch.arange(6) * 7
    ids = [0, *wanted.tolist()]
    ours, theirs = (distributions(x.numpy(), ids, range(1, 7), k) for x, k in ((p, None), (q, top_k)))
    expected = [divergence(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert divergences(p, q, wanted, top_k).tolist() == pytest.approx(expected, rel=1e-4)


def test_pieces_are_the_text():
    draw = random.Random(1)
    words = ["".join(draw.choices("abc", k=draw.randrange(1, 9))) for _ in range(2000)]
    text = " ".join(words) + "x" * 4000
    found = list(pieces(text))
    assert "".join(found) == text and all(1200 <= len(piece) <= 2400 for piece in found[:-1])
    assert all(piece[-1].isspace() for piece in found[:4])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sizes_are_those_of_the_files(family, tiny, tmp_path):
    whole = tiny(family, blocks=8, tied=family == "llama")
    sizes = GgufFileSizes(whole, "org/A-model.Q8_0")
    cut = tmp_path / "cut"
    model = load_model(whole)
    drop_blocks(model, [2, 3, 5])
    save_checkpoint(model, load_tokenizer(whole), cut)
    for mix in ("F16", "Q8_0", "Q4_K_M"):
        for removed, checkpoint in ((0, whole), (3, cut)):
            file = tmp_path / f"{mix}-{removed}.gguf"
            matrix: dict[str, Any] | None = {} if GGUF_TYPES[mix].calibrated else None
            written = write_gguf(checkpoint, file, mix, imatrix=matrix, name=f"A-model-{8 - removed}L")
            assert sizes.size(removed, mix).bytes == file.stat().st_size == written.bytes
            assert sizes.size(removed, mix).read < file.stat().st_size
