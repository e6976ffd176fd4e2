"""README and docs/: every command and recipe is one that the program takes; what is cheap is run, page by page."""

from __future__ import annotations

import ast
import glob
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from compress.cli import main as cli
from compress.core.errors import UserError
from compress.pipeline.recipe import Recipe
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
COMMANDS: dict[str, Any] = get_command(cli.app).commands  # type: ignore[attr-defined]

# Commands that are not run here, by pattern, and why. All others are.
NEEDS_HARDWARE = {
    "*--device cuda*": "a GPU",
    "*--gpu-layers 20": "a GPU",
    "llama-server *": "a llama-server on PATH",
    "*meta-llama/*": "the Hub, and room for 8B parameters",
    "accelerate launch *": "several GPUs",
    "compress eval runs/my-llama/*": "the Hub",
    "compress run llama70b_64L *": "memory for 70B parameters",
}
COVERED = {
    "make *": ".ci/run",
    "pip install *": "tests/integration/test_installation.py",
    "python -m venv *": "tests/integration/test_installation.py",
    ".venv*/bin/pip install *": "tests/integration/test_installation.py",
    "source .venv/bin/activate": "tests/integration/test_installation.py",
    "hf auth login*": "tests/integration/test_plain_folders.py",
    "compress serve *": "tests/integration/test_serve.py",
    "compress bench *--speculate*": "tests/integration/test_run_commands.py",
    "compress generate *--engine llama.cpp --kv-budget*": "tests/integration/test_llamacpp_kv.py",
    "compress generate *--kv-budget 1024 --prompt*": "tests/integration/test_kv_bundle.py",
    "compress generate *--kv-positions contiguous*": "tests/integration/test_kv_bundle.py",
    "compress * --llama-server *": "tests/integration/test_llama_server.py",
    "compress generate *--kv-type q8_0*": "tests/integration/test_kv_types.py",
    "compress generate *--depth auto*": "tests/integration/test_run_commands.py",
    "compress run smollm2_135m_*": "tests/integration/test_plan_recipes.py",
    "compress eval my-model *--retrieval*": "tests/integration/test_retrieval.py",
    "compress eval bundle *": "tests/integration/test_damage.py",
    "compress export my-model *": "tests/integration/test_depth_bundles.py",
    "compress fit my-model *": "tests/integration/test_fit.py",
    "compress * fit/recipe.yaml*": "tests/integration/test_fit.py",
}
PYTHON_COVERED = {
    "from openai import": "tests/integration/test_serve.py",
    "from optimum.onnxruntime import": "benchmarks/optimum_ort.py",
}
PAGES_COVERED = {"docs/tutorials/python.md": "tests/integration/test_python_page.py"}


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page].read_text("utf-8"), re.M | re.S):
        yield Block(page, language, text)


def commands(page: str) -> list[str]:
    """The command lines in a page's bash blocks, without comments."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines()]
    stripped = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines)
    return [line for line in stripped if line]


def noted_commands(page: str) -> list[str]:
    """Commands of ours in running text, and in research pages' indented lines."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page].read_text("utf-8"), flags=re.M | re.S).replace("\\\n", "")
    inline = [" ".join(found.split()) for found in re.findall(r"`(compress [a-z][^`]*)`", text)]
    return inline + re.findall(r"^    (compress [a-z][^\n]*)$", text, re.M)


def ours(command: str) -> list[str] | None:
    """The arguments of `compress` in a command line, without redirections; None where it is another program's."""
    found = re.search(r"(?:^|/|-m )compress (.*)$", command)
    return None if found is None else shlex.split(re.sub(r"\s[<>] \S+", "", found[1]))


def listed(command: str) -> bool:
    return any(fnmatch(command, pattern) for pattern in [*NEEDS_HARDWARE, *COVERED])


def test_every_command_is_one_that_the_program_takes():
    for page in PAGES:
        for command in commands(page):
            arguments = ours(command)
            if arguments is None:
                assert listed(command), f"{page}: {command}: neither a command of ours nor listed in this file"
                continue
            assert arguments[0] in COMMANDS, f"{page}: {command}"
            try:
                COMMANDS[arguments[0]].make_context(arguments[0], arguments[1:])
            except Exception as error:
                pytest.fail(f"{page}: {command}: {getattr(error, 'message', error)}")


def test_commands_in_running_text_have_real_names_and_options():
    for page in PAGES:
        for command in noted_commands(page):
            name, *rest = (ours(command) or [""])[0:]
            if page.startswith("docs/research/") and name not in COMMANDS:
                continue
            assert name in COMMANDS, f"{page}: {command}"
            options = {option for parameter in COMMANDS[name].params for option in parameter.opts} | {"--help"}
            unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.split("=")[0] not in options]
            assert not unknown, f"{page}: {command}: no option {unknown}"


def recipe_of(text: str, folder: Path) -> Path:
    """A recipe file of a YAML block: as it is, or a part of one with a name and a model before it."""
    file = folder / "recipe.yaml"
    if not re.search(r"^model:", text, re.M):
        data = "" if re.search(r"^data:", text, re.M) else "data: {source: magpie}\n"
        text = f"name: part\nmodel: random:llama\n{data}{text}"
    file.write_text(text, "utf-8")
    return file


def test_every_yaml_block_is_a_recipe_or_a_part_of_one(tmp_path):
    for page in PAGES:
        for block in blocks(page):
            if block.language == "yaml":
                try:
                    Recipe.load(str(recipe_of(block.text, tmp_path)))
                except UserError as error:
                    pytest.fail(f"{page}:\n{block.text}\n{error}")


def test_overrides_name_real_keys(tmp_path):
    whole = "".join(f"{stage}: {section}\n" for stage, section in STAGES_OF_ALL.items())
    for page in PAGES:
        for command in commands(page):
            arguments = ours(command)
            if arguments and arguments[0] in ("run", "plan", "validate"):
                overrides = [b for a, b in pairwise(arguments) if a == "--set"]
                recipe = arguments[1]
                if recipe in ("my.yaml", "my-llama.yaml", "fit/recipe.yaml"):
                    recipe = str(recipe_of(whole, tmp_path))
                Recipe.load(recipe, overrides)


STAGES_OF_ALL = {
    "data": "{source: texts, rows: 24, tokens: 48, length: 48, batch: 6, heldout: 0.25}",
    "prune": "{blocks: 2, heal: linear, calibration: {tokens: 384, length: 48, batch: 1, scoring: 48, held_out: 48}}",
    "distill": "{objective: asft, tune: {kind: lora, rank: 4}, length: 48, accumulate: 1, max_steps: 2, eval_every: 2}",
}
VERIFY = "{tokens: 24, window: 24}"
MADE = f"export: {{gguf: [Q4_K_M], onnx: [int4], depths: [12, 18, 24], imatrix_tokens: 128, verify: {VERIFY}}}"


@pytest.fixture(scope="module")
def world(tiny, builder_here, tmp_path_factory) -> Path:
    """A folder with what the pages' commands are about: a model of 24 blocks, its run and bundle, recipes, texts."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "my-model").symlink_to(tiny(blocks=10))
    (folder / "deep").symlink_to(tiny(blocks=24, max_positions=4096))
    head = "name: my-model\nseed: 7\n"
    whole = f"{head}model: my-model\n" + "".join(f"{stage}: {section}\n" for stage, section in STAGES_OF_ALL.items())
    (folder / "my.yaml").write_text(whole, "utf-8")
    (folder / "made.yaml").write_text(f"{head}model: deep\ndata: {STAGES_OF_ALL['data']}\n{MADE}", "utf-8")
    with builder_here(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("compress run made.yaml --runs made")
    (folder / "bundle").symlink_to(next(folder.glob("made/my-model/export-*/bundle")))
    for seed, name in enumerate(("A", "B", "C", "START")):
        (folder / name).symlink_to(tiny(seed=seed))
    (folder / "mine.jsonl").write_text('{"question": "2 + 2?", "choices": ["3", "4"], "answer": "B"}\n', "utf-8")
    words = [f"{word} {i}" for i, word in enumerate("the way of many people is which model".split() * 60)]
    (folder / "wiki.txt").write_text(" ".join(words[:24]), "utf-8")
    (folder / "long.txt").write_text(" ".join(words), "utf-8")
    (folder / "my-llama.yaml").write_text(llama_recipe(), "utf-8")
    return folder


def llama_recipe() -> str:
    """The 8B tutorial's recipe, with the model's shape from this repository in the place of the Hub's."""
    recipe = next(b.text for b in blocks("docs/tutorials/llama8b.md") if b.text.startswith("name: my-llama"))
    name, config = "meta-llama/Llama-3.1-8B-Instruct", ROOT / "recipes/configs/llama3_1_8b.json"
    return re.sub(rf"^model: {name}.*$", f"model: {{source: {name}, config: {config}}}", recipe, flags=re.M)


def run(command: str, text: str = "") -> None:
    """Run a command line in this process, with its globs and redirections; fails where it does not exit with 0."""
    words = ours(command) or []
    arguments = [match for word in words for match in (sorted(glob.glob(word)) if "*" in word else [word])]
    source = re.search(r"\s< (\S+)", command)
    data = Path(source[1]).read_bytes() if source else text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        try:
            cli.main(arguments)
        except SystemExit as error:
            assert not error.code, f"{command} ends with {error.code}"


def runnable(page: str) -> list[str]:
    return [command for command in commands(page) if not listed(command)]


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)])
def test_commands_of_a_page_run_one_after_the_other(page, world, tmp_path, monkeypatch, builder_here):
    for entry in world.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "runs").mkdir()
    for name in ("smollm2-135m-24L", "my-llama"):
        (tmp_path / "runs" / name).symlink_to(world / "made/my-model")
    monkeypatch.chdir(tmp_path)
    with builder_here():
        for command in runnable(page):
            run(command, "/exit\n")


WITH_PYTHON = [
    page for page in PAGES if page not in PAGES_COVERED and any(b.language == "python" for b in blocks(page))
]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_a_page_runs(page, world, monkeypatch, builder_here):
    """All blocks of a page after one another, in one namespace."""
    monkeypatch.chdir(world)
    names: dict[str, Any] = {"__name__": page}
    for block in blocks(page):
        if block.language == "python":
            code = compile(block.text, page, "exec")
            if not any(line in block.text for line in PYTHON_COVERED):
                with builder_here():
                    exec(code, names)


def test_the_plan_of_the_8b_tutorial_fits_its_card(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-llama.yaml").write_text(llama_recipe(), "utf-8")
    run("compress plan my-llama.yaml --on rtx-4090")
    assert "every stage fits in" in capsys.readouterr().out


def test_what_is_listed_is_there(every_command: list[str]):
    for pattern in [*NEEDS_HARDWARE, *COVERED]:
        assert any(fnmatch(command, pattern) for command in every_command), f"no page has {pattern}"
    for place in [*COVERED.values(), *PYTHON_COVERED.values(), *PAGES_COVERED.values()]:
        assert (ROOT / place).is_file(), place


@pytest.fixture
def every_command() -> list[str]:
    return [command for page in PAGES for command in commands(page)]


def own_sources() -> list[Path]:
    """Every Python file of the repository: not those of an environment in it, nor what was built or fetched."""
    rooms = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    return [file for room in rooms if room.name not in ("build", "runs", "site") for file in room.rglob("*.py")]


def source_texts() -> str:
    """All texts in the program, f-strings' own words included, joined where the source joins them."""
    texts = []
    for path in own_sources():
        if path.relative_to(ROOT).parts[0] in ("tests", "docs", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                texts.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_real_messages():
    known = source_texts()
    for title in re.findall(r"^### (`.*)$", PAGES["docs/troubleshooting.md"].read_text("utf-8"), re.M):
        message = re.findall(r"`([^`]*)`", title)[0]
        pieces = [piece.strip() for piece in re.split(r"\b[A-Z]{4,}\b|'[A-Z]+'", message)]
        for piece in pieces:
            assert piece.strip("()' ") in known, f"no message of the program has {piece!r}"


def test_what_the_code_says_of_the_docs_is_there():
    sources = own_sources()
    files = [*sources, *ROOT.glob("recipes/*.yaml"), ROOT / "Makefile"]
    assert len(sources) > 300
    for file in files:
        for page in re.findall(r"\bdocs/[a-z0-9/-]+\.md", file.read_text("utf-8")):
            assert (ROOT / page).is_file(), f"{file.relative_to(ROOT)} names {page}"
