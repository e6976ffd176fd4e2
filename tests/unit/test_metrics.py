"""What blocks cost, metric by metric, against dropping them and against a plain backward pass; the lists of methods."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import compress.prune
import pytest
import torch
from compress.core.errors import UserError
from compress.core.registry import Registry
from compress.core.stage import Advance, Progress
from compress.data.chat import Encoded
from compress.data.packing import Batch, pack
from compress.modeling.blocks import without_blocks
from compress.modeling.load import load_model
from compress.prune.heals import HEALS
from compress.prune.importance import scan
from compress.prune.metrics import METRICS, taylor
from compress.prune.scoring import Scorer
from compress.prune.searches import SEARCHES
from compress.prune.study import Study
from torch import Tensor

BLOCKS = 5
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {"tied": False}),
    ("gemma3_text", SLIDING | {"final_logit_softcapping": 30.0}),
    ("phi3", {}),
]
SIZES = [20, 1, 29, 2, 60, 31]  # tokens; the longest is cut
LENGTH = 48
PRUNE = Path(compress.prune.__file__).parent


def windows(name: str, known: Study, length: int) -> list[float]:
    return METRICS.get(name).model_validate({}).windows(known, length)


def rows(sizes: Sequence[int] = SIZES, seed: int = 5) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 300) for _ in range(size)] for size in sizes]


def packed(ids: list[list[int]]) -> list[Batch]:
    return pack([Encoded(row, [True] * len(row)) for row in ids], LENGTH, 2, 9)


@pytest.fixture
def build(shaken: Callable[..., Path]) -> Callable[..., Any]:
    def make(family: str = "llama", **options: Any) -> Any:
        size = {"blocks": BLOCKS, "hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 48}
        return load_model(shaken(family, **(size | options)))

    return make


def study(model: Any, **options: Any) -> Study:
    """Scored on the rows above; all else on others, so that a mix-up would be seen."""
    return Study(model, packed(rows([25, 30], seed=8)), scoring=packed(rows()), **options)


def backward(model: Any, ids: list[list[int]]) -> list[Any]:
    """Σ |∂L/∂w · w| of every block in float64: every row alone, L its next tokens' summed negative log-likelihood."""
    exact = copy.deepcopy(model).double()
    for row in ids:
        tokens = torch.tensor([row[:LENGTH]])
        chances = exact(input_ids=tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
        (-chances.gather(1, tokens[0, 1:, None]).sum()).backward()
    with torch.no_grad():
        return [float(sum((p.grad * p).abs().sum() for p in block.parameters())) for block in exact.model.layers]


def state(model: Any) -> tuple[dict[str, Tensor], list[bool], list[bool], bool]:
    parameters = list(model.parameters())
    flags, bare = [p.requires_grad for p in parameters], [p.grad is None for p in parameters]
    return {name: value.clone() for name, value in model.state_dict().items()}, flags, bare, model.training


def assert_state(model: Any, expected: tuple[dict[str, Tensor], list[bool], list[bool], bool]) -> None:
    values, *others = state(model)
    assert others == list(expected[1:]) and all(torch.equal(values[name], value) for name, value in expected[0].items())


@pytest.mark.parametrize(("family", "options"), MODELS, ids=[family for family, _ in MODELS])
def test_taylor_is_a_plain_backward_pass(
    build: Callable[..., Any], family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, **options)
    wanted = backward(model, rows())
    assert min(abs(a - b) for a, b in itertools.combinations(wanted, 2)) > 1e-3 * max(wanted)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    before, known = state(model), study(model)
    monkeypatch.setattr("compress.prune.scoring.CHUNK", 7)
    with torch.no_grad():  # as the stage may be
        found = windows("taylor", known, 1)
    assert found == pytest.approx(wanted, rel=2e-5)
    assert_state(model, before)
    monkeypatch.setattr("compress.prune.metrics.taylor.block_sums", lambda _study: pytest.fail("measured twice"))
    for length in range(1, BLOCKS + 1):
        sums = [sum(wanted[first : first + length]) for first in range(BLOCKS - length + 1)]
        assert windows("taylor", known, length) == pytest.approx(sums, rel=2e-5)


class Stopping(Progress):
    """Fails at the first step."""

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        def advance(n: int = 1, note: str = "") -> None:
            raise KeyboardInterrupt

        yield advance


def test_taylor_leaves_a_model_as_it_was_even_after_an_error(build: Callable[..., Any]) -> None:
    model = build()
    model.lm_head.weight.requires_grad_(False)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        taylor.block_sums(study(model, progress=Stopping()))
    assert_state(model, before)


def removed(model: Any, ids: list[list[int]], length: int) -> dict[str, list[float]]:
    """The measures without every run of blocks: each row alone, all logits, float64."""

    @torch.no_grad()
    def logs() -> list[Tensor]:
        logits = [model(input_ids=torch.tensor([row[:LENGTH]]), use_cache=False).logits[0] for row in ids]
        return [part.double().log_softmax(-1)[:-1] for part in logits]

    whole = torch.cat(logs())
    following = torch.tensor([token for row in ids for token in row[1:LENGTH]])
    found: dict[str, list[float]] = {"kl": [], "perplexity": []}
    for first in range(BLOCKS - length + 1):
        with without_blocks(model, range(first, first + length)):
            after = torch.cat(logs())
        found["kl"].append(float((whole.exp() * (whole - after)).sum(-1).mean()))
        found["perplexity"].append(math.exp(-float(after.gather(1, following[:, None]).mean())))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_removal_is_the_measure_without_the_blocks(build: Callable[..., Any], family: str) -> None:
    model = build(family)
    known = study(model)
    for length in range(1, BLOCKS):
        for measure, wanted in removed(model, rows(), length).items():
            assert windows(measure, known, length) == pytest.approx(wanted, rel=1e-5, abs=1e-6), (measure, length)
            assert len(set(wanted)) == 1 or max(wanted) > min(wanted) * 1.001
    for measure in ("kl", "perplexity"):
        assert windows(measure, known, BLOCKS) == [math.inf]  # no model is left


def test_removals_are_written_down(build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ledger = build(), tmp_path / "work" / "search.jsonl"
    first = study(model, ledger=ledger)
    wanted = {measure: windows(measure, first, 2) for measure in ("kl", "perplexity")}
    monkeypatch.setattr(Scorer, "score", lambda *_, **__: pytest.fail("scored twice"))
    for known in (first, study(model, ledger=ledger)):
        assert {measure: windows(measure, known, 2) for measure in wanted} == wanted


def test_models_that_cap_their_logits_have_no_removals(build: Callable[..., Any]) -> None:
    family, options = MODELS[2]
    known = study(build(family, **options))
    for measure in ("kl", "perplexity"):
        with pytest.raises(UserError, match="caps its logits; use influence"):
            windows(measure, known, 1)


@pytest.mark.parametrize("position", ["all", "last"])
def test_distances_are_those_of_all_batches_at_the_position(build: Callable[..., Any], position: str) -> None:
    model = build()
    known = study(model, position=position)
    found = scan(model, packed(rows([25, 30], seed=8)))
    tables = {}
    for metric, length in itertools.product(("angular", "influence", "magnitude"), range(1, BLOCKS + 1)):
        tables[metric, length] = windows(metric, known, length)
        assert tables[metric, length] == found[position].windows(metric, length)
        assert tables[metric, length] != found["last" if position == "all" else "all"].windows(metric, length)
        assert len(tables[metric, length]) == BLOCKS - length + 1
    assert len({tuple(table) for table in tables.values()}) == len(tables)


@pytest.mark.parametrize(
    ("folder", "methods"),
    [("metrics", METRICS), ("heals", HEALS), ("searches", SEARCHES)],
    ids=("metrics", "heals", "searches"),
)
def test_every_method_is_a_file_of_its_name(folder: str, methods: Registry[Any]) -> None:
    """A folder of methods holds nothing else."""
    assert {file.stem for file in (PRUNE / folder).glob("*.py")} - {"__init__"} == set(methods.names)
    for name, method in methods.methods.items():
        assert method.__module__ == f"compress.prune.{folder}.{name}" and method().kind == name
