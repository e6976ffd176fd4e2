"""Training scales in the export stage: against slow references, after a kill, at several depths, refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import compress.export.scale_training as scale_training
import pytest
import torch
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs
from compress.data.chat import load_encoded
from compress.data.rows import Row, write_rows
from compress.export.config import ExportConfig, TrainScales
from compress.export.gguf import write_gguf
from compress.export.scale_files import GgufScales
from compress.export.scale_training import ScaleRows, ScaleStudent, train_scales
from compress.export.scales import ScaledMatrix
from compress.export.stage import export_checkpoint, run
from compress.export.verify import check_weights
from compress.modeling.blocks import without_blocks
from compress.modeling.load import load_model, load_tokenizer
from compress.pipeline.recipe import Recipe
from compress.runtime.bundle import read_bundle

VERIFY = {"tokens": 32, "window": 32}
FEW = {"steps": 6, "eval_every": 3, "lr": 5e-3}
LOUD = {"initializer_range": 0.1}  # weights so large that rounding them is heard


def config(train: dict[str, Any] | None = None, **values: Any) -> ExportConfig:
    given = {"verify": VERIFY, "threads": 1, "train_scales": FEW if train is None else train}
    return ExportConfig.model_validate(given | values)


def plain_kl(checkpoint: Path, file: Path, data: Path, depths: list[int], split: str = "heldout") -> float:
    """Mean KL over depths and tokens of whole models with dequantized weights, a row at a time, in float64."""
    teacher, student = load_model(checkpoint), load_model(checkpoint)
    for name, found in GgufScales([file], checkpoint).weights():
        values = found.values() if isinstance(found, ScaledMatrix) else found
        student.get_parameter(name).data = values
    sums: list[float] = []
    tokens = 0
    with torch.no_grad():
        for depth in depths:
            for row in load_encoded(data, load_tokenizer(checkpoint), split, 512):
                logits = []
                for model in (teacher, student):
                    with without_blocks(model, range(depth, 4)):
                        logits.append(model(torch.tensor([row.input_ids])).logits[0, :-1].double())
                p, q = (found.log_softmax(-1) for found in logits)
                sums.append(float((p.exp() * (p - q)).sum()))
                tokens += len(p)
    return sum(sums) / tokens


@pytest.mark.parametrize("depths", [[4], [2, 4]])
def test_held_out_kl_is_that_of_whole_models(shaken, talks, tmp_path, context, depths):
    checkpoint, file = shaken(**LOUD), tmp_path / "m.gguf"
    write_gguf(checkpoint, file, "Q4_0", threads=1)
    rows = ScaleRows(TrainScales.model_validate(FEW), checkpoint, talks, depths, context)
    before = plain_kl(checkpoint, file, talks, depths)
    found = train_scales(rows, GgufScales([file], checkpoint), "Q4_0", tmp_path / "state.safetensors")
    assert found is not None and found.step in (3, 6)
    assert found.held_out_kl_before == pytest.approx(before, rel=1e-3)
    after = plain_kl(checkpoint, file, talks, depths)
    assert found.held_out_kl == pytest.approx(after, rel=1e-3)  # what was measured is what the file holds
    assert after < 0.97 * before and 0 < found.moved < 0.05


def test_recomputed_activations_change_nothing(shaken, talks, tmp_path, context):
    checkpoint, file = shaken(**LOUD), tmp_path / "m.gguf"
    write_gguf(checkpoint, file, "Q4_0", threads=1)
    gradients = []
    for recomputed in (False, True):
        wanted = TrainScales.model_validate(FEW | {"gradient_checkpointing": recomputed})
        rows = ScaleRows(wanted, checkpoint, talks, [4], context)
        student = ScaleStudent(rows, GgufScales([file], checkpoint))
        student.kl(student.train[0]).backward()
        gradients.append(student.gradient.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_steps_are_those_of_torchs_adam(shaken, talks, tmp_path, context):
    checkpoint, file = shaken(**LOUD), tmp_path / "m.gguf"
    write_gguf(checkpoint, file, "Q4_0", threads=1)
    wanted = TrainScales.model_validate({"steps": 10, "warmup": 0.2, "lr": 1e-2})
    student = ScaleStudent(ScaleRows(wanted, checkpoint, talks, [4], context), GgufScales([file], checkpoint))
    state = scale_training._start(student, tmp_path / "none")
    parameter = torch.nn.Parameter(torch.zeros_like(student.moves))
    adam = torch.optim.Adam([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    shape = [0.5, 1.0, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 8))]
    random = torch.Generator().manual_seed(3)
    for step in range(1, 11):
        gradient = torch.randn(parameter.shape, generator=random) * 1e-3
        student.gradient.copy_(gradient)
        parameter.grad = gradient
        state.step = step
        scale_training._adam(student, state, wanted)
        adam.param_groups[0]["lr"] = 1e-2 * shape[step - 1]
        adam.step()
    torch.testing.assert_close(student.moves, parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.fixture
def inputs(shaken, talks) -> Inputs:
    return Inputs(shaken(**LOUD), shaken(**LOUD), {"data": talks}, name="tiny")


def test_a_bundle_with_trained_scales_is_verified_and_says_so(
    inputs, tmp_path, context, inline_builder, noted, monkeypatch
):
    """Killed between two states and started again, it ends with the same bytes as one that was not."""
    wanted = config(gguf=["Q8_0", "Q4_K_M"], onnx=["int4"], depths=[2, 4])
    loud = Context(seed=7, progress=noted())
    for name in ("whole", "killed", "plain"):
        (tmp_path / name).mkdir()
    run(wanted, inputs, tmp_path / "whole", loud)
    steps: list[int] = []
    adam = scale_training._adam

    def killed(student: Any, state: Any, config: Any) -> None:
        steps.append(state.step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        adam(student, state, config)

    monkeypatch.setattr(scale_training, "SAVE_EVERY", 2)
    with monkeypatch.context() as patch:
        patch.setattr(scale_training, "_adam", killed)
        with pytest.raises(KeyboardInterrupt):
            run(wanted, inputs, tmp_path / "killed", context)
    monkeypatch.setattr(scale_training, "_adam", lambda *given: (steps.append(given[1].step), adam(*given))[1])
    run(wanted, inputs, tmp_path / "killed", context)
    assert steps == [1, 2, 3, 4, 5, 5, 6, *range(1, 7)]
    whole = {f.relative_to(tmp_path / "whole"): f for f in (tmp_path / "whole/bundle").rglob("*") if f.is_file()}
    for file, path in whole.items():
        assert (tmp_path / "killed" / file).read_bytes() == path.read_bytes(), file

    run(wanted.model_copy(update={"train_scales": None}), inputs, tmp_path / "plain", context)
    manifest, plain = (read_bundle(tmp_path / name / "bundle", hashes=True) for name in ("whole", "plain"))
    for trained, rounded in zip(manifest.artifacts, plain.artifacts, strict=True):
        assert (trained.bytes, rounded.trained_scales) == (rounded.bytes, None)
        if trained.type == "Q8_0":  # enough bits: left alone
            assert trained.trained_scales is None
            continue
        found = trained.trained_scales
        assert found is not None and found.step and found.held_out_kl < found.held_out_kl_before
    assert any(text.startswith("onnx-int4: trained scales, held-out KL ") for text in loud.progress.texts)  # type: ignore[attr-defined]


def test_scales_that_do_not_get_better_stay(inputs, tmp_path, noted, monkeypatch):
    monkeypatch.setattr(ScaleStudent, "held_out_kl", lambda _self: 0.25)
    context = Context(seed=7, progress=noted())
    for name, train in (("trained", FEW), ("plain", None)):
        (tmp_path / name).mkdir()
        wanted = config(gguf=["Q4_0"]).model_copy(update={} if train else {"train_scales": None})
        run(wanted, inputs, tmp_path / name, context)
    files = [next((tmp_path / name / "bundle/gguf").iterdir()).read_bytes() for name in ("trained", "plain")]
    assert files[0] == files[1]
    assert any("did not lower the held-out KL (0.2500)" in text for text in context.progress.texts)  # type: ignore[attr-defined]


def test_a_step_that_breaks_the_model_ends_the_training(shaken, talks, tmp_path, context, monkeypatch):
    checkpoint, file = shaken(**LOUD), tmp_path / "m.gguf"
    write_gguf(checkpoint, file, "Q4_0", threads=1)
    rows = ScaleRows(TrainScales.model_validate(FEW), checkpoint, talks, [4], context)
    kl = ScaleStudent.kl
    steps: list[int] = []

    def broken(self: ScaleStudent, seen: Any) -> torch.Tensor:
        found = kl(self, seen)
        if torch.is_grad_enabled():
            steps.append(len(steps))
        return found * math.nan if torch.is_grad_enabled() and len(steps) == 5 else found

    monkeypatch.setattr(ScaleStudent, "kl", broken)
    found = train_scales(rows, GgufScales([file], checkpoint), "Q4_0", tmp_path / "state")
    assert len(steps) == 5 and found is not None and found.step == 3  # the last that was measured
    assert found.held_out_kl < found.held_out_kl_before


def test_rows_may_differ_by_what_training_moved_and_no_more():
    errors = [("a", "Q4_0", 0.36), ("b", "F32", 0.0)]
    with pytest.raises(UserError, match=r"tensor a \(Q4_0\) differs .* \(limit 0\.35\)"):
        check_weights("x", iter(errors))
    assert check_weights("x", iter(errors), 0.02) == 0.36
    with pytest.raises(UserError, match=r"tensor c \(F32\)"):
        check_weights("x", iter([("c", "F32", 0.01)]), 0.02)


def test_what_cannot_be_trained_is_refused_before_any_work(shaken, tmp_path, context, talks):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"gguf": ["F16", "Q8_0"]}, "none of F16, Q8_0 has fewer than six bits"),
        ({"gguf": ["F16", "Q4_0"], "train": {"types": ["F16"]}}, "F16 has no scales to train"),
        ({"gguf": ["Q4_0"], "train": {"types": ["int4"]}}, "int4 is not exported; listed are Q4_0"),
    ]
    for values, why in cases:
        with pytest.raises(ValueError, match=why):
            config(**values)
    assert config(gguf=["Q8_0"], train={"types": ["Q8_0"]}).trained == ["Q8_0"]
    with pytest.raises(UserError, match="training scales needs rows to learn from"):
        export_checkpoint(shaken(), tmp_path / "b", config(gguf=["Q4_0"]), context)
    (tmp_path / "r.yaml").write_text(f"name: r\nmodel: {shaken()}\nexport: {{gguf: [Q4_0], train_scales: {{}}}}\n")
    with pytest.raises(UserError, match=r"export\.train_scales: it learns from the data stage's rows; add `data:`"):
        Recipe.load(str(tmp_path / "r.yaml"))
    (tmp_path / "one").mkdir()
    write_rows(tmp_path / "one", [Row(0, "train", text="what we can say of the people " * 5)])
    with pytest.raises(UserError, match="one has 1 rows to train on and 0 held out"):
        export_checkpoint(shaken(), tmp_path / "b", config(gguf=["Q4_0"]), context, rows=tmp_path / "one")
    assert not list(tmp_path.rglob("*.gguf"))
    export_checkpoint(shaken(), tmp_path / "b", config(gguf=["Q4_0"]), context, rows=talks)
    assert read_bundle(tmp_path / "b").artifacts[0].trained_scales is not None
