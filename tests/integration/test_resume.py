"""Killed with SIGKILL at any moment and started again, a run ends with the same bytes as one that was not."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from compress.modeling.source import hash_file

KILLS = 10
SHORT = (
    "data.rows=16 data.batch=4 data.max_prompt_tokens=16 data.max_tokens=16 prune.calibration.tokens=256 "
    "distill.select=last distill.max_steps=6 distill.save_every=2 retain.length=480 retain.rows=3 retain.steps=6 "
    "retain.heldout=2 retain.eval_every=2 export.onnx=[] export.verify.tokens=8 "
    "export.verify.window=16 evaluate.speed=null evaluate.tokens=64"
).split()
# The processes are forked from one that has imported everything, so that the kills strike work and not imports.
PRELOAD = ["data", "prune", "distill", "retain", "export", "evaluation"]
PRELOAD = [f"compress.{name}.stage" for name in PRELOAD] + ["compress.pipeline.summary", "accelerate", "peft"]
PRELOAD += [
    "compress.pipeline.report.plots",
    "matplotlib.backends.backend_svg",
    "transformers.models.llama.modeling_llama",
]
# Runs the command line in a session of its own. Logs the renames whose target holds a text, and dies before the n-th.
CHILD = """
import gc, os, sys
gc.freeze()  # so that a collection does not walk through all that was imported
arguments, log, text, fatal = {!r}
os.setsid()
for number in (1, 2):
    os.dup2(os.open(log + ".txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
seen = 0
def watch(event, args):
    global seen
    if event == "os.rename" and text and text in str(args[1]):
        seen += 1
        if seen == fatal:
            os.kill(os.getpid(), 9)
        with open(log, "a") as file:
            file.write(str(args[1]) + "\\n")
sys.addaudithook(watch)
from compress.export import rivals
rivals.RIVAL_TOKENS = 32  # the unpruned model's types are told apart on few tokens, too
sys.argv = ["compress", *arguments]
from compress.cli.main import main
main()
"""
MEASURED = ("peak_memory_bytes", "tokens_per_second", "prefill_tokens_per_second")
ALWAYS = ("stage", "fingerprint", "format", "config", "inputs", "base", "seed", "device", "dtype", "versions")


@dataclass
class Command:
    """`compress run` of the shortened tiny recipe, into a folder."""

    runs: Path
    until: str = "evaluate"

    def start(self, text: str = "", fatal: int = 0) -> BaseProcess:
        options = [part for override in SHORT for part in ("--set", override)]
        arguments = ["run", "tiny_random", "--runs", str(self.runs), "--until", self.until, *options]
        self.runs.mkdir(exist_ok=True)
        code = CHILD.format((arguments, str(self.log), text, fatal))
        process = multiprocessing.get_context("forkserver").Process(target=exec, args=(code, {}))
        process.start()
        return process

    @property
    def log(self) -> Path:
        return self.runs / "renames"

    def finish(self, text: str = "") -> list[str]:
        """Run to the end; the logged renames of this process alone."""
        self.log.unlink(missing_ok=True)
        process = self.start(text)
        process.join()
        assert process.exitcode == 0, self.log.with_suffix(".txt").read_text()
        return self.log.read_text().splitlines() if self.log.exists() else []

    def die(self, text: str, fatal: int) -> None:
        """Run until the `fatal`-th rename to a path that holds `text`; that one does not happen."""
        process = self.start(text, fatal)
        process.join()
        assert process.exitcode == -signal.SIGKILL, self.log.with_suffix(".txt").read_text()

    def partial(self, stage: str) -> Path:
        (folder,) = self.runs.glob(f"tiny-random/.{stage}-*.partial")
        return folder


def kill(process: BaseProcess) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # no session of its own yet
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()


def artifacts(runs: Path) -> dict[str, object]:
    """sha256 of every file of every stage folder; what was measured and when is left out."""
    found: dict[str, object] = {}
    for folder in sorted((runs / "tiny-random").glob("[a-z]*-*/")):
        manifest = json.loads((folder / "manifest.json").read_text())
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = str(file.relative_to(folder.parent))
            if file.name == "models.json":
                rows = json.loads(file.read_text())
                found[name] = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
            elif file == folder / "manifest.json":
                found[name] = {key: manifest[key] for key in ALWAYS}
            else:
                found[name] = hash_file(file)
                if file.name == "README.md":  # completed when the run ends, so that no manifest has its hash
                    continue
                assert manifest["files"][str(file.relative_to(folder))]["sha256"] == found[name]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, object], float]]:
    """The artifacts of an uninterrupted run, and its seconds."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    warm = multiprocessing.get_context("forkserver").Process(target=exec, args=("pass", {}))
    warm.start()
    warm.join()
    command = Command(tmp_path_factory.mktemp("whole"))
    begun = time.monotonic()
    command.finish()
    yield artifacts(command.runs), time.monotonic() - begun


def test_an_uninterrupted_run_makes_what_is_compared(whole):
    names = {Path(name).name for name in whole[0]}
    assert {
        "rows.parquet",
        "model.safetensors",
        "importance.json",
        "curves.jsonl",
        "heads.safetensors",
        "models.json",
    } <= names
    assert any(name.endswith("Q8_0.gguf") for name in names)
    assert sum(name.endswith("/manifest.json") for name in whole[0]) == 7  # six stages and the bundle's own


def test_ten_kills_at_random_moments_change_no_byte(whole, tmp_path):
    """Each wait is a random share of the whole run's time, so that over the kills a run is struck everywhere."""
    expected, seconds = whole
    draw, struck, number = random.Random(7), 0, 0
    while struck < KILLS:
        number += 1
        command, begun, before = Command(tmp_path / str(number)), time.monotonic(), struck
        while struck < KILLS:
            process = command.start()
            process.join(draw.uniform(0.02, 0.4) * seconds)
            if process.exitcode is not None:
                if struck == before:  # the machine has become faster since
                    seconds = min(seconds, time.monotonic() - begun)
                break
            kill(process)
            struck += 1
        command.finish()
        assert artifacts(command.runs) == expected
        leftovers = [path.name for path in (command.runs / "tiny-random").iterdir() if path.name.startswith(".")]
        assert leftovers == [".lock"]


def test_self_data_goes_on_with_the_rows_it_had(whole, tmp_path):
    command = Command(tmp_path / "runs", until="data")
    command.die("/parts/", fatal=3)
    parts = command.partial("data") / ".work" / "parts"
    first = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(parts.glob("*.jsonl"))}
    assert list(first) == ["00000.jsonl", "00001.jsonl"]
    command.die("manifest.json", fatal=1)  # everything is made, but not finished
    second = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(parts.glob("*.jsonl"))}
    assert len(second) > 2
    assert {name: second[name] for name in first} == first  # neither drawn nor written again
    assert command.finish("/parts/") == []
    assert artifacts(command.runs).items() <= whole[0].items()


def test_training_goes_on_from_its_checkpoint(whole, tmp_path):
    command = Command(tmp_path / "runs", until="distill")
    command.die("/checkpoint-4/", fatal=1)  # half of this checkpoint is there
    trainer = command.partial("distill") / ".work" / "trainer"
    assert (trainer / "checkpoint-4").exists()
    assert [path.parent.name for path in trainer.glob("*/WHOLE")] == ["checkpoint-2"]
    renamed = command.finish("/checkpoint-")
    assert sorted({Path(path).parent.name for path in renamed}) == ["checkpoint-4"]
    assert artifacts(command.runs).items() <= whole[0].items()


def test_heads_go_on_behind_the_last_row_and_the_last_head(whole, tmp_path):
    command = Command(tmp_path / "runs", until="retain")
    command.die("/.work/rows/", fatal=3)
    work = command.partial("retain") / ".work"
    assert sorted(file.stem for file in work.glob("rows/*.safetensors")) == ["train-0", "train-1"]
    command.die("/.work/heads/", fatal=2)
    assert len(list(work.glob("rows/*.safetensors"))) == 3 + 2
    assert [file.stem for file in work.glob("heads/*.safetensors")] == ["0"]
    written = [Path(path).name for path in command.finish("/.work/")]
    assert "0.safetensors" not in written and "1.safetensors" in written
    assert not [name for name in written if name.startswith(("train", "heldout"))]
    assert artifacts(command.runs).items() <= whole[0].items()


def test_stages_killed_just_before_their_manifests_are_made_again_over_what_lies_there(whole, tmp_path):
    command = Command(tmp_path / "runs")
    for number, stage in enumerate(("data", "prune", "distill", "retain", "export", "evaluate")):
        command.die(".partial/manifest.json", fatal=min(number + 1, 2))  # the stage before is finished first
        assert not (command.partial(stage) / "manifest.json").exists()
        assert any(command.partial(stage).iterdir())
    command.finish()
    assert artifacts(command.runs) == whole[0]
