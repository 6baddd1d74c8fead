"""Scan orders: how the cells of a grid are read as sequences.

An order is a function from a grid to a (K, T) table of cell numbers, registered under its name:

>>> "hilbert" in list_scans(2), "hilbert" in list_scans(3)
(True, True)
>>> scan_table("cross", (2, 2))
tensor([[0, 1, 2, 3],
        [0, 2, 1, 3],
        [3, 2, 1, 0],
        [3, 1, 2, 0]], dtype=torch.int32)
"""

from vssm.scans import (  # noqa: F401  (their orders register themselves)
    curves,
    diagonal,
    hybrid,
    local,
    raster,
    routes,
    skip,
    slices,
    snake,
    spiral,
    volume,
    window,
)
from vssm.scans.apply import to_grid, to_sequences
from vssm.scans.plotting import plot
from vssm.scans.registry import Grid, list_scans, register_scan, scan_array, scan_rows, scan_shape, visits_once
from vssm.scans.snake import snake_directions
from vssm.scans.tables import scan_table

__all__ = [
    "Grid",
    "list_scans",
    "plot",
    "register_scan",
    "scan_array",
    "scan_rows",
    "scan_shape",
    "scan_table",
    "snake_directions",
    "to_grid",
    "to_sequences",
    "visits_once",
]
