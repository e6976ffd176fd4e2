"""Turning a model source into a plain checkpoint folder, and loading from such a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.chat_templates import MORE_TEMPLATES
from ..core.errors import UserError
from ..core.stage import Progress
from .checkpoint import made_once, quiet
from .config import read_config
from .families import family_of
from .source import ModelSource, base_of_adapter, fingerprint_source, parse_source
from .types import CausalModel, ModelConfig, ModelTokenizer
from .weights import INDEX, SINGLE, is_adapter_alone, safetensors_header, weight_files, weight_map


def resolve(text: str, cache: Path, *, base_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The plain checkpoint folder of a model source: config.json, safetensors and tokenizer.

    A local folder is used in place, unless libraries could mistake other files in it for the model's (`plain_folder`);
    a Hub repository is downloaded into the Hub's own cache; GGUF files, random models and adapters are converted once
    into `cache`. Raises `UserError` for missing, broken or unsupported models, and for weights that do not fit the
    configuration.
    """
    from .plain import plain_folder

    base_dir, progress = base_dir or Path.cwd(), progress or Progress()
    source = parse_source(text, base_dir)
    if source.kind == "hub":
        folder = _download(source)
        if is_adapter_alone(folder):
            source = ModelSource("adapter", source.text, folder)
    if source.kind == "folder":
        assert source.path is not None
        folder = source.path
    elif source.kind != "hub":
        name = f"{source.name}-{fingerprint_source(source, cache, base_dir)[:12]}"
        folder = made_once(cache / name, lambda partial: _make(source, partial, cache, base_dir, progress))
    return plain_folder(folder, cache, progress)


def _make(source: ModelSource, folder: Path, cache: Path, base_dir: Path, progress: Progress) -> None:
    if source.kind == "random":
        from .random import random_checkpoint

        random_checkpoint(folder, source.text.removeprefix("random:"), blocks=8)
    elif source.kind == "adapter":
        from .adapter import merge_adapter

        assert source.path is not None
        base = resolve(base_of_adapter(source.path, base_dir).text, cache, base_dir=base_dir, progress=progress)
        progress.note(f"merging the adapter {source.name} into its base model {base.name} (once)")
        merge_adapter(source.path, base, folder)
    else:
        from .gguf import convert_gguf

        assert source.path is not None
        progress.note(f"reading {source.path.name} into float32 safetensors (once)")
        convert_gguf(source.path, folder)


def _download(source: ModelSource) -> Path:
    """A Hub repository's model in the Hub's cache; the small files first, since they list the weight files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from .source import hub_commit

    commit = hub_commit(source)

    def fetch(*patterns: str, ignore: str | None = None) -> Path:
        try:
            snapshot = snapshot_download(
                source.text, revision=commit, allow_patterns=list(patterns), ignore_patterns=ignore
            )
            return Path(snapshot)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(f"model {source.text!r} could not be downloaded: {error}") from error

    # The Hub's * also matches in folders (original/, onnx/), which hold other copies of the model.
    folder = fetch("*.json", "*.jinja", "*.model", ignore="*/*")
    fetch(f"{MORE_TEMPLATES}/*.jinja")
    if is_adapter_alone(folder):
        return fetch("adapter_model.safetensors")
    if (folder / INDEX).is_file():
        return fetch(*sorted(set(weight_map(folder / INDEX).values())))
    folder = fetch(SINGLE)
    try:
        weight_files(folder)
    except UserError as error:
        raise UserError(
            f"model {source.text!r} has no safetensors weights ({SINGLE} or {INDEX}); only those are read"
        ) from error
    return folder


def load_config(folder: Path) -> ModelConfig:
    """The transformers configuration of a checkpoint folder; `UserError` if its family is unsupported or its
    config.json damaged."""
    return config_of(read_config(folder)[0], folder)


def config_of(values: dict[str, Any], folder: Path) -> Any:
    """The transformers configuration with the values of a folder's config.json; errors as `load_config`."""
    from transformers import CONFIG_MAPPING

    family_of(values, folder)
    try:
        with quiet():
            config = CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
    except Exception as error:  # each class validates itself and raises errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder / 'config.json'} is not a valid configuration: {reason[:300]}") from error
    config._name_or_path = str(folder)  # as a loaded model's has it
    return config


def load_model(folder: Path, dtype: str = "float32", device: str = "cpu", **options: Any) -> CausalModel:
    """The causal language model of a plain checkpoint folder, in evaluation mode on `device`.

    `options` go to `from_pretrained` (a quantization config, say). Raises `UserError` when a weight file is broken,
    or a weight is missing or not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from .linear import speed_up
    from .soundness import check_finite

    config = load_config(folder)
    for file in weight_files(folder):  # truncation is the most common damage; the header has the expected length
        safetensors_header(file)
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
    except Exception as error:  # a wrong value in a configuration can raise anything
        if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
            raise
        raise UserError(f"the weights in {folder} could not be loaded: {error}") from error
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys"):
        names = sorted(name for name in info[problem] if not name.endswith("rotary_emb.inv_freq"))
        if names:
            lacks = "lacks" if problem == "missing_keys" else "has, unknown to its configuration,"
            raise UserError(f"{folder} {lacks} {len(names)} weights, {names[0]} among them: the checkpoint is broken")
    if "quantization_config" not in options:
        model = model.to(device)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            check_finite(name, parameter.detach(), folder)
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights on CPUs with AVX-512 BF16, which fails for rows shorter than a block of 64.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    speed_up(model)
    return model.eval()


def load_tokenizer(folder: Path) -> ModelTokenizer:
    """The fast tokenizer of a checkpoint folder."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokenizer.json; a fast tokenizer is needed")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, use_fast=True, trust_remote_code=False
            )  # or it asks on the console whether to run the code
            tokenizer.decode(tokenizer("a")["input_ids"])  # some wrong values only fail in use
    except Exception as error:  # tokenizers raises plain Exception, and a wrong value can raise anything
        raise UserError(f"the tokenizer in {folder} could not be loaded: {error}") from error
    return tokenizer
