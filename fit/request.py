"""What the user asked `compress fit` for, checked before anything is read that is large."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import UserError
from ..core.geometry import Geometry
from ..core.suggest import did_you_mean
from ..core.units import megabytes
from ..pipeline.plan import Device, find_device, parse_size
from ..records.fit import FitFigures
from ..runtime.artifact_types import GGUF_TYPES, ONNX_TYPES
from ..runtime.cost import kv_bytes_per_token
from .candidates import CACHES, Combination
from .limits import Limits
from .prediction import FileSize, PlannedSpeeds

CONTEXT = 2048  # tokens, unless the user says or the model has fewer
MIXES = {"llama.cpp": tuple(GGUF_TYPES), "onnx": tuple(ONNX_TYPES)}  # of each engine
Q8_WIDTH = 32  # of heads in llama.cpp's 8-bit cache: a multiple of it


@dataclass(frozen=True)
class FitRequest:
    """The limits, and where the model is to run."""

    limits: Limits
    device: Device | None  # None: this machine
    caches: tuple[str, ...]
    engine: str = "llama.cpp"
    mixes: tuple[str, ...] = ()  # those that differ for this model

    @property
    def place(self) -> str:
        return "this machine" if self.device is None else self.device.name


def make_request(
    shape: Geometry,
    *,
    size: str | int | None,
    memory: str | int | None,
    context: int | None,
    latency_ms: float | None,
    on: str | None,
    engine: str | None = None,
) -> FitRequest:
    """The checked request. Raises `UserError` for sizes that are none, unknown devices and engines, a context that the
    model cannot have, and where there is no limit at all."""
    engine = engine or next(iter(CACHES))
    if engine not in CACHES:
        raise UserError(f"--engine {engine}: there are {' and '.join(CACHES)}{did_you_mean(engine, CACHES)}")
    device = find_device(on) if on else None
    room = parse_size(memory) if isinstance(memory, str) else memory
    most = parse_size(size, "--size", "80MB") if isinstance(size, str) else size
    if device is not None and room is None:
        room = (device.host or device).memory
    if most is None and room is None and latency_ms is None:
        raise UserError("there is nothing to fit to: give --size, --memory, --latency-ms or --on, alone or together")
    for value, option in ((most, "--size"), (room, "--memory"), (latency_ms, "--latency-ms"), (context, "--context")):
        if value is not None and not value > 0:
            raise UserError(f"{option} {value}: must be more than 0")
    if context is not None and context > shape.positions:
        raise UserError(
            f"--context {context}: the model was made for {shape.positions} tokens; ask for at most so many"
        )
    whole, small = CACHES[engine]
    fits = engine != "llama.cpp" or shape.head_size % Q8_WIDTH == 0
    caches = (whole, small) if (memory is not None or context is not None) and fits else (whole,)
    limits = Limits(most, room, context or min(CONTEXT, shape.positions), latency_ms)
    return FitRequest(limits, device, caches, engine)


def removable(shape: Geometry) -> range:
    """How many blocks may go: up to half of them, the first and the last stay."""
    return range(min(shape.blocks // 2, max(shape.blocks - 2, 0)) + 1)


def check_reachable(request: FitRequest, shape: Geometry, sizes: dict[tuple[int, str], FileSize]) -> None:
    """`UserError` where no file is small enough, the smallest named; sizes are known to the byte, a process is at
    least its file and its cache, and a named device's speeds are the plan's."""
    least: list[tuple[str, FitFigures]] = []
    speeds = None if request.device is None else PlannedSpeeds(request.device, shape)
    for (removed, mix), size in sizes.items():
        latency = 0.0 if speeds is None else speeds.decode(mix, size, shape.blocks - removed)
        for cache in request.caches:
            held = request.limits.context * kv_bytes_per_token(shape, shape.blocks - removed, cache)
            figures = FitFigures(kl=0, bytes=size.bytes, memory=size.bytes + held, latency=latency, prefill=0)
            least.append((Combination(removed, mix, cache).name, figures))
    if any(request.limits.meets(figures) for _, figures in least):
        return
    limit = request.limits.size
    name, small = min(least, key=lambda item: item[1].bytes)
    if limit is not None and small.bytes > limit:
        whole = min((s.bytes, mix) for (removed, mix), s in sizes.items() if not removed)
        raise UserError(
            f"--size {megabytes(limit)}: no mix reaches it; the smallest possible is {megabytes(small.bytes)} "
            f"({name}), without a cut {megabytes(whole[0])} ({whole[1]})"
        )
    raise request.limits.refuse(least, "possible" if speeds is None else "possible or planned")
