"""Every line or plane a sequence of its own."""

from __future__ import annotations

import math

import numpy as np

from vssm.scans.raster import axis_numbers, lines
from vssm.scans.registry import Grid, register_scan


def _count(grid: Grid, axes: str | None) -> int:
    return grid[axis_numbers(len(grid), axes)[0]]


@register_scan(
    spatial_dims=(2, 3),
    permutation=False,
    visits_once=True,
    rows=_count,
    steps=lambda grid, axes: math.prod(grid[axis] for axis in axis_numbers(len(grid), axes)[1:]),
)
def slices(grid: Grid, axes: str | None = None) -> np.ndarray:
    """Each row of the map is a sequence of its own, (H, W); in 3D each plane, (D, H W).

    The recurrence begins anew in each slice, as in XYScanNet's intra-slice scan (section 3.2 of arXiv:2412.10338).
    ``axes`` names the axes from slowest to fastest: slices lie along the first one, ``"wh"`` reads columns. The number
    of slices follows the grid, so all share one set of parameters, given without an axis for rows.

    >>> slices((2, 3)).tolist(), slices((2, 3), axes="wh").tolist()
    ([[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]])
    """
    cells = lines(grid, axes)
    return cells.reshape(len(cells), -1)
