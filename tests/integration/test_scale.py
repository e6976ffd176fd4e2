"""Several processes end with what one process makes: the same rows to the byte, the same weights but for rounding."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.data.rows import Row, write_rows
from compress.modeling.blocks import drop_blocks
from compress.modeling.checkpoint import save_checkpoint
from compress.modeling.load import load_model, load_tokenizer
from safetensors.torch import load_file

PRELOAD: list[str] = [f"compress.{name}.stage" for name in ("data", "distill", "prune")]
PRELOAD += ["compress.pipeline.summary", "accelerate", "peft"]
PRELOAD += ["compress.pipeline.report.plots", "matplotlib.backends.backend_svg", "torch.distributed.tensor"]
PRELOAD += ["transformers.models.llama.modeling_llama", "torch.nn.parallel.distributed", "torch.distributed.fsdp"]
SHORT = (
    "data.rows=18 data.batch=4 data.max_prompt_tokens=16 data.max_tokens=16 prune.calibration.tokens=256 "
    "distill.objective=kd distill.lr=0.01 distill.select=last distill.max_steps=6 distill.save_every=2"
).split()
# One process of several, in a session of its own, with its output in a file.
CHILD = """
import gc, os, sys
gc.freeze()
rank, world, port, log, body, given = {!r}
os.setsid()
for number in (1, 2):
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
if world > 1:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
import torch
torch.set_num_threads(1)
exec(body)
"""
# The command line, with something done to it first.
COMMAND = """
arguments, hurt = given
exec(hurt)
sys.argv = ["compress", *arguments]
from compress.cli.main import main
main()
"""
# The distill stage alone, or the sort stage where depths are given; the gradients of its steps are saved.
TRAIN = """
from pathlib import Path
from safetensors.torch import save_file
from compress.distill import stage
from compress.training import train
from compress.distill.config import DistillConfig
from compress.sort import stage as sort
from compress.sort.config import SortConfig
from compress.pipeline.group import processes
from compress.core.stage import Context, Inputs
from compress.training.sharding import whole
options, base, model, data, out, hurt, shard = given
keep, found = train.Recorder.on_pre_optimizer_step, {}
def note(recorder, args, state, control, **rest):
    keep(recorder, args, state, control, **rest)
    for name, parameter in recorder.trainer.student.named_parameters():
        if parameter.requires_grad:
            found[f"{state.global_step}/{name}"] = whole(parameter.grad).clone()
train.Recorder.on_pre_optimizer_step = note
exec(hurt)
with processes("cpu") as (group, device):
    section, stage = (SortConfig, sort) if "depths" in options else (DistillConfig, stage)
    config, out = section.model_validate(options), Path(out)
    out.mkdir(exist_ok=True)
    context = Context(seed=7, group=group, shard=shard)
    stage.check(config, Path(base), context)
    stage.run(config, Inputs(Path(base), Path(model), {"data": Path(data)}), out, context)
    if group.rank == 0:
        save_file(found, out / "gradients.safetensors")
"""


def launch(folder: Path, world: int, body: str, given: Callable[[int], Any] | Any) -> list[tuple[int, str]]:
    """Run `body` in `world` processes; the exit code and the output of each."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        log = folder / f"log{rank}.txt"
        log.unlink(missing_ok=True)
        own = given(rank) if callable(given) else given
        code = CHILD.format((rank, world, port, str(log), body, own))
        process = multiprocessing.get_context("forkserver").Process(target=exec, args=(code, {}))
        process.start()
        started.append((process, log))
    for process, _ in started:
        process.join(120)
        process.kill()
    return [(process.exitcode or 0, log.read_text()) for process, log in started]


def arguments(runs: Path, until: str = "distill") -> list[str]:
    options = [part for override in SHORT for part in ("--set", override)]
    return ["run", "tiny_random", "--runs", str(runs), "--until", until, *options]


def command(runs: Path, world: int) -> None:
    """`compress run`, to its end."""
    found = launch(runs, world, COMMAND, (arguments(runs), ""))
    assert [code for code, _ in found] == [0] * world, found


KILLS = """
from compress.data import drafts
from transformers import Trainer
where, name = {!r}
owner = Trainer if where == "Trainer" else drafts.Drafts
plain, calls = getattr(owner, name), []
def die(*given):
    calls.append(given)
    if len(calls) == 2:
        os.kill(os.getpid(), 9)
    return plain(*given)
setattr(owner, name, die)
"""


def kill(runs: Path, where: str, name: str) -> None:
    """`compress run` in two processes, the second of which is killed when it calls a method for the second time."""
    hurt = KILLS.format((where, name))
    found = launch(runs, 2, COMMAND, lambda rank: (arguments(runs), hurt if rank == 1 else ""))
    assert [code for code, _ in found] == [2, -signal.SIGKILL]
    assert found[0][1].count("error: another process of this run has failed; finished work is kept") == 1
    assert "Traceback" not in found[0][1]


def made(runs: Path) -> dict[str, bytes]:
    """What the stages made, by stage and name; manifests, which have times, and the trained model are left out."""
    found = {}
    for folder in (runs / "tiny-random").glob("[a-z]*-*/"):
        for file in folder.rglob("*"):
            if file.is_file() and file.name != "manifest.json":
                found[f"{folder.name.partition('-')[0]}/{file.relative_to(folder)}"] = file.read_bytes()
    return found


MODEL = "distill/model/model.safetensors"
CURVES = "distill/curves.jsonl"


def learned(artifacts: dict[str, bytes]) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    from safetensors.torch import load

    return load(artifacts[MODEL]), [json.loads(line) for line in artifacts[CURVES].decode().splitlines()]


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """The same files, byte for byte but for what was trained: its weights and curves differ by rounding."""
    assert found.keys() == expected.keys()
    assert [n for n in found if n not in (MODEL, CURVES) and found[n] != expected[n]] == []
    (weights, curves), (wanted, lines) = learned(found), learned(expected)
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert [line.keys() for line in curves] == [line.keys() for line in lines]
    for line, other in zip(curves, lines, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


@pytest.fixture(scope="module")
def forkserver() -> None:
    """Processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    warm = context.Process(target=exec, args=("pass", {}))
    warm.start()
    warm.join()


@pytest.fixture(scope="module")
def alone(forkserver: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes."""
    runs = tmp_path_factory.mktemp("alone")
    command(runs, 1)
    return made(runs)


@pytest.fixture(scope="module")
def pair(forkserver: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What two processes make, started by torchrun itself."""
    runs = tmp_path_factory.mktemp("pair")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "compress", *arguments(runs)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[3/3] distill") == 1  # one process speaks
    return made(runs)


def test_two_processes_make_what_one_makes(alone: dict[str, bytes], pair: dict[str, bytes]) -> None:
    assert {"data/rows.parquet", "data/stats.json", "prune/model/model.safetensors", MODEL, CURVES} <= alone.keys()
    assert_same(pair, alone)
    weights, _ = learned(alone)
    from safetensors.torch import load

    before = load(alone["prune/model/model.safetensors"])
    assert max(float((weights[name] - before[name]).abs().max()) for name in before) > 1e-2  # it did learn


@pytest.fixture(scope="module")
def killed(forkserver: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, one of them killed while self-data is drawn; and again, within its second checkpoint."""
    runs = tmp_path_factory.mktemp("killed")
    kill(runs, "Drafts", "_batch")
    (parts,) = runs.glob("tiny-random/.data-*/.work/parts")
    written = {file.name for file in parts.glob("*.jsonl")}
    assert {"00000.jsonl", "00001.jsonl"} <= written and "00003.jsonl" not in written
    kill(runs, "Trainer", "_save_rng_state")
    (trainer,) = runs.glob("tiny-random/.distill-*/.work/trainer")
    assert [path.parent.name for path in trainer.glob("*/WHOLE")] == ["checkpoint-2"]
    return runs


def test_a_killed_run_ends_with_the_same_bytes(killed: Path, pair: dict[str, bytes], tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "runs")
    command(tmp_path / "runs", 2)
    assert made(tmp_path / "runs") == pair


def test_what_two_processes_began_one_finishes(killed: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "runs")
    command(tmp_path / "runs", 1)
    assert_same(made(tmp_path / "runs"), alone)


FAILS = """
from compress.data import drafts
from compress.core.errors import UserError
def fail(*_): raise UserError("no more of this")
drafts.Drafts._batch = fail
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rank, base: base | ({"hurt": FAILS} if rank == 1 else {}), "error: no more of this"),
        (lambda rank, base: base | {"hurt": FAILS}, "error: no more of this"),
        (
            lambda rank, base: base | {"more": ["--set", "distill.accumulate=3"]},
            "error: distill.accumulate is 3, which",
        ),
        (lambda rank, base: base | {"more": ["--set", f"seed={rank}"]}, "error: processes 0 and 1 differ in what is"),
        (
            lambda rank, base: base | {"runs": base["runs"] / str(rank)},
            "error: process 1 on .*: does not see the folder",
        ),
        (lambda rank, base: base | {"more": ["--device", "mps"]}, "--device mps: with several processes use cpu"),
    ],
    ids=["one-fails", "all-fail", "uneven", "other-recipe", "other-folder", "device"],
)
def test_an_error_is_told_once_and_ends_all(
    forkserver: None, tmp_path: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]], message: str
) -> None:
    import re

    def given(rank: int) -> Any:
        use = change(rank, {"runs": tmp_path / "runs", "hurt": "", "more": []})
        return [*arguments(use["runs"]), *use["more"]], use["hurt"]

    found = launch(tmp_path, 2, COMMAND, given)
    assert [code for code, _ in found] == [2, 2]
    text = "".join(output for _, output in found)
    assert len(re.findall(message, text)) == 1 and text.count("error:") == 1 and "Traceback" not in text
    assert not list(tmp_path.glob("**/.seen-*"))


class World:
    """A base model, the same without a block, and rows that make five batches: two processes share them unevenly."""

    def __init__(self, base: Path, folder: Path):
        self.base, self.folder = base, folder
        self.tied = '"tie_word_embeddings": true' in (base / "config.json").read_text()
        model = load_model(base)
        drop_blocks(model, [1])
        save_checkpoint(model, load_tokenizer(base), folder / "pruned")
        draw, words = random.Random(3), "the way of many people is which model time and look so".split()
        (folder / "data").mkdir()
        rows = []
        for number in range(14):
            turns = [" ".join(draw.choices(words, k=draw.randrange(4, 20))) for _ in range(2)]
            talk = [{"role": r, "content": text} for r, text in zip(("user", "assistant"), turns, strict=True)]
            rows.append(Row(number, "heldout" if number % 4 == 0 else "train", talk))
        write_rows(folder / "data", rows)

    def train(self, name: str, world: int, hurt: str, shard: bool, options: Any) -> list[tuple[int, str]]:
        """The distill or sort stage; exit codes and outputs."""
        plain = {"objective": "kd", "tune": "full", "lr": 1e-3, "length": 64, "epochs": 2, "accumulate": 2}
        plain |= {"batch": 2, "eval_every": 3, "save_every": 2, "clip": 1e9, "schedule": "constant", "warmup": 0}
        paths = [str(path) for path in (self.base, self.folder / "pruned", self.folder / "data", self.folder / name)]
        return launch(self.folder, world, TRAIN, (plain | options, *paths, hurt, shard))

    def __call__(
        self, name: str, world: int, hurt: str = "", shard: bool = False, **options: Any
    ) -> dict[str, torch.Tensor]:
        """The gradients of each step, by "step/parameter"."""
        found = self.train(name, world, hurt, shard, options)
        assert [code for code, _ in found] == [0] * world, found
        return load_file(self.folder / name / "gradients.safetensors")

    def model(self, name: str) -> Path:
        return self.folder / name / "model" / "model.safetensors"

    def curves(self, name: str) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (self.folder / name / "curves.jsonl").read_text().splitlines()]
        for line in lines:  # each depth's figures beside the others
            for key in ("depths", "eval_depths"):
                for own in line.pop(key, []):
                    line |= {f"{key}.{own['depth']}.{figure}": value for figure, value in own.items()}
        return lines


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(
    request: pytest.FixtureRequest,
    forkserver: None,
    tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    base = tiny(blocks=4, hidden=32, heads=2, kv_heads=1, intermediate=48, tied=request.param)
    return World(base, tmp_path_factory.mktemp("scale"))


def differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], step: int) -> float:
    """The largest relative difference between the gradients of one step, parameter by parameter."""
    assert found.keys() == wanted.keys()
    names = [name for name in wanted if name.startswith(f"{step}/")]
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm().clamp_min(1e-12)) for n in names)


DROPPED = """
plain = train.DistillTrainer.compute_loss
def nothing(self, *arguments, **options):
    loss = plain(self, *arguments, **options)
    return loss * 0 if self.group.rank == 1 else loss
train.DistillTrainer.compute_loss = nothing
"""


def test_a_step_of_two_processes_is_a_step_of_one(world: World) -> None:
    """Gradients, before any optimizer makes much of little, at all steps: the last of each epoch has one batch left."""
    one, two = world("one", 1, gradient_checkpointing=True), world("two", 2, gradient_checkpointing=True)
    compare(world, two, one, "two", "one")
    if world.tied:
        return
    dropped = world("dropped", 2, DROPPED)
    assert differences(dropped, one, 0) > 0.1  # this is what it would look like
    options: dict[str, Any] = {"tune": {"kind": "lora", "rank": 4}, "objective": "asft"}
    compare(world, world("lora2", 2, **options), world("lora1", 1, **options), "lora2", "lora1")
    own = {"temperature": 0, "max_tokens": 8, "refresh": 2, "batch": 2}
    options |= {"objective": "kd", "on_policy": own}
    compare(world, world("own2", 2, **options), world("own1", 1, **options), "own2", "own1")


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_sorted_depths_learn_the_same(world: World, shard: bool) -> None:
    """Also which depths learn from which tokens is the same, however many processes share a step."""
    options: dict[str, Any] = {"depths": [1, 2, 3], "sample": 2, "gradient_checkpointing": True}
    if "sorted-1" not in {path.name for path in world.folder.iterdir()}:
        world("sorted-1", 1, **options)
    wanted, name = load_file(world.folder / "sorted-1" / "gradients.safetensors"), f"sorted-{shard}"
    compare(world, world(name, 2, shard=shard, **options), wanted, name, "sorted-1")


def compare(
    world: World, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], name: str, reference: str
) -> None:
    """The same gradients, curves and model, but for rounding."""
    assert max(differences(found, wanted, step) for step in range(6)) < 1e-4
    lines, others = world.curves(name), world.curves(reference)
    assert [line["epoch"] for line in lines if "epoch" in line] == [0.4, 0.8, 1, 1.4, 1.8, 2]  # five batches
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    weights, kept = load_file(world.model(name)), load_file(world.model(reference))
    for key, weight in kept.items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-5)


def test_sharded_weights_learn_the_same(world: World) -> None:
    """FSDP2 on two processes; killed within its second checkpoint, it goes on and ends with the same bytes."""
    options: dict[str, Any] = {"gradient_checkpointing": True}
    compare(world, world("shards", 2, shard=True, **options), world("whole", 1, **options), "shards", "whole")
    if world.tied:
        return
    found = world.train("killed", 2, KILLS.format(("Trainer", "_save_rng_state")), True, options)
    assert [code for code, _ in found] == [-signal.SIGKILL] * 2
    found = world.train("killed", 1, "", False, options)
    assert found[0][0] == 1 and "checkpoint-2 was written with --shard; resume with --shard" in found[0][1]
    world("killed", 2, shard=True, **options)
    assert world.model("killed").read_bytes() == world.model("shards").read_bytes()
    assert world.curves("killed") == world.curves("shards")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
