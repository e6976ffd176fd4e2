"""The prune stage on tiny random checkpoints: what it writes, chooses and refuses."""

from __future__ import annotations

import itertools
import json
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs
from compress.data.calibration import calibration_batches
from compress.data.rows import Row, write_rows
from compress.modeling.load import load_model, load_tokenizer
from compress.prune.config import PruneConfig
from compress.prune.healing import heal
from compress.prune.heals.linear import LinearHeal
from compress.prune.importance import Distances, scan
from compress.prune.stage import candidate_blocks, check, run
from compress.prune.study import Study
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS = torch.arange(3, 43).reshape(2, 20)
WORDS = ["the way", "of many", "people", "is é", "42", "which", "model", "time"]


class Stage:
    """Runs the stage on a text file, or on a data stage's folder, each time into a fresh folder."""

    def __init__(self, base: Path, folder: Path):
        self.base, self.folder, self.runs = base, folder, 0
        draw = random.Random(1)
        (folder / "text.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(900)), encoding="utf-8")
        self.inputs = Inputs(base, base)

    def __call__(self, **options: Any) -> dict[str, Any]:
        self.runs += 1
        self.out = self.folder / f"out{self.runs}"
        self.out.mkdir()
        calibration = {"tokens": 600, "length": 48, "text": "text.txt"} | options.pop("calibration", {})
        config = PruneConfig.model_validate(options | {"calibration": calibration})
        context = Context(recipe_dir=self.folder)
        check(config, self.base, context)
        return run(config, self.inputs, self.out, context)

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.out / "importance.json").read_text())

    def logits(self) -> torch.Tensor:
        return logits(self.out / "model")


def logits(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def stage(tiny: Callable[..., Path], tmp_path: Path) -> Stage:
    return Stage(tiny(blocks=6), tmp_path)


def test_the_artifact_loads_plainly_and_is_recorded(stage: Stage) -> None:
    metrics = stage(blocks=2)
    assert {path.name for path in stage.out.iterdir()} == {"model", "importance.json"}
    model: Any = AutoModelForCausalLM.from_pretrained(stage.out / "model")
    tokenizer = AutoTokenizer.from_pretrained(stage.out / "model")
    assert tokenizer("the way").input_ids == load_tokenizer(stage.base)("the way")["input_ids"]
    record = stage.record
    first = record["dropped"][0]
    assert record["dropped"] == [first, first + 1] and 1 <= first <= 3
    assert record["kept"] == [i for i in range(6) if i not in record["dropped"]]
    assert (record["blocks"], model.config.num_hidden_layers, record["tokens"]) == (6, 4, 600)
    assert (record["importance"], record["position"], record["search"]) == ("angular", "all", "window")
    assert json.loads(json.dumps(metrics)) == {
        name: record[name] for name in ("blocks", "dropped", "tokens", "healing")
    }
    whole = load_model(stage.base)
    for number, kept in enumerate(record["kept"]):  # only the block before the gap was changed
        for name, value in model.model.layers[number].state_dict().items():
            same = torch.equal(value, whole.model.layers[kept].state_dict()[name])
            assert same is not (kept == first - 1 and name == "mlp.down_proj.weight")
    (healing,) = record["healing"]
    assert (healing["block"], healing["gap"], healing["tokens"]) == (first - 1, record["dropped"], 600)
    assert healing["errors"][f"{healing['ridge']:g}"] == min(healing["errors"].values()) < healing["unhealed_error"]


def test_the_recorded_distances_are_the_scan(stage: Stage) -> None:
    stage(blocks=2)
    text = stage.folder / "text.txt"
    batches = calibration_batches(stage.inputs, load_tokenizer(stage.base), tokens=600, length=48, batch=4, text=text)
    for name, distances in scan(load_model(stage.base), batches).items():
        for metric, table in stage.record["distances"][name].items():
            assert table == [distances.windows(metric, length) for length in range(1, 7)]
            assert [len(windows) for windows in table] == [6, 5, 4, 3, 2, 1]


def test_the_metric_position_and_search_asked_for_decide(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(21)
    tables = [torch.rand(7, 7, generator=draw, dtype=torch.float64) for _ in range(4)]
    found = {
        "last": Distances(tables[0], tables[1], tables[0], 1),
        "all": Distances(tables[2], tables[3], tables[2], 1),
    }
    monkeypatch.setattr("compress.prune.study.scan", lambda *_: found)
    chosen = []
    for position, importance in itertools.product(found, ("angular", "influence")):
        table = getattr(found[position], importance)
        pairs = {(i, i + 1): float(table[i, i + 2]) for i in range(4)}  # the last block stays
        singles = {i: float(table[i, i + 1]) for i in range(5)}
        wanted = {
            "window": list(min(pairs, key=lambda p: pairs[p])),
            "lowest": sorted(sorted(singles, key=lambda i: singles[i])[:2]),
        }
        for search, blocks in wanted.items():
            stage(blocks=2, heal="none", search=search, importance=importance, position=position)
            assert stage.record["dropped"] == blocks
            chosen.append((search, tuple(blocks)))
    assert len(set(chosen)) == 8  # a mixed-up metric or position would be seen


def test_without_healing_the_pruned_model_is_the_base_without_its_blocks(stage: Stage) -> None:
    stage(blocks=3, heal="none")
    whole = load_model(stage.base)
    for number in stage.record["dropped"]:
        whole.model.layers[number].register_forward_hook(lambda _m, args, _o: args[0])
    with torch.no_grad():
        assert torch.equal(stage.logits(), whole(IDS).logits)


@pytest.mark.parametrize("heal", ["none", "linear"])
@pytest.mark.parametrize("search", ["window", "lowest"])
def test_no_blocks_gives_bit_identical_logits(stage: Stage, search: str, heal: str) -> None:
    metrics = stage(blocks=0, search=search, heal=heal)
    assert metrics["dropped"] == [] and stage.record["healing"] == [] and stage.record["kept"] == [0, 1, 2, 3, 4, 5]
    assert torch.equal(stage.logits(), logits(stage.base))


def test_the_same_run_gives_the_same_bytes_and_names_no_path(stage: Stage) -> None:
    stage(blocks=2)
    first = stage.out
    stage(blocks=2)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(stage.out) for path in stage.out.rglob("*") if path.is_file())
    for name in files:
        content = (first / name).read_bytes()
        assert content == (stage.out / name).read_bytes() and str(stage.folder).encode() not in content


def test_gemma_is_pruned_and_healed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    mixed = ["sliding_attention", "full_attention"] * 3
    stage = Stage(tiny("gemma3_text", blocks=6, sliding_window=8, layer_types=mixed), tmp_path)
    stage(blocks=1, heal="none")
    model: Any = AutoModelForCausalLM.from_pretrained(stage.out / "model")
    assert model.config.layer_types == [mixed[i] for i in stage.record["kept"]]
    stage(blocks=1)  # healed by a scale per channel
    assert stage.record["healing"][0]["errors"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(stage.out / "model")
    assert not torch.equal(loaded(IDS).logits, model(IDS).logits)
    stage(blocks=0)  # nothing to fuse


def test_the_data_stage_is_calibrated_on_where_no_text_is_named(stage: Stage) -> None:
    data = stage.folder / "data"
    data.mkdir()
    talk = [{"role": "user", "content": "the way"}, {"role": "assistant", "content": "of many people " * 20}]
    write_rows(data, [Row(i, "train", talk) for i in range(4)] + [Row(4, "heldout", text="time " * 400)])
    stage.inputs = Inputs(stage.base, stage.base, {"data": data})
    rows = 4 * min(48, len(load_tokenizer(stage.base).apply_chat_template(talk)["input_ids"]))
    assert stage(blocks=1, calibration={"text": None})["tokens"] == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 5}, r"prune\.blocks is 5, but the model has 6 blocks, of which 4 can be removed"),
        ({"blocks": 6, "heal": "none"}, r"prune\.blocks is 6, but the model has 6 blocks, of which 5 can be removed"),
        ({"blocks": 1, "calibration": {"text": "none.txt"}}, r"prune\.calibration\.text: .*none\.txt does not exist"),
        ({"blocks": 1, "calibration": {"text": "empty.txt"}}, r"no calibration data: .*empty\.txt has fewer than"),
        ({"blocks": 1, "calibration": {"text": None}}, "no calibration data: add a `data` section"),
        ({"blocks": 1, "calibration": {"tokens": 40}}, "at least two packed calibration rows"),
    ],
)
def test_impossible_wishes_are_refused(stage: Stage, options: dict[str, Any], message: str) -> None:
    (stage.folder / "empty.txt").touch()
    with pytest.raises(UserError, match=message):
        stage(**options)
    assert not list(stage.out.iterdir())


def test_as_many_blocks_as_can_go(stage: Stage) -> None:
    stage(blocks=4)
    assert stage.record["kept"] == [0, 5] and stage.record["healing"][0]["gap"] == [1, 4]
    stage(blocks=5, heal="none", search="lowest")
    assert stage.record["kept"] == [5]
    assert stage.logits().shape == (2, 20, logits(stage.base).shape[-1])


def test_configuration() -> None:
    assert PruneConfig(blocks=1).heal == LinearHeal()
    assert PruneConfig.model_validate({"blocks": 1, "heal": "linear"}).heal == LinearHeal()
    assert PruneConfig.model_validate({"blocks": 1, "heal": "none"}).heal.kind == "none"
    assert candidate_blocks(PruneConfig(blocks=1), 6) == range(1, 5)
    assert PruneConfig.model_validate({"blocks": 1, "calibration": {"text": "a.txt"}}).input_files() == ["a.txt"]
    assert PruneConfig(blocks=1).input_files() == []
    for wrong in (
        {},
        {"blocks": -1},
        {"blocks": 1, "heal": "cosin"},
        {"blocks": 1, "goal": {"perplexity": 1.2}},
        {"blocks": "auto", "goal": {"perplexity": 1.2, "size": 0.8}},
        {"blocks": "auto", "goal": {}},
        {"blocks": "auto", "goal": {"perplexity": 0.9}},
        {"blocks": "all"},
        {"blocks": 1, "heal": {"kind": "none", "ridge": [1]}},
        {"blocks": 1, "heal": {"kind": "linear", "ridge": []}},
        {"blocks": 1, "heal": {"kind": "linear", "ridge": [-1e-3]}},
        {"blocks": 1, "heal": {"kind": "linear", "held_out": 0.6}},
        {"blocks": 1, "search": "greedi"},
        {"blocks": 1, "search": {"kind": "greedy", "width": 2}},
        {"blocks": 1, "calibration": {"tokens": 0}},
    ):
        with pytest.raises(ValidationError):
            PruneConfig.model_validate(wrong)


AUTO = {"calibration": {"tokens": 900, "scoring": 192, "held_out": 192}, "heal": "refit"}


def test_auto_drops_the_most_blocks_within_the_perplexity_asked_for(stage: Stage) -> None:
    """Against the curve it records, and the curve's first point against the unpruned model."""
    stage(blocks="auto", goal={"perplexity": 3.0}, search="greedy", **AUTO)
    curve = stage.record["curve"]
    assert [len(point["dropped"]) for point in curve] == list(range(len(curve))) and curve[0]["healed_ratio"] == 1
    within = [point for point in curve if point["healed_ratio"] <= 3.0]
    assert stage.record["dropped"] == within[-1]["dropped"]
    for point in curve:
        assert point["healed_ratio"] == pytest.approx(point["healed"] / curve[0]["pruned"])
    stage(blocks="auto", goal={"perplexity": 1.0}, **AUTO)
    assert all(p["healed_ratio"] > 1 for p in stage.record["curve"][len(stage.record["dropped"]) + 1 :])


def test_auto_records_what_the_chosen_size_was_compared_with(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.prune.auto._meets", lambda point, goal: len(point.dropped) <= 1)
    stage(blocks="auto", goal={"perplexity": 3.0}, search="greedy", **AUTO)
    compared = stage.record["trials"]["guard"]
    assert [len(point["dropped"]) for point in stage.record["curve"]] == [0, 1, 2, 3]  # larger ones were tried too
    assert len(stage.record["dropped"]) == 1
    assert stage.record["dropped"] in [entry["dropped"] for entry in compared.values()]
    assert all(len(entry["dropped"]) == 1 for entry in compared.values())


def test_auto_drops_the_fewest_blocks_that_reach_a_size_or_a_time(stage: Stage) -> None:
    whole = load_model(stage.base)
    total = sum(p.numel() for p in whole.parameters())
    block = sum(p.numel() for p in whole.model.layers[0].parameters())
    stage(blocks="auto", goal={"size": 1 - 1.5 * block / total}, **AUTO)
    assert len(stage.record["dropped"]) == 2
    assert stage.record["curve"][-1]["size"] == pytest.approx(1 - 2 * block / total)
    with pytest.raises(UserError, match=r"prune\.goal cannot be reached: with 1 block removed"):
        stage(blocks="auto", goal={"size": 0.01, "at_most": 1}, **AUTO)


def test_an_interrupted_search_goes_on_where_it_was(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after some rounds and started again in the same folder: the same bytes, and finished rounds stay done."""
    from compress.prune.scoring import Scorer

    options = {"blocks": 3, "search": "greedy", **AUTO}
    stage(**options)
    whole = (stage.out / "importance.json").read_bytes()
    calls, score = [0], Scorer.score

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return score(self, *args, **kwargs)

    monkeypatch.setattr(Scorer, "score", dying)
    with pytest.raises(KeyboardInterrupt):
        stage(**options)
    monkeypatch.setattr(Scorer, "score", score)
    left = stage.out
    monkeypatch.setattr(Path, "mkdir", lambda self, *a, _m=Path.mkdir, **k: None if self == left else _m(self, *a, **k))
    stage.runs -= 1
    stage(**options)
    assert stage.out == left and (left / "importance.json").read_bytes() == whole


def test_too_few_rows_to_hold_any_out_are_refused(stage: Stage) -> None:
    with pytest.raises(UserError, match=r"prune\.calibration: \d+ tokens are too few to heal on"):
        stage(blocks=1, search="greedy", calibration={"tokens": 300})


def test_cuts_are_tried_on_rows_read_twice_where_asked_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share reaches scoring and held-out rows, not those that healing is fitted on."""
    seen: list[Study] = []

    class Watched(Study):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            seen.append(self)

    monkeypatch.setattr("compress.prune.stage.Study", Watched)
    calibration = {"scoring": 100, "held_out": 100, "batch": 1}
    for share in (0.0, 1.0):
        stage(blocks=1, heal="none", search={"kind": "greedy", "copying": share}, calibration=calibration)
    plain, twice = seen
    for rows in ("scoring", "held_out"):
        for before, after in zip(getattr(plain, rows), getattr(twice, rows), strict=True):
            assert not torch.equal(before.input_ids, after.input_ids)
            (ids,) = after.input_ids
            half = after.tokens // 2
            assert half and torch.equal(ids[:half], ids[half : 2 * half])
    for before, after in zip(plain.batches, twice.batches, strict=True):
        assert torch.equal(before.input_ids, after.input_ids)


def test_what_a_search_held_is_gone_when_healing_begins(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    studies: list[weakref.ref[Study]] = []

    class Watched(Study):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            studies.append(weakref.ref(self))

    def watched_heal(*args: Any) -> Any:
        assert [study() for study in studies] == [None]
        return heal(*args)

    monkeypatch.setattr("compress.prune.stage.Study", Watched)
    monkeypatch.setattr("compress.prune.stage.heal", watched_heal)
    calibration = {"scoring": 100, "held_out": 100, "batch": 1}
    assert stage(blocks=2, search="greedy", calibration=calibration)["healing"]
