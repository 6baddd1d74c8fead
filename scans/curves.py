"""Space-filling curves: generalised Hilbert on any box, Hilbert of a power of two, and Morton."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from vssm.scans.raster import both_ways, lines
from vssm.scans.registry import Grid, register_scan

# A box is a start cell and one signed vector per axis of the recursion, all vectors along different grid axes.
Box = tuple[np.ndarray, ...]


@register_scan(spatial_dims=(2, 3), permutation=True, rows=2)
def hilbert(grid: Grid, axes: str | None = None) -> np.ndarray:
    """The generalised Hilbert curve of any box ("gilbert", J. Červený), and the same backwards: (2, L).

    Where all sizes are even every step goes to a neighbour; odd sizes may hold a few diagonal steps. On squares and
    cubes of a power of two it is a Hilbert curve. ``axes`` draws the curve of the grid with its axes in that order,
    "hw" and "dhw" by default.

    >>> hilbert((2, 2)).tolist(), hilbert((2, 2), axes="wh").tolist()[0]
    ([[0, 2, 3, 1], [1, 3, 2, 0]], [0, 1, 3, 2])
    """
    return _along(_gilbert, grid, axes)


@register_scan(spatial_dims=(2, 3), permutation=True, rows=2)
def hilbert_pow2(grid: Grid, axes: str | None = None) -> np.ndarray:
    """The Hilbert curve of the enclosing cube of a power of two, and the same backwards: (2, L).

    J. Skilling, "Programming the Hilbert curve" (AIP Conf. Proc. 707, 2004), whose first coordinate is the first of
    ``axes``, "hw" and "dhw" by default. Cells that the grid lacks are left out, so steps can be long; in a cube every
    step goes to a neighbour. Point Cloud Mamba (arXiv:2403.00762) sorts points so; "hdw" is its transposed curve.

    >>> hilbert_pow2((2, 2)).tolist()[0], hilbert_pow2((2, 2, 2)).tolist()[0]
    ([0, 1, 3, 2], [0, 1, 3, 2, 6, 7, 5, 4])
    """
    return _along(_skilling, grid, axes)


@register_scan(spatial_dims=(2, 3), permutation=True, rows=2)
def morton(grid: Grid, axes: str | None = None) -> np.ndarray:
    """Z-order, and the same backwards: (2, L). Cells are sorted by their coordinates' interleaved bits.

    Of each level's bits the first of ``axes`` gives the highest, "hw" and "dhw" by default. Cells of the enclosing
    power of two that the grid lacks are left out, so steps can be long.

    >>> morton((2, 4))[0].tolist(), morton((2, 4), axes="wh")[0].tolist()
    ([0, 1, 4, 5, 2, 3, 6, 7], [0, 4, 1, 5, 2, 6, 3, 7])
    """
    return _along(_morton, grid, axes)


def _along(curve: Callable[[Grid], np.ndarray], grid: Grid, axes: str | None) -> np.ndarray:
    """The cells along the curve of the grid with its axes in the given order, and the same backwards."""
    cells = lines(grid, axes)
    return both_ways(cells.ravel()[curve(cells.shape)])


def _morton(grid: Grid) -> np.ndarray:
    return np.argsort(_interleaved(np.indices(grid)), axis=None)


def _skilling(grid: Grid) -> np.ndarray:
    """The curve, level by level from the coarsest: swap or flip the axes below, then Gray code."""
    x = np.indices(grid)
    levels = [1 << bit for bit in reversed(range((max(grid) - 1).bit_length()))]
    for level in levels:
        for axis in range(len(x)):
            swap = np.where(x[axis] & level, 0, (x[0] ^ x[axis]) & (level - 1))
            flip = np.where(x[axis] & level, level - 1, 0)
            x[axis] ^= swap
            x[0] ^= swap ^ flip
    x = np.bitwise_xor.accumulate(x, axis=0)
    low = x[-1].copy()
    for level in levels:
        x ^= np.where(low & level, level - 1, 0)
    return np.argsort(_interleaved(x), axis=None)


def _interleaved(coordinates: np.ndarray) -> np.ndarray:
    """One number of the bits of all coordinates, the first one's bit the highest of each level."""
    key = np.zeros(coordinates.shape[1:], dtype=np.int64)
    for bit in range(int(coordinates.max()).bit_length()):
        for low, coordinate in enumerate(coordinates[::-1]):
            key |= (coordinate >> bit & 1) << (bit * len(coordinates) + low)
    return key


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
