"""Orders along diagonals."""

from __future__ import annotations

import numpy as np

from vssm.scans.raster import both_ways, cells_of
from vssm.scans.registry import Grid, register_scan

WALKS = ("zigzag", "up", "down")


@register_scan(spatial_dims=2, permutation=True, rows=2)
def diagonal(grid: Grid, walk: str = "zigzag", mirror: bool = False) -> np.ndarray:
    """Anti-diagonals one after the other from the top left corner, and the same backwards: (2, L).

    Each is walked ``"up"``, from bottom left to top right, ``"down"``, or in turns (``"zigzag"``, the first one up, as
    JPEG reads its coefficients and MambaAD its map, arXiv:2404.06564). ``mirror`` draws the path on the map mirrored
    left to right, so along main diagonals from the top right corner.

    >>> diagonal((2, 3)).tolist()[0], diagonal((2, 3), walk="up").tolist()[0]
    ([0, 1, 3, 4, 2, 5], [0, 3, 1, 4, 2, 5])
    >>> diagonal((2, 3), mirror=True).tolist()[0]
    [2, 1, 5, 4, 0, 3]
    """
    if walk not in WALKS:
        raise ValueError(f"scan 'diagonal': walk must be one of {', '.join(WALKS)}, got {walk!r}")
    row, column = np.indices(grid)
    number = row + column
    up = {"up": True, "down": False, "zigzag": number % 2 == 0}[walk]
    path = np.lexsort([np.where(up, -row, row).ravel(), number.ravel()])
    cells = cells_of(grid)
    return both_ways((cells[:, ::-1] if mirror else cells).ravel()[path])
