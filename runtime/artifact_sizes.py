"""A size instead of a type: `80MB` for the whole file, or `4.3bits` per weight. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .artifact_types import ARTIFACT_TYPES

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)}|bits)", re.IGNORECASE)
PATTERN = r"^[0-9]+(\.[0-9]+)?\s*([KMGkmg]i?)?[Bb](its)?$"  # for the schema of recipes


@dataclass(frozen=True)
class Target:
    """One of the two is given."""

    bytes: int | None = None  # of the whole file, its vocabulary included
    bits: float | None = None  # per weight, the vocabulary not counted

    @property
    def name(self) -> str:
        """As a type: 80MB, 1.25GB, 4.3bits."""
        if self.bits is not None:
            return f"{self.bits:g}bits"
        assert self.bytes is not None
        unit = next(unit for unit in ("GB", "MB", "kB", "B") if self.bytes >= UNITS[unit] or unit == "B")
        return f"{self.bytes / UNITS[unit]:.12g}{unit}"

    def expected(self, parameters: int) -> float:
        """Bits per weight; of a size in bytes about, as if there were no vocabulary."""
        return self.bits if self.bits is not None else 8 * (self.bytes or 0) / parameters


def target_of(name: str) -> Target | None:
    """The size that a type's name stands for; None for a plain type. Raises `ValueError` for a size of nothing."""
    found = _SIZE.fullmatch(name.strip())
    if found is None:
        return None
    number, unit = float(found[1]), found[2]
    if unit.lower() == "bits":
        target = Target(bits=number)
    else:
        factor = next(factor for spelt, factor in UNITS.items() if spelt.lower() == unit.lower())
        target = Target(bytes=round(number * factor))
    if not (target.bits or target.bytes):
        raise ValueError(f"{name} is no size")
    return target


def bits_per_weight(name: str, parameters: int, *, most: bool = False) -> float:
    """Expected bits per weight of a type or size, or for types the most that are expected."""
    target = target_of(name)
    if target is not None:
        return target.expected(parameters)
    kind = ARTIFACT_TYPES[name]
    return kind.most if most else kind.typical
