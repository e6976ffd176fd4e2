"""`compress fit` end to end on tiny random models, in stock llama.cpp: its result, its recipe, kills, and refusals."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.api import Recipe, fit
from compress.cli import main as cli
from compress.cli.fit_command import fit_table
from compress.core.errors import UserError
from compress.data.rows import Row, write_rows
from compress.fit import measuring, run, search
from compress.fit.budgets import _tail_logs, budget_cost, settings_of
from compress.fit.rows import Effort
from compress.fit.sizes import OnnxFileSizes
from compress.kv.settings import KvBudget
from compress.modeling.blocks import Decoder
from compress.modeling.load import load_model
from compress.records.fit import FitRecord
from compress.runtime.engine import Speed
from compress.runtime.measure import Measurement, _measure_artifact, measure
from rich.console import Console

SMALL = Effort(
    rows=48,
    fewest_rows=2,
    written=24,
    batch=1,
    length=32,
    calibration=512,
    scoring=64,
    positions=96,
    least_calibration=128,
    least_positions=32,
    prompt=8,
    answer=4,
)
WORDS = "the way of many people is which model and time look so é 42 on a in".split()


def timed_here(path: Path, **how: Any) -> Measurement:
    """`measure` without a process of its own, which takes longer to start than to measure: its memory is this one's."""
    values = _measure_artifact(path, {"threads": 1, "runtime": None, "place": {}, **how})
    return Measurement(Speed(*values["speed"]), values["peak_memory_bytes"], values["load_seconds"])


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "measure", timed_here)
    monkeypatch.setattr(run, "EFFORT", SMALL)
    monkeypatch.setattr(search, "MOST", 4)
    monkeypatch.setattr(run, "MIXES", {"llama.cpp": ("Q8_0", "Q4_0", "Q4_K_M"), "onnx": ("int8", "int4")})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text(tmp_path) -> Path:
    draw = random.Random(1)
    (tmp_path / "text.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(3000)), "utf-8")
    return tmp_path / "text.txt"


@pytest.fixture(scope="session")
def model(tiny) -> Path:
    return tiny(blocks=6, initializer_range=0.2)


def sizes(record: FitRecord) -> dict[str, int]:
    return {c.name: c.predicted.bytes for c in record.candidates}


def test_a_text_and_a_size(model, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "measure", measure)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", str(model), "--size", "1MB", "--text", "text.txt", "--out", "f", "--json"])
    assert not stopped.value.code
    found = FitRecord.model_validate_json(capsys.readouterr().out)
    assert found == FitRecord.read(tmp_path / "f")
    measured = [c for c in found.candidates if c.measured is not None]
    assert len(measured) == 4 and {"Q8_0", "Q4_0", "Q4_K_M"} <= {c.name for c in found.candidates if not c.removed}
    assert found.recommended == "Q8_0" and found.reason.startswith("Do not cut. Within --size 1.0 MB")
    for entry in measured:
        assert entry.measured is not None and entry.measured.bytes == entry.predicted.bytes and entry.meets
        assert entry.measured.kl == pytest.approx(entry.predicted.kl, rel=0.5, abs=2e-3)
        assert entry.measured.memory > entry.measured.bytes
    assert "bytes" in found.candidate("Q8_0").front
    cuts = [c for c in found.candidates if c.removed]
    assert cuts and all(len(c.dropped or ()) == c.removed for c in cuts)
    with (narrow := Console(width=80)).capture() as shown:
        narrow.print(fit_table(found))
    lines = [line.split()[0] for line in shown.get().splitlines() if line.strip()]
    assert {"Q8_0", "Q4_0", "Q4_K_M"} <= set(lines) and "…" not in shown.get()
    page = (tmp_path / "f/fit.html").read_text("utf-8")
    assert "Do not cut." in page and page.count("<svg") == 2 and "Q4_K_M" in page
    recipe = Recipe.load("f/recipe.yaml")
    assert recipe.order == ("data", "export") and recipe.export.gguf == ["Q8_0"]  # type: ignore[union-attr]
    assert not list((tmp_path / "f/.work").glob("*.gguf")) and not (tmp_path / "f/.work/cuts").exists()


def test_a_size_that_needs_a_cut_and_what_its_recipe_makes(model, text, tmp_path):
    small = fit(model, "f", size="1MB", text=text)
    names = sizes(small)
    plain = min(size for name, size in names.items() if "cut" not in name)
    again = fit(model, "f", size=plain - 1, text=text)  # what is known of the weights is used
    assert (
        "No plain file of the unpruned model is that small" in again.reason and again.recommended != small.recommended
    )
    chosen = again.candidate(again.recommended)
    assert chosen.removed and chosen.measured is not None and chosen.measured.bytes < plain
    from compress.api import run as run_recipe

    result = run_recipe("f/recipe.yaml", runs="runs")
    importance = json.loads((result.stages["prune"] / "importance.json").read_text())
    assert importance["dropped"] == chosen.dropped
    (file,) = (result.stages["export"] / "bundle/gguf").glob("*.gguf")
    assert file.stat().st_size == chosen.measured.bytes or ("types for" in chosen.name and file.stat().st_size < plain)


def test_a_size_between_two_types_is_used_to_the_full(model, text, tmp_path):
    names = sizes(fit(model, "f", size="1MB", text=text))
    limit = (names["Q4_0"] + names["Q8_0"]) // 2
    again = fit(model, "f", size=limit, text=text)
    own = next(c for c in again.candidates if c.mix not in names and not c.removed)
    assert own.measured is not None and own.meets and names["Q4_0"] < own.measured.bytes <= limit
    assert own.measured.kl < 0.9 * again.candidate("Q4_0").predicted.kl
    if again.recommended == own.name:
        recipe = Recipe.load("f/recipe.yaml")
        assert recipe.export is not None and recipe.export.gguf == [own.mix]


def test_memory_with_a_context_weighs_an_eight_bit_cache(tiny, text, tmp_path):
    model = tiny(blocks=4, hidden=64, heads=2, kv_heads=1)
    found = fit(model, "f", memory="4GB", context=256, text=text)
    assert {c.cache for c in found.candidates} == {"f16", "q8_0"}
    half = next(c for c in found.candidates if c.cache == "q8_0" and c.measured is not None)
    assert half.measured is not None and half.measured.kl > 0
    for entry in found.candidates:  # 4 blocks, 1 head of 32, 256 tokens
        if entry.cache == "q8_0" and entry.measured is None:
            numbers = 2 * (4 - entry.removed) * 32 * 256
            other = next(
                c for c in found.candidates if (c.removed, c.mix, c.cache) == (entry.removed, entry.mix, "f16")
            )
            if other.measured is None:
                assert other.predicted.memory - entry.predicted.memory == numbers * 2 - numbers * 34 // 32
    assert found.limits.context == 256
    assert [b.entries for b in found.budgets] == [128, 64, 32]
    assert [b.kl for b in found.budgets] == sorted(b.kl for b in found.budgets) and found.budgets[0].kl > 0
    assert [b.bytes for b in found.budgets] == sorted((b.bytes for b in found.budgets), reverse=True)
    assert "What a KV budget costs" in (tmp_path / "f/fit.html").read_text("utf-8")


def test_onnx_weighs_types_of_a_size_and_an_int8_cache(model, text, inline_builder):
    plain = OnnxFileSizes(model, "tiny").table([0], ["int4", "int8"])
    limit = (plain[0, "int4"].bytes + plain[0, "int8"].bytes) // 2
    found = fit(model, "f", size=limit, context=256, engine="onnx", text=text)
    assert found.engine == "onnx" and {c.cache for c in found.candidates} == {"float32", "int8"}
    measured = {c.name: c.measured for c in found.candidates if c.measured is not None}
    own = next(name for name in measured if name.startswith("types for") and "," not in name)
    assert 0.97 * limit < measured[own].bytes <= limit and measured[own].kl < measured["int4"].kl
    small = [c for c in found.candidates if c.cache == "int8" and c.measured is not None]
    assert small and all(c.name.endswith("8-bit cache") for c in small)
    for one in found.candidates:
        assert one.measured is None or one.measured.bytes == pytest.approx(one.predicted.bytes, rel=0.03)
    assert "in stock ONNX Runtime" in Path("f/fit.html").read_text("utf-8")
    chosen, export = found.candidate(found.recommended), Recipe.load("f/recipe.yaml").export
    assert export is not None and (export.onnx, export.kv, export.gguf) == ([chosen.mix], chosen.cache, [])
    assert not list(Path("f/.work").glob("onnx-*")) and not list(Path("f/.work").glob("kv-*"))


def test_what_a_budget_costs(tiny):
    model = load_model(tiny(blocks=4, initializer_range=0.2))
    ids = [7 * i % 97 + 3 for i in range(64)]
    assert budget_cost(model, [ids], 64).kl == pytest.approx(0, abs=1e-9)
    few = budget_cost(model, [ids], 16)
    assert few.bytes == 2 * (2 * 4 * 2 * 16) * 48  # at most 16 + 16 of the prompt, and the 16 after it
    with torch.no_grad():  # the whole cache is the plain model
        plain = model(torch.tensor([ids])).logits[0, 47:-1].double().log_softmax(-1)
    whole = _tail_logs(Decoder(model), KvBudget(None, policy="recent"), ids, 16)
    assert torch.allclose(whole, plain, atol=1e-4)
    kept = _tail_logs(Decoder(model), settings_of(16, 16), ids, 16)
    expected = sum(float(p.exp() @ (p - q)) for p, q in zip(whole, kept, strict=True)) / 16
    assert few.kl == pytest.approx(expected) and few.kl > 1e-3


def test_rows_that_the_model_writes_and_a_named_device(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "EFFORT", replace(SMALL, least_positions=16))
    found = fit(tiny(blocks=6), "f", on="cpu-2core", size="1MB")
    assert found.device == "cpu-2core" and found.errors.latency is None
    entry = found.candidate(found.recommended)
    assert entry.measured is not None and entry.measured.latency == entry.predicted.latency
    data = Recipe.load("f/recipe.yaml").data
    assert data is not None and data.source == "magpie" and data.rows == 48


def test_given_rows(model, talks, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder, [Row(i, "heldout" if i % 3 == 0 else "train", text=" ".join(WORDS * 4)) for i in range(12)])
    found = fit(model, "f", size="1MB", rows=folder)
    data: Any = Recipe.load("f/recipe.yaml").data
    assert found.positions >= 32 and data.source == "dataset" and data.path == str(folder / "rows.parquet")


def told(record: FitRecord) -> list[tuple[str, list[int] | None, bool]]:
    return [(c.name, c.dropped, c.measured is not None) for c in sorted(record.candidates, key=lambda c: c.name)]


def test_killed_anywhere_and_called_again(model, text, tmp_path, killer):
    def again(out: str, **how: Any) -> FitRecord:
        return fit(model, out, size="1MB", text=text, minutes=600, **how)

    expected, kills = again("whole"), 0
    for calls in (1, 20, 40, 60, 90, 130):  # each in the same folder, further on
        try:
            again("f", on_progress=killer(calls))
        except KeyboardInterrupt:
            kills += 1
            assert not (tmp_path / "f/fit.json").exists()
    found = again("f")
    assert kills >= 3
    assert found.recommended == expected.recommended and told(found) == told(expected)
    for one in found.candidates:
        other = expected.candidate(one.name)
        if one.measured is not None and other.measured is not None:
            assert one.measured.kl == pytest.approx(other.measured.kl, rel=0.02, abs=1e-5)
    first, second = (Path(out, "recipe.yaml").read_text().splitlines()[1:] for out in ("f", "whole"))
    assert first == second


def test_time_is_kept_and_what_is_left_out_is_told(model, text):
    found = fit(model, "f", size="1MB", text=text, minutes=1e-6)
    assert len([c for c in found.candidates if c.measured is not None]) == 1
    told = " ".join(found.left_out)
    assert "the damage of" in told and "cuts of a block and more were not tried" in told and "raise --minutes" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is nothing to fit to"),
        ({"size": "1KB"}, r"--size 0\.0 MB: no mix reaches it; the smallest possible is 0\.. MB .*without a cut"),
        ({"memory": "50KB"}, r"--memory 0\.1 MB \(with --context 512\): nothing comes that low"),
        ({"size": "1MB", "context": 100_000}, "--context 100000: the model was made for 512 tokens"),
        ({"size": "1MB", "on": "rtx4090"}, "did you mean rtx-4090"),
        ({"on": "cpu-2core", "latency_ms": 1e-6}, "--latency-ms 1e-06: nothing comes that low; the least possible or"),
        ({"size": "1MB", "text": "short.txt"}, r"--text short\.txt: \d+ tokens are too few to tell two types apart"),
        ({"size": "1MB", "text": "nowhere.txt"}, r"--text: nowhere\.txt does not exist"),
        ({"size": "1MB", "rows": "nowhere"}, "--rows nowhere: it is not the folder of a data stage"),
        ({"size": "1MB", "rows": "mine", "text": "short.txt"}, "--rows and --text are both given"),
        ({"size": "1MB", "out": "mine"}, "mine exists already and is no fit's folder"),
        ({"size": "1MB", "minutes": 0}, "--minutes 0: must be more than 0"),
        ({"size": "1MB", "engine": "onxx"}, r"--engine onxx: there are llama\.cpp and onnx; did you mean 'onnx'\?"),
        ({"size": "1KB", "engine": "onnx"}, r"--size 0\.0 MB: no mix reaches it; .* without a cut .* \(int4\)"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(options, message, model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thing").touch()
    (tmp_path / "short.txt").write_text("too little to tell anything")
    out = options.pop("out", "f")
    with pytest.raises(UserError, match=message):
        fit(model, out, **options)
    assert not list(tmp_path.glob("f/*.html"))


def test_a_time_that_nothing_reaches_and_limits_that_contradict_each_other(model, text):
    with pytest.raises(UserError, match=r"--latency-ms 1e-06: nothing comes that low; the least predicted is"):
        fit(model, "f", latency_ms=1e-6, text=text)
    assert '"cut ' not in Path("f/.work/ledger.jsonl").read_text()  # said before any cut was looked for


def test_a_folder_of_another_fit(model, tiny, text, talks):
    fit(model, "f", size="1MB", text=text, minutes=1e-6)
    with pytest.raises(UserError, match="f belongs to another fit, with another model; give another --out"):
        fit(tiny(blocks=4), "f", size="1MB", text=text)
    with pytest.raises(UserError, match="with another calibration rows"):
        fit(model, "f", size="1MB")
