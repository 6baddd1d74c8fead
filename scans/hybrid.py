"""One path drawn on the map as it lies, transposed, turned, and turned and transposed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vssm.scans.curves import hilbert, morton
from vssm.scans.diagonal import diagonal
from vssm.scans.raster import both_ways, cells_of, raster
from vssm.scans.registry import Grid, register_scan
from vssm.scans.snake import snake

PATHS: dict[str, Callable[[Grid], np.ndarray]] = {
    "sweep": raster, "scan": snake, "zorder": morton, "zigzag": diagonal, "hilbert": hilbert,
}  # fmt: skip


def _directions(grid: Grid, path: str, directions: int) -> int:
    if directions not in (2, 4, 8):
        raise ValueError(f"scan 'hybrid': directions must be 2, 4 or 8, got {directions}")
    return directions


@register_scan(spatial_dims=2, permutation=True, rows=_directions)
def hybrid(grid: Grid, path: str = "hilbert", directions: int = 8) -> np.ndarray:
    """MambaAD's hybrid scan (arXiv:2404.06564, section 3.3): a path in ``directions`` directions, (directions, L).

    The path is drawn on the map, on its transpose, on the map turned by 90 degrees counter-clockwise, and on the
    transpose of that; the first half of them, or the first one alone, for 4 or 2 directions. Then all of these
    backwards. ``path`` is ``"sweep"`` (rows), ``"scan"`` (rows, every second one backwards), ``"zorder"`` (Morton),
    ``"zigzag"`` (anti-diagonals) or ``"hilbert"``. Published for squares, the curves for powers of two; here on any
    grid, a turned map having a path of its own shape.

    >>> hybrid((2, 2), directions=4).tolist()
    [[0, 2, 3, 1], [0, 1, 3, 2], [1, 3, 2, 0], [2, 3, 1, 0]]
    """
    if path not in PATHS:
        raise ValueError(f"scan 'hybrid': path must be one of {', '.join(PATHS)}, got {path!r}")
    cells = cells_of(grid)
    turned = np.rot90(cells)
    maps = [cells, cells.T, turned, turned.T][: _directions(grid, path, directions) // 2]
    return both_ways(*(each.ravel()[PATHS[path](each.shape)[0]] for each in maps))
