"""Reading a GGUF file into a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from .blocks import check_family
from .checkpoint import quiet, save_checkpoint
from .pretokenizers import IGNORE_MERGES, PRE_TOKENIZERS
from .random import pre_tokenizer_from_json


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model in a GGUF file, dequantized to float32, as a checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields = read_fields(file, ("general.architecture", "tokenizer.ggml.pre", "tokenizer.ggml.model"))
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (ValueError, KeyError, RuntimeError, OSError, NotImplementedError) as error:
        raise UserError(f"{file} could not be read as a model: {error}") from error
    check_family(model.config, file)
    if fields.get("tokenizer.ggml.model") == "gpt2":
        _set_pre_tokenizer(tokenizer, str(fields.get("tokenizer.ggml.pre", "default")), file)
    tokenizer = _without_surplus(tokenizer, model.get_input_embeddings().num_embeddings)
    # The weights are plain float32 from here on; save_pretrained refuses while these marks are there.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    save_checkpoint(model, tokenizer, folder)


def read_fields(file: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Some metadata values of a GGUF file; `UserError` if the file is broken."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        fields = {name: reader.fields[name].contents() for name in names if name in reader.fields}
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"{file} is not a readable GGUF file: {error}") from error
    if end > file.stat().st_size:
        raise UserError(f"{file} is cut short: its tensors need {end:,} bytes, it has {file.stat().st_size:,}")
    return fields


def _without_surplus(tokenizer: Any, embeddings: int) -> Any:
    """The tokenizer without tokens that the model has no embedding for.

    transformers' reader adds the tokenizer class's own special tokens, such as <|endoftext|> for Llama-3.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if len(tokenizer) <= embeddings:
        return tokenizer
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < embeddings]
    known = {token["content"] for token in whole["added_tokens"]} | set(whole["model"]["vocab"])
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: token for name in names if (token := getattr(tokenizer, name)) in known}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(whole)), chat_template=tokenizer.chat_template, **special
    )


def _set_pre_tokenizer(tokenizer: Any, name: str, file: Path) -> None:
    # transformers' reader gives every byte-level tokenizer GPT-2's pre-tokenizer; the file names the right one.
    name = "gpt-2" if name == "default" else name
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{file}: its pre-tokenizer {name!r} is not known here (known: {', '.join(sorted(PRE_TOKENIZERS))}); "
            "use the original checkpoint folder instead"
        )
    from tokenizers import Tokenizer, decoders

    normalizer, pre_tokenizer = PRE_TOKENIZERS[name]
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizer_from_json(pre_tokenizer)
    backend.decoder = decoders.ByteLevel()
    backend.model.ignore_merges = name in IGNORE_MERGES
    if normalizer is not None:
        whole = json.loads(backend.to_str())
        whole["normalizer"] = normalizer
        backend.normalizer = Tokenizer.from_str(json.dumps(whole)).normalizer
