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

# file: (pattern of its row names, groups of the match -> (order, options, row)). Reversed rows come second in ours.
ROWS: dict[str, tuple[str, Callable[..., tuple[str, dict, int]]]] = {
    "cross_scan": (r"k([0-3])", lambda k: ("cross", {}, int(k))),
    "raster3d": (r"slow_to_fast_([dhw]{3})(_rev)?", lambda axes, rev: ("bidirectional", {"axes": axes}, bool(rev))),
    "continuous": (r"o([1-4])", lambda number: ("snake", {}, int(number) - 1)),
    "gilbert2d": (r"gilbert(_trans)?(_rev)?", lambda trans, rev: ("hilbert", {"transpose": bool(trans)}, bool(rev))),
    "gilbert3d": (r"gilbert(_rev)?", lambda rev: ("hilbert", {}, bool(rev))),
    "morton2d": (r"z(_trans)?(_rev)?", lambda trans, rev: ("morton", {"transpose": bool(trans)}, bool(rev))),
    "local_window": (
        r"w(\d+)(_col)?(_flip)?",
        lambda side, column, flip: ("window", {"window": int(side), "column": bool(column)}, bool(flip)),
    ),
    "atrous": (r"k([0-3])", lambda k: ("atrous", {"step": 2}, int(k))),
    "inter_slice": (
        r"(forward|backward|interslice_n(\d+))",
        lambda kind, n: ("interslice", {"slices": int(n)} if n else {}, {"forward": 0, "backward": 1}.get(kind, 2)),
    ),
}


class NotCovered(KeyError):
    """A published table that none of our orders draws yet."""

    def __str__(self) -> str:
        return str(self.args[0])


def published_row(file_name: str, order_name: str, grid: Grid) -> np.ndarray:
    """The row that the published table file calls ``order_name``, drawn by us: (T,), -1 for padding.

    >>> published_row("local_window", "w2_flip", (1, 3)).tolist()
    [-1, -1, -1, 2, -1, -1, 1, 0]
    """
    order, options, row = _ours(file_name, order_name)
    path = scan_array(order, grid, **options)[int(row)]
    return np.where(path == math.prod(grid), -1, path)


def published_directions(file_name: str, order_name: str, grid: Grid) -> np.ndarray:
    """The direction codes that go with a row of "continuous": (T,), 0 start, 1 right, 2 left, 3 up, 4 down.

    >>> published_directions("continuous", "o3", (2, 2)).tolist()
    [0, 4, 1, 3]
    """
    order, _, row = _ours(file_name, order_name)
    if order != "snake":
        raise NotCovered(f"published scans: {file_name} has no direction codes; continuous has")
    return snake_directions(grid)[row]


def _ours(file_name: str, order_name: str) -> tuple[str, dict, int]:
    name = PurePath(file_name).name.removesuffix(".json")
    if name not in ROWS:
        raise NotCovered(f"published scans: no order of ours draws {name!r} yet")
    pattern, ours = ROWS[name]
    if (match := re.fullmatch(pattern, order_name)) is None:
        raise NotCovered(f"published scans: no order of ours draws {order_name!r} of {name!r} yet, only {pattern}")
    return ours(*match.groups())
