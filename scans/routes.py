"""The routes of a multi-head scan."""

from __future__ import annotations

import numpy as np

from vssm.scans.diagonal import diagonal
from vssm.scans.raster import cells_of, raster
from vssm.scans.registry import Grid, register_scan
from vssm.scans.snake import snake
from vssm.scans.spiral import spiral


def _snake(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    return snake(grid)[0], snake(grid)[2]


def _diagonals(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    return diagonal(grid)[0], diagonal(grid, mirror=True)[0]


def _spirals(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    inwards = spiral(grid)[0]
    return inwards, cells_of(grid)[::-1].ravel()[inwards]


def _lines(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    return raster(grid)[0], raster(grid, axes="wh")[0]


HEADS = {"c": _snake, "x": _diagonals, "s": _spirals, "z": _lines}


def _rows(grid: Grid, heads: str) -> int:
    if not heads or not set(heads) <= set(HEADS):
        raise ValueError(f"scan 'routes': heads must be letters of {''.join(HEADS)}, got {heads!r}")
    return 4 * len(heads)


@register_scan(spatial_dims=2, permutation=True, rows=_rows)
def routes(grid: Grid, heads: str = "cxsz") -> np.ndarray:
    """Two routes for each head of MHS-VM (arXiv:2406.05992), each forwards, then backwards: (4 heads, L).

    Heads are letters: ``c`` snakes along rows and along columns; ``x`` zigzags along anti-diagonals from the top left
    and along main diagonals from the top right; ``s`` spirals inwards from the top left clockwise and from the bottom
    left counter-clockwise; ``z`` reads rows and columns.

    >>> routes((2, 2), heads="x").tolist()
    [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]]
    """
    _rows(grid, heads)
    return np.stack([row for head in heads for route in HEADS[head](grid) for row in (route, route[::-1])])
