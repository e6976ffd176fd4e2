"""What is typed is checked before any work, and the check leaves nothing behind; errors of others become one line."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from compress.cli import main as cli
from compress.core.errors import UserError
from compress.core.files import write_whole
from compress.export.config import ExportConfig
from compress.pipeline.explain import explained, without_foreign_advice
from compress.pipeline.options import checked
from compress.pipeline.places import bundle_name, check_file_place, check_folder, check_name, check_new, check_text
from safetensors import SafetensorError

NOT_UTF8 = os.fsdecode(b"bad \xff byte")
NAMES = [
    "",
    ".",
    "..",
    "...",
    "../else",
    "../../else",
    "a/b",
    "/a",
    "a\\b",
    "-a",
    "_a",
    ".a",
    "a b",
    "é",
    "a\n",
    "a" * 101,
]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which a command is refused."""

    def refused(*arguments: object) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert (stopped.value.code, out) == (2, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return refused


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be looked for: whatever is refused is refused before."""

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("compress.modeling.load.resolve", work)
    monkeypatch.setattr("compress.runtime.session.Session.__init__", work)
    monkeypatch.setattr("compress.runtime.bench.measure_all", work)
    monkeypatch.setattr("compress.pipeline.runner.fingerprint_source", work)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", NAMES)
def test_a_bundles_name_is_no_path(name, refused, idle, tiny, tmp_path):
    said = refused("export", tiny(), "--gguf", "Q8_0", "--out", tmp_path / "out", "--name", name)
    assert f"--name {name!r}: a name consists of" in said and files(tmp_path) == []


@pytest.mark.parametrize("name", ["a", "A.b_c-1", "a" * 100, "0"])
def test_names_that_may_be(name):
    check_name(name)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ("plain-1.5B", "plain-1.5B"),
        ("in [a]", "in [a]"),
        (".", "model"),
        ("", "model"),
        (NOT_UTF8, "bad - byte"),
        ("a\tb:c", "a-b-c"),
        ("模型", "模型"),
        ("x" * 300, "x" * 100),
    ],
)
def test_a_name_that_nobody_chose_can_always_be_a_files(found, name):
    assert bundle_name(found) == name


PLACES = {
    "a file above": ("file/out", "Not a directory"),
    "a file far above": ("file/a/b/out", "Not a directory"),
    "too long a name": ("x" * 250, "File name too long"),
    "too long a name above": ("y" * 300 + "/out", "File name too long"),
    "a link to nothing": ("dangling", "it is a broken link"),
    "below a link to nothing": ("dangling/out", "No such file or directory"),
    "a system folder": ("/proc/nowhere/out", ""),
    "no name": ("..", "give the name of the file or folder to create"),
    "something there": ("full", "exists already"),
    "a file there": ("file", "exists already"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    (tmp_path / "words.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("out", "why"), PLACES.values(), ids=PLACES)
def test_where_nothing_can_be_made_is_found_before_any_work(out, why, place, refused, idle, tiny):
    before = files(place)
    for command in (
        ["export", tiny(), "--gguf", "Q8_0", "--out", out],
        ["merge", tiny(), tiny(), "--out", out],
        ["extract", tiny(), "--type", "Q8_0", "--out", out],
    ):
        said = refused(*command)
        assert out in said and why in said, said
    assert files(place) == before


@pytest.mark.parametrize("out", ["file/b.json", "dangling/b.json", "x" * 251 + ".json", "/proc/nowhere/b.json"])
def test_a_benchs_page_is_not_measured_for_nothing(out, place, refused, idle, bundle):
    before = files(place)
    assert out in refused("bench", bundle, "--out", out)
    assert files(place) == before


@pytest.mark.parametrize("runs", ["file", "file/a", "dangling", "dangling/a", "y" * 300, "/proc/nowhere"])
def test_runs_that_cannot_be_written_are_found_before_weights_are_read(runs, place, refused, idle, tiny):
    (place / "r.yaml").write_text(f"name: r\nmodel: {tiny()}\nprune: {{blocks: 1, calibration: {{text: words.txt}}}}\n")
    before = files(place)
    said = refused("run", "r.yaml", "--runs", runs)
    assert f"--runs {runs}" in said and "choose a folder you may write to" in said
    (place / "m.gguf").write_bytes(b"GGUF")
    assert f"--runs {runs}" in refused("export", "m.gguf", "--gguf", "F16", "--out", "new", "--runs", runs)
    (place / "m.gguf").unlink()
    assert files(place) == before


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.EIO])
def test_a_folder_that_exists_is_tried_by_writing(code, tmp_path, monkeypatch):
    """As root no permission stops a test, so the system's answer is put in."""

    def write(path: Path, _: bytes) -> None:
        raise OSError(code, os.strerror(code), str(path))

    (tmp_path / "there").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        for check in (lambda: check_folder(tmp_path / "there", "--runs"), lambda: check_new(tmp_path / "new" / "deep")):
            with pytest.raises(UserError, match=os.strerror(code)):
                check()
    assert files(tmp_path) == ["there"]


def test_what_can_be_made_is_not_made_yet(tmp_path):
    check_new(tmp_path / "a" / "b" / "out")
    check_file_place(tmp_path / "a" / "b.json")
    check_folder(tmp_path / "runs" / "r", "--runs")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x")  # of an export that was killed, and goes on
    (tmp_path / "out").mkdir()
    check_new(tmp_path / "out")
    assert files(tmp_path) == [".out.partial", ".out.partial/half", "out"]


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--text", "none.txt", "--text: none.txt does not exist"),
        ("--text", "full", "full is a folder, but a file is needed"),
        ("--text", "latin.txt", "latin.txt is not UTF-8 text: byte 2 is 0xe9"),
        ("--task", "none.jsonl", "none.jsonl"),
        ("--task", "broken.jsonl", "line 2 of"),
        ("--base", "./none.gguf", "none.gguf does not exist"),
        ("--retrieval", "text=none.txt", "none.txt does not exist"),
    ],
)
def test_what_is_measured_on_is_read_before_the_model(option, value, why, place, refused, idle, tiny):
    (place / "latin.txt").write_bytes("blé".encode("latin-1"))
    (place / "broken.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n{no\n')
    arguments = [] if option == "--text" else ["--text", "words.txt"]
    assert why in refused("eval", tiny(), *arguments, option, value)
    folder = ("--task", "arc_easy", "--task-folder", "none")
    assert "--task-folder" in refused("eval", tiny(), "--text", "words.txt", *folder)


BUNDLE = "is not a bundle: it has no manifest.json"


@pytest.mark.parametrize(
    ("command", "options", "wrong"),
    [
        ("generate", ["--prompt", "x"], BUNDLE),
        ("chat", [], BUNDLE),
        ("bench", [], BUNDLE),
        ("serve", ["--port", "0"], BUNDLE),
        ("extract", ["--type", "Q8_0", "--out", "one.gguf"], BUNDLE),
        ("report", [], "is not the folder of a finished run: empty/last-run.json does not exist"),
        ("inspect", [], "is not a checkpoint, GGUF file, ONNX folder, bundle, stage or run folder"),
        ("export", ["--gguf", "Q8_0", "--out", "new"], "has no config.json"),
        ("merge", ["./empty", "--out", "new"], "has no config.json"),
        ("eval", ["--text", "words.txt"], "has no config.json"),
        ("run", [], "is a folder; give a recipe file"),
        ("validate", [], "is a folder; give a recipe file"),
        ("plan", [], "is a folder; give a recipe file"),
    ],
)
def test_a_missing_path_does_not_exist_and_a_wrong_one_lacks_something(command, options, wrong, place, refused):
    (place / "empty").mkdir()
    missing, empty = refused(command, "./none", *options), refused(command, "./empty", *options)
    assert "none" in missing and "does not exist" in missing and "not a" not in missing
    assert "empty" in empty and wrong in empty


@pytest.mark.parametrize("option", ["--prompt", "--system"])
def test_a_prompt_that_is_not_utf8_is_refused_before_the_model_is_loaded(option, refused, idle, bundle):
    prompt = [] if option == "--prompt" else ["--prompt", "x"]
    said = refused("generate", bundle, *prompt, option, NOT_UTF8)
    assert said == f"error: {option} is not UTF-8 text: byte 4 is 0xff (invalid start byte); save it as UTF-8\n"
    if option == "--system":
        assert "--system is not UTF-8" in refused("chat", bundle, option, NOT_UTF8)


def test_a_standard_input_that_is_not_utf8(refused, idle, bundle, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"stdin \xff")))
    assert "standard input is not UTF-8 text: byte 6 is 0xff" in refused("generate", bundle, "--prompt", "-")


def test_a_line_of_a_conversation_that_is_not_utf8_ends_it(bundle):
    command = [sys.executable, "-m", "compress", "chat", bundle, "--max-tokens", "3", "--engine", "onnx"]
    done = subprocess.run(command, capture_output=True, input=b"hi\nbad \xff\nhi\n")
    assert done.returncode == 2 and done.stdout.count(b"\n") == 1
    assert done.stderr.endswith(
        b"error: a line of standard input is not UTF-8 text: byte 4 is 0xff (invalid start byte); save it as UTF-8\n"
    )


def test_text_of_other_languages_and_pairs_is_text():
    for text in (None, "", "é", "\U0001f600", "a\0b"):
        check_text(text, "--prompt")


def test_a_key_that_is_not_utf8(refused, bundle):
    assert "--api-key is not UTF-8 text" in refused("serve", bundle, "--port", "0", "--api-key", NOT_UTF8)


def test_names_of_files_that_are_no_text_print_and_are_written(refused, tmp_path, tiny, capfd):
    assert "bad \\udcff byte does not exist" in refused("inspect", NOT_UTF8)
    folder = tmp_path / NOT_UTF8
    folder.symlink_to(tiny())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", str(folder)])
    assert not stopped.value.code and "\\udcff" in "".join(capfd.readouterr().out.split("\n"))
    write_whole(tmp_path / "a.json", json.dumps({"file": NOT_UTF8}, ensure_ascii=False))
    assert (tmp_path / "a.json").read_bytes() == rb'{"file": "bad \udcff byte"}'
    assert json.loads((tmp_path / "a.json").read_text()) == {"file": NOT_UTF8}


def test_a_model_in_a_folder_of_any_name_is_exported(tmp_path, tiny, capfd):
    folder = tmp_path / "m [a]: *?\u2028é"
    folder.symlink_to(tiny())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(folder), "--gguf", "Q8_0", "--out", str(tmp_path / "out {x} *")])
    assert not stopped.value.code, capfd.readouterr().err
    assert [file.name for file in tmp_path.rglob("*.gguf")] == ["m [a]- ---é-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "f"), "f: No such file or directory"),
        (OSError(errno.EIO, "Input/output error"), "here: Input/output error"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a → b: Invalid cross-device link"),
        (OSError("Can't load\n  it"), "here: Can't load it"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"f\xff"), "f\udcff: No such file"),
        (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid start byte"), "is not utf-8 text: invalid start byte at"),
        (
            UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"),
            r"a text contains '\udcff', which is not",
        ),
        (json.JSONDecodeError("Expecting value", "x", 0), "is not valid JSON: Expecting value"),
        (jinja2.TemplateSyntaxError("unexpected '}'", 3), "a chat template that was read is broken: unexpected '}'"),
        (SafetensorError("header too large"), "a safetensors file that was read is broken: header too large (here)"),
        (MemoryError(), "out of memory (here)"),
    ],
)
def test_what_files_and_the_machine_cause_is_one_line(error, said, refused, monkeypatch):
    found = explained(error, "here")
    assert found is not None and said in str(found) and "\n" not in str(found)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("compress.pipeline.inspection.inspect", fail)
    refused("inspect", "x")


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), TypeError("x"), AssertionError(), RuntimeError("x")])
def test_errors_of_the_program_keep_their_traceback(error, monkeypatch):
    assert explained(error, "here") is None

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("compress.pipeline.inspection.inspect", fail)
    with pytest.raises(type(error)):
        cli.main(["inspect", "x"])


def test_nobody_is_told_to_run_a_models_code():
    message = (
        "the tokenizer in t could not be loaded: The repository t contains custom code which must be executed to "
        "correctly load the model. You can inspect the repository content at /t .\n You can inspect the repository "
        "content at https://hf.co/t.\nPlease pass the argument `trust_remote_code=True` to allow custom code to be run."
    )
    said = without_foreign_advice(message)
    assert "trust_remote_code" not in said and "\n" not in said and "inspect" not in said
    assert said.startswith("the tokenizer in t could not be loaded: ") and "remove auto_map from" in said
    assert without_foreign_advice("two\nlines") == "two\nlines"


def test_the_sections_of_commands_are_checked_first(place, refused, idle, tiny):
    assert "gguf" in refused("export", tiny(), "--gguf", "Q5", "--out", "new")
    with pytest.raises(UserError, match="name at least one type"):
        checked(ExportConfig, {})


def test_a_tokenizer_with_code_of_its_own_is_refused_without_asking(tiny, refused, tmp_path, monkeypatch):
    def asked(*_: Any) -> str:
        raise AssertionError("asked whether to run a model's code")

    monkeypatch.setattr("builtins.input", asked)
    folder = tmp_path / "remote"
    shutil.copytree(tiny(), folder)
    file = folder / "tokenizer_config.json"
    code = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tok.Own", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | code))
    said = refused("export", folder, "--gguf", "Q8_0", "--out", tmp_path / "out")
    assert "trust_remote_code" not in said and "remove auto_map from its tokenizer_config.json" in said
