"""Opening a bundle: reading its manifest and checking its files against it."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import UserError
from ..core.files import check_folder_exists, read_json, sha256
from ..records.bundle import BundleManifest

SMALL = 50 * 10**6  # bytes: tokenizers, configurations and templates are smaller, real models' weights larger


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle: a checkpoint or a stage's folder may hold a manifest.json too."""
    file = folder / BundleManifest.FILE
    return file.is_file() and "artifacts" in read_json(file)


def read_bundle(bundle: Path, *, hashes: bool = False) -> BundleManifest:
    """The manifest of a bundle, after checking that all its files exist and have the right size.

    Files of up to 50 MB, or with `hashes` all files, are also checked by hash.

    Raises `UserError` naming what is missing or changed.
    """
    if not (bundle / BundleManifest.FILE).is_file():
        check_folder_exists(bundle)
        raise UserError(f"{bundle} is not a bundle: it has no {BundleManifest.FILE}")
    manifest = BundleManifest.read(bundle)
    compared: dict[tuple[int, int], str] = {}  # a file with several names (depths share weights) is read once
    for entry in manifest.files:
        file = bundle / entry.path
        if not file.is_file():
            raise UserError(f"the bundle {bundle} lacks {entry.path}")
        state = file.stat()
        same = state.st_size == entry.bytes
        if same and (hashes or entry.bytes <= SMALL):
            key = state.st_dev, state.st_ino
            if key not in compared:
                compared[key] = sha256(file)
            same = compared[key] == entry.sha256
        if not same:
            raise UserError(f"{file} has changed since the bundle was made")
    return manifest
