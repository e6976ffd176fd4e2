"""Runs onnxruntime-genai's model builder: `python -m compress.export._onnx_build CHECKPOINT FOLDER [CHECKPOINT …]`.

In a separate process because the builder is not meant for import: it puts its folder on `sys.path` and adds
top-level modules named `builders`, `loaders` and `quantization`; it prints to the terminal; and it keeps the whole
model in memory. The process ends when its standard input closes, that is, when its parent dies.
"""

from __future__ import annotations

import os
import sys
import threading
from functools import cache
from typing import Any


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


def build(checkpoint: str, folder: str) -> None:
    """Write the float32 graph of a checkpoint folder, with genai_config.json and tokenizer, into `folder`."""
    import onnxruntime_genai.models  # noqa: F401 (puts the builder's own modules on sys.path)
    from onnxruntime_genai.models import builder

    builder.Gemma3Model = _gemma3(sys.modules["builders.gemma"].Gemma3Model)
    downloads = os.path.join(folder, "cache")
    # A full-length cache for every block: sliding-window attention then differs from full attention in its mask
    # alone, and any runtime can feed it.
    options = builder.parse_extra_options("", checkpoint, folder, "fp32", "cpu", downloads, ["windowed_kv_cache=false"])
    builder.create_model("", checkpoint, folder, "fp32", "cpu", downloads, **options)


@cache
def _gemma3(base: type[Any]) -> Any:
    """The builder's Gemma-3 class, adapted to read transformers 5's configuration and to scale embeddings exactly."""

    class Gemma3Model(base):
        def __init__(self, config: Any, *rest: Any) -> None:
            # One rotary embedding for all blocks, and the base of the local ones beside it, as transformers 4 had it.
            ropes = config.rope_parameters
            config.rope_local_base_freq = ropes["sliding_attention"]["rope_theta"]
            config.rope_parameters = ropes["full_attention"]
            super().__init__(config, *rest)
            self.embed_attrs["scale"] = config.hidden_size**0.5  # the builder rounds it to two decimals

        def make_rotary_embedding_caches_from_scratch(self) -> Any:
            if hasattr(self, "cos_cache_local_name"):
                self.rope_attrs["rescale_factors"] = 1  # scaling for long texts is for full attention alone
            return super().make_rotary_embedding_caches_from_scratch()

    return Gemma3Model


def main(arguments: list[str]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for checkpoint, folder in zip(arguments[::2], arguments[1::2], strict=True):
        build(checkpoint, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
