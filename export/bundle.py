"""Writing a bundle's common files and its manifest."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..core.chat_templates import MORE_TEMPLATES, TEMPLATE
from ..core.files import read_json, sha256, write_json
from ..records.bundle import BundleManifest, FileEntry
from .card import CARD
from .ends import write_generation_config

TOKENIZER = "tokenizer_config.json"
COPIED = ("config.json", "tokenizer.json", TOKENIZER, TEMPLATE)
OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path", "_name_or_path")  # where a tokenizer came from


@dataclass(frozen=True)
class Size:
    """The size of a single depth of one type."""

    bytes: int  # of all that is read for it
    parameters: int
    bits_per_weight: float  # of the tensors; a GGUF's vocabulary is not counted


def copy_model_files(checkpoint: Path, bundle: Path) -> None:
    """Configuration, tokenizer and chat template; the tokenizer's settings in a form that older libraries read too."""
    for name in COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, bundle / name)
    if (checkpoint / MORE_TEMPLATES).is_dir():
        shutil.copytree(checkpoint / MORE_TEMPLATES, bundle / MORE_TEMPLATES, dirs_exist_ok=True)
    write_generation_config(checkpoint, bundle)
    if (bundle / TOKENIZER).is_file():
        settle_tokenizer(bundle / TOKENIZER)


def settle_tokenizer(file: Path) -> None:
    """Rewrite a tokenizer_config.json without what is specific to this machine or to transformers 5.

    transformers 5 gives its one class for tokenizer.json a new name, and further special tokens a new key; it reads
    the old ones as the same, and transformers 4 (which Optimum's ONNX side needs) reads no others. There the class
    also makes token types, which no decoder takes, unless it is told what the model's inputs are.
    """
    values = read_json(file)
    for key in OF_THIS_MACHINE:
        values.pop(key, None)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        values.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    write_json(file, values)


def list_files(bundle: Path) -> list[FileEntry]:
    """Every file but the manifest and the card, which evaluation completes, in order, with its hash; further hard links
    to a file are marked as such."""
    left_out = (bundle / BundleManifest.FILE, bundle / CARD)
    found: list[FileEntry] = []
    names: dict[tuple[int, int], FileEntry] = {}
    for file in sorted(file for file in bundle.rglob("*") if file.is_file() and file not in left_out):
        path, state = file.relative_to(bundle).as_posix(), file.stat()
        first = names.get((state.st_dev, state.st_ino))
        if first is None:
            entry = FileEntry(path=path, bytes=state.st_size, sha256=sha256(file))
            names[state.st_dev, state.st_ino] = entry
        else:
            entry = first.model_copy(update={"path": path, "link": first.path})
        found.append(entry)
    return found


def disk_bytes(folder: Path) -> tuple[int, int]:
    """The bytes of a folder's files, hard links counted once, and with links counted as copies."""
    states = [file.stat() for file in folder.rglob("*") if file.is_file()]
    once = {(state.st_dev, state.st_ino): state.st_size for state in states}
    return sum(once.values()), sum(state.st_size for state in states)
