"""The plain installation and its extras: what runs without torch, and what is said where a library is missing.

The plain installation is imitated: a process, and every process it starts, that sees of the installed packages only
those that pyproject.toml's `dependencies` bring, directly or not.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import compress
import pytest
from compress.core.errors import UserError
from compress.core.extras import EXTRAS, FULL, load_library, missing, need
from compress.core.gguf_header import read_header
from compress.runtime.session import Session, Settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(str(compress.__file__)).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Another namespace package beside our own file in it shows no missing library; and the Hub's comes with tokenizers.
NOT_LOOKED_FOR = {"optimum", "huggingface-hub"}
# Imported where it is installed, beside compress and never by an extra: it pins a torch of its own.
BESIDE = {"vllm"}

# As `sitecustomize` it runs at the start of every process, and hides what the plain installation lacks.
HIDING = """
import sys

HIDDEN = {hidden!r}


class Without:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in [name for name in sys.modules if name.partition(".")[0] in HIDDEN]:
    del sys.modules[name]
"""


def brought(lines: Iterable[str]) -> set[str]:
    """The distributions that requirements bring, through the metadata of what is installed."""
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(line), "") for line in lines]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo += [(Requirement(line), wanted) for line in requires(name) or []]
    return {name for name, _ in seen}


def environment(folder: Path, *extras: str) -> dict[str, str]:
    """Variables of a process that sees the plain installation, and some extras."""
    there = brought([*PROJECT["dependencies"], *(line for extra in extras for line in OPTIONAL[extra])])
    hidden = {
        module
        for module, distributions in packages_distributions().items()
        if module != "compress" and not {canonicalize_name(name) for name in distributions} & there
    }
    assert {"torch", "transformers", "datasets", "pyarrow", "matplotlib", "safetensors", "onnx"} <= hidden
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HIDING.format(hidden=hidden), encoding="utf-8")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "200"}


Lean = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Lean:
    """lean("generate", …) runs the command line in the plain installation."""
    variables = environment(tmp_path_factory.mktemp("lean"))

    def run(*arguments: str | Path, typed: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "compress", *map(str, arguments)]
        return subprocess.run(command, input=typed, capture_output=True, text=True, env=variables, timeout=120)

    return run


def test_the_plain_installation_is_imitated(lean: Lean, tmp_path: Path):
    code = "import numpy, onnxruntime, tokenizers, xllamacpp\nfrom importlib.util import find_spec\n"
    code += "print([find_spec(n) for n in ('torch', 'starlette', 'onnx')])\nimport torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(tmp_path))
    assert done.stdout == "[None, None, None]\n"
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'torch'\n")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["--help"], "Make decoder-only language models small"),
        (["--version"], f"compress {compress.__version__}"),
        (["recipes"], "smollm2_135m_24L"),
        (["schema"], '"title": "Recipe"'),
        (["validate", "llama8b_26L"], "valid; stages: data, prune"),
        (["plan", "llama8b_26L", "--on", "rtx-4090"], "8.03 B parameters in 32 blocks"),
        (["run", "--help"], "Run a recipe"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_reads_no_model_runs(lean: Lean, command: list[str], shown: str):
    done = lean(*command)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_a_bundle_is_inspected(lean: Lean, bundle: Path):
    done = lean("inspect", bundle)
    assert done.returncode == 0, done.stderr
    assert "depths" in done.stdout and "gguf-F16" in done.stdout
    (part, *_) = sorted((bundle / "gguf").rglob("*-00001-of-*.gguf"))
    done = lean("inspect", part)
    assert done.returncode == 0, done.stderr
    assert "1 of" in done.stdout and "llama" in done.stdout


@pytest.mark.parametrize("engine", ["onnx", "llama.cpp"])
def test_a_bundle_writes_text(lean: Lean, bundle: Path, engine: str):
    done = lean(
        "generate", bundle, "--prompt", "the way", "--engine", engine, "--depth", "3", "--max-tokens", 5, "--threads", 1
    )
    assert done.returncode == 0, done.stderr
    with Session(bundle, engine, threads=1) as session:
        pieces = session.chat([{"role": "user", "content": "the way"}], Settings(max_tokens=5, depth=3))
        assert done.stdout == "".join(piece.text for piece in pieces) + "\n"


def test_a_bundle_writes_text_in_a_bounded_cache(lean: Lean, bundle: Path):
    options = ["--kv-budget", 8, "--kv-policy", "recent", "--kv-chunk", 4, "--kv-stabilizers", 2, "--kv-local", 4]
    done = lean("generate", bundle, "--prompt", "the way " * 9, "--engine", "onnx", "--max-tokens", 3, *options)
    assert done.returncode == 0, done.stderr
    assert "8 keys and values per head (recent)" in done.stderr


def test_a_bundle_talks(lean: Lean, bundle: Path):
    done = lean("chat", bundle, "--max-tokens", 4, "--threads", 1, typed="the way\n/depth 2\nthe way\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2


def test_a_bundle_is_timed(lean: Lean, bundle: Path, tmp_path: Path):
    sizes = ["--prompt-tokens", 8, "--new-tokens", 4, "--repeat", 1, "--threads", 1]
    done = lean("bench", bundle, *sizes, "--json", "--out", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    assert {(entry["engine"], entry["depth"]) for entry in json.loads(done.stdout)["depths"]} == {
        (engine, depth) for engine in ("onnx", "llama.cpp") for depth in (2, 3, 4)
    }
    done = lean("bench", bundle, *sizes, "--out", tmp_path / "bench.html")
    assert (done.returncode, done.stdout) == (2, "")  # before anything is measured
    assert "needs matplotlib, which is not installed: pip install 'llm-compress[full]'" in done.stderr


def test_figures_of_a_runs_bundle_are_kept_without_its_report(lean: Lean, bundle: Path, tmp_path: Path):
    shutil.copytree(bundle, tmp_path / "export-0" / "bundle")
    (tmp_path / "last-run.json").write_text("{}", encoding="utf-8")
    sizes = ["--prompt-tokens", 8, "--new-tokens", 4, "--repeat", 1, "--threads", 1, "--engine", "onnx"]
    done = lean("bench", tmp_path / "export-0" / "bundle", *sizes)
    assert done.returncode == 0, done.stderr
    assert "note: drawing the run's report again needs matplotlib, which is not installed" in done.stderr
    assert json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["stage"] == "export-0"


def test_one_depth_is_written_as_a_file_of_its_own(lean: Lean, bundle: Path, tmp_path: Path):
    done = lean("extract", bundle, "--type", "F16", "--depth", 2, "--out", tmp_path / "two.gguf")
    assert done.returncode == 0, done.stderr
    assert read_header(tmp_path / "two.gguf")["llama.block_count"] == 2


def test_a_bundle_is_served(bundle: Path, tmp_path: Path):
    command = [sys.executable, "-m", "compress", "serve", str(bundle), "--port", "0", "--threads", "1"]
    variables = environment(tmp_path / "serve", "serve")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert " at http://" in line, process.communicate()[1]
    connection = http.client.HTTPConnection("127.0.0.1", int(line.split("/v1")[0].rsplit(":", 1)[1]), timeout=60)
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "the way"}], "max_tokens": 4})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = json.load(connection.getresponse())
    connection.close()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["run", "tiny_random"], "compress run needs torch, which is not installed: pip install 'llm-compress[full]'"),
        (["export", "model", "--out", "out", "--gguf", "F16"], "compress export needs torch, "),
        (["merge", "a", "b", "--out", "out"], "compress merge needs torch, "),
        (["eval", "model", "--text", "text.txt"], "compress eval needs torch, "),
        (["report", "runs/x"], "compress report needs matplotlib, "),
        (
            ["serve", "BUNDLE"],
            "compress serve needs starlette, which is not installed: pip install 'llm-compress[serve]'",
        ),
        (["inspect", "BUNDLE/onnx/fp32/d2"], "compress inspect needs onnx, "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_one_line_says_what_to_install(lean: Lean, bundle: Path, command: list[str], line: str):
    done = lean(*[argument.replace("BUNDLE", str(bundle)) for argument in command])
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]+ which is not installed: pip install '[^\n]+'\n", done.stderr), done.stderr
    assert done.stderr.startswith(f"error: {line}")


def test_extras_are_those_of_pyproject():
    for extra, modules in EXTRAS.items():
        listed = {canonicalize_name(Requirement(line).name) for line in OPTIONAL[extra]} - {PROJECT["name"]}
        assert {canonicalize_name(name) for name in modules.values()} == listed - NOT_LOOKED_FOR


def third_party() -> Iterator[tuple[str, str]]:
    """(file, top-level name) of every import that is neither ours nor Python's."""
    pattern = re.compile(r"^\s*(?:from|import) ([a-zA-Z_]\w*)", re.MULTILINE)
    for file in sorted(ROOT.rglob("*.py")):
        place = file.relative_to(ROOT)
        if place.parts[0] in ("tests", "benchmarks", "docs", "build", "runs", "dist") or place.parts[0].startswith("."):
            continue
        source = re.sub(r'""".*?"""', "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        for name in pattern.findall(source):
            if name not in sys.stdlib_module_names and name != "compress":
                yield str(place), name


def test_every_library_that_is_imported_is_declared():
    own = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    own |= {*NOT_LOOKED_FOR, "pydantic-core"}
    names = packages_distributions()
    known = {module for modules in EXTRAS.values() for module in modules} | BESIDE
    found = [
        (file, name)
        for file, name in third_party()
        if name not in known
        and not own & {canonicalize_name(n) for n in names.get(name, [])}
        and name != "pydantic_core"
    ]
    assert found == []
    assert {name for _, name in third_party()} > {"torch", "numpy", "starlette", "lm_eval"}


def test_a_library_is_loaded_or_its_extra_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert load_library("x", "json") is json
    need("x", *FULL)
    (tmp_path / "peft.py").write_text("import a_library_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    with pytest.raises(UserError, match=r"^lora needs peft, which cannot be imported: No module named 'a_library_that"):
        load_library("lora", "peft")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)  # an earlier test may have imported it
    wanted = r"^tasks needs lm-eval, which is not installed: pip install 'llm-compress\[eval\]'$"
    with pytest.raises(UserError, match=wanted):
        need("tasks", "numpy", "lm_eval")
    with pytest.raises(UserError, match=wanted):
        load_library("tasks", "lm_eval.tasks")
    assert missing("x", ModuleNotFoundError("no", name="compress.typo")) is None  # a fault of ours keeps its traceback


# Ways to name the distribution `compress`, which on PyPI is somebody else's.
FOREIGN = re.compile(
    r"(?<![\w-])compress\["
    r"|pip3? install [^\n`#]*(?<![\w/.-])compress(?![\w/-])"
    r"|library_name: compress\b"
    r"|(?:version|requires|distribution|metadata)\([\"']compress[\"']\)"
    r"|(?m:^name = \"compress\")"
)


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("pip install compress", True),
        ("pip install -U 'compress[eval]'", True),
        ("`compress[full]`", True),
        ("library_name: compress\n", True),
        ('version("compress")', True),
        ('[project]\nname = "compress"', True),
        ("pip install llm-compress", False),
        ("pip install 'llm-compress[full]'", False),
        ("pip install .     # compress, beside it", False),
        ("library_name: llm-compress", False),
    ],
)
def test_the_search_for_the_old_name_finds_it(text: str, foreign: bool):
    assert bool(FOREIGN.search(text)) == foreign


def test_nothing_names_the_distribution_compress():
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".j2", ".json", ""}
    found = []
    for file in sorted(ROOT.rglob("*")):
        parts = file.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part not in (".ci", ".pre-commit-config.yaml") for part in parts)
        if hidden or parts[0] in ("build", "runs", "dist", "site") or parts[0].endswith(".egg-info"):
            continue
        if file.is_file() and file.suffix in suffixes and file != Path(__file__):
            text = file.read_text(encoding="utf-8", errors="replace")
            found += [f"{file}: {match[0]}" for match in FOREIGN.finditer(text)]
    assert found == []
