"""Bringing a model source into a plain checkpoint folder, and loading from such a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import UserError
from ..stage import Progress
from .checkpoint import quiet
from .source import Source, checkpoint_files, fingerprint_source, parse_source


def resolve(text: str, cache: Path, *, base_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The checkpoint folder of a model source: config.json, safetensors and tokenizer.

    A local folder is used where it lies; a Hub repository is downloaded into the Hub's own cache; GGUF files and
    random models are written once into `cache`. Raises `UserError` for what is missing, broken or unsupported.
    """
    source = parse_source(text, base_dir or Path.cwd())
    if source.kind == "hub":
        folder = _download(source)
    elif source.kind == "folder":
        assert source.path is not None
        folder = source.path
    else:
        folder = cache / f"{source.name}-{fingerprint_source(source, cache)[:12]}"
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):  # runs may share the cache
                if not folder.exists():
                    _make(source, folder, progress or Progress())
    load_config(folder)  # refuses unsupported families before any weight is read
    return folder


def _make(source: Source, folder: Path, progress: Progress) -> None:
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if source.kind == "random":
        from .random import random_checkpoint

        random_checkpoint(temporary, source.text.removeprefix("random:"), blocks=8)
    else:
        from .gguf import convert_gguf

        assert source.path is not None
        progress.note(f"reading {source.path.name} into float32 safetensors (once)")
        convert_gguf(source.path, temporary)
    temporary.replace(folder)


def _download(source: Source) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from .source import hub_commit

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model"]
    try:
        folder = snapshot_download(source.text, revision=hub_commit(source), allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model {source.text!r} could not be downloaded: {error}") from error
    if not any(Path(folder).glob("*.safetensors")):
        raise UserError(f"model {source.text!r} has no safetensors weights; only safetensors are read")
    return Path(folder)


def load_config(folder: Path) -> Any:
    """The transformers configuration of a checkpoint folder; `UserError` if its family is unsupported."""
    from .blocks import check_family

    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json, so it is not a checkpoint folder")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    check_family(values, folder)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a wrong value raises whatever it happens to meet
        raise UserError(f"{path} is no configuration that transformers can read: {error}") from error


def load_model(folder: Path, dtype: str = "float32", device: str = "cpu", **options: Any) -> Any:
    """The causal language model of a checkpoint folder, in evaluation mode on `device`.

    `options` go to `from_pretrained` (a quantization config, say). Raises `UserError` when a weight file is broken,
    or a weight is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from .linear import speed_up

    config = load_config(folder)
    _check_safetensors(folder)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation="sdpa",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # a wrong value in a configuration raises whatever it happens to meet
        if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
            raise
        raise UserError(f"the weights in {folder} could not be loaded: {error}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} weights, {missing[0]} among them: the checkpoint is broken")
    if "quantization_config" not in options:
        model = model.to(device)
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights on CPUs with AVX-512 BF16, which fails for rows shorter than a block of 64.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    speed_up(model)
    return model.eval()


def _check_safetensors(folder: Path) -> None:
    """A truncated file is the commonest damage; its header says how long the file must be."""
    from safetensors import SafetensorError, safe_open

    for file in checkpoint_files(folder):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="np") as handle:
                    handle.keys()
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is not a whole safetensors file: {error}") from error


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a checkpoint folder."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokenizer.json; a fast tokenizer is needed")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, use_fast=True, trust_remote_code=False
            )  # or it asks on the console whether to run the code
            tokenizer.decode(tokenizer("a")["input_ids"])  # some wrong values show themselves only in use
    except Exception as error:  # tokenizers raises plain Exception; a wrong value whatever it happens to meet
        raise UserError(f"the tokenizer in {folder} could not be loaded: {error}") from error
    return tokenizer
