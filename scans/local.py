"""Any choice of rows, columns and windows, each also backwards."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch

from vssm.scans.raster import raster
from vssm.scans.registry import Grid, register_scan, scan_shape
from vssm.scans.window import window

DIRECTION = re.compile(r"(?:h|v|w([1-9][0-9]*))(_flip)?")


def _count(grid: Grid, directions: str) -> int:
    if not (count := len(directions.split())):
        raise ValueError("scan 'local': directions must name one direction or more, such as 'h w7_flip', got none")
    return count


def _longest(grid: Grid, directions: str) -> int:
    """Steps of the longest of these directions."""
    longest: Any = math.prod(grid)  # a number or a symbol
    for side in sorted({int(side) for side, _ in map(_parsed, directions.split()) if side}):
        longest = torch.sym_max(longest, scan_shape("window", grid, window=side)[1])
    return longest


@register_scan(
    spatial_dims=2,
    permutation=False,
    visits_once=True,
    rows=_count,
    steps=_longest,
)
def local(grid: Grid, directions: str = "h h_flip w2 w2_flip") -> np.ndarray:
    """The directions of LocalMamba (arXiv:2403.09338, section 3.2) that ``directions`` names, one a row: (K, T).

    ``h`` reads rows, ``v`` columns, ``w7`` windows of side 7 in raster order, cells in raster order inside each; with
    ``_flip`` the same path backwards. Windows pad the grid at its end, and their padding is scanned; a row that is
    shorter than another one is padded at its end.

    >>> local((2, 3), directions="h v_flip").tolist()
    [[0, 1, 2, 3, 4, 5], [5, 2, 4, 1, 3, 0]]
    >>> local((1, 3), directions="h w2_flip").tolist()              # 3 is padding
    [[0, 1, 2, 3, 3, 3, 3, 3], [3, 3, 3, 2, 3, 3, 1, 0]]
    """
    _count(grid, directions)
    rows = []
    for name, (side, flipped) in zip(directions.split(), map(_parsed, directions.split()), strict=True):
        if side:
            path = window(grid, window=int(side))[0]
        else:
            path = raster(grid, axes="wh" if name.startswith("v") else "hw")[0]
        path = path[::-1] if flipped else path
        rows.append(np.pad(path, (0, _longest(grid, directions) - len(path)), constant_values=math.prod(grid)))
    return np.stack(rows)


def _parsed(name: str) -> tuple[str | None, bool]:
    """Side of the window, None for rows and columns; and whether the path is read backwards."""
    if (match := DIRECTION.fullmatch(name)) is None:
        raise ValueError(f"scan 'local': a direction is h, v or w and a number, perhaps with _flip, got {name!r}")
    return match[1], bool(match[2])
