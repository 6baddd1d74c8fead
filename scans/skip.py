"""Orders whose rows leave cells out, and cover the grid together."""

from __future__ import annotations

import math

import numpy as np

from vssm.scans.raster import cells_of
from vssm.scans.registry import Grid, register_scan


def _subgrid(grid: Grid, step: int) -> Grid:
    """Sizes of the largest sub-grid of every ``step``-th cell."""
    if step < 1:
        raise ValueError(f"scan 'atrous': step must be at least 1, got {step}")
    return tuple((size + step - 1) // step for size in grid)


@register_scan(
    spatial_dims=2,
    permutation=False,
    visits_once=True,
    rows=lambda grid, step: step * step,
    steps=lambda grid, step: math.prod(_subgrid(grid, step)),
)
def atrous(grid: Grid, step: int = 2) -> np.ndarray:
    """Every ``step``-th cell of every ``step``-th row, for each offset: (step², ceil(H / step) ceil(W / step)).

    EfficientVMamba's skip sampling (arXiv:2403.09977, section 3.2). Row ``j step + i`` starts at cell (i, j) and reads
    its sub-grid by rows if i is even, by columns if it is odd. Sub-grids that are short at the border are padded.

    >>> atrous((2, 4)).tolist()
    [[0, 2], [4, 6], [1, 3], [5, 7]]
    >>> atrous((3, 2)).tolist()                         # 6 is padding
    [[0, 4], [2, 6], [1, 5], [3, 6]]
    """
    padding = [(0, parts * step - size) for size, parts in zip(grid, _subgrid(grid, step))]
    cells = np.pad(cells_of(grid), padding, constant_values=math.prod(grid))
    parts = [cells[i::step, j::step] for j in range(step) for i in range(step)]
    # As published: rows of odd offset by columns, though none of the four is reversed.
    return np.stack([(part.T if k % step % 2 else part).ravel() for k, part in enumerate(parts)])


def _whole(grid: Grid, rate: int) -> int:
    """Cells rounded up to a multiple of ``rate``."""
    if rate < 1:
        raise ValueError(f"scan 'reorder': rate must be at least 1, got {rate}")
    return (math.prod(grid) + rate - 1) // rate * rate


@register_scan(spatial_dims=(1, 2, 3), permutation=False, visits_once=True, rows=2, steps=_whole)
def reorder(grid: Grid, rate: int = 10) -> np.ndarray:
    """All cells as they lie, and every ``rate``-th of them for each offset: (2, T), T = L up to a multiple of ``rate``.

    The two branches of SR-Mamba in MambaMIL (arXiv:2403.06800, section 2.3), for bags of patches and for grids. The
    padding is scanned with the cells.

    >>> reorder((5,), rate=2).tolist()                  # 5 is padding
    [[0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3, 5]]
    """
    cells = np.full(_whole(grid, rate), math.prod(grid))
    cells[: math.prod(grid)] = np.arange(math.prod(grid))
    return np.stack([cells, cells.reshape(-1, rate).T.ravel()])
