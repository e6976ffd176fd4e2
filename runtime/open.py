"""Opening an exported artifact of any format."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import UserError
from ..core.place import ANYWHERE, ON_CPU, Place
from .artifact_types import GGUF_CACHE
from .cost import SLOTS
from .engine import Engine


def open_engine(
    path: Path,
    threads: int = 0,
    context: int = 1024,
    runtime: str | None = None,
    *,
    slots: int = SLOTS,
    kv_type: str = GGUF_CACHE,
    place: Place = ANYWHERE,
) -> Engine:
    """The engine of a GGUF file (llama.cpp) or an ONNX folder (onnxruntime, unless `runtime` says onnxruntime-genai).

    `context` is the longest text for llama.cpp, which allocates its cache in advance, for `slots` texts at a time and
    in the type `kv_type`; `place` is the hardware. Here `auto` is the CPU in ONNX
    Runtime, so that figures of different machines can be compared; onnxruntime-genai runs there alone.
    """
    path = Path(path)
    if path.suffix == ".gguf" and runtime in (None, "llama.cpp"):
        from .llamacpp_engine import LlamaCppEngine

        return LlamaCppEngine(path, threads, context, slots, kv_type=kv_type, place=place)
    if path.is_dir() and runtime in (None, "onnxruntime"):
        from .onnx_engine import OnnxEngine

        return OnnxEngine(path, threads, ON_CPU if place.device == "auto" else place)
    if path.is_dir() and runtime == "onnxruntime-genai":
        from .genai_engine import GenaiEngine

        return GenaiEngine(path, threads)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    where = f" in {runtime}" if runtime else ""
    raise UserError(f"{path} cannot be opened{where}: give a .gguf file or an ONNX folder")
