"""4-bit blocks with zero points.

The builder's own 4-bit quantizers round to nearest. Here each block's scale and zero point are searched for the
least squared error, each weight's error weighted by how much its input matters: the same idea as llama.cpp's
importance matrix, in the same file format and size as round-to-nearest with zero points.
"""

from __future__ import annotations

from functools import partial

from ..grids import Grid, round_to
from . import BLOCK, Quantizer

QUANTIZER = Quantizer(partial(round_to, Grid(4, BLOCK, zeros=True)), bits=4, row_error=0.3)
