"""Merges an adapter folder (as peft saves it) with its base model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json
from .checkpoint import quiet, save_checkpoint
from .load import load_model, load_tokenizer
from .weights import ADAPTER_CONFIG, tensor_headers

WEIGHTS = "adapter_model.safetensors"
DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def merge_adapter(adapter: Path, base: Path, folder: Path) -> None:
    """Write the base model with the adapter merged into its weights, in their own type, as a checkpoint folder.

    The tokenizer is the adapter's where its folder has one, else the base's. Raises `UserError` for adapters that
    cannot be merged into weights, or do not fit the base.
    """
    from peft import PeftModel

    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter} has no {WEIGHTS}; only safetensors are read (pickled weights can run code)")
    method = read_json(adapter / ADAPTER_CONFIG).get("peft_type")
    counts = Counter(tensor.dtype for tensor in tensor_headers(base).values())
    model = load_model(base, DTYPES[counts.most_common(1)[0][0]])
    try:
        with quiet():
            adapted: Any = PeftModel.from_pretrained(model, str(adapter))
            merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"adapter {adapter} ({method}) cannot be merged into {base}: {reason}") from error
    tokenizer = load_tokenizer(adapter if (adapter / "tokenizer.json").is_file() else base)
    save_checkpoint(merged, tokenizer, folder)
