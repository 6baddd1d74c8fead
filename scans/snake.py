"""Orders that turn round at the end of each line, so that every step goes to a neighbour."""

from __future__ import annotations

import numpy as np

from vssm.scans.raster import AXES, cells_of, lines
from vssm.scans.registry import Grid, register_scan, scan_array

START, RIGHT, LEFT, UP, DOWN = range(5)  # the move that enters a cell, as PlainMamba numbers them


def _boustrophedon(cells: np.ndarray) -> np.ndarray:
    """Line after line of an array of cells, every second one backwards, in any number of dimensions."""
    if cells.ndim == 1:
        return cells
    walked = cells.reshape(-1, cells.shape[-1])[_boustrophedon(cells_of(cells.shape[:-1]))]
    walked[1::2] = walked[1::2, ::-1]
    return walked.ravel()


@register_scan(
    spatial_dims=(2, 3),
    permutation=True,
    rows=lambda grid, axes: 2 * (len(grid) if axes is None else 1),
)
def snake(grid: Grid, axes: str | None = None) -> np.ndarray:
    """Rows, every second one from right to left; that backwards; columns likewise; that backwards: (4, L).

    PlainMamba's continuous orders o1 to o4 (arXiv:2403.17695, section 3.3). In 3D planes turn round as well: with the
    axes dhw, hwd and wdh from slowest to fastest, each followed by its reverse, (6, L). ``axes`` names one choice:
    (2, L). The six of them are the consistent traverse serialization of Point Cloud Mamba (arXiv:2403.00762,
    section 3.2) as its paper describes it.

    >>> snake((2, 3)).tolist()
    [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]]
    >>> snake((2, 2, 2), axes="whd").tolist()[0]
    [0, 4, 6, 2, 3, 7, 5, 1]
    """
    letters = AXES[len(grid)]
    choices = [letters[i:] + letters[:i] for i in range(len(grid))] if axes is None else [axes]
    paths = [_boustrophedon(lines(grid, choice)) for choice in choices]
    return np.stack([row for path in paths for row in (path, path[::-1])])


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
