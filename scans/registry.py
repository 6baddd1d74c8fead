"""Scan orders by name: a function from a grid to a (K, T) array of cell numbers, checked once and cached.

``array[k, t]`` is the row-major number of the cell that row k reads at step t; the number ``prod(grid)``, one past the
last cell, is padding. Tensors of these arrays come from ``vssm.scans.tables``.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Grid = tuple[int, ...]
Option = int | str | bool | None
Options = tuple[tuple[str, Option], ...]  # sorted by name, defaults filled in: a cache key

# Arguments of scan_table and plot, so no option's name.
RESERVED = ("name", "grid", "device", "middle_token", "rows", "ax", "cmap")

_SCANS: dict[str, Scan] = {}


@dataclass(frozen=True, eq=False)
class Scan:
    """A registered order: the function that draws it, and what is known without drawing it."""

    name: str
    draw: Callable[..., np.ndarray]
    spatial_dims: tuple[int, ...]
    permutation: bool
    visits_once: bool
    rows: Callable[..., int]
    steps: Callable[..., int]
    defaults: dict[str, Option]

    @functools.cached_property
    def default_options(self) -> Options:
        return tuple(sorted(self.defaults.items()))

    def shape(self, grid: Sequence[int], options: Options) -> tuple[int, int]:
        """(K, T), by arithmetic alone, so that sizes may be symbolic."""
        return self.rows(grid, **dict(options)), self.steps(grid, **dict(options))


def register_scan(
    *,
    spatial_dims: int | tuple[int, ...],
    permutation: bool,
    rows: int | Callable[..., int],
    steps: Callable[..., int] | None = None,
    visits_once: bool = False,
) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """Register the decorated function as a scan order, under the function's name.

    The function takes the grid, and options as keywords with defaults (numbers, strings, booleans), and returns a
    (K, T) integer array of cell numbers. What is promised here is checked when a table is first made.

    Args:
        spatial_dims: Grid dimensions it can read: 2, 3 or both.
        permutation: True if each row visits each cell exactly once, on every grid.
        rows: K, or a function ``(grid, **options)`` giving it.
        steps: A function ``(grid, **options)`` giving T, by default the number of cells. Sizes may be symbolic:
            arithmetic only, no ``if`` on a size.
        visits_once: True if no row visits a cell twice, on any grid; a permutation does not.

    An order that reads every second row::

        @register_scan(spatial_dims=2, permutation=False, visits_once=True, rows=1,
                       steps=lambda grid: (grid[0] + 1) // 2 * grid[1])
        def even_rows(grid):
            return np.arange(math.prod(grid)).reshape(grid)[::2].reshape(1, -1)
    """

    def register(draw: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        name = draw.__name__
        if name in _SCANS:
            raise ValueError(f"register_scan: the name {name!r} is taken by {_SCANS[name].draw.__module__}; rename one")
        options = list(inspect.signature(draw).parameters.values())[1:]
        if any(option.default is option.empty or option.name in RESERVED for option in options):
            raise ValueError(
                f"register_scan: each option of {name!r} needs a default and a name other than {', '.join(RESERVED)}, "
                f"got {inspect.signature(draw)}"
            )
        _SCANS[name] = Scan(
            name=name,
            draw=draw,
            spatial_dims=(spatial_dims,) if isinstance(spatial_dims, int) else tuple(spatial_dims),
            permutation=permutation,
            visits_once=permutation or visits_once,
            rows=rows if callable(rows) else lambda grid, **options: rows,
            steps=steps or (lambda grid, **options: math.prod(grid)),
            defaults={option.name: option.default for option in options},
        )
        return draw

    return register


def list_scans(spatial_dims: int | None = None) -> list[str]:
    """Names of the registered orders, all or those that read grids of ``spatial_dims`` dimensions.

    >>> "hilbert" in list_scans(3), "spiral" in list_scans(3)
    (True, False)
    """
    return sorted(name for name, scan in _SCANS.items() if spatial_dims is None or spatial_dims in scan.spatial_dims)


def visits_once(name: str) -> bool:
    """Whether each row of an order visits each cell at most once, on any grid and with any options.

    >>> visits_once("cross"), visits_once("window")
    (True, True)
    """
    return find_scan(name).visits_once


def scan_shape(name: str, grid: Sequence[int], *, middle_token: bool = False, **options: Option) -> tuple[int, int]:
    """(K, T) of an order on a grid, without making its table; sizes may be symbolic integers.

    >>> scan_shape("cross", (14, 14)), scan_shape("window", (14, 15), window=7), scan_shape("cross", (4, 4, 4))
    ((4, 196), (2, 294), (6, 64))
    """
    scan = find_scan(name)
    k, t = scan.shape(check_grid(scan, grid), check_options(scan, options))
    return k, t + int(middle_token)  # int: a symbolic t and a bool do not add up in torch 2.11


def scan_rows(name: str, spatial_dims: int, **options: Option) -> int | None:
    """K of an order where it is the same on every grid; None where it follows the grid, as the number of slices does.

    A model has parameters for each of the K rows; rows that follow the grid share one set.

    >>> scan_rows("cross", 2), scan_rows("cross", 3), scan_rows("slices", 2)
    (4, 6, None)
    """
    scan = find_scan(name)
    chosen = check_options(scan, options)
    grids = [check_grid(scan, sizes[:spatial_dims]) for sizes in ((8, 8, 8), (16, 24, 40))]
    counts = {scan.shape(grid, chosen)[0] for grid in grids}
    return counts.pop() if len(counts) == 1 else None


def scan_array(name: str, grid: Sequence[int], **options: Option) -> np.ndarray:
    """The table of an order on a grid: (K, T) int32 cell numbers, ``prod(grid)`` for padding; read-only and cached.

    Raises:
        ValueError: If there is no such order or option, or the order cannot read this grid.

    >>> scan_array("cross", (2, 3)).tolist()
    [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    """
    scan = find_scan(name)
    return _drawn(scan, check_grid(scan, grid), check_options(scan, options))


@functools.lru_cache(maxsize=32)
def _drawn(scan: Scan, grid: Grid, options: Options) -> np.ndarray:
    array = np.asarray(scan.draw(grid, **dict(options)))
    _check_array(scan, array, grid, options)
    array = np.array(array, dtype=np.int32, order="C")  # a copy: the order may keep what it returned
    array.setflags(write=False)
    return array


def _check_array(scan: Scan, array: np.ndarray, grid: Grid, options: Options) -> None:
    """Hold an order to what it was registered with."""
    who, cells, shape = f"scan {scan.name!r} on grid {grid}", math.prod(grid), scan.shape(grid, options)
    if array.dtype.kind not in "iu" or array.shape != shape:
        raise ValueError(f"{who}: the table must be integers of shape {shape}, got {array.dtype} {array.shape}")
    if array.size and not 0 <= array.min() <= array.max() <= cells:
        raise ValueError(f"{who}: cell numbers must lie in [0, {cells}], got {array.min()} to {array.max()}")
    if not scan.visits_once:
        return
    for k, row in enumerate(array):
        visits = np.bincount(row.astype(np.intp), minlength=cells + 1)[:cells]
        wrong = visits != 1 if scan.permutation else visits > 1
        if wrong.any():
            promise, cell = "permutation" if scan.permutation else "visits_once", wrong.argmax()
            raise ValueError(
                f"{who}: registered with {promise}=True, but cell {cell} has {visits[cell]} visits in row {k}"
            )


def find_scan(name: str) -> Scan:
    """The registered order of this name; an unknown name is a ValueError that suggests one."""
    if name not in _SCANS:
        raise ValueError(f"scan: no order named {name!r}; {_suggest(name, list_scans())}")
    return _SCANS[name]


def check_grid(scan: Scan, grid: Sequence[int]) -> Grid:
    """The grid as a tuple of whole numbers that ``scan`` can read. Symbolic sizes pass unchecked, without a guard."""
    grid = tuple(grid)
    if len(grid) not in scan.spatial_dims:
        dims = " or ".join(f"{n}D" for n in scan.spatial_dims)
        raise ValueError(f"scan {scan.name!r}: reads {dims} grids, got {grid}; list_scans({len(grid)}) names others")
    if any(isinstance(size, torch.SymInt) for size in grid):
        return grid
    if not all(hasattr(size, "__index__") and operator.index(size) >= 1 for size in grid):
        raise ValueError(f"scan {scan.name!r}: grid sizes must be whole numbers from 1, got {grid}")
    grid = tuple(operator.index(size) for size in grid)
    if math.prod(grid) >= 2**31 - 1:
        raise ValueError(f"scan {scan.name!r}: a table holds 32-bit cell numbers, got {math.prod(grid)} cells {grid}")
    return grid


def check_options(scan: Scan, given: dict[str, Option]) -> Options:
    """All options of ``scan`` with the given values; an unknown option or a value of no simple type is a ValueError."""
    if not given:
        return scan.default_options
    for option, value in given.items():
        if option not in scan.defaults:
            own = ", ".join(f"{name}={default!r}" for name, default in sorted(scan.defaults.items()))
            hint = _suggest(option, scan.defaults) if scan.defaults else "it takes none"
            raise ValueError(f"scan {scan.name!r}: no option named {option!r}; {hint}" + (f" ({own})" if own else ""))
        default = scan.defaults[option]
        if type(value) not in ((int, str, type(None)) if default is None else (type(default),)):
            raise ValueError(
                f"scan {scan.name!r}: {option} must be of the type of its default, {default!r}, got {value!r}"
            )
    return tuple(sorted((scan.defaults | given).items()))


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"choose from {', '.join(sorted(known))}"
