"""Run folders: fingerprints, manifests, completion by renaming, and the lock."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.stage import WORK
from ..modeling.source import hash_file, hash_json
from ..records.manifest import StageFile, StageManifest

MANIFEST = StageManifest.FILE
DISCARDED = ".old"  # suffix of folders that are about to be deleted


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage of one run: `<run>/<stage>-<fingerprint>`."""

    run: Path
    stage: str
    fingerprint: str

    @property
    def path(self) -> Path:
        return self.run / f"{self.stage}-{self.fingerprint[:12]}"

    @property
    def partial(self) -> Path:
        """Where it is made; renamed to `path` when complete."""
        return self.run / f".{self.path.name}.partial"

    @property
    def complete(self) -> bool:
        return self.path.is_dir()

    def manifest(self, hashes: Path | None = None) -> StageManifest:
        """The manifest of a complete stage; `UserError` if the folder has been damaged since.

        With a folder for cached `hashes`, every file is compared by its hash; else only by its size.
        """
        try:
            manifest = StageManifest.read(self.path)
        except UserError as error:
            raise UserError(f"{self.path} is damaged ({error}){self._advice()}") from error
        for name, entry in manifest.files.items():
            file = self.path / name
            try:
                same = file.is_file() and file.stat().st_size == entry.bytes
                same = same and (hashes is None or hash_file(file, hashes) == entry.sha256)
            except (OSError, ValueError) as error:
                raise UserError(f"{self.path} is damaged ({error}){self._advice()}") from error
            if not same:
                raise UserError(f"{file} has changed since it was made{self._advice()}")
        return manifest

    def _advice(self) -> str:
        return f"; delete the folder, or run again with --from {self.stage}"

    @property
    def sealed(self) -> bool:
        """Whether the partial folder is complete and only has to be renamed."""
        return (self.partial / MANIFEST).is_file()

    def finish(self, manifest: StageManifest, pages: Sequence[str] = ()) -> None:
        """Add the files but `pages` to the manifest, write it, flush all to disk, and rename the partial folder."""
        written = _files(self.partial)
        hashes: dict[tuple[int, int], str] = {}  # a file with several names (depths share weights) is read once
        files: dict[str, StageFile] = {}
        for file in written:
            if file.relative_to(self.partial).as_posix() in pages:
                continue
            state = file.stat()
            key = state.st_dev, state.st_ino
            if key not in hashes:
                hashes[key] = hash_file(file)
            files[str(file.relative_to(self.partial))] = StageFile(bytes=state.st_size, sha256=hashes[key])
        for file in written:
            _flush(file)
        manifest.model_copy(update={"files": files}).write(self.partial)
        _flush(self.partial / MANIFEST)
        _flush(self.partial)
        self.seal()

    def seal(self) -> None:
        """Rename the partial folder without its working state; a kill in between leaves it `sealed`.

        The working state is moved away before it is deleted, because half of it would mislead a resumed run. An older
        folder that is being replaced is deleted only once the new one is complete.
        """
        old = self.run / f".{self.path.name}{DISCARDED}"
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir()
        if (self.partial / WORK).exists():
            (self.partial / WORK).rename(old / "work")
        if self.path.exists():
            self.path.rename(old / "stage")
        self.partial.rename(self.path)
        _flush(self.run)
        shutil.rmtree(old, ignore_errors=True)


def fingerprint(
    stage: str,
    format: int,
    config: object,
    seed: int,
    dtype: str,
    base: str,
    inputs: list[str],
    files: list[str],
    packages: dict[str, str] | None = None,
) -> str:
    """A hash (sha256 hex) of everything that a stage's output depends on: dtype included, device and machine not.

    `packages` are those whose methods the stage uses, with their versions.
    """
    parts = [stage, format, config, seed, dtype, base, inputs, files]
    return hash_json([*parts, packages] if packages else parts)


@contextmanager
def lock(run: Path, option: str = "--runs") -> Iterator[None]:
    """Lock a run folder; a second process gets a `UserError` naming the holder, and the `option` that chooses another
    folder. The lock ends with its process."""
    run.mkdir(parents=True, exist_ok=True)
    holder = run / ".lock-holder.json"
    guard = FileLock(run / ".lock")
    try:
        guard.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{run} is in use by another run{_describe(holder)}; wait for it or choose another {option}"
        ) from error
    try:
        for folder in run.glob(f".*{DISCARDED}"):  # left by a kill while it was being deleted
            shutil.rmtree(folder, ignore_errors=True)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(holder, me)
        yield
    finally:
        holder.unlink(missing_ok=True)
        guard.release()


def _describe(holder: Path) -> str:
    try:
        who = read_json(holder)
        return f" (process {who['pid']} on {who['host']}, since {who['since']})"
    except (UserError, KeyError):
        return ""


def _files(folder: Path) -> list[Path]:
    """All files of a stage except its manifest and working state, in a fixed order."""
    left_out = (folder / MANIFEST, folder / f"{MANIFEST}.tmp")
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and file not in left_out and not file.is_relative_to(folder / WORK)
    )


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
