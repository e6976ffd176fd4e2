"""Retaining heads in a bundle: as they are, as safetensors, and as a GGUF beside the model's.

`retaining/heads.gguf` is no model (`general.architecture` is `compress-retain`). Of block N it holds, float32,
`blk.N.retain_1.weight` (R, I) and `blk.N.retain_2.weight` (G, R): scores = W2 · SiLU(W1 · [q; k; v]). The metadata are
`compress.retain.budget`, `.chunk`, `.stabilizers`, `.local`, `.pool`, `.sinks`, `.width` (R) and `.block_count`, all
uint32.

I runs over q, k and v as transformers lays them out, biases added, before norms and rotary positions. llama.cpp's q and
k of llama and mistral have their rows in another order (the pairs that rotate together are adjacent): to use them from
its graph, reorder the columns of W1 accordingly.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf

from ..kv.settings import FOLDER, GGUF, SETTINGS, read_settings
from ..modeling.load import load_config
from ..modeling.retaining import WEIGHTS, has_heads, load_heads
from ..records.bundle import RetainingEntry

ARCHITECTURE = "compress-retain"


def write_heads(checkpoint: Path, bundle: Path) -> RetainingEntry | None:
    """Write a checkpoint's heads into a bundle; None if it has none. The same bytes each time."""
    if not has_heads(checkpoint):
        return None
    config, settings = load_config(checkpoint), read_settings(checkpoint)
    heads = load_heads(checkpoint, config)
    folder = bundle / FOLDER
    folder.mkdir(exist_ok=True)
    for name in (WEIGHTS, SETTINGS):
        shutil.copyfile(checkpoint / FOLDER / name, folder / name)
    writer = gguf.GGUFWriter(folder / GGUF, ARCHITECTURE)
    numbers = {**settings.numbers(), "width": heads.width, "block_count": len(heads.blocks)}
    for key, value in numbers.items():
        writer.add_uint32(f"compress.retain.{key}", value)
    for name, value in heads.state_dict().items():
        _, number, part, _ = name.split(".")
        writer.add_tensor(f"blk.{number}.retain_{part[1]}.weight", value.numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return RetainingEntry(
        path=f"{FOLDER}/{WEIGHTS}",
        gguf=f"{FOLDER}/{GGUF}",
        width=heads.width,
        **settings.numbers(),
    )
