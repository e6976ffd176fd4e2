"""Named machines for `compress plan --on NAME`: what they have, and what of it is reached.

Peaks and bandwidths are the vendors' (dense, no sparsity; tensor cores with 32-bit accumulation). What is reached of
them is an assumption for GPUs, marked so in the plan. For `cpu-2core` both speeds were measured: SmolLM2-135M in
float32 on two cores of an AMD EPYC (AVX2), 400 tokens/s forward, 100 forward and backward, 17 decoding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from ...errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A machine or a card."""

    name: str
    memory: int  # bytes
    flops: dict[str, float]  # peak per second, by dtype
    bandwidth: float  # bytes per second
    reached: float = 0.4  # of the peak, in prefill and training
    reached_bandwidth: float = 0.6  # in decoding
    measured: bool = False  # what is reached, rather than assumed
    cuda: bool = True

    @property
    def dtype(self) -> str:
        """What weights are held in unless something else is asked for."""
        return "bfloat16" if self.cuda else "float32"

    def seconds(self, flops: float, read: float, dtype: str) -> float:
        """Time of work: its arithmetic, and the bytes that must be read for each of its small steps."""
        return flops / (self.flops[dtype] * self.reached) + read / (self.bandwidth * self.reached_bandwidth)


def _gpu(name: str, gigabytes: int, half: float, single: float, bandwidth: float) -> Device:
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return Device(name, gigabytes * GIB, flops, bandwidth * 1e9)


_CPU_FLOPS = {"float32": 1.08e11, "bfloat16": 1e10, "float16": 1e10}  # what was reached
DEVICES = {
    device.name: device
    for device in (
        Device("cpu-2core", 16 * GIB, _CPU_FLOPS, 9e9, 1.0, 1.0, measured=True, cuda=False),
        _gpu("rtx-3090", 24, 71, 35.6, 936),
        _gpu("rtx-4090", 24, 165, 82.6, 1008),
        _gpu("l4-24g", 24, 121, 30.3, 300),
        _gpu("a100-80g", 80, 312, 19.5, 2039),
        _gpu("h100-80g", 80, 989, 67, 3350),
    )
}


def find_device(name: str) -> Device:
    """A device of the table; `UserError` with the nearest names for another."""
    if name in DEVICES:
        return DEVICES[name]
    near = get_close_matches(name, DEVICES, 3, 0.4) or list(DEVICES)
    raise UserError(f"--on {name}: no such device; did you mean {', '.join(near)}? All: {', '.join(DEVICES)}")


def parse_size(text: str) -> int:
    """Bytes of a size such as 24GB or 23.5GiB; a number alone is GB. Raises `UserError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise UserError(f"--memory {text}: write a size such as 24GB")
    power = " KMGT".index(found[2].upper() or "G")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
