"""The names under which published scan tables go, and the orders of ours that they are.

A published table holds one row, -1 for padding; ``tests/golden/scans`` and ``vssm verify`` compare them with ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import PurePath

import numpy as np

from vssm.scans.registry import Grid, scan_array
from vssm.scans.snake import snake_directions

CURVES = {"z": "morton", "hilbert": "hilbert_pow2"}

# file: (pattern of its row names, (grid, groups of the match) -> our row). Reversed rows come second in ours.
ROWS: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "cross_scan": (r"k([0-3])", lambda grid, k: scan_array("cross", grid)[int(k)]),
    "raster3d": (
        r"slow_to_fast_([dhw]{3})(_rev)?",
        lambda grid, axes, rev: scan_array("bidirectional", grid, axes=axes)[1 if rev else 0],
    ),
    "continuous": (r"o([1-4])", lambda grid, number: scan_array("snake", grid)[int(number) - 1]),
    "snake3d": (
        r"([xyz]{3})(_rev)?",  # fastest first; x, y, z are d, h, w
        lambda grid, axes, rev: scan_array("snake", grid, axes=_slowest_first(axes))[1 if rev else 0],
    ),
    "gilbert2d": (
        r"gilbert(_trans)?(_rev)?",
        lambda grid, trans, rev: scan_array("hilbert", grid, axes="wh" if trans else "hw")[1 if rev else 0],
    ),
    "gilbert3d": (r"gilbert(_rev)?", lambda grid, rev: scan_array("hilbert", grid)[1 if rev else 0]),
    "morton2d": (
        r"z(_trans)?(_rev)?",
        lambda grid, trans, rev: scan_array("morton", grid, axes="wh" if trans else "hw")[1 if rev else 0],
    ),
    "morton_hilbert3d": (
        r"(z|hilbert)(_trans)?",
        lambda grid, curve, trans: scan_array(CURVES[curve], grid, axes="hdw" if trans else "dhw")[0],
    ),
    "diagonal": (
        r"(?:(main|anti)_(down|up)|zigzag(_mirror)?)(_rev)?",
        lambda grid, family, walk, mirror, rev: scan_array(
            "diagonal", grid, walk=walk or "zigzag", mirror=bool(mirror) or family == "main"
        )[1 if rev else 0],
    ),
    "spiral": (
        r"(c?cw)_in(_rev)?",
        lambda grid, turn, rev: scan_array("spiral", grid, clockwise=turn == "cw")[1 if rev else 0],
    ),
    "mambaad": (
        r"(sweep|scan|zorder|zigzag|hilbert)_dir([0-7])",
        lambda grid, path, number: scan_array("hybrid", grid, path=path)[int(number)],
    ),
    "local_window": (
        r"w(\d+)(_col)?(_flip)?",
        lambda grid, side, column, flip: scan_array("window", grid, window=int(side), column=bool(column))[
            1 if flip else 0
        ],
    ),
    "atrous": (r"k([0-3])", lambda grid, k: scan_array("atrous", grid, step=2)[int(k)]),
    "inter_slice": (
        r"(forward|backward|interslice_n(\d+))",
        lambda grid, kind, n: scan_array("interslice", grid, slices=int(n) if n else None)[
            {"forward": 0, "backward": 1}.get(kind, 2)
        ],
    ),
    "xy_slice": (
        r"(intra|inter)_(row|col)s",
        lambda grid, kind, line: _slices(grid, kind == "inter", "hw" if line == "row" else "wh"),
    ),
    "sequence_reorder": (r"order", lambda size: scan_array("reorder", size[:1], rate=size[1])[1]),
}


def _slowest_first(axes: str) -> str:
    return axes[::-1].translate(str.maketrans("xyz", "dhw"))


def _slices(grid: Grid, inter: bool, axes: str) -> np.ndarray:
    """Cells of all slices, or the numbers of the slices, whose means are read one after the other."""
    table = scan_array("slices", grid, axes=axes)
    return scan_array("raster", (1, len(table)))[0] if inter else table


class NotCovered(KeyError):
    """A published table that none of our orders draws yet."""

    def __str__(self) -> str:
        return str(self.args[0])


def published_row(file_name: str, order_name: str, grid: Grid) -> np.ndarray:
    """The row that the published table file calls ``order_name``, drawn by us: (T,), -1 for padding.

    (K, T) where it is a set of sequences. The tables of "sequence_reorder" have a size (cells, rate).

    >>> published_row("local_window", "w2_flip", (1, 3)).tolist()
    [-1, -1, -1, 2, -1, -1, 1, 0]
    >>> published_row("xy_slice", "intra_cols", (2, 2)).tolist()
    [[0, 2], [1, 3]]
    """
    name = PurePath(file_name).name.removesuffix(".json").lower()
    if name not in ROWS:
        raise NotCovered(f"published scans: no order of ours draws {name!r} yet")
    pattern, ours = ROWS[name]
    if (match := re.fullmatch(pattern, order_name)) is None:
        raise NotCovered(f"published scans: no order of ours draws {order_name!r} of {name!r} yet, only {pattern}")
    path = ours(grid, *match.groups())
    cells = grid[0] if name == "sequence_reorder" else math.prod(grid)
    return np.where(path == cells, -1, path)


def published_directions(file_name: str, order_name: str, grid: Grid) -> np.ndarray:
    """The direction codes that go with a row of "continuous": (T,), 0 start, 1 right, 2 left, 3 up, 4 down.

    >>> published_directions("continuous", "o3", (2, 2)).tolist()
    [0, 4, 1, 3]
    """
    if PurePath(file_name).name.removesuffix(".json") != "continuous":
        raise NotCovered(f"published scans: {file_name} has no direction codes; continuous has")
    return snake_directions(grid)[int(order_name.removeprefix("o")) - 1]
