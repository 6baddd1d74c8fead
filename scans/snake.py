"""Orders that turn round at the end of each line, so that every step goes to a neighbour."""

from __future__ import annotations

import numpy as np

from vssm.scans.raster import cells_of
from vssm.scans.registry import Grid, register_scan, scan_array

START, RIGHT, LEFT, UP, DOWN = range(5)  # the move that enters a cell, as PlainMamba numbers them


def _boustrophedon(cells: np.ndarray) -> np.ndarray:
    cells = cells.copy()
    cells[1::2] = cells[1::2, ::-1]
    return cells.ravel()


@register_scan(spatial_dims=2, permutation=True, rows=4)
def snake(grid: Grid) -> np.ndarray:
    """Rows, every second one from right to left; that backwards; columns likewise; that backwards: (4, L).

    PlainMamba's continuous orders o1 to o4 (arXiv:2403.17695, section 3.3).

    >>> snake((2, 3)).tolist()
    [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]]
    """
    cells = cells_of(grid)
    rows, columns = _boustrophedon(cells), _boustrophedon(cells.T)
    return np.stack([rows, rows[::-1], columns, columns[::-1]])


def snake_directions(grid: Grid) -> np.ndarray:
    """The move that enters each step's cell of ``snake``: (4, L), 0 start, 1 right, 2 left, 3 up, 4 down.

    PlainMamba adds to B a learned term chosen by this code.

    >>> snake_directions((2, 3)).tolist()[0]
    [0, 1, 1, 4, 2, 2]
    """
    row, column = np.divmod(scan_array("snake", grid), grid[1])
    down, right = np.diff(row, axis=1), np.diff(column, axis=1)
    moves = np.select([right > 0, right < 0, down < 0, down > 0], [RIGHT, LEFT, UP, DOWN])
    return np.pad(moves, ((0, 0), (1, 0)), constant_values=START)
