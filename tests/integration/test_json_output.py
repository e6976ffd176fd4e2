"""What commands print with --json is what `compress schema` says, and nothing else is on standard output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compress.cli import main as cli
from compress.pipeline.outputs import output_schema

Run = Callable[..., tuple[int, str, str]]
NAMES = {"array": list, "object": dict, "string": str, "boolean": bool, "null": type(None)}


def faults(value: Any, schema: Any, root: dict[str, Any], path: str = "$") -> Iterator[str]:
    """Where a value is not what a JSON schema (of the keywords that pydantic writes) says."""
    if schema is True:
        return
    if "$ref" in schema:
        definition = root["$defs"][schema["$ref"].rpartition("/")[2]]
        yield from faults(value, definition, root, path)
    for keyword in ("anyOf", "oneOf"):
        options = [list(faults(value, option, root, path)) for option in schema.get(keyword, [])]
        if options and [] not in options:
            yield f"{path}: none of {len(options)} fits: {min(options, key=len)}"
    if "const" in schema and value != schema["const"]:
        yield f"{path}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if (kind := schema.get("type")) is not None and not of_type(value, kind):
        yield f"{path}: {value!r} is no {kind}"
        return
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        yield from (f"{path}: lacks {name}" for name in schema.get("required", []) if name not in value)
        for name, item in value.items():
            if name in properties:
                yield from faults(item, properties[name], root, f"{path}.{name}")
            elif others is False:
                yield f"{path}: has {name}"
            else:
                yield from faults(item, others, root, f"{path}.{name}")
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from faults(item, schema.get("items", True), root, f"{path}[{number}]")


def of_type(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        whole = not isinstance(value, float) or (kind == "number" or value.is_integer())
        return isinstance(value, (int, float)) and not isinstance(value, bool) and whole
    return isinstance(value, NAMES[kind])


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture
def printed(run: Run) -> Callable[..., Any]:
    """What a command prints with --json, held against its schema."""

    def printed(command: str, *arguments: object) -> Any:
        code, out, err = run(command, *arguments, "--json")
        assert code == 0, err
        value, schema = json.loads(out), json.loads(run("schema", command)[1])
        assert list(faults(value, schema, schema)) == []
        assert list(faults([*value, 7] if isinstance(value, list) else value | {"more": 1}, schema, schema))
        return value

    return printed


def test_recipes_and_their_plans(printed):
    found = {entry["name"]: entry for entry in printed("recipes")}
    assert Path(found["tiny_random"]["path"]).is_file() and found["tiny_random"]["summary"].startswith("A random tiny")
    valid = printed("validate", "tiny_random", "--set", "prune.blocks=3")
    assert valid["name"] == "tiny-random" and valid["stages"] == ["data", "prune", "distill", "export", "evaluate"]
    plan = printed("plan", "tiny_random", "--set", "prune.blocks=3")
    assert (plan["blocks"], plan["blocks_after"], plan["seconds"], plan["device"]) == (8, 5, None, None)
    assert all(sum(stage["memory"].values()) == stage["peak_memory_bytes"] > 0 for stage in plan["stages"])
    tight = printed("plan", "llama8b_26L", "--on", "rtx-4090", "--memory", "8GB")
    assert tight["memory_bytes"] == 8 * 10**9 and tight["seconds"] is not None
    lacking = [stage for stage in tight["stages"] if not stage["fits"]]
    assert lacking and any(stage["change"] or stage["on_processors"] for stage in lacking)


def test_everything_that_is_inspected(printed, tiny, bundle, tmp_path):
    found = printed("inspect", tiny())
    assert found["kind"] == "checkpoint" and found["blocks"] == 4
    assert found["parameters"] == sum(found["types"].values())
    whole = printed("inspect", bundle)
    assert whole["depths"] == [2, 3, 4] and len(whole["artifacts"]) == 6
    first = next(artifact for artifact in whole["artifacts"] if artifact["role"] == "gguf-F16@2")
    part = printed("inspect", bundle / first["path"])
    assert part["parts"] > 1 and part["bytes_of_all_parts"] == first["bytes"] and part["blocks"] == 2
    graph = next(artifact for artifact in whole["artifacts"] if artifact["role"] == "onnx-fp32")
    assert printed("inspect", bundle / graph["path"])["operators"]["GroupQueryAttention"] == 4
    (tmp_path / "c.txt").write_text("some words to calibrate on " * 20)
    (tmp_path / "r.yaml").write_text(
        f"name: r\nmodel: {tiny()}\nprune: {{blocks: 1, calibration: {{tokens: 256, length: 16, text: c.txt}}}}\n"
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "r.yaml"])
    assert not stopped.value.code
    run = printed("inspect", "runs/r")
    assert [stage["name"] for stage in run["stages"]] == ["prune"] and len(run["reports"]) == 2
    stage = printed("inspect", Path("runs/r") / run["stages"][0]["folder"])
    assert stage["config"]["blocks"] == 1 and stage["seconds"] > 0


def test_figures(printed, tiny, bundle, tmp_path):
    (tmp_path / "t.txt").write_text("some words to measure on " * 20)
    where = ("--text", "t.txt", "--tokens", 32, "--limit", 2, "--task", "builtin:copy")
    base, model = printed("eval", tiny(seed=2), "--base", tiny(seed=1), *where)
    assert base["role"] == "base" and model["kl_to_base"] > 0 and model["tasks"]["builtin:copy"]["n"] == 2
    how = ("--engine", "onnx", "--prompt-tokens", 8, "--new-tokens", 4, "--repeat", 1, "--threads", 1)
    assert [entry["depth"] for entry in printed("bench", bundle, *how)["depths"]] == [2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "tiny_rndom"), "did you mean 'tiny_random'?"),
        (("plan", "tiny_random", "--on", "rtx4090"), "did you mean rtx-4090"),
        (
            ("validate", "tiny_random", "--set", "prune.block=1", "--set", "seed=x"),
            "has 2 problems: --set prune.block=1",
        ),
        (("inspect", "nowhere"), "nowhere does not exist"),
        (("eval", "random:llama", "--text", "nowhere.txt"), "--text: nowhere.txt does not exist"),
        (("eval", "random:llama", "--text", "t", "--dtype", "bfloat61"), "did you mean 'bfloat16'?"),
        (("bench", "nowhere"), "nowhere does not exist"),
    ],
)
def test_errors_are_one_line_on_standard_error(run, arguments, message):
    code, out, err = run(*arguments, "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_schemas_are_found_by_name(run):
    assert json.loads(run("schema")[1]) == output_schema("recipe")
    assert output_schema("report")["title"] == "Report"
    code, out, err = run("schema", "evla")
    assert (code, out) == (2, "") and "did you mean 'eval'?" in err


def test_the_check_of_schemas_finds_faults():
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    assert not list(faults({"n": 1}, schema, schema))
    for wrong in ({}, {"n": "1"}, {"n": True}, {"n": 1.5}, {"n": 1, "m": 2}, [1]):
        assert list(faults(wrong, schema, schema)), wrong
