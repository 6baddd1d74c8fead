"""Space-filling curves: generalised Hilbert and Morton, on any box."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from vssm.scans.raster import both_ways, cells_of
from vssm.scans.registry import Grid, register_scan

# A box is a start cell and one signed vector per axis of the recursion, all vectors along different grid axes.
Box = tuple[np.ndarray, ...]


@register_scan(spatial_dims=(2, 3), permutation=True, rows=2)
def hilbert(grid: Grid, transpose: bool = False) -> np.ndarray:
    """The generalised Hilbert curve of any box ("gilbert", J. Červený), and the same backwards: (2, L).

    Where all sizes are even every step goes to a neighbour; odd sizes may hold a few diagonal steps. On squares and
    cubes of a power of two it is a Hilbert curve. ``transpose`` draws the curve of the transposed grid.

    >>> hilbert((2, 2)).tolist()
    [[0, 2, 3, 1], [1, 3, 2, 0]]
    """
    return both_ways(_on(grid, _gilbert, transpose))


@register_scan(spatial_dims=(2, 3), permutation=True, rows=2)
def morton(grid: Grid, transpose: bool = False) -> np.ndarray:
    """Z-order, and the same backwards: (2, L). Cells are sorted by their coordinates' interleaved bits.

    The last axis gives the lowest bit, with ``transpose`` the first. Cells of the enclosing power of two that the grid
    lacks are left out, so steps can be long.

    >>> morton((2, 4))[0].tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    return both_ways(_on(grid, _morton, transpose))


def _on(grid: Grid, curve: Callable[[Grid], np.ndarray], transpose: bool) -> np.ndarray:
    """The cells along ``curve``, or along the curve of the transposed grid mapped back."""
    if not transpose:
        return curve(grid)
    return cells_of(grid).T.ravel()[curve(grid[::-1])]


def _morton(grid: Grid) -> np.ndarray:
    key = np.zeros(grid, dtype=np.int64)
    for axis, coordinate in enumerate(np.indices(grid, dtype=np.int64, sparse=True)):
        low = len(grid) - 1 - axis  # this axis' place among the bits of one level
        for bit in range(max(grid).bit_length()):
            key |= (coordinate >> bit & 1) << (bit * len(grid) + low)
    return np.argsort(key, axis=None)


def _gilbert(grid: Grid) -> np.ndarray:
    """Cell numbers along the curve.

    The recursion cuts a box into two to five boxes that are walked one after the other. A box's place in the path is
    known when it is cut, so boxes need not be cut in the order of the path: each round cuts all that are left at once.
    """
    sizes = grid[::-1]  # x first: the longest axis leads, ties prefer x, then y
    lead = max(range(len(sizes)), key=lambda axis: sizes[axis])
    axes = np.diag(sizes)
    vectors = [axes[lead], *np.delete(axes, lead, axis=0)]
    boxes = [np.zeros((1, len(sizes)), dtype=np.int64), *(v[None] for v in vectors)]
    first = np.zeros(1, dtype=np.int64)  # each box's first step
    path = np.empty(math.prod(grid), dtype=np.int64)
    strides = np.cumprod([1, *sizes[:-1]])
    while len(first):
        lengths = np.stack([_length(v) for v in boxes[1:]])
        line = (lengths > 1).sum(axis=0) <= 1
        _walk(path, first[line], [v[line] @ strides for v in boxes], lengths[:, line])
        first, boxes = _cut(first[~line], [v[~line] for v in boxes])
    return path


def _walk(path: np.ndarray, first: np.ndarray, boxes: list[np.ndarray], lengths: np.ndarray) -> None:
    """Write boxes that are lines into the path, each along its one vector longer than 1; all in cell numbers here."""
    start, *vectors = boxes
    count = lengths.max(axis=0)
    stride = np.choose(lengths.argmax(axis=0), vectors) // count
    step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    path[np.repeat(first, count) + step] = np.repeat(start, count) + step * np.repeat(stride, count)


def _cut(first: np.ndarray, boxes: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Cut each box into its parts; a part's first step is where the parts before it end."""
    firsts, parts = [], []
    for chosen, cuts in (_cuts_2d if len(boxes) == 3 else _cuts_3d)(*boxes):
        step = first[chosen]
        for part in cuts:
            box = [v[chosen] for v in part]
            size = math.prod(_length(v) for v in box[1:])
            firsts.append(step[size > 0])  # half of a side of -1 is all of it: its rest is empty
            parts.append([v[size > 0] for v in box])
            step = step + size
    return np.concatenate(firsts), [np.concatenate(column) for column in zip(*parts, strict=True)]


def _cuts_2d(p: np.ndarray, a: np.ndarray, b: np.ndarray) -> list[tuple[np.ndarray, list[Box]]]:
    """For each rule, the boxes it holds for and the parts it makes, in the order of the path."""
    w, h = _length(a), _length(b)
    da, db, a2, b2 = np.sign(a), np.sign(b), _even_half(a), _even_half(b)
    half = a // 2  # the second rule halves a without evening it
    return [
        (2 * w > 3 * h, [(p, a2, b), (p + a2, a - a2, b)]),
        (2 * w <= 3 * h, [(p, b2, half), (p + b2, a, b - b2), (p + (a - da) + (b2 - db), -b2, -(a - half))]),
    ]


def _cuts_3d(p: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> list[tuple[np.ndarray, list[Box]]]:
    w, h, d = _length(a), _length(b), _length(c)
    da, db, dc, a2, b2, c2 = np.sign(a), np.sign(b), np.sign(c), _even_half(a), _even_half(b), _even_half(c)
    wide = (2 * w > 3 * h) & (2 * w > 3 * d)
    high = ~wide & (3 * h > 4 * d)
    deep = ~wide & ~high & (3 * d > 4 * h)
    return [
        (wide, [(p, a2, b, c), (p + a2, a - a2, b, c)]),
        (high, [(p, b2, c, a2), (p + b2, a, b - b2, c), (p + (a - da) + (b2 - db), -b2, c, -(a - a2))]),
        (deep, [(p, c2, a2, b), (p + c2, a, b, c - c2), (p + (a - da) + (c2 - dc), -c2, -(a - a2), b)]),
        (~wide & ~high & ~deep, [
            (p, b2, c2, a2),
            (p + b2, c, a2, b - b2),
            (p + (b2 - db) + (c - dc), a, -b2, -(c - c2)),
            (p + (a - da) + b2 + (c - dc), -c, -(a - a2), b - b2),
            (p + (a - da) + (b2 - db), -b2, c2, -(a - a2)),
        ]),
    ]  # fmt: skip


def _even_half(vector: np.ndarray) -> np.ndarray:
    """Half of each vector, rounded down, then up to an even length if it is odd and the vector longer than 2."""
    half = vector // 2  # towards minus infinity, also for negative vectors
    odd = (_length(half) % 2 == 1) & (_length(vector) > 2)
    return half + np.sign(vector) * odd[:, None]


def _length(vector: np.ndarray) -> np.ndarray:
    return np.abs(vector).sum(axis=-1)
