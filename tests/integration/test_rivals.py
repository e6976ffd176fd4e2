"""Exported files beside the unpruned model quantized to at most their bytes, on tiny models in the real runtimes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from compress import api
from compress.cli.main import app
from compress.core.errors import UserError
from compress.core.stage import WORK, Context, Inputs
from compress.evaluation import stage as evaluation
from compress.evaluation.config import EvaluateConfig
from compress.evaluation.rivals import Rivals
from compress.evaluation.subjects import Subject
from compress.evaluation.suite import MeasuredModel
from compress.export import imatrix
from compress.export import rivals as making
from compress.export.artifacts import GgufKind
from compress.export.card import write_card
from compress.export.config import ExportConfig
from compress.export.gguf_sized import GgufSizes
from compress.export.gguf_sizes import plain_sizes
from compress.export.onnx import write_onnx
from compress.export.onnx_depths import measure_onnx
from compress.export.onnx_sizes import onnx_sizes
from compress.export.rivals import UnprunedModels
from compress.export.stage import export_checkpoint
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from compress.modeling.weights import count_parameters
from compress.pipeline.recipe import Recipe
from compress.records.bundle import BundleManifest
from compress.records.models import ModelEntry
from compress.runtime.artifact_sizes import target_of
from compress.runtime.artifact_types import GGUF_TYPES
from compress.runtime.bundle import read_bundle
from typer.testing import CliRunner

TEXT = "The library opens at nine. Anna returned three books, paid a fine and walked home along the river. " * 8
LOOSE = {"kl": dict.fromkeys(GGUF_TYPES, 9.0), "tokens": 16, "window": 16}


@pytest.fixture(scope="module")
def base(shaken) -> Path:
    """The unpruned model: four blocks, whose removal is felt."""
    return shaken(initializer_range=0.3)


@pytest.fixture(scope="module")
def cut(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first and last block."""
    model, folder = load_model(base), tmp_path_factory.mktemp("cut") / "model"
    drop_blocks(model, [1, 2])
    save_checkpoint(model, load_tokenizer(base), folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def config(text: Path) -> EvaluateConfig:
    return EvaluateConfig(text=str(text), window=64, tokens=256, speed=None)


def bundle_of(checkpoint: Path, folder: Path, **keys: Any) -> Path:
    export_checkpoint(checkpoint, folder, ExportConfig(verify=LOOSE, **keys), Context(), "tiny")
    return folder


@pytest.fixture(scope="module")
def gguf_bundle(cut: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(cut, tmp_path_factory.mktemp("gguf") / "bundle", gguf=["F16", "Q4_0"])


def by_role(entries: list[ModelEntry]) -> dict[str, ModelEntry]:
    return {entry.role: entry for entry in entries}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_sizes_of_onnx_folders_are_reckoned(family, tiny, tmp_path, inline_builder):
    folder = tiny(family)
    for kind, size in onnx_sizes(folder).items():
        write_onnx(folder, tmp_path / kind, kind)
        true = measure_onnx(tmp_path / kind, count_parameters(folder)).bytes
        graph = (tmp_path / kind / "model.onnx").stat().st_size  # of a tiny model a great part of the whole
        assert abs(size - true) < graph


def test_a_clearly_worse_cut_stands_before_its_rival(base, gguf_bundle, config, tmp_path):
    entries = evaluation.evaluate_path(gguf_bundle, config, Context(), base, tmp_path)
    roles = [entry.role for entry in entries]
    rival = entries[2]
    assert roles[:3] == ["base", "gguf-F16", rival.role] and roles[3] == "gguf-Q4_0"
    ours, limit = entries[1], entries[1].bytes
    fitting = [kind for kind, size in plain_sizes(base, False).items() if size <= limit]
    assert rival.role.removeprefix("base-gguf-") in fitting and rival.rival_of == ["gguf-F16"]
    assert rival.bytes <= limit and rival.blocks == 4 and rival.runtime == "llama.cpp"
    (standing,) = ours.standings
    assert (standing.verdict, standing.rival, standing.on_front) == ("worse", rival.role, False)
    assert ours.kl_to_base is not None and rival.kl_to_base is not None and rival.kl_to_base < ours.kl_to_base
    assert standing.difference == pytest.approx(ours.kl_to_base - rival.kl_to_base, rel=1e-6)
    # The cut in the smallest type is smaller than the whole model in any.
    (alone,) = entries[3].standings
    sizes = plain_sizes(base, False)
    assert (alone.verdict, alone.smallest_bytes) == ("alone", min(sizes.values()))
    assert alone.smallest_sized_bytes == GgufSizes(base).smallest and entries[3].bytes < alone.smallest_sized_bytes
    assert alone.sentence.endswith("with a type per tensor.")
    assert len(roles) == 4 and not any((tmp_path / "rivals").glob("**/*.gguf"))


def test_the_best_of_the_largest_that_fit_wins(base, tmp_path):
    """What is measured decides, not the size."""
    plain = UnprunedModels(Inputs(base, base, {}), tmp_path / "work", Context(), 0)
    limit = plain.sizes("gguf")["Q8_0"]
    first, second = plain.tried("gguf", limit)
    assert first == "Q8_0" and plain.sizes("gguf")[second] <= limit
    assert plain.best("gguf", limit) == "Q8_0"
    records = {kind: tmp_path / "work" / f"gguf-{kind}.json" for kind in (first, second)}
    found = {kind: json.loads(file.read_text())["kl"] for kind, file in records.items()}
    assert 0 < found[first] < found[second]
    assert [file.stem for file in (tmp_path / "work" / "gguf").iterdir()] == ["model-Q8_0"]
    records[first].write_text(json.dumps({"kl": 9.0}))
    assert plain.best("gguf", limit) == second
    assert plain.best("gguf", plain.smallest - 1) is None


def test_a_type_per_tensor_is_tried_beside_such_files_and_where_no_plain_type_is_as_small(base, tmp_path):
    models = UnprunedModels(Inputs(base, base, {}), tmp_path / "work", Context(), 0)
    sizes = models.sizes("gguf")
    below, limit = min(sizes.values()) - 1, sizes["Q5_0"]
    assert target_of(models.tried("gguf", limit)[0]) is None
    own, *plain = models.tried("gguf", limit, sized=True)
    assert plain == models.tried("gguf", limit)
    assert models.tried("gguf", below) == [f"{below // 10_000 * 10}kB"]
    assert models.tried("gguf", models.smallest - 1, sized=True) == []
    assert models.best("gguf", limit, sized=True) == own
    found = {kind: json.loads((tmp_path / "work" / f"gguf-{kind}.json").read_text())["kl"] for kind in (own, *plain)}
    assert found[own] == min(found.values())
    assert models.file("gguf", own)[0].stat().st_size <= limit


def test_a_file_smaller_than_every_plain_type_has_a_rival_of_its_size(base, cut, config, tmp_path):
    bundle = bundle_of(cut, tmp_path / "bundle", gguf=["F16", "Q8_0"])
    limit = BundleManifest.read(bundle).artifacts[1].bytes
    assert GgufSizes(base).smallest < limit < min(plain_sizes(base, False).values())
    (tmp_path / "work").mkdir()
    entries = by_role(evaluation.evaluate_path(bundle, config, Context(), base, tmp_path / "work"))
    (standing,) = entries["gguf-Q8_0"].standings
    assert standing.rival == f"base-gguf-{limit // 10_000 * 10}kB" and "with a type per tensor" in standing.sentence
    rival = entries[standing.rival]
    assert rival.bytes <= limit and rival.blocks == 4 and rival.rival_of == ["gguf-Q8_0"]


def test_rows_too_few_to_choose_types_on_leave_the_plain_rivals(base, tmp_path, monkeypatch):
    def refuse(*_: Any) -> Any:
        raise UserError("too few")

    monkeypatch.setattr(making, "kept_sensitivity", refuse)
    notes: list[str] = []
    context = Context()
    monkeypatch.setattr(context.progress, "note", notes.append)
    models = UnprunedModels(Inputs(base, base, {}), tmp_path / "work", context, 0)
    assert models.best("gguf", min(models.sizes("gguf").values()) - 1) is None
    assert notes == ["no rival with a type per tensor: too few"]


def test_an_onnx_file_has_a_rival_in_its_runtime_and_one_in_llamacpp(base, cut, config, tmp_path, inline_builder):
    bundle = bundle_of(cut, tmp_path / "bundle", onnx=["fp32", "int4"])
    (tmp_path / "work").mkdir()
    entries = by_role(evaluation.evaluate_path(bundle, config, Context(), base, tmp_path / "work"))
    ours = entries["onnx-fp32"]
    onnx, gguf = ours.standings
    assert (onnx.format, gguf.format) == ("onnx", "gguf")
    assert onnx.rival == "base-onnx-int8" and entries["base-onnx-int8"].runtime == "onnxruntime"
    assert entries["base-onnx-int8"].bytes <= ours.bytes and entries["base-onnx-int8"].rival_of == ["onnx-fp32"]
    assert gguf.rival is not None and entries[gguf.rival].runtime == "llama.cpp" and "llama.cpp" in gguf.sentence
    assert list(entries).index("onnx-fp32") < list(entries).index("base-onnx-int8") < list(entries).index("onnx-int4")
    alone, _ = entries["onnx-int4"].standings
    assert (alone.verdict, alone.smallest) == ("alone", "int4") and "No ONNX precision" in alone.sentence


def test_every_depth_has_its_own_rival(base, config, tmp_path):
    bundle = bundle_of(base, tmp_path / "bundle", gguf=["F16"], depths=[1, 3, 4])
    (tmp_path / "work").mkdir()
    entries = by_role(evaluation.evaluate_path(bundle, config, Context(), base, tmp_path / "work"))
    for role in ("gguf-F16", "gguf-F16@3", "gguf-F16@1"):
        (standing,) = entries[role].standings
        rival = entries[standing.rival or ""]
        assert rival.bytes <= entries[role].bytes and role in rival.rival_of
    whole = entries["gguf-F16"].standings[0]
    assert whole.rival != entries["gguf-F16@1"].standings[0].rival


class FewTypes:
    """Plain types of made-up sizes."""

    smallest = 500

    def __init__(self) -> None:
        self.asked: list[int] = []

    def fitting(self, _form: str, limit: int) -> list[str]:
        return [kind for kind, size in (("A", 1000), ("B", 900)) if size <= limit]

    def per_tensor(self, _form: str, _limit: int, sized: bool) -> bool:
        return sized

    def best(self, form: str, limit: int, _sized: bool) -> str | None:
        self.asked.append(limit)
        return next(iter(self.fitting(form, limit)), None)

    def sizes(self, _form: str) -> dict[str, int]:
        return {"B": 900, "A": 1000}

    def close(self) -> None:
        return None


def test_files_of_nearly_one_size_share_a_rival(monkeypatch):
    """Whatever their order; one that is more than 2 % larger has its own."""

    def model(role: str, size: int) -> MeasuredModel:
        figures = {"runtime": "x", "blocks": 1, "parameters": 1, "perplexity": 1.0, "positions": 1, "tasks": {}}
        return MeasuredModel.model_validate({"role": role, "bytes": size, **figures})

    def measured(_self: object, _bench: object, role: str, _form: str, kind: str) -> MeasuredModel:
        return model(role, {"A": 1000, "B": 900}[kind])

    monkeypatch.setattr(Rivals, "_measured", measured)
    sizes = {"large": 1200, "near": 1015, "small": 1001, "tiny": 100}
    wanted: Any = [(Subject(role, bytes=size), "gguf") for role, size in sizes.items()]
    plain, bench = FewTypes(), cast(Any, None)
    pairs = Rivals(cast(Any, plain), wanted).measure(bench, [model(role, size) for role, size in sizes.items()])
    assert [pair.artifact.role for pair in pairs] == list(sizes)
    assert [(pair.kind, pair.rival is None) for pair in pairs] == [("A", False)] * 3 + [("B", True)]
    assert plain.asked == [100, 1001, 1200]


def test_a_model_that_was_not_cut_has_rivals_only_when_asked(base, config, tmp_path):
    bundle = bundle_of(base, tmp_path / "bundle", gguf=["Q8_0"])
    for wanted, roles in ((None, ["base", "gguf-Q8_0"]), (True, ["base", "gguf-Q8_0", "base-gguf-Q8_0"])):
        (tmp_path / str(wanted)).mkdir()
        asked = config.model_copy(update={"rival": wanted})
        entries = evaluation.evaluate_path(bundle, asked, Context(), base, tmp_path / str(wanted))
        assert [entry.role for entry in entries] == roles
    (standing,) = entries[1].standings
    assert standing.verdict == "tie" and standing.difference == pytest.approx(0, abs=1e-6)


@pytest.fixture
def inputs(base: Path, gguf_bundle: Path, tmp_path: Path) -> Inputs:
    """As a run has them: the bundle in its export stage's folder."""
    stage = tmp_path / "export-0123"
    stage.mkdir()
    (stage / "bundle").symlink_to(gguf_bundle)
    return Inputs(base, base, {"export": stage}, "tiny")


def test_a_killed_run_makes_and_measures_nothing_twice(inputs, config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    made: list[str] = []
    write, measured = GgufKind.write, evaluation.Bench._artifact
    died: list[str] = []

    def writing(kind: GgufKind) -> None:
        made.append(kind.type)
        write(kind)

    def measuring(bench: Any, subject: Any) -> Any:
        if subject.role.startswith("base-") and not died:
            died.append(subject.role)
            raise KeyboardInterrupt
        return measured(bench, subject)

    monkeypatch.setattr(GgufKind, "write", writing)
    monkeypatch.setattr(evaluation.Bench, "_artifact", measuring)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(config, inputs, out, Context())
    (chosen,) = died
    files = list((out / WORK / "rivals" / "gguf").iterdir())
    assert [f"base-gguf-{file.stem.rpartition('-')[2]}" for file in files] == [chosen]
    before = list(made)
    evaluation.run(config, inputs, out, Context())
    assert made == before and len(made) == len(set(made)) == 2  # the two largest that fit
    assert not (out / WORK / "rivals").exists()
    roles = [entry["role"] for entry in json.loads((out / "models.json").read_text())]
    assert roles == ["base", "gguf-F16", chosen, "gguf-Q4_0"]


def test_rivals_are_left_out_where_the_section_says_so(inputs, config, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    evaluation.run(config.model_copy(update={"rival": False}), inputs, out, Context())
    models = json.loads((out / "models.json").read_text())
    assert [m["role"] for m in models] == ["base", "gguf-F16", "gguf-Q4_0"]
    assert not any({"standings", "rival_of"} & m.keys() for m in models)


def test_a_full_disk_is_told_before_anything_is_measured(inputs, config, tmp_path, monkeypatch):
    usage = making.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(making.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=r"at the artifacts' sizes needs about .* set evaluate.rival to false"):
        evaluation.run(config, inputs, out, Context())
    assert not list((out / WORK).glob("*.json"))


def test_a_format_that_cannot_hold_the_unpruned_model_is_named(inputs, config, tmp_path, noted, monkeypatch):
    def refuse(_checkpoint: Path) -> None:
        raise UserError("its attention is soft-capped")

    monkeypatch.setattr(making, "check_gguf", refuse)
    out, progress = tmp_path / "out", noted()
    out.mkdir()
    evaluation.run(config, inputs, out, Context(progress=progress))
    assert any(note == "no rival in GGUF: its attention is soft-capped" for note in progress.texts)


def test_the_importance_matrix_is_made_as_the_exports_was(base, talks, tmp_path, monkeypatch):
    tokens: list[int] = []
    original = imatrix.calibration_batches

    def batches(*args: Any, **keys: Any) -> Any:
        tokens.append(keys["tokens"])
        return original(*args, **keys)

    monkeypatch.setattr(imatrix, "calibration_batches", batches)
    plain = UnprunedModels(Inputs(base, base, {"data": talks}), tmp_path / "work", Context(), 128)
    file, size = plain.file("gguf", "Q4_0")
    assert tokens == [128] and size.bytes == file.stat().st_size == plain.sizes("gguf")["Q4_0"]
    unweighted = UnprunedModels(Inputs(base, base, {}), tmp_path / "other", Context(), 0).file("gguf", "Q4_0")[0]
    assert file.read_bytes() != unweighted.read_bytes()


def test_the_card_is_completed_and_the_bundle_stays_whole(base, gguf_bundle, config, tmp_path):
    manifest = read_bundle(gguf_bundle, hashes=True)
    assert "README.md" not in {entry.path for entry in manifest.files}
    before = (gguf_bundle / "README.md").read_text()
    entries = evaluation.evaluate_path(gguf_bundle, config, Context(), base, tmp_path)
    write_card(gguf_bundle, manifest, entries)
    card = (gguf_bundle / "README.md").read_text()
    assert read_bundle(gguf_bundle, hashes=True) == manifest
    standing = entries[1].standings[0]
    assert f"- {standing.sentence}" in card and f"| {standing.rival} | 4 |" in card
    head, _, tail = card.partition("## Beside the unpruned model at the same bytes")
    assert before == head + "## How to run it" + tail.partition("## How to run it")[2]
    write_card(gguf_bundle, manifest)
    assert (gguf_bundle / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"rival": True}, "rival: a rival stands beside an exported file, and this recipe exports none"),
        ({"rival": "perhaps"}, "rival"),
        ({"rival": True, "artifacts": False}, "rival is true, but artifacts is false"),
    ],
)
def test_sections_that_ask_for_rivals_of_nothing_are_refused(keys, why):
    with pytest.raises(UserError, match=why):
        Recipe.from_dict({"name": "x", "model": "random:llama", "prune": {"blocks": 1}, "evaluate": keys})


@pytest.fixture
def refused(tmp_path, monkeypatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
        assert isinstance(result.exception, (UserError, SystemExit)), result.output
        return str(result.exception) if isinstance(result.exception, UserError) else result.output

    yield run


def test_eval_refuses_rivals_of_checkpoints_and_without_a_base(base, gguf_bundle, text, refused):
    assert "is not a bundle" in refused(base, "--base", base, "--text", text, "--rival")
    assert "name the model with --base" in refused(gguf_bundle, "--text", text, "--rival")


def test_eval_shows_the_rivals_of_a_bundle(base, gguf_bundle, text):
    arguments = ["eval", str(gguf_bundle), "--base", str(base), "--text", str(text), "--tokens", "64", "--window", "32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "base-gguf-" in told and "is better than gguf-F16" in told and "No GGUF type of the unpruned model" in told
    plain = api.evaluate(gguf_bundle, base=base, text=text, tokens=64, window=32, speed=None, rival=False)
    assert [entry.role for entry in plain] == ["base", "gguf-F16", "gguf-Q4_0"]
