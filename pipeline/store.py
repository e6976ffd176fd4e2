"""Run folders: fingerprints, manifests, completion by renaming, and the lock."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import UserError
from ..modeling.source import hash_file, hash_json
from ..stage import WORK

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class StageFolder:
    """Where one stage of one run lives: `<run>/<stage>-<fingerprint>`."""

    run: Path
    stage: str
    fingerprint: str

    @property
    def path(self) -> Path:
        return self.run / f"{self.stage}-{self.fingerprint[:12]}"

    @property
    def partial(self) -> Path:
        """Where it is made; renamed to `path` when whole."""
        return self.run / f".{self.path.name}.partial"

    @property
    def complete(self) -> bool:
        return self.path.is_dir()

    def manifest(self) -> dict[str, Any]:
        """The manifest of a complete stage; `UserError` if the folder was damaged since."""
        path = self.path / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            for name, entry in manifest["files"].items():
                if (self.path / name).stat().st_size != entry["bytes"]:
                    raise UserError(f"{self.path / name} has changed since it was made{self._advice()}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}){self._advice()}") from error
        return manifest

    def _advice(self) -> str:
        return f"; delete the folder, or run again with --from {self.stage}"

    def finish(self, manifest: dict[str, Any]) -> None:
        """Seal the partial folder: drop working state, write the manifest, flush to disk, rename."""
        shutil.rmtree(self.partial / WORK, ignore_errors=True)
        files = {
            str(file.relative_to(self.partial)): {"bytes": file.stat().st_size, "sha256": hash_file(file)}
            for file in _files(self.partial)
        }
        write_json(self.partial / MANIFEST, {"schema_version": SCHEMA_VERSION, **manifest, "files": files})
        for file in [*_files(self.partial), self.partial / MANIFEST]:
            _flush(file)
        _flush(self.partial)
        if self.path.exists():  # made again on request: the old one goes only once the new one is whole
            old = self.path.with_name(f".{self.path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.path.rename(old)
            self.partial.rename(self.path)
            shutil.rmtree(old)
        else:
            self.partial.rename(self.path)
        _flush(self.run)


def fingerprint(stage: str, format: int, config: Any, seed: int, base: str, inputs: list[str], files: list[str]) -> str:
    """What a stage's output depends on, as sha256 hex: nothing about where or how it runs enters."""
    return hash_json([stage, format, config, seed, base, inputs, files])


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is never seen half-written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """One process per run folder; a second one is told who holds it. The lock ends with its process."""
    run.mkdir(parents=True, exist_ok=True)
    holder = run / ".lock-holder.json"
    guard = FileLock(run / ".lock")
    try:
        guard.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{run} is in use by another run{_describe(holder)}; wait for it or choose another --runs"
        ) from error
    try:
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(holder, me)
        yield
    finally:
        holder.unlink(missing_ok=True)
        guard.release()


def _describe(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text())
        return f" (process {who['pid']} on {who['host']}, since {who['since']})"
    except (OSError, ValueError, KeyError):
        return ""


def _files(folder: Path) -> list[Path]:
    """Every file of a stage but its manifest, in a fixed order."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
