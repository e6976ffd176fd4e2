"""Damaged files of every kind: any command ends well, or with one line and exit code 2, never in a traceback.

Which file is damaged, how, and what is run on it are drawn from a seed. DAMAGE_CASES=500 tries more of them.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compress.cli import main as cli

CASES = int(os.environ.get("DAMAGE_CASES", "5"))
FIRST = int(os.environ.get("DAMAGE_FIRST", "0"))
RECIPE = """name: r
model: checkpoint
data: {source: dataset, path: rows.jsonl}
prune: {blocks: 1, calibration: {tokens: 256, length: 16, text: words.txt}}
"""
OTHER_JSON = [b"[]", b"null", b"5", b'"text"', b"{}", b'{"a": NaN', b"9" * 5000]
DEEP = b"[" * 2000
OTHER_VALUES: list[Any] = [None, "x", -1, 10**30, 1e308, [], {}, [None], {"a": 1}, True, "", "\udcff", 0.5]
LONG = b"x" * 100
# product -> the commands that read it; {x} is its path
COMMANDS: dict[str, list[list[str]]] = {
    "checkpoint": [
        ["inspect", "{x}"],
        ["export", "{x}", "--gguf", "Q8_0", "--out", "{w}/out", "--runs", "{w}/runs"],
        ["eval", "{x}", "--text", "{w}/words.txt", "--tokens", "32", "--window", "16", "--runs", "{w}/runs"],
        ["plan", "{w}/r.yaml", "--runs", "{w}/runs"],
        ["run", "{w}/r.yaml", "--runs", "{w}/new"],
        ["merge", "{x}", "{x}", "--out", "{w}/merged", "--runs", "{w}/runs"],
    ],
    "bundle": [
        ["inspect", "{x}"],
        ["generate", "{x}", "--prompt", "hi", "--max-tokens", "3", "--engine", "onnx", "--threads", "1"],
        ["generate", "{x}", "--prompt", "hi", "--max-tokens", "3", "--engine", "llama.cpp", "--context", "64"],
        ["generate", "{x}", "--prompt", "hi", "--max-tokens", "3", "--engine", "onnx", "--depth", "2"],
        ["chat", "{x}", "--max-tokens", "3", "--engine", "onnx", "--threads", "1"],
        ["extract", "{x}", "--type", "F16", "--depth", "2", "--out", "{w}/one.gguf"],
        ["extract", "{x}", "--type", "fp32", "--depth", "2", "--out", "{w}/one"],
        ["eval", "{x}", "--text", "{w}/words.txt", "--tokens", "32", "--window", "16"],
    ],
    "runs": [
        ["inspect", "{x}/r"],
        ["report", "{x}/r"],
        ["run", "{w}/r.yaml", "--runs", "{x}"],
        ["run", "{w}/r.yaml", "--runs", "{x}", "--set", "evaluate={{tokens: 32, window: 16, text: words.txt}}"],
    ],
    "rows.jsonl": [["run", "{w}/r.yaml", "--runs", "{w}/new", "--until", "data"]],
    "words.txt": [
        ["eval", "{w}/checkpoint", "--text", "{x}", "--tokens", "32", "--window", "16"],
        ["run", "{w}/r.yaml", "--runs", "{w}/new"],
    ],
    "task.jsonl": [["eval", "{w}/checkpoint", "--text", "{w}/words.txt", "--tokens", "32", "--task", "{x}"]],
    "r.yaml": [["validate", "{x}"], ["plan", "{x}", "--runs", "{w}/runs"], ["run", "{x}", "--dry-run"]],
    "one.gguf": [["inspect", "{x}"], ["export", "{x}", "--gguf", "F16", "--out", "{w}/out", "--runs", "{w}/cache"]],
}


@pytest.fixture(scope="module")
def products(tiny: Callable[..., Path], bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that commands read."""
    root = tmp_path_factory.mktemp("products")
    shutil.copytree(tiny(), root / "checkpoint")
    shutil.copytree(bundle, root / "bundle")
    rows = [{"prompt": f"what is {i}", "response": f"the way of {i} people and time"} for i in range(24)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "words.txt").write_text("some words to calibrate on " * 20)
    (root / "task.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n' * 4)
    (root / "r.yaml").write_text(RECIPE)
    commands = [
        ["run", str(root / "r.yaml"), "--runs", str(root / "runs")],
        ["extract", str(root / "bundle"), "--type", "F16", "--out", str(root / "one.gguf")],
    ]
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            cli.main(command)
        assert not stopped.value.code
    return root


def damage(file: Path, draw: random.Random) -> str:
    """Do something to a file; what."""
    whole = file.read_bytes()
    kinds = [
        "cut",
        "last byte",
        "empty",
        "flip",
        "flip",
        "random",
        "not UTF-8",
        "UTF-16",
        "removed",
        "folder",
        "longer",
    ]
    if file.suffix in (".json", ".jsonl", ".yaml"):
        kinds += ["other JSON"] * 2
    if file.suffix == ".json":
        kinds += ["other value"] * 8
    kind = draw.choice(kinds)
    middle = draw.randrange(len(whole)) if whole else 0
    if kind == "removed":
        file.unlink()
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "other value":
        return f"other value {_other_value(file, draw)}"
    else:
        flipped = bytes([whole[middle] ^ (1 << draw.randrange(8))]) if whole else b""
        changed = {
            "cut": whole[:middle],
            "last byte": whole[:-1],
            "empty": b"",
            "flip": whole[:middle] + flipped + whole[middle + 1 :],
            "random": draw.randbytes(len(whole)),
            "not UTF-8": whole[:middle] + b"\xff" + whole[middle:],
            "UTF-16": whole.decode("latin-1").encode("utf-16"),
            "longer": whole + LONG,
            "other JSON": draw.choice([*OTHER_JSON, DEEP] if file.suffix == ".json" else OTHER_JSON),
        }
        file.unlink()  # it may be a link
        file.write_bytes(changed[kind])
    return f"{kind} {middle}"


def _other_value(file: Path, draw: random.Random) -> str:
    """Put another value in some place of a JSON file."""
    values = json.loads(file.read_text())
    places: list[tuple[Any, Any]] = []
    left: list[Any] = [values]
    while left and len(places) < 3000:
        node = left.pop(0)
        items = (
            list(node.items() if isinstance(node, dict) else enumerate(node)) if isinstance(node, (dict, list)) else []
        )
        places += [(node, key) for key, _ in items]
        left += [value for _, value in items]
    node, key = draw.choice(places[: draw.choice((20, 3000))])
    if draw.random() < 0.2 and isinstance(node, dict):
        del node[key]
        found = f"no {key}"
    else:
        node[key] = draw.choice(OTHER_VALUES)
        found = f"{key} = {str(node[key])[:40]!a}"
    file.unlink()
    file.write_text(json.dumps(values))
    return found


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def outcome(command: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main(command)
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return outcome


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
@pytest.mark.parametrize("product", COMMANDS)
def test_whatever_is_damaged_is_said_in_one_line(products, outcome, tmp_path, monkeypatch, product, seed):
    draw = random.Random(f"{product} {seed}")
    work = tmp_path / "w"
    shutil.copytree(products, work, copy_function=os.link)
    monkeypatch.chdir(work)
    target = work / product
    files = sorted(f for f in (target.rglob("*") if target.is_dir() else [target]) if f.is_file())
    command = [part.format(x=target, w=work) for part in draw.choice(COMMANDS[product])]
    right = outcome(command) if command[0] in ("generate", "chat") else None
    file = draw.choice(files)
    what = f"{file.relative_to(work)}: {damage(file, draw)}"
    code, out, err = outcome(command)
    said = f"{what}\n{' '.join(command)}\n{err}"
    assert code in (0, 2), said
    if code == 2:
        assert [line.startswith("error: ") for line in err.splitlines()].count(True) == 1, said
        assert "Traceback" not in err and "trust_remote_code" not in err, said
    elif right is not None:
        assert out == right[1], f"another answer, and nothing said\n{said}"
