"""The cost of writing and checking the artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..core.cost import Need, Setting, StageCost, worst
from ..core.work import Work, forward
from ..runtime.cost import artifact_bytes, scoring
from .config import ExportConfig

RUNTIME = 720e6  # measured after a whole run of SmolLM2; includes freed memory that glibc keeps
ROW = 2048  # longest held-out row that is encoded; its beginning is the probe
DEPTH_GGUF = 64  # bytes per token of the vocabulary, which every depth of a GGUF type has once more
DEPTH_ONNX = 9_000  # bytes per block of the graph that every depth of an ONNX type has
# Operations' worth of time per weight and type: choosing scales. From the default recipe's export on `cpu-2core`.
QUANTIZING = 13_000


def _exported(config: ExportConfig, at: Setting) -> Sequence[int]:
    """The depths to export."""
    return config.depths or at.depths or [at.kept]


def _leaves(config: ExportConfig, at: Setting) -> Setting:
    if config.depths:
        at.check_depths("export.depths", config.depths)
    files = [(kind, depth) for kind in [*config.gguf, *config.onnx] for depth in _exported(config, at)]
    return replace(at, artifacts=tuple(files))


def _need(config: ExportConfig, at: Setting) -> Need:
    """The checkpoint; for ONNX the builder's process, which holds it again in float32."""
    kinds = [*config.gguf, *config.onnx]
    small = at.shape.parameters(at.kept)
    disk = sum(int(artifact_bytes(kind, small)) for kind in kinds)
    *less, _ = _exported(config, at)
    disk += len(less) * len(config.gguf) * DEPTH_GGUF * at.shape.vocab + sum(less) * len(config.onnx) * DEPTH_ONNX
    note = ", ".join(kinds) + (f" at {len(less) + 1} depths" if less else "")
    runtime = {"runtime": at.runtime(RUNTIME)}
    reference = runtime | {"weights": at.small, "activations": ROW * at.shape.state * at.size}
    if less:  # each depth's distributions on the probe text
        reference["logits"] = (len(less) + 1) * config.verify.tokens * at.shape.vocab * 4
    moments = [reference]
    building = {"runtime": int(2 * RUNTIME), "weights": small * 4}
    if config.onnx and not at.cuda:
        moments.append(building)
    host = sum(building.values()) if config.onnx and at.cuda else 0
    # The float32 graph that the others are made from; before it the F16 file that llama.cpp's graph is checked with.
    checked = 2 * small if config.gguf and "F16" not in config.gguf else 0
    return Need(worst(*moments), disk, note, max(4 * small if config.onnx else 0, checked), host)


def _work(config: ExportConfig, at: Setting) -> Work:
    """The checkpoint on the probe and for the importance matrix; each type written, read back and tried, and the graph
    tried at high precision."""
    small, verify = at.shape.parameters(at.kept), config.verify
    work = Work(forward(at.shape, at.kept, config.imatrix_tokens + verify.tokens, 256))
    for kind in [*config.gguf, *config.onnx]:
        plain = kind in ("F16", "fp32")
        work = work + Work(host_flops=0 if plain else QUANTIZING * small, host_read=4 * 4 * small)
        for depth in _exported(config, at):
            work = work + scoring(at.shape, kind, depth, verify.tokens, verify.window)
    for precise, kinds in (("F16", config.gguf), ("fp32", config.onnx)):  # the graph, once per format
        written = bool(kinds) and precise == "F16" and precise not in kinds
        work = work + Work(host_read=(4 + 2) * small if written else 0)
        for depth in _exported(config, at) if kinds else ():
            work = work + scoring(at.shape, precise, depth, verify.tokens, verify.window)
    return work


COST = StageCost[ExportConfig](_need, _work, _leaves)
