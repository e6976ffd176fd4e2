"""Stage folders: fingerprints, manifests, completion by renaming, the lock."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compress.core.errors import UserError
from compress.core.files import write_json
from compress.pipeline import store
from compress.pipeline.explain import readable_errors
from compress.pipeline.store import StageFolder, fingerprint, lock
from compress.records import record

HOLDER = "import sys, time\nfrom pathlib import Path\nfrom compress.pipeline.store import lock\n"
ARGUMENTS = {
    "stage": "prune",
    "format": 1,
    "config": {"a": 1, "b": [1, 2]},
    "seed": 7,
    "dtype": "float32",
    "base": "aa",
    "inputs": ["bb", "cc"],
    "files": ["dd"],
}


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    """A stage folder in the making: two files and working state."""
    folder = StageFolder(tmp_path / "run", "prune", "0123456789abcdef")
    (folder.partial / "model").mkdir(parents=True)
    (folder.partial / "model" / "w.bin").write_bytes(b"weights")
    (folder.partial / "notes.txt").write_text("abc")
    (folder.partial / ".work" / "deep").mkdir(parents=True)
    (folder.partial / ".work" / "deep" / "state").write_text("half")
    return folder


def names(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", "data"),
        ("format", 2),
        ("config", {"a": 1, "b": [2, 1]}),
        ("seed", 8),
        ("dtype", "bfloat16"),
        ("base", "ab"),
        ("inputs", ["cc", "bb"]),
        ("files", []),
        ("files", ["de"]),
    ],
)
def test_everything_that_decides_the_output_enters_the_fingerprint(key, value):
    assert fingerprint(**ARGUMENTS) != fingerprint(**(ARGUMENTS | {key: value}))


def test_the_order_of_a_configurations_keys_does_not_enter():
    assert fingerprint(**ARGUMENTS) == fingerprint(**(ARGUMENTS | {"config": {"b": [1, 2], "a": 1}}))


def test_a_finished_folder_holds_its_files_and_its_manifest_alone(folder, manifest_of):
    assert not folder.complete
    folder.finish(manifest_of())
    assert folder.complete
    assert folder.path.name == "prune-0123456789ab"
    assert names(folder.path) == ["manifest.json", "model/w.bin", "notes.txt"]
    assert names(folder.run) == [f"{folder.path.name}/{name}" for name in names(folder.path)]  # nothing beside it
    found = folder.manifest().contents()
    assert found["schema_version"] == 1
    assert found["files"] == {
        "model/w.bin": {"bytes": 7, "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"},
        "notes.txt": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
    }


def crash_at(monkeypatch: pytest.MonkeyPatch, target: str, name: str, call: int) -> None:
    """Make the `call`-th use of a function of os, Path or shutil fail, as a kill at that moment would."""
    owner = {"Path": Path, "shutil": store.shutil, "store": store, "record": record}[target]
    original, count = getattr(owner, name), 0

    def crash(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, crash)


MOMENTS = [("store", "hash_file", 1), ("store", "_flush", 1), ("record", "write_json", 1), ("store", "_flush", 3)]
MOMENTS += [("Path", "rename", 1), ("Path", "rename", 2), ("store", "_flush", 5), ("shutil", "rmtree", 2)]


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_kill_while_finishing_leaves_the_stage_whole_or_resumable(folder, monkeypatch, moment, manifest_of):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at(patch, *moment)
        folder.finish(manifest_of())
    if folder.complete:
        assert names(folder.path) == ["manifest.json", "model/w.bin", "notes.txt"]
        folder.manifest()
    elif folder.sealed:
        folder.seal()
        folder.manifest()
    else:  # working state is there as a whole, so that the stage resumes
        assert (folder.partial / ".work" / "deep" / "state").read_text() == "half"
        folder.finish(manifest_of())
    with lock(folder.run):
        assert names(folder.path) == ["manifest.json", "model/w.bin", "notes.txt"]
        assert not list(folder.run.glob("*.partial")) and not list(folder.run.glob(".*.old"))


@pytest.mark.parametrize("call", [1, 2, 3])
def test_made_again_the_old_folder_goes_only_when_the_new_one_is_whole(folder, monkeypatch, call, manifest_of):
    folder.finish(manifest_of(seed=1))
    (folder.partial / ".work").mkdir(parents=True)
    (folder.partial / "new.txt").write_text("x")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at(patch, "Path", "rename", call)
        folder.finish(manifest_of(seed=2))
    assert folder.complete or folder.sealed
    if folder.sealed:
        folder.seal()
    assert folder.manifest().seed == 2
    assert names(folder.path) == ["manifest.json", "new.txt"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "manifest.json").unlink(), "is damaged"),
        (lambda p: (p / "manifest.json").write_text("{"), "is damaged"),
        (lambda p: (p / "manifest.json").write_text("[]"), "is damaged"),
        (lambda p: (p / "manifest.json").write_text('{"files": {"a": 1}}'), "is damaged"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff"), "is damaged"),
        (lambda p: (p / "manifest.json").write_text('{"files": [1]}'), "is damaged"),
        (lambda p: (p / "notes.txt").unlink(), "notes.txt has changed since it was made"),
        (lambda p: (p / "notes.txt").write_text("ab"), "notes.txt has changed since it was made"),
    ],
)
def test_damage_is_named_with_what_to_do(folder, damage, message, manifest_of):
    folder.finish(manifest_of())
    damage(folder.path)
    with pytest.raises(UserError) as caught:
        folder.manifest()
    assert message in str(caught.value)
    assert "delete the folder, or run again with --from prune" in str(caught.value)


def test_the_last_bit_is_compared_where_hashes_are_asked_for(folder, tmp_path, manifest_of):
    folder.finish(manifest_of())
    folder.manifest(tmp_path / "cache")
    (folder.path / "notes.txt").write_text("abd")
    folder.manifest()
    with pytest.raises(UserError, match=r"notes\.txt has changed since it was made"):
        folder.manifest(tmp_path / "cache")


def test_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": "ü"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "x": "ü"\n}\n'
    crash_at(monkeypatch, "Path", "replace", 1)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"x": "ü"}


def test_a_second_process_is_told_who_holds_the_lock_until_that_one_dies(tmp_path):
    code = HOLDER + "with lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, lock(tmp_path):
            pass
        assert f"{tmp_path} is in use by another run (process {process.pid} on " in str(caught.value)
        assert "wait for it or choose another --runs" in str(caught.value)
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / ".lock-holder.json").exists()  # the dead one's note; it holds nothing
    with lock(tmp_path):
        assert json.loads((tmp_path / ".lock-holder.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock-holder.json").exists()


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="x"), lock(tmp_path):
        raise ValueError("x")
    with lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full (here); free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full (here)"),
        (RuntimeError("write failed: No space left on device (os error 28)"), "the disk is full (here)"),
        (RuntimeError("I/O error: File too large (os error 27)"), "the disk is full (here)"),
        (MemoryError(), "out of memory (here): no details"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), "f: Permission denied; choose a folder"),
        (OSError(errno.EROFS, "Read-only file system", "f"), "f: Read-only file system"),
    ],
)
def test_what_the_machine_lacks_is_said_plainly(error, message):
    with pytest.raises(UserError) as caught, readable_errors("here"):
        raise error
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "gone", "f"), UserError("y")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, readable_errors("here"):
        raise error
    assert caught.value is error
