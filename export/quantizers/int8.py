"""Symmetric 8-bit blocks."""

from __future__ import annotations

from functools import partial

from ..grids import Grid, round_to
from . import BLOCK, Quantizer

QUANTIZER = Quantizer(partial(round_to, Grid(8, BLOCK, zeros=False)), bits=8, row_error=0.025)
