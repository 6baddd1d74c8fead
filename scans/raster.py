"""Orders that read whole lines, all in the same direction: raster, both ways, VMamba's cross-scan and its ablations."""

from __future__ import annotations

import math

import numpy as np

from vssm.scans.registry import Grid, register_scan

AXES = {2: "hw", 3: "dhw"}  # the letters of a grid's axes, as the papers name them


def cells_of(grid: Grid) -> np.ndarray:
    """The row-major cell numbers, in the shape of the grid."""
    return np.arange(math.prod(grid)).reshape(grid)


def both_ways(*paths: np.ndarray) -> np.ndarray:
    """Rows of the given paths, of any shape, then the same rows backwards: (2 n, T)."""
    rows = np.stack([path.ravel() for path in paths])
    return np.concatenate([rows, rows[:, ::-1]])


def axis_numbers(dims: int, axes: str | None) -> list[int]:
    """The grid's axes in the order that ``axes`` names them, as they lie if None: "wh" is [1, 0]."""
    letters = AXES[dims]
    if axes is None:
        return list(range(dims))
    if not isinstance(axes, str) or sorted(axes) != sorted(letters):
        raise ValueError(f"scan: axes must name each of {letters!r} once, slowest first, got {axes!r}")
    return [letters.index(letter) for letter in axes]


def lines(grid: Grid, axes: str | None = None) -> np.ndarray:
    """Cell numbers with the axes in the given order, slowest first."""
    return cells_of(grid).transpose(axis_numbers(len(grid), axes))


@register_scan(spatial_dims=(2, 3), permutation=True, rows=1)
def raster(grid: Grid, axes: str | None = None) -> np.ndarray:
    """Line after line: (1, L). ``axes`` names the axes from slowest to fastest, "hw" in 2D and "dhw" in 3D by default.

    >>> raster((2, 3)).tolist(), raster((2, 3), axes="wh").tolist()
    ([[0, 1, 2, 3, 4, 5]], [[0, 3, 1, 4, 2, 5]])
    """
    return lines(grid, axes).reshape(1, -1)


@register_scan(spatial_dims=(2, 3), permutation=True, rows=2)
def bidirectional(grid: Grid, axes: str | None = None) -> np.ndarray:
    """Line after line, and the same path backwards, as in Vim (arXiv:2401.09417): (2, L).

    >>> bidirectional((1, 3)).tolist()
    [[0, 1, 2], [2, 1, 0]]
    """
    return both_ways(lines(grid, axes))


@register_scan(spatial_dims=(2, 3), permutation=True, rows=lambda grid: 2 * len(grid))
def cross(grid: Grid) -> np.ndarray:
    """Lines along each axis in turn, then all of them backwards: (4, L) in 2D, (6, L) in 3D.

    In 2D rows, columns and both reversed, as in VMamba (arXiv:2401.10166); in 3D the axes rotate: dhw, hwd, wdh.

    >>> cross((2, 2)).tolist()
    [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [3, 1, 2, 0]]
    """
    letters = AXES[len(grid)]
    return both_ways(*(lines(grid, letters[i:] + letters[:i]) for i in range(len(grid))))


@register_scan(spatial_dims=2, permutation=True, rows=4)
def unidi(grid: Grid) -> np.ndarray:
    """Rows, four times the same: VMamba's ablation "unidi" (forward type v051d), (4, L).

    >>> unidi((1, 2)).tolist()
    [[0, 1], [0, 1], [0, 1], [0, 1]]
    """
    return np.tile(cells_of(grid).ravel(), (4, 1))


@register_scan(spatial_dims=2, permutation=True, rows=4)
def bidi(grid: Grid) -> np.ndarray:
    """Rows twice, rows backwards twice: VMamba's ablation "bidi" (forward type v052d), (4, L).

    >>> bidi((1, 2)).tolist()
    [[0, 1], [0, 1], [1, 0], [1, 0]]
    """
    return both_ways(cells_of(grid), cells_of(grid))


@register_scan(spatial_dims=2, permutation=True, rows=4)
def rot90(grid: Grid) -> np.ndarray:
    """Rows of the map turned by 0, 90, 180 and 270 degrees counter-clockwise: VMamba's ablation "rot90", (4, L).

    >>> rot90((2, 2)).tolist()
    [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
    """
    return np.stack([np.rot90(cells_of(grid), turns).ravel() for turns in range(4)])
