"""Bundles of several depths: made, verified, resumed, copied, extracted from, described."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path
from typing import Any

import compress.export.artifacts as artifacts
import pytest
from compress.cli import main as cli
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs
from compress.evaluation.stage import bundle_subjects
from compress.export.config import ExportConfig
from compress.export.gguf_family import family_name
from compress.export.job import chosen_depths
from compress.export.stage import export_checkpoint, run
from compress.export.verify import KL_LIMITS
from compress.modeling.blocks import drop_blocks, record_depths
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from compress.records.bundle import BundleManifest
from compress.runtime.bundle import read_bundle
from compress.runtime.open import open_engine
from pydantic import ValidationError

VERIFY = {"tokens": 32, "window": 32}
TYPES = {"gguf": ["Q4_K_M", "Q8_0"], "onnx": ["int4"]}


def config(**values: Any) -> ExportConfig:
    return ExportConfig.model_validate({"verify": VERIFY, "threads": 1} | values)


@pytest.fixture(scope="module")
def exported(shaken, builder_here, tmp_path_factory) -> Path:
    """A bundle of three types at three depths, made once: to read from."""
    bundle = tmp_path_factory.mktemp("exported") / "bundle"
    wanted = config(**TYPES, depths=[1, 2, 4])
    with builder_here():
        export_checkpoint(shaken(tied=False), bundle, wanted, Context(seed=7), name="tiny")
    return bundle


def disk(folder: Path) -> int:
    return sum({f.stat().st_ino: f.stat().st_size for f in folder.rglob("*") if f.is_file()}.values())


def test_a_bundle_holds_every_depth_of_every_type_verified(exported):
    manifest = read_bundle(exported, hashes=True)
    assert manifest.depths == [1, 2, 4]
    assert [a.role for a in manifest.artifacts] == [
        *("gguf-Q4_K_M", "gguf-Q4_K_M@2", "gguf-Q4_K_M@1"),
        *("gguf-Q8_0", "gguf-Q8_0@2", "gguf-Q8_0@1"),
        *("onnx-int4", "onnx-int4@2", "onnx-int4@1"),
    ]
    for artifact in manifest.artifacts:
        found = artifact.verification
        assert found.positions == 32 and found.kl < KL_LIMITS[artifact.type]
        with open_engine(exported / artifact.path, threads=1, context=64) as engine:
            assert len(list(engine.generate([5, 6, 7], 4))) == 4
    # Each depth is compared with as many blocks in torch, not with all of them.
    checkpoints = [a.verification.checkpoint_perplexity for a in manifest.artifacts[:3]]
    assert len(set(checkpoints)) == 3
    assert checkpoints == [a.verification.checkpoint_perplexity for a in manifest.artifacts[6:]]
    paths = {a.role: a.path for a in manifest.artifacts}
    assert paths["gguf-Q8_0@2"] == "gguf/tiny-Q8_0/tiny-Q8_0-d2-00001-of-00004.gguf"
    assert (paths["onnx-int4"], paths["onnx-int4@2"]) == ("onnx/int4/d1/d2/d4", "onnx/int4/d1/d2")
    sizes = {a.role: (a.parameters, a.bytes) for a in manifest.artifacts}
    for role in ("gguf-Q4_K_M", "gguf-Q8_0", "onnx-int4"):
        assert sizes[f"{role}@1"] < sizes[f"{role}@2"] < sizes[role]
        assert sizes[role][0] == manifest.parameters


def test_sizes_are_stated_with_and_without_links(exported, tmp_path):
    manifest = read_bundle(exported)
    assert [(f.format, f.type, f.depths) for f in manifest.families] == [
        (form, kind, [1, 2, 4]) for form, kind in (("gguf", "Q4_K_M"), ("gguf", "Q8_0"), ("onnx", "int4"))
    ]
    for family in manifest.families:
        root = exported / family.format / (f"tiny-{family.type}" if family.format == "gguf" else family.type)
        shutil.copytree(root, tmp_path / "copy" / family.type)
        assert disk(root) == family.bytes < family.bytes_without_links == disk(tmp_path / "copy" / family.type)
        parts = [a.bytes for a in manifest.artifacts if a.type == family.type]
        assert family.bytes < sum(parts)
        if family.format == "gguf":
            assert family.bytes_without_links == sum(parts)
    files = {entry.path: entry for entry in manifest.files}
    unlisted = sum(os.path.getsize(exported / name) for name in ("manifest.json", "README.md"))
    assert sum(entry.bytes for entry in files.values() if entry.link is None) == disk(exported) - unlisted
    links = [entry for entry in files.values() if entry.link is not None]
    assert links and all((exported / entry.path).samefile(exported / str(entry.link)) for entry in links)


def test_a_copy_without_links_works_and_is_the_same_bundle(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    files = [file for file in (tmp_path / "copy").rglob("*") if file.is_file()]
    assert len(files) > 20 and all(file.stat().st_nlink == 1 for file in files)
    manifest = read_bundle(tmp_path / "copy", hashes=True)
    for artifact in manifest.artifacts:
        open_engine(tmp_path / "copy" / artifact.path, threads=1, context=64).close()


def test_where_there_are_no_links_copies_are_made(shaken, tmp_path, context, inline_builder, monkeypatch):
    def refuse(*_args: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    export_checkpoint(shaken(), tmp_path / "b", config(**TYPES, depths=[2, 4]), context)
    manifest = read_bundle(tmp_path / "b", hashes=True)
    assert all(family.bytes == family.bytes_without_links for family in manifest.families)
    assert all(entry.link is None for entry in manifest.files)
    assert len(manifest.artifacts) == 6


def test_links_outlive_a_stage(shaken, tmp_path, context, inline_builder, manifest_of):
    """A stage folder is renamed when it is whole, and says of every file how large it is."""
    from compress.pipeline.store import StageFolder

    folder = StageFolder(tmp_path, "export", "0" * 64)
    folder.partial.mkdir()
    inputs = Inputs(shaken(), shaken())
    run(config(gguf=["Q8_0"], depths=[2, 4]), inputs, folder.partial, context)
    before = disk(folder.partial / "bundle")
    folder.finish(manifest_of(stage="export"))
    assert disk(folder.path / "bundle") == before
    files = folder.manifest().files
    names = [f"bundle/gguf/model-4L-Q8_0/{family_name('model-4L-Q8_0', d, 2, [2, 4])}" for d in (2, 4)]
    assert files[names[0]] == files[names[1]]
    assert (folder.path / names[0]).samefile(folder.path / names[1])


@pytest.fixture
def sorted_model(shaken, tmp_path) -> Path:
    """A checkpoint of three blocks that notes two depths, as the sort stage leaves it."""
    model = load_model(shaken())
    drop_blocks(model, [1])
    record_depths(model.config, [2, 3])
    save_checkpoint(model, load_tokenizer(shaken()), tmp_path / "sort-1" / "model")
    return tmp_path / "sort-1" / "model"


def test_the_depths_a_model_was_sorted_for_are_exported(sorted_model, shaken, tmp_path, context, inline_builder):
    assert chosen_depths(config(gguf=["F16"]), sorted_model) == [2, 3]
    assert chosen_depths(config(gguf=["F16"], depths=[3]), sorted_model) == [3]
    assert chosen_depths(config(gguf=["F16"]), shaken()) == [4]
    (tmp_path / "out").mkdir()
    run(config(onnx=["int8"]), Inputs(shaken(), sorted_model, name="x"), tmp_path / "out", context)
    manifest = read_bundle(tmp_path / "out" / "bundle")
    assert (manifest.depths, manifest.kept_blocks, manifest.name) == ([2, 3], [0, 2, 3], "x-3L")


def test_one_depth_has_the_plain_layout(sorted_model, tmp_path, context):
    export_checkpoint(sorted_model, tmp_path / "b", config(gguf=["F16"], depths=[3]), context, name="m")
    manifest = read_bundle(tmp_path / "b")
    assert [a.path for a in manifest.artifacts] == ["gguf/m-F16.gguf"] and manifest.families == []


def test_impossible_depths_are_refused(shaken, sorted_model, tmp_path, context):
    for wrong in ([], [0, 4], [4, 2], [2, 2, 4], [-1, 4], ["x"]):
        with pytest.raises(ValidationError):
            config(gguf=["F16"], depths=wrong)
    with pytest.raises(UserError, match=r"export\.depths ends with 3, but the model in .* has 4 blocks"):
        export_checkpoint(shaken(), tmp_path / "b", config(gguf=["F16"], depths=[2, 3]), context)
    with pytest.raises(UserError, match=r"export\.depths asks for 5 blocks, but .* has only 4"):
        export_checkpoint(shaken(), tmp_path / "b", config(gguf=["F16"], depths=[2, 5]), context)
    with pytest.raises(UserError, match=r"ends with 4, but the model in .* has 3 blocks"):
        (tmp_path / "out").mkdir()
        run(config(gguf=["F16"], depths=[2, 4]), Inputs(shaken(), sorted_model), tmp_path / "out", context)
    assert not (tmp_path / "b").exists()


def test_disk_is_counted_with_or_without_links(shaken, tmp_path, context, monkeypatch):
    """Copies of three depths need room for three models."""
    weights = 2 * sum(p.numel() for p in load_model(shaken()).parameters())  # F16
    free = shutil.disk_usage(tmp_path)._replace(free=int(2.2 * weights))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    monkeypatch.setattr("compress.export.job.can_link", lambda _path: False)
    with pytest.raises(UserError, match="export fewer types"):
        export_checkpoint(shaken(), tmp_path / "b", config(gguf=["F16"], depths=[2, 3, 4]), context)
    monkeypatch.setattr("compress.export.job.can_link", lambda _path: True)
    export_checkpoint(shaken(), tmp_path / "b", config(gguf=["F16"], depths=[2, 3, 4]), context)


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def uninterrupted(request, shaken, builder_here, tmp_path_factory) -> tuple[str, ExportConfig, Path]:
    """A format, what is exported in it, and what a run leaves that nobody kills."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    wanted = config(**{request.param: ["Q8_0" if request.param == "gguf" else "int8"], "depths": [2, 4]})
    with builder_here():
        run(wanted, Inputs(shaken(), shaken()), folder, Context(seed=7))
    return request.param, wanted, folder


@pytest.mark.parametrize("moment", ["between depths", "checking the graph", "reading back", "writing"])
def test_a_killed_export_goes_on(shaken, tmp_path, context, inline_builder, monkeypatch, uninterrupted, moment):
    form, wanted, whole = uninterrupted
    kind = artifacts.GgufKind if form == "gguf" else artifacts.OnnxKind
    inputs, killed = Inputs(shaken(), shaken()), tmp_path / "killed"
    killed.mkdir()
    calls: list[str] = []
    for name in ("write", "run", "errors", "check_graph"):
        original = getattr(kind, name)

        def counted(self: Any, *args: Any, name: str = name, original: Any = original) -> Any:
            if self.making.temporary and name != "check_graph":  # files for the graph's check
                return original(self, *args)
            calls.append(f"{name} {args[0]}" if name in ("run", "check_graph") else name)
            if armed and calls[-1] == armed[0]:
                if armed.pop() == "write":  # half of it is there
                    root = self.making.bundle / self.root
                    root.mkdir(parents=True)
                    (root / "half.gguf").write_bytes(b"GG")
                raise KeyboardInterrupt
            return original(self, *args)

        monkeypatch.setattr(kind, name, counted)
    moments = {"between depths": "run 2", "checking the graph": "check_graph 4", "reading back": "errors"}
    armed = [moments.get(moment, "write")]
    with pytest.raises(KeyboardInterrupt):
        run(wanted, inputs, killed, context)
    calls.clear()
    run(wanted, inputs, killed, context)
    behind = ["check_graph 2", "check_graph 4", "run 4", "run 2"]
    went_on = {"between depths": ["run 2"], "checking the graph": behind}
    assert calls == went_on.get(moment, ["write", "errors", *behind])
    files, again = (
        sorted(file.relative_to(home) for file in (home / "bundle").rglob("*") if file.is_file())
        for home in (whole, killed)
    )
    assert files == again
    for file in files:
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_depth_that_runs_wrongly_fails_by_name(shaken, tmp_path, context, inline_builder, monkeypatch):
    """Right weights, but a graph that leaves out a block too many."""
    import compress.export.onnx_depths as onnx_depths

    cut = onnx_depths.cut_graph
    monkeypatch.setattr(onnx_depths, "cut_graph", lambda model, depth: cut(model, depth) or rewire(model))

    def rewire(model: Any) -> None:
        nodes = {node.name: node for node in model.graph}
        final = next(node for name, node in nodes.items() if "final_norm" in name)
        early = nodes["/model/layers.1/input_layernorm/SkipLayerNorm"]
        for index in (0, 1):
            final.replace_input_with(index, early.inputs[index])

    with pytest.raises(UserError, match="onnx: onnxruntime does not compute the checkpoint's model"):
        export_checkpoint(shaken(), tmp_path / "b", config(onnx=["fp32"], depths=[2, 4]), context)


def card_of(bundle: Path) -> str:
    return (bundle / "README.md").read_text(encoding="utf-8")


def test_the_card_lists_every_depth_and_its_size(exported):
    card, manifest = card_of(exported), read_bundle(exported)
    for artifact in manifest.artifacts:
        assert f"| `{artifact.path}` | {artifact.type} | {artifact.depth} |" in card
    assert "its first 1, 2 blocks, or all 4" in card
    for depth in (1, 2, 4):
        assert f'compress generate . --engine onnx --depth {depth} --prompt "Hello"' in card
    assert "(other depths: `onnx/int4/d1/d2`, `onnx/int4/d1`)" in card
    assert "\n\n\n" not in card and "|\n\nEach was loaded" in card  # a line right below would be a row


def test_the_cards_commands_run(exported, tmp_path, monkeypatch):
    """llama.cpp through its bindings with the path that the card names; the rest as it stands there."""
    shutil.copytree(exported, tmp_path / "copy")
    exported = tmp_path / "copy"
    card = card_of(exported)
    files = re.findall(r"llama-cli -m (\S+) -p", card)
    assert len(files) == 3
    for file in files:
        open_engine(exported / file, threads=1, context=64).close()
    start = card.index("    import onnxruntime_genai")
    snippet = textwrap.dedent(card[start : card.index("\n\nonnxruntime, through", start)])
    for path in ("onnx/int4/d1/d2/d4", "onnx/int4/d1"):
        code = snippet.replace("onnx/int4/d1/d2/d4", path)
        found = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True)
        assert found.returncode == 0 and found.stdout.startswith("Hello"), found.stderr
    # Optimum needs an older transformers (benchmarks/optimum_ort.py runs it); what it is told to open is there.
    (folder, graph) = re.findall(r'subfolder="(\S+)", file_name="(\S+)"', card)[0]
    others = re.findall(r"`(model-d\d+\.onnx)`", card)
    assert others == ["model-d2.onnx", "model-d1.onnx"]
    assert all((exported / folder / name).is_file() for name in [graph, *others])
    monkeypatch.chdir(exported)
    commands = re.findall(r"(?m)^    compress (extract .*)$", card)
    assert len(commands) == 3
    for command in commands:
        cli.app(command.split(), standalone_mode=False)
    source = (exported / "Modelfile").read_text().splitlines()[0].removeprefix("FROM ")
    for file in (source, "tiny-Q4_K_M-d2.gguf", "tiny-Q4_K_M-d1.gguf"):
        open_engine(exported / file, threads=1, context=64).close()


def test_the_cards_server_answers(exported):
    (command,) = re.findall(r"(?m)^    compress (serve .*)$", card_of(exported))
    (model,) = re.findall(r"`(\S+@\d+)` as the model's name", card_of(exported))
    line = [sys.executable, "-m", "compress", *command.split(), "--port", "0", "--threads", "1"]
    with subprocess.Popen(line, cwd=exported, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split(" at ")[1].split(";")[0]
            with urllib.request.urlopen(f"{url}/models", timeout=60) as answer:
                assert model in [entry["id"] for entry in json.load(answer)["data"]]
            asked = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 4, "temperature": 0}).encode()
            request = urllib.request.Request(f"{url}/completions", asked, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] == 4
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0


def test_extracting(exported, tmp_path, capsys):
    def extract(*options: str) -> None:
        cli.app(["extract", str(exported), *options], standalone_mode=False)

    extract("--type", "int4", "--depth", "2", "--out", str(tmp_path / "two"))
    assert sorted(file.name for file in (tmp_path / "two").iterdir())[-2:] == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for runtime in ("onnxruntime", "onnxruntime-genai"):
        open_engine(tmp_path / "two", runtime=runtime).close()
    extract("--type", "Q8_0", "--out", str(tmp_path / "all.gguf"))
    assert str(tmp_path / "all.gguf") in capsys.readouterr().out.replace("\n", "")
    for options, message in (
        (["--type", "Q8_0", "--out", str(tmp_path / "all.gguf")], "exists already; give another --out"),
        (
            ["--type", "Q8_0", "--depth", "3", "--out", "x.gguf"],
            r"no Q8_0 at depth 3; .* Q4_K_M, Q8_0, int4 .* 1, 2, 4",
        ),
        (["--type", "F16", "--out", "x.gguf"], "no F16 at depth 4"),
        (["--type", "int4", "--out", "x.gguf"], "is extracted into a folder"),
        (["--type", "Q8_0", "--out", "x"], r"into a file that ends in \.gguf"),
    ):
        with pytest.raises(UserError, match=message):
            extract(*options)


def test_extracting_from_a_bundle_of_one_depth(shaken, tmp_path, context):
    export_checkpoint(shaken(), tmp_path / "b", config(gguf=["Q8_0"]), context, name="m")
    cli.app(
        ["extract", str(tmp_path / "b"), "--type", "Q8_0", "--out", str(tmp_path / "m.gguf")], standalone_mode=False
    )
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "b" / "gguf" / "m-Q8_0.gguf").read_bytes()


def test_the_command_line_takes_depths(shaken, tmp_path, monkeypatch):
    asked: list[ExportConfig] = []
    monkeypatch.setattr("compress.export.stage.export_checkpoint", lambda _from, _to, config, *_: asked.append(config))
    monkeypatch.setattr("compress.pipeline.direct.read_bundle", lambda _: None)
    line = ["export", str(shaken()), "--gguf", "Q8_0", "--out", str(tmp_path / "b")]
    cli.app([*line, "--depths", "2, 4"], standalone_mode=False)
    cli.app(line, standalone_mode=False)
    assert [config.depths for config in asked] == [[2, 4], None]
    for depths, message in (
        ("2,x", r"depths\.1: input should be a valid integer"),
        ("4,2", r"\[4, 2\] must be in ascending order"),
    ):
        with pytest.raises(UserError, match=message):
            cli.app([*line, "--depths", depths], standalone_mode=False)


def test_inspect_says_what_a_part_and_a_depth_are(exported, capsys):
    def inspect(path: str) -> str:
        cli.app(["inspect", str(exported / path)], standalone_mode=False)
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    folder = "gguf/tiny-Q8_0"
    assert "1 of 4," in (out := inspect(f"{folder}/tiny-Q8_0-d2-00001-of-00004.gguf")) and "shared with other" in out
    assert "2 of a model in several files" in inspect(f"{folder}/tiny-Q8_0-d2-00002-of-00004.gguf")
    out = inspect("onnx/int4/d1")
    assert "blocks 1" in out and "d2/d4/model-d1.onnx" in out and "MB in model.onnx.data" in out
    out = inspect("")
    assert "onnx-int4@2" in out and "1, 2, 4 blocks in" in out and "without links" in out


def test_evaluation_knows_each_depth(exported):
    manifest = read_bundle(exported)
    for subject, artifact in zip(bundle_subjects(exported), manifest.artifacts, strict=True):
        assert (subject.role, subject.files) == (artifact.role, exported / artifact.path)
        assert (subject.blocks, subject.parameters, subject.bytes) == (
            artifact.depth,
            artifact.parameters,
            artifact.bytes,
        )


def test_manifests_are_plain(exported):
    """Nothing empty is written, and what is written is read again."""
    text = (exported / "manifest.json").read_text()
    assert "null" not in text
    assert BundleManifest.model_validate(json.loads(text)) == read_bundle(exported)
