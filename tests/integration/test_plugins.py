"""Methods that an installed package adds, and what adding one to ours costs: a file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import compress
import gguf
import onnx
import pytest

HOME = Path(str(compress.__file__)).parent
METHODS = {
    ("objectives", "focal"): '''
from typing import Literal

from compress.training.objectives import Objective
from pydantic import Field


class Focal(Objective):
    """The negative log-likelihood, times (1 − likelihood)^γ."""

    kind: Literal["focal"] = "focal"
    gamma: float = Field(default=2.0, ge=0, description="0 is plain sft")

    def loss(self, terms):
        return (1 - (-terms.nll).exp()) ** self.gamma * terms.nll
''',
    ("metrics", "nearness"): '''
from typing import Literal

from compress.prune.metrics import Metric


class Nearness(Metric):
    """Blocks are the more important the nearer they are to one place."""

    kind: Literal["nearness"] = "nearness"
    to: int = 0

    def windows(self, study, length):
        return [float(-abs(first - self.to)) for first in range(study.num_blocks - length + 1)]
''',
    ("heals", "damp"): '''
from typing import Literal

from compress.prune.heals import Heal


class Damp(Heal):
    """The MLP before the gap adds less."""

    kind: Literal["damp"] = "damp"
    factor: float = 0.5

    def fit(self, gap):
        from compress.records.importance import Healing

        record = Healing(gap.block, (gap.first, gap.last), self.factor, {}, 1.0, 0)
        return gap.decoder.fused(gap.block, gap.identity * self.factor), record
''',
    ("searches", "scattered"): '''
from typing import Literal

from compress.prune.searches import Search


class Scattered(Search):
    """The least important blocks of which no two are neighbours."""

    kind: Literal["scattered"] = "scattered"

    def choose(self, study, config, count, candidates):
        values = config.importance.windows(study, 1)
        chosen = []
        for block in sorted(candidates, key=lambda block: values[block]):
            if len(chosen) < count and all(abs(block - other) > 1 for other in chosen):
                chosen.append(block)
        return tuple(sorted(chosen))
''',
}
POLICY = {
    ("policies", "oldest"): '''
from typing import Literal

from compress.kv.policy import Policy


class Oldest(Policy):
    """The first tokens of a text stay."""

    kind: Literal["oldest"] = "oldest"

    def score(self, view):
        return -view.places[None].repeat(view.heads, 0).astype("float32")
''',
}
CHECK = {
    ("checks", "opening"): '''
from typing import ClassVar, Literal

from compress.data.checks import Check
from pydantic import Field


class Opening(Check):
    """The answer begins as the row's column `answer` says."""

    kind: Literal["opening"] = "opening"
    words: int = Field(default=1, ge=1, description="how many words are compared")
    needs: ClassVar = frozenset(["answer"])

    def comparable(self, truth):
        return len(truth.answer.split()) >= self.words

    def agrees(self, text, truth):
        return text.split()[: self.words] == truth.answer.split()[: self.words]
''',
}
CLASSES = {
    "focal": "Focal",
    "nearness": "Nearness",
    "damp": "Damp",
    "scattered": "Scattered",
    "oldest": "Oldest",
    "opening": "Opening",
}
RECIPE = """
name: plugged
model: random:llama
seed: 7
data: {source: texts, rows: 16, batch: 16, tokens: 24, length: 32, heldout: 0.25}
prune:
  blocks: 2
  importance: {kind: nearness, to: 1}
  search: scattered
  heal: {kind: damp, factor: 0.75}
  calibration: {tokens: 128, length: 32}
distill:
  objective: {kind: focal, gamma: 1.5}
  tune: {kind: lora, rank: 2}
  length: 32
  accumulate: 1
  max_steps: 2
"""
CHECKED = """
name: checked
model: random:llama
data:
  source: dataset
  path: rows.jsonl
  answer: final
  length: 256
  rewrite: {kind: general, check: {kind: opening, words: 1}, max_tokens: 8}
"""
WITH_A_WRITER = """
import json, sys
from pathlib import Path

from compress.api import Recipe, load_model
from compress.core.registry import packages
from compress.core.stage import Context, Inputs
from compress.data import rewriting
from compress.data.rows import read_rows
from compress.data.sampling import Sampled
from compress.data.stage import run


class Writer:  # always the same words
    def __init__(self, engine, base, *rest):
        from compress.modeling.load import load_tokenizer
        self.tokenizer = load_tokenizer(base)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def speed(self):
        return None

    def sample(self, prompts, *rest, **more):
        tokens = self.tokenizer("in all", add_special_tokens=False)["input_ids"]
        return [Sampled(tokens, ended=True) for _ in prompts]


rewriting.Writer = Writer
file = Path(sys.argv[1])
data = Recipe.load(str(file)).data
base = load_model("random:llama").folder
out = file.parent / "out"
out.mkdir()
run(data, Inputs(base, base), out, Context(recipe_dir=file.parent))
print(json.dumps({
    "why": {row.id: row.why for row in read_rows(out)},
    "packages": packages(data),
    "config": data.model_dump(mode="json")["rewrite"]["check"],
}))
"""


def package(folder: Path, name: str, version: str, sources: dict[tuple[str, str], str]) -> Path:
    """A package's sources, with an entry point for each method."""
    module = name.replace("-", "_")
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text("")
    points = ""
    for (group, kind), source in sources.items():
        (folder / module / f"{kind}.py").write_text(source, encoding="utf-8")
        points += f'[project.entry-points."compress.{group}"]\n{kind} = "{module}.{kind}:{CLASSES[kind]}"\n'
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "{name}"\nversion = "{version}"\n{points}'
        f'[tool.setuptools]\npackages = ["{module}"]\n',
        encoding="utf-8",
    )
    return folder


def install(sources: Path, site: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(sources)]
    subprocess.run(command, check=True, timeout=300)


def call(arguments: list[object], *paths: Path) -> subprocess.CompletedProcess[str]:
    """The command line, in a process that sees these folders first."""
    command = [sys.executable, "-m", "compress", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=seeing(*paths))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package tiny-plugin 1.2."""
    root = tmp_path_factory.mktemp("plugin")
    install(package(root / "sources", "tiny-plugin", "1.2", METHODS), root / "site")
    return root / "site"


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    def write(*changes: tuple[str, str]) -> Path:
        text = RECIPE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "plugged.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_a_recipe_runs_with_the_methods_of_an_installed_package(
    site: Path, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run = ["run", recipe(), "--runs", tmp_path / "runs"]
    done = call(run, site)
    assert done.returncode == 0, done.stderr
    folders = {path.name.partition("-")[0]: path for path in (tmp_path / "runs" / "plugged").iterdir() if path.is_dir()}
    record = json.loads((folders["prune"] / "importance.json").read_text())
    assert (record["importance"], record["search"]) == ("nearness", "scattered")
    last = record["blocks"] - 2  # farthest from block 1; healing keeps the very last
    assert record["dropped"] == [last - 2, last] and record["values"][:3] == [-1.0, 0.0, -1.0]
    assert [healing["ridge"] for healing in record["healing"]] == [0.75, 0.75]
    manifests = {
        name: json.loads((folders[name] / "manifest.json").read_text()) for name in ("data", "prune", "distill")
    }
    assert manifests["prune"]["config"]["importance"] == {"kind": "nearness", "to": 1}
    assert manifests["distill"]["config"]["objective"] == {"kind": "focal", "gamma": 1.5}
    assert [manifest["versions"].get("tiny-plugin") for manifest in manifests.values()] == [None, "1.2", "1.2"]

    again = call([*run, "--dry-run"], site)
    assert again.returncode == 0 and "to do" not in again.stdout
    newer = by_hand(tmp_path / "site", "tiny-plugin", "1.3", METHODS)
    lines = call([*run, "--dry-run"], newer).stdout.splitlines()
    states = {line.split()[1]: line for line in lines if line.startswith("│")}
    assert "complete" in states["data"]
    assert "to do" in states["prune"] and "to do" in states["distill"]


def test_their_names_and_options_are_checked_as_ours_are(site: Path, recipe: Callable[..., Path]) -> None:
    file = recipe(("gamma", "gama"), ("scattered", "scatered"), ("factor: 0.75", "factor: much"))
    done = call(["validate", file], site)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{file}:13: distill.objective.gama: unknown key 'gama'; did you mean 'gamma'?" in done.stderr
    assert f"{file}:9: prune.search: 'scatered' is not one of 'window', 'lowest', 'greedy', 'beam', 'scattered'" in (
        done.stderr
    )
    assert "did you mean 'scattered'?" in done.stderr and f"{file}:10: prune.heal.factor" in done.stderr
    schema = json.loads(call(["schema"], site).stdout)
    node = schema["$defs"]["PruneConfig"]["properties"]["heal"]
    assert "damp" in node["anyOf"][0]["enum"] and schema["$defs"]["Damp"]["properties"]["factor"]["default"] == 0.5
    without = call(["validate", file])
    assert "'focal' is not one of 'sft', 'dft', 'asft', 'kd'" in without.stderr and "scattered" not in without.stderr


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_module_that_nobody_has\n", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("raise SystemExit('not\\nhere')\n", "SystemExit: not here"),
        ("class Focal:\n    pass\n", "TypeError: broken_plugin.focal:Focal is no Objective whose kind is 'focal'"),
        ("", "AttributeError"),
    ],
)
def test_a_broken_package_is_one_line_where_it_is_asked_for(
    tmp_path: Path, recipe: Callable[..., Path], source: str, reason: str
) -> None:
    site = by_hand(tmp_path / "site", "broken-plugin", "0.3", {("objectives", "focal"): source})
    ours = [("nearness, to: 1", "angular"), ("scattered", "window"), ("{kind: damp, factor: 0.75}", "linear")]
    file = recipe(*ours)
    done = call(["validate", file], site)
    (_, line) = done.stderr.splitlines()
    assert done.returncode == 2 and line.strip().startswith(
        f"{file}:13: distill.objective: the objective 'focal' of the package broken-plugin 0.3 is broken: {reason}"
    )
    assert call(["validate", recipe(*ours, ("{kind: focal, gamma: 1.5}", "sft"))], site).returncode == 0


def test_two_packages_with_one_name_are_told_apart_by_nobody(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    methods = {("objectives", "focal"): METHODS["objectives", "focal"]}
    sites = [by_hand(tmp_path / name, name, "1.0", methods) for name in ("one-plugin", "two-plugin")]
    done = call(["validate", recipe(("importance: {kind: nearness, to: 1}\n", "\n"), ("scattered", "window"))], *sites)
    assert "the objective 'focal' is in two packages, one-plugin 1.0 and two-plugin 1.0; uninstall one" in done.stderr


def test_a_policy_of_an_installed_package_is_one_of_the_recipe_s(tmp_path: Path) -> None:
    """The version of what is named in words alone is part of the result too."""
    site = by_hand(tmp_path / "site", "kv-plugin", "2.0", POLICY)
    code = (
        "from compress.core.registry import packages\n"
        "from compress.evaluation.config import EvaluateConfig\n"
        "used = {'retrieval': {'policies': ['full', 'oldest']}}\n"
        "print([packages(EvaluateConfig.model_validate(section)) for section in (used, {})])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=seeing(site))
    assert done.stdout.strip() == "[{'kv-plugin': '2.0'}, {}]", done.stderr
    file = tmp_path / "recipe.yaml"
    file.write_text("name: x\nmodel: random:llama\nevaluate:\n  retrieval: {policies: [oldst]}\n")
    done = call(["validate", file], site)
    assert "there is no policy 'oldst'" in done.stderr and "did you mean 'oldest'?" in done.stderr


def test_a_check_of_an_installed_package_decides_on_rewrites(tmp_path: Path) -> None:
    """Beside the engine that writes, all of the data stage is as in a run."""
    site = by_hand(tmp_path / "site", "check-plugin", "2.1", CHECK)
    lines = [{"prompt": f"q{n}", "response": "gold", "final": final} for n, final in enumerate(("in a", "of b", ""))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = tmp_path / "recipe.yaml"
    file.write_text(CHECKED)
    done = subprocess.run([sys.executable, "-c", WITH_A_WRITER, file], capture_output=True, text=True, env=seeing(site))
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    assert written["why"] == {"0": "opening agrees", "1": "differs", "2": "uncheckable"}
    assert written["packages"] == {"check-plugin": "2.1"}
    assert written["config"] == {"kind": "opening", "words": 1}
    file.write_text(CHECKED.replace("opening,", "openin,"))
    assert "'openin' is not one of 'none', 'number', 'choice', 'exact', 'python', 'opening'" in (
        call(["validate", file], site).stderr
    )
    file.write_text(CHECKED.replace("answer: final", ""))
    message = "check: opening needs answer: name the column that holds the final answer"
    assert message in call(["validate", file], site).stderr


def seeing(*paths: Path) -> dict[str, str]:
    """The environment of a process that sees these folders first."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])}


def by_hand(site: Path, name: str, version: str, sources: dict[tuple[str, str], str]) -> Path:
    """A package as pip leaves it, without pip's seconds."""
    module = name.replace("-", "_")
    info = site / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (site / module).mkdir()
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for (group, kind), source in sources.items():
        (site / module / f"{kind}.py").write_text(source, encoding="utf-8")
        lines += [f"[compress.{group}]", f"{kind} = {module}.{kind}:{CLASSES[kind]}"]
    info.joinpath("entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package as it is, to add something to."""
    left_out = shutil.ignore_patterns(".*", "build", "docs", "tests", "benchmarks", "runs", "*.egg-info", "__pycache__")
    return shutil.copytree(HOME, tmp_path / "compress", ignore=left_out)


def test_adding_a_method_costs_one_file(copied: Path, recipe: Callable[..., Path]) -> None:
    folders = {"objectives": "training/objectives", "checks": "data/checks"}
    for (group, kind), source in (METHODS | CHECK).items():
        folder = copied / folders.get(group, f"prune/{group}")
        (folder / f"{kind}.py").write_text(source, encoding="utf-8")
    done = call(["validate", recipe()], copied.parent)
    assert done.returncode == 0, done.stderr
    misspelt = call(["validate", recipe(("gamma", "gama"))], copied.parent)
    assert "unknown key 'gama'; did you mean 'gamma'?" in misspelt.stderr
    schema = json.loads(call(["schema"], copied.parent).stdout)
    assert {"Focal", "Nearness", "Damp", "Scattered", "Opening"} <= schema["$defs"].keys()


def test_a_gguf_type_is_one_line(copied: Path, tmp_path: Path) -> None:
    table = copied / "runtime" / "artifact_types.py"
    text = table.read_text(encoding="utf-8")
    (line,) = re.findall(r'    "Q5_0": .*\n', text)
    out = tmp_path / "bundle"
    words = ["export", "random:llama", "--gguf", "Q5_0", "--out", out, "--runs", tmp_path / "runs"]
    table.write_text(text.replace(line, ""), encoding="utf-8")
    assert "Q5_0" in call(words, copied.parent).stderr  # there is no such type
    table.write_text(text, encoding="utf-8")
    done = call(words, copied.parent)
    assert done.returncode == 0, done.stderr
    (artifact,) = json.loads((out / "manifest.json").read_text())["artifacts"]
    assert artifact["type"] == "Q5_0" and 5 < artifact["bits_per_weight"] < 9
    (file,) = (out / "gguf").glob("*.gguf")
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors if tensor.name.startswith("blk.")}
    assert types == {"Q5_0", "F32"}


QUANTIZER = '''
import torch

from . import Quantized, Quantizer, chunks, pack


def quantize(weight, importance=None):
    """4 bits, symmetric: no zero points."""
    scales, codes = [], []
    for chunk in chunks(weight):
        scale = (chunk.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-12)
        codes.append(((chunk / scale).round() + 8).to(torch.uint8))
        scales.append(scale[..., 0])
    scale = torch.cat(scales)
    return Quantized(pack(torch.cat(codes).flatten(1)).reshape(*scale.shape, 16), scale.numpy(), None, 4)


QUANTIZER = Quantizer(quantize, bits=4, row_error=0.2)
'''


def test_adding_an_onnx_precision_costs_one_line_and_one_file(copied: Path, tmp_path: Path) -> None:
    table = copied / "runtime" / "artifact_types.py"
    line = '    "plain4": ArtifactType(5.5, 7, kl=9, blocks="symmetric", head="int8"),\n'
    text = table.read_text(encoding="utf-8")
    before = "ONNX_TYPES = {\n"
    assert before in text
    table.write_text(text.replace(before, before + line), encoding="utf-8")
    (copied / "export" / "quantizers" / "symmetric.py").write_text(QUANTIZER, encoding="utf-8")
    out = tmp_path / "bundle"
    done = call(["export", "random:llama", "--onnx", "plain4", "--out", out, "--runs", tmp_path / "r"], copied.parent)
    assert done.returncode == 0, done.stderr
    (artifact,) = json.loads((out / "manifest.json").read_text())["artifacts"]
    assert artifact["type"] == "plain4"
    (file,) = out.glob("onnx/**/model.onnx")
    graph = onnx.load(str(file), load_external_data=False).graph
    names = {tensor.name.rpartition("_")[2] for tensor in graph.initializer if "_proj" in tensor.name}
    assert {"Q4", "scales"} <= names and "points" not in names
