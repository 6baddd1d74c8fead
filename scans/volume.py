"""Orders made for volumes."""

from __future__ import annotations

import numpy as np

from vssm.scans.raster import cells_of
from vssm.scans.registry import Grid, register_scan


@register_scan(spatial_dims=(2, 3), permutation=True, rows=3)
def interslice(grid: Grid, slices: int | None = None) -> np.ndarray:
    """Raster, raster backwards, and slice by slice at one position before the next position: (3, L).

    SegMamba's tri-orientated scan (arXiv:2401.13560, section 2.2). A slice is one plane of the first axis, in 2D one
    row; with ``slices`` it is one of that many equal pieces of the raster sequence, whatever the depth. The published
    code has it so, with 64, 32, 16, 8 pieces for its four stages: the true depths of a 128³ input only.

    >>> interslice((2, 1, 3))[2].tolist()
    [0, 3, 1, 4, 2, 5]
    >>> interslice((2, 1, 3), slices=3)[2].tolist()
    [0, 2, 4, 1, 3, 5]
    """
    path = cells_of(grid).ravel()
    slices = grid[0] if slices is None else slices
    if not isinstance(slices, int) or slices < 1 or path.size % slices:
        raise ValueError(
            f"scan 'interslice': slices must divide the {path.size} cells of {grid}, got {slices!r}; "
            "leave it out to use the depth"
        )
    return np.stack([path, path[::-1], path.reshape(slices, -1).T.ravel()])
