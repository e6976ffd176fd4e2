"""GGUF files of a size: the estimate of damage against real KL, and exports that are as large as was asked for."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Inputs
from compress.data.calibration import calibration_batches
from compress.data.packing import Batch
from compress.export import damage
from compress.export.config import ExportConfig
from compress.export.gguf_sized import GgufSizes, bits_of
from compress.export.job import ExportJob
from compress.export.own_text import own_batches
from compress.export.sensitivity import (
    Sensitivity,
    check_spread,
    collect_sensitivity,
    load_sensitivity,
    save_sensitivity,
)
from compress.export.stage import export_checkpoint
from compress.modeling.blocks import Decoder
from compress.modeling.families import EMBEDDING
from compress.modeling.load import load_model, load_tokenizer

QUICK = {"verify": {"tokens": 16, "window": 16}, "imatrix_tokens": 128}


def config(**keys: Any) -> ExportConfig:
    return ExportConfig.model_validate(QUICK | keys)


def batches_of(checkpoint: Path, talks: Path, tokens: int = 384) -> list[Batch]:
    inputs = Inputs(checkpoint, checkpoint, {"data": talks})
    return calibration_batches(inputs, load_tokenizer(checkpoint), tokens=tokens, length=64, batch=1)


@torch.no_grad()
def logprobs(model: Any, batches: list[Batch]) -> torch.Tensor:
    decoder = Decoder(model)
    found = []
    for batch in batches:
        hidden = decoder.hidden(**batch.model_inputs()).flatten(0, 1)[(batch.segment_ids >= 0).flatten()]
        found.append(torch.log_softmax(decoder.head(hidden).double(), -1))
    return torch.cat(found)


FAMILIES = {
    "llama": {"tied": False},
    "llama, tied": {"tied": True},
    "gemma3_text": {},
    "phi3": {"tied": False},
}


@pytest.mark.parametrize("case", FAMILIES)
def test_the_estimate_is_the_kl_of_small_changes(shaken, talks, case):
    """Random changes of one matrix at a time, as small as rounding's; over directions the KL is what was estimated."""
    checkpoint = shaken(case.split(",")[0], **FAMILIES[case])
    batches = batches_of(checkpoint, talks)
    model = load_model(checkpoint)
    found = collect_sensitivity(model, batches, seed=3)
    own = logprobs(model, batches)
    draw = torch.Generator().manual_seed(1)
    parameters = dict(model.named_parameters())
    assert set(found.terms) == {name for name, parameter in parameters.items() if parameter.ndim == 2}
    for name, terms in found.terms.items():
        weight = parameters[name]
        kept = weight.data.clone()
        ratios = []
        for _ in range(3):
            change = 0.01 * kept.std() * torch.randn(weight.shape, generator=draw)
            weight.data = kept + change
            real = float((own.exp() * (own - logprobs(model, batches))).sum(-1).mean())
            squares = change.double().square().numpy()
            ratios.append(real / (0.5 * sum(float(t.rows @ squares @ t.columns) for t in terms)))
        weight.data = kept
        assert 0.5 < np.mean(ratios) < 2.0, (name, ratios)


def test_costs_of_drawn_rows_are_those_of_all(monkeypatch):
    draw = np.random.default_rng(2)
    values = draw.standard_normal((3000, 64)).astype(np.float32)
    terms = [
        damage.Term(draw.lognormal(0, 1.5, 3000).astype(np.float32), draw.lognormal(0, 1, 64).astype(np.float32)),
        damage.Term(draw.lognormal(0, 1.5, 3000).astype(np.float32), draw.lognormal(0, 1, 64).astype(np.float32)),
    ]

    def rounded(rows: np.ndarray, kind: int) -> np.ndarray:
        return np.round(rows * kind) / kind

    drawn = damage.rounding_costs(values, terms, (2, 4), rounded, 5)
    monkeypatch.setattr(damage, "SAMPLED", 1 << 30)
    whole = damage.rounding_costs(values, terms, (2, 4), rounded, 5)
    errors = (rounded(values, 2) - values) ** 2
    assert whole[2] == pytest.approx(0.5 * sum(float(t.rows @ errors @ t.columns) for t in terms), rel=1e-5)
    assert drawn == pytest.approx(whole, rel=0.05)


def test_sensitivity_is_kept_in_a_file(shaken, talks, tmp_path):
    checkpoint = shaken()
    found = collect_sensitivity(load_model(checkpoint), batches_of(checkpoint, talks))
    save_sensitivity(found, tmp_path / "s.safetensors")
    again = load_sensitivity(tmp_path / "s.safetensors")
    assert (again.spread, again.tokens) == (found.spread, found.tokens) and again.terms.keys() == found.terms.keys()
    for name, terms in found.terms.items():
        for old, new in zip(terms, again.terms[name], strict=True):
            np.testing.assert_array_equal(old.rows, new.rows)
            np.testing.assert_array_equal(old.columns, new.columns)
    assert len(found.terms[EMBEDDING]) == 2  # as embedding and as head


def test_a_text_too_short_to_tell_types_apart_is_refused():
    with pytest.raises(UserError, match=r"100 calibration tokens .* known to ±60%.* about 40\d tokens are needed"):
        check_spread(Sensitivity({}, 0.6, 100))
    with pytest.raises(UserError, match="40 calibration tokens in one text are too few"):
        check_spread(Sensitivity({}, float("inf"), 40))
    check_spread(Sensitivity({}, 0.1, 100))


def test_own_texts_follow_the_model(shaken):
    """Tokens are as likely as the model says: their mean log-probability is minus the entropy."""
    checkpoint = shaken()
    model = load_model(checkpoint)
    batches = own_batches(model, load_tokenizer(checkpoint), 1536, 48, seed=1)
    assert len(batches) == 32 and all(batch.tokens == 48 for batch in batches)
    scores = torch.stack([logprobs(model, [batch]) for batch in batches])[:, :-1]
    ids = torch.stack([batch.input_ids[0] for batch in batches])[:, 1:]
    said = scores.gather(2, ids[..., None]).mean()
    entropy = -(scores.exp() * scores).sum(-1).mean()
    assert float(said + entropy) == pytest.approx(0, abs=0.1)


@pytest.fixture
def files(
    shaken: Callable[..., Path], context: Any, tmp_path: Path
) -> Callable[..., tuple[Path, list[dict[str, Any]]]]:
    def make(
        checkpoint: Path | None = None, rows: Path | None = None, **keys: Any
    ) -> tuple[Path, list[dict[str, Any]]]:
        out = tmp_path / "bundle"
        shutil.rmtree(out, ignore_errors=True)
        export_checkpoint(checkpoint or shaken(**WIDE), out, config(**keys), context, name="m", rows=rows)
        return out, json.loads((out / "manifest.json").read_text())["artifacts"]

    return make


# Rows of 256 may have every type.
WIDE: dict[str, Any] = {"hidden": 256, "heads": 8, "kv_heads": 2, "intermediate": 256, "blocks": 2}


@pytest.fixture(scope="module")
def sensed(shaken: Callable[..., Path], talks: Path) -> Sensitivity:
    """Of the wide model."""
    return collect_sensitivity(load_model(shaken(**WIDE)), batches_of(shaken(**WIDE), talks))


def types_in(file: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors if len(t.shape) > 1}


def test_a_file_is_as_large_as_was_asked_for(files, shaken, talks):
    sizes = GgufSizes(shaken(**WIDE), name="m")
    size = (sizes.plain["Q4_K_M"] + sizes.plain["IQ4_XS"]) // 2
    out, (large, by_bits) = files(rows=talks, gguf=[{"size": size}, {"bits": 5.5}])
    file = out / large["path"]
    assert 0.98 * size < file.stat().st_size == large["bytes"] <= size
    assert 5.3 < by_bits["bits_per_weight"] <= 5.5 and by_bits["type"] == "5.5bits"
    assert len(set(types_in(file).values())) > 1
    assert large["verification"]["kl"] < 0.8


def test_without_rows_the_checkpoint_writes_its_own(files, shaken, noted, monkeypatch):
    size = GgufSizes(shaken(**WIDE), name="m").plain["Q5_K_M"]
    _, (found,) = files(gguf={"size": size})
    assert 0.98 * size < found["bytes"] <= size


def test_sizes_out_of_reach_are_refused_and_large_ones_are_f16(files, shaken, monkeypatch):
    sizes = GgufSizes(shaken(**WIDE), name="m")
    least = math.ceil(sizes.smallest / 1e4) / 100
    text = rf"export\.gguf: 100kB is too small .* the file has {least:.2f} MB"
    monkeypatch.setattr(ExportJob, "_measure", lambda _job: pytest.fail("it has begun to work"))
    with pytest.raises(UserError, match=text):
        files(gguf=["100kB"])
    monkeypatch.undo()
    monkeypatch.setattr(ExportJob, "_sensed", lambda _job, _model: None)  # at most bits there is nothing to choose
    out, (found,) = files(gguf=["1GB"])
    assert set(types_in(out / found["path"]).values()) == {"F16"} and found["bytes"] == sizes.plain["F16"]


def test_the_smallest_possible_is_possible(files, shaken, talks):
    sizes = GgufSizes(shaken(**WIDE), name="m")
    _, (found,) = files(
        rows=talks, gguf={"size": sizes.smallest}, verify={"kl": {f"{sizes.smallest}B": 99.0}} | QUICK["verify"]
    )
    assert found["bytes"] == sizes.smallest


def test_depths_share_the_types_of_their_blocks(files, shaken, talks):
    sizes = GgufSizes(shaken(**WIDE), name="m", depths=[1, 2])
    size = sizes.plain["Q4_K_M"]
    out, found = files(rows=talks, gguf={"size": size}, depths=[1, 2])
    assert [entry["depth"] for entry in found] == [2, 1] and found[1]["bytes"] < 0.98 * size < found[0]["bytes"] <= size
    assert len(list((out / "gguf").rglob("*.gguf"))) == 7


def test_more_bytes_cost_less_damage_and_what_matters_gets_more(shaken, sensed, tmp_path):
    sizes = GgufSizes(shaken(**WIDE))
    name = "model.layers.1.mlp.down_proj.weight"
    terms = {**sensed.terms, name: [replace(t, rows=t.rows * 1e4) for t in sensed.terms[name]]}
    raised = replace(sensed, terms=terms)
    size, cache = f"{sizes.plain['Q4_K_M']}B", tmp_path / "damage.json"
    plain = sizes.chosen(size, sensed, {}, cache=cache)
    other = sizes.chosen(size, raised, {}, cache=tmp_path / "raised.json")
    assert bits_of(other.types["blk.1.ffn_down.weight"]) > bits_of(plain.types["blk.1.ffn_down.weight"])
    damages = [sizes.chosen(f"{bits}bits", sensed, {}, cache=cache).damage for bits in (5, 6, 7)]
    assert damages == sorted(damages, reverse=True) and damages[0] > 4 * damages[-1]


def test_a_killed_export_goes_on(shaken, sensed, tmp_path, monkeypatch):
    """The table of costs is kept tensor by tensor."""
    sizes, cache = GgufSizes(shaken(**WIDE)), tmp_path / "damage.json"
    whole = sizes.chosen("5.5bits", sensed, {})
    rounding, calls = damage.rounding_costs, []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return rounding(*arguments)

    monkeypatch.setattr(damage, "rounding_costs", killed)
    with pytest.raises(KeyboardInterrupt):
        sizes.chosen("5.5bits", sensed, {}, cache=cache)
    assert len(json.loads(cache.read_text())) == 8
    again = sizes.chosen("5.5bits", sensed, {}, cache=cache)
    assert again.types == whole.types and again.damage == whole.damage
    assert len(calls) == 1 + len(sizes.shapes)
