"""Orders that finish one window before the next."""

from __future__ import annotations

import math

import numpy as np

from vssm.scans.raster import both_ways, cells_of
from vssm.scans.registry import Grid, register_scan


def _padded(grid: Grid, window: int) -> Grid:
    """The grid rounded up to whole windows."""
    if window < 1:
        raise ValueError(f"scan 'window': window must be at least 1, got {window}")
    return tuple((size + window - 1) // window * window for size in grid)


@register_scan(
    spatial_dims=(2, 3),
    permutation=False,
    visits_once=True,
    rows=2,
    steps=lambda grid, window, column: math.prod(_padded(grid, window)),
)
def window(grid: Grid, window: int = 7, column: bool = False) -> np.ndarray:
    """Windows of side ``window`` in raster order, cells in raster order inside each, and the same backwards: (2, T).

    As in LocalMamba (arXiv:2403.09338, section 3.2). The grid is padded at the end of each axis to whole windows, and
    the padding is scanned: T is the number of padded cells. ``column`` reads windows and cells column by column.

    >>> window((2, 4), window=2).tolist()
    [[0, 1, 4, 5, 2, 3, 6, 7], [7, 6, 3, 2, 5, 4, 1, 0]]
    >>> window((1, 3), window=2)[0].tolist()            # 3 is padding
    [0, 1, 3, 3, 2, 3, 3, 3]
    """
    padding = [(0, padded - size) for size, padded in zip(grid, _padded(grid, window))]
    cells = np.pad(cells_of(grid), padding, constant_values=math.prod(grid))
    if column:
        cells = cells.T
    parts = [part for size in cells.shape for part in (size // window, window)]  # windows, cells, windows, …
    axes = [*range(0, len(parts), 2), *range(1, len(parts), 2)]
    return both_ways(cells.reshape(parts).transpose(axes))
