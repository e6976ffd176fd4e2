"""Named machines for `compress plan --on NAME`: their peak figures, and the share of them that is reached.

Peaks and bandwidths are the vendors' (dense, no sparsity; tensor cores with 32-bit accumulation). The share reached is
an assumption for GPUs, marked as such in the plan. So are all figures of the host CPUs, which write the artifacts and
run them in stock llama.cpp and ONNX Runtime. For `cpu-2core` both were measured: the default recipe's stages on two
cores of an AMD EPYC (AVX-512), and its model's decoding, 33 tokens/s in float32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...core.errors import UserError
from ...core.suggest import similar
from ...core.work import Work

GIB = 2**30


@dataclass(frozen=True)
class Host:
    """CPU and memory of a machine with GPUs."""

    memory: int  # bytes
    flops: float  # reached per second, in the dtype that models run in there
    double: float  # the same in float64
    bandwidth: float  # bytes reached per second


@dataclass(frozen=True)
class Device:
    """A machine or a GPU."""

    name: str
    memory: int  # bytes
    flops: dict[str, float]  # peak per second, by dtype
    bandwidth: float  # bytes per second
    reached: float = 0.4  # of the peak, in prefill and training
    reached_bandwidth: float = 0.6  # in decoding
    measured: bool = False  # whether the shares reached are measured rather than assumed
    cuda: bool = True
    double: float = 0.5  # peak in float64 relative to float32
    host: Host | None = None  # None: the device itself

    @property
    def dtype(self) -> str:
        """The default dtype of weights."""
        return "bfloat16" if self.cuda else "float32"

    def seconds(self, work: Work, dtype: str) -> float:
        """Seconds for work: its arithmetic, plus reading memory in steps limited by bandwidth."""
        double = self.flops["float32"] * self.double
        speed, bandwidth = self.flops[dtype] * self.reached, self.bandwidth * self.reached_bandwidth
        host = self.host or Host(self.memory, speed, double * self.reached, bandwidth)
        own = work.flops / speed + work.double / (double * self.reached) + work.read / bandwidth
        beside = work.host_flops / host.flops + work.host_double / host.double + work.host_read / host.bandwidth
        return own + beside


DESKTOP = Host(64 * GIB, 4e11, 2e11, 4e10)  # 16 cores, two channels of memory
SERVER = Host(1024 * GIB, 2e12, 1e12, 2e11)  # of a machine with eight GPUs: 128 cores
SERVER_AMX = Host(1024 * GIB, 1e13, 2e12, 3e11)  # 112 cores with AMX (matrix products in bfloat16)


def _gpu(name: str, gigabytes: int, half: float, single: float, double: float, bandwidth: float, host: Host) -> Device:
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return Device(name, gigabytes * GIB, flops, bandwidth * 1e9, double=double / single, host=host)


_CPU_FLOPS = {"float32": 2.6e11, "bfloat16": 1e10, "float16": 1e10}  # what was reached
DEVICES = {
    device.name: device
    for device in (
        Device("cpu-2core", 16 * GIB, _CPU_FLOPS, 18e9, 1.0, 1.0, measured=True, cuda=False),
        _gpu("rtx-3090", 24, 71, 35.6, 0.56, 936, DESKTOP),
        _gpu("rtx-4090", 24, 165, 82.6, 1.29, 1008, DESKTOP),
        _gpu("l4-24g", 24, 121, 30.3, 0.47, 300, DESKTOP),
        _gpu("a100-80g", 80, 312, 19.5, 19.5, 2039, SERVER),
        _gpu("h100-80g", 80, 989, 67, 67, 3350, SERVER_AMX),
    )
}


def find_device(name: str) -> Device:
    """The device of that name; `UserError` with the nearest names if there is none."""
    if name in DEVICES:
        return DEVICES[name]
    near = similar(name, DEVICES, least=0.4)[:3] or list(DEVICES)
    raise UserError(f"--on {name}: no such device; did you mean {', '.join(near)}? All: {', '.join(DEVICES)}")


def parse_size(text: str, option: str = "--memory", example: str = "24GB") -> int:
    """Bytes of a size such as 24GB or 23.5GiB; a number alone is GB. Raises `UserError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"{option} {text}: write a size such as {example}")
    power = " KMGT".index(match[2].upper() or "G")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
