"""The Hilbert curves against their recursions, and their neighbours."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from vssm.scans import scan_array
from vssm.scans.curves import hilbert


def gilbert(grid: tuple[int, ...]) -> list[int]:
    """One box at a time, in the order of the path: the definition."""
    dims, sizes = len(grid), grid[::-1]
    axes = [np.eye(dims, dtype=int)[i] * size for i, size in enumerate(sizes)]
    axes.insert(0, axes.pop(sizes.index(max(sizes))))
    walk = _walk_2d if dims == 2 else _walk_3d
    cells = np.array(list(walk(np.zeros(dims, dtype=int), *axes)))
    return np.ravel_multi_index(cells.T[::-1], grid).tolist()


def _length(v):
    return abs(v).sum()


def _even_half(v):
    half = v // 2
    return half + np.sign(v) if _length(half) % 2 and _length(v) > 2 else half


def _walk_2d(p, a, b):
    w, h, da, db = _length(a), _length(b), np.sign(a), np.sign(b)
    if h == 1 or w == 1:
        yield from (p + i * (da if h == 1 else db) for i in range(w * h))
    elif 2 * w > 3 * h:
        a2 = _even_half(a)
        yield from _walk_2d(p, a2, b)
        yield from _walk_2d(p + a2, a - a2, b)
    else:
        a2, b2 = a // 2, _even_half(b)
        yield from _walk_2d(p, b2, a2)
        yield from _walk_2d(p + b2, a, b - b2)
        yield from _walk_2d(p + (a - da) + (b2 - db), -b2, -(a - a2))


def _walk_3d(p, a, b, c):
    (w, h, d), (da, db, dc) = map(_length, (a, b, c)), map(np.sign, (a, b, c))
    if w * h * d == 0:
        return
    for line, rest, step in [(w, h * d, da), (h, w * d, db), (d, w * h, dc)]:
        if rest == 1:
            yield from (p + i * step for i in range(line))
            return
    a2, b2, c2 = map(_even_half, (a, b, c))
    if 2 * w > 3 * h and 2 * w > 3 * d:
        parts = [(p, a2, b, c), (p + a2, a - a2, b, c)]
    elif 3 * h > 4 * d:
        parts = [(p, b2, c, a2), (p + b2, a, b - b2, c), (p + (a - da) + (b2 - db), -b2, c, -(a - a2))]
    elif 3 * d > 4 * h:
        parts = [(p, c2, a2, b), (p + c2, a, b, c - c2), (p + (a - da) + (c2 - dc), -c2, -(a - a2), b)]
    else:
        parts = [
            (p, b2, c2, a2),
            (p + b2, c, a2, b - b2),
            (p + (b2 - db) + (c - dc), a, -b2, -(c - c2)),
            (p + (a - da) + b2 + (c - dc), -c, -(a - a2), b - b2),
            (p + (a - da) + (b2 - db), -b2, c2, -(a - a2)),
        ]
    for part in parts:
        yield from _walk_3d(*part)


def jumps(grid: tuple[int, ...]) -> int:
    """Steps of the curve that do not go to a neighbour."""
    cells = np.unravel_index(scan_array("hilbert", grid)[0], grid)
    return int((np.abs(np.diff(cells)).sum(axis=0) != 1).sum())


@pytest.mark.parametrize("dims", [2, 3])
def test_the_levels_cut_at_once_are_the_recursion(dims):
    """Every box with sides up to 6, and larger odd ones whose parts are empty."""
    large = {2: [(19, 7), (7, 30), (23, 23)], 3: [(7, 5, 8), (9, 11, 7), (2, 17, 9)]}[dims]
    for grid in [*itertools.product(range(1, 7), repeat=dims), *large]:
        assert hilbert(grid)[0].tolist() == gilbert(grid), grid


@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (10, 4), (6, 22), (2, 4, 6), (4, 4, 4), (12, 10, 14)], ids=str)
def test_even_boxes_are_walked_from_neighbour_to_neighbour(grid):
    assert jumps(grid) == 0


@pytest.mark.parametrize(("grid", "expected"), [((6, 9), 1), ((9, 6), 1), ((3, 5, 2), 1), ((5, 4, 6), 2)], ids=str)
def test_odd_boxes_have_the_known_diagonal_steps(grid, expected):
    assert jumps(grid) == expected


def test_axes_draw_the_curve_of_the_permuted_grid():
    cells = np.arange(4 * 6).reshape(4, 6).T.ravel()
    assert (scan_array("hilbert", (4, 6), axes="wh")[0] == cells[scan_array("hilbert", (6, 4))[0]]).all()
    assert scan_array("hilbert", (2, 2, 2))[0].tolist() == [0, 2, 6, 4, 5, 7, 3, 1]
    assert scan_array("hilbert", (2, 2, 2), axes="whd")[0].tolist() == [0, 2, 3, 1, 5, 7, 6, 4]
    for name in ("hilbert", "hilbert_pow2", "morton"):
        cells = np.arange(60).reshape(3, 4, 5).transpose(1, 2, 0).ravel()
        assert (scan_array(name, (3, 4, 5), axes="hwd")[0] == cells[scan_array(name, (4, 5, 3))[0]]).all(), name


@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (64, 64), (2, 2, 2), (4, 4, 4), (16, 16, 16)], ids=str)
def test_a_power_of_two_is_walked_from_neighbour_to_neighbour(grid):
    cells = np.unravel_index(scan_array("hilbert_pow2", grid)[0], grid)
    assert (np.abs(np.diff(cells)).sum(axis=0) == 1).all()


@pytest.mark.parametrize("grid", [(5, 7), (1, 6), (3, 4, 6), (7, 1, 2)], ids=str)
def test_cells_that_a_cube_has_and_the_grid_lacks_are_left_out(grid):
    side = 1 << (max(grid) - 1).bit_length()
    cube = np.array(np.unravel_index(scan_array("hilbert_pow2", (side,) * len(grid))[0], (side,) * len(grid)))
    inside = (np.array(grid) > cube.T).all(axis=1)
    assert scan_array("hilbert_pow2", grid)[0].tolist() == np.ravel_multi_index(cube[:, inside], grid).tolist()


def halves(side: int) -> list[tuple[int, int]]:
    """(row, column) along MambaAD's curve of a square, from its recursion."""
    if side == 1:
        return [(0, 0)]
    s, h = side // 2, halves(side // 2)
    return [
        *((c, r) for r, c in h), *((s + r, c) for r, c in h), *((s + r, s + c) for r, c in h),
        *((s - 1 - c, 2 * s - 1 - r) for r, c in h),
    ]  # fmt: skip


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 32, 64])
def test_on_squares_both_curves_are_the_published_one(side):
    """MambaAD's decoder works on sides of 8 to 64; its first coordinate is the column."""
    expected = [r * side + c for r, c in halves(side)]
    assert scan_array("hybrid", (side, side))[0].tolist() == expected
    assert scan_array("hilbert", (side, side))[0].tolist() == expected
    assert scan_array("hilbert_pow2", (side, side), axes="wh")[0].tolist() == expected


def test_a_table_of_64_cubed_takes_less_than_a_second():
    """Best of three, so that a busy machine does not fail it; a recursion cell by cell takes several seconds."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        hilbert((64, 64, 64))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
