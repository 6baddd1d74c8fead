"""Spirals."""

from __future__ import annotations

import numpy as np

from vssm.scans.raster import both_ways, cells_of
from vssm.scans.registry import Grid, register_scan


@register_scan(spatial_dims=2, permutation=True, rows=2)
def spiral(grid: Grid, clockwise: bool = True) -> np.ndarray:
    """Ring after ring from the top left corner inwards, and the same outwards: (2, L).

    >>> spiral((2, 3)).tolist(), spiral((2, 3), clockwise=False).tolist()[0]
    ([[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0]], [0, 3, 4, 5, 2, 1])
    """
    left = cells_of(grid) if clockwise else cells_of(grid).T
    path = []
    while left.size:
        path.append(left[0])
        left = np.rot90(left[1:])  # the next side of the ring is now the first row
    return both_ways(np.concatenate(path))
