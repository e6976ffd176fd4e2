"""Reading a checkpoint's config.json: other tools' mistakes are corrected where the intent is clear.

Works on the file's values only, without torch or transformers, so commands that read no weights (plan, inspect) see the
same values as the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json, read_json_if_there
from .families import FAMILIES, PER_BLOCK

CONFIG = "config.json"
KEPT_BLOCKS = "compress_kept_blocks"  # numbers, in the unpruned model, of the blocks this model has
DEPTHS = "compress_depths"  # depths that the model was trained to run at
RECORDS = (KEPT_BLOCKS, DEPTHS)
SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def read_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The values of a checkpoint folder's config.json, and a note on each correction.

    Raises `UserError` for a file that is missing or damaged, a model that is already quantized, and per-block lists
    whose length differs from the number of blocks, unless the intent is clear.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG}, so it is not a checkpoint folder")
    values = read_json(path)
    check_not_quantized(values, folder)
    return _repaired(values, path)


def check_not_quantized(values: Mapping[str, Any], where: object) -> None:
    """`UserError` for a model whose weights are already integers or 8-bit floats, saying what to do instead."""
    quantization = values.get("quantization_config")
    if not quantization:
        return
    description = described_quantization(quantization)
    method = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
    way = "use the float checkpoint it was made from"
    if method == "bitsandbytes":
        way += ", or load it with transformers and save it after `model.dequantize()`"
    elif method in ("fp8", "compressed-tensors", "mxfp4"):
        way += (
            ", or load it with transformers and `quantization_config` set to the method's class with "
            + ("`run_compressed=False`" if method == "compressed-tensors" else "`dequantize=True`")
            + ", and save it"
        )
    raise UserError(f"{where} is already quantized ({description}), and only float weights can be read: {way}")


def described_quantization(found: object) -> str:
    """The method and the bits of a quantization_config, in words."""
    if not isinstance(found, dict):
        return "it has a quantization_config"
    bits = found.get("bits") or (4 if found.get("load_in_4bit") else 8 if found.get("load_in_8bit") else None)
    return str(found.get("quant_method", "method not named")) + (f", {bits} bits" if bits else "")


def _repaired(values: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    for name in SHAPE:
        number = values.get(name)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise UserError(f"{path}: {name} is {number!r}, but must be a whole number above 0")
    blocks = values.get("num_hidden_layers")
    if blocks is None:
        return values, []
    values, notes = dict(values), []
    family = FAMILIES.get(str(values.get("model_type")))
    for name, entry_type in (family.per_block if family else PER_BLOCK).items():
        entries = values.get(name)
        if entries is None:
            continue
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, entry_type) for entry in entries):
            described = "string" if entry_type is str else "number"
            raise UserError(f"{path}: {name} must be a list with one {described} per block")
        if len(entries) == blocks:
            continue
        if len(set(entries)) > 1:
            raise UserError(
                f"{path}: {name} has {len(entries)} differing entries for {blocks} blocks (num_hidden_layers), so it "
                f"is not clear which entry belongs to which block; give it {blocks} entries"
            )
        values[name] = [entries[0]] * blocks
        notes.append(
            f"{name} has {len(entries)} entries for {blocks} blocks, all {entries[0]}: read as {blocks} entries"
        )
    for name in RECORDS:
        record = values.get(name)
        fits = record is None or (
            isinstance(record, list)
            and all(isinstance(number, int) for number in record)
            and (len(record) == blocks if name == KEPT_BLOCKS else bool(record) and record[-1] == blocks)
        )
        if not fits:
            del values[name]
            notes.append(f"{name} belongs to a model whose number of blocks is not {blocks}: ignored")
    return values, notes


def eos_ids(folder: Path) -> list[int]:
    """The tokens that end a text by generation_config.json, or, where that names none, by config.json; as transformers
    reads them."""
    for name in ("generation_config.json", "config.json"):
        value = read_json_if_there(folder / name).get("eos_token_id")
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    return []
