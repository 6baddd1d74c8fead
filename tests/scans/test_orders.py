"""Every registered order keeps its promises on every grid, and each rule stands once more as a literal example."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vssm.scans import list_scans, scan_array, scan_shape, snake_directions, visits_once
from vssm.scans.registry import find_scan

GRIDS = [(1,), (7,), (1, 1), (1, 6), (6, 1), (2, 2), (3, 7), (8, 8), (14, 14), (13, 5),
         (1, 1, 1), (1, 1, 5), (2, 3, 5), (4, 4, 4), (3, 3, 3), (5, 4, 6), (7, 2, 1)]  # fmt: skip
OPTIONS = {
    "raster": [{"axes": "wh"}, {"axes": "whd"}, {"axes": "hdw"}],
    "bidirectional": [{"axes": "wh"}, {"axes": "dwh"}],
    "hilbert": [{"axes": "wh"}, {"axes": "hdw"}],
    "hilbert_pow2": [{"axes": "wh"}, {"axes": "hdw"}],
    "morton": [{"axes": "wh"}, {"axes": "hdw"}],
    "snake": [{"axes": "wh"}, {"axes": "whd"}],
    "diagonal": [{"walk": "up"}, {"walk": "down", "mirror": True}, {"mirror": True}],
    "spiral": [{"clockwise": False}],
    "slices": [{"axes": "wh"}, {"axes": "hwd"}],
    "hybrid": [{"path": path, "directions": k} for path in ("sweep", "scan", "zorder", "zigzag") for k in (2, 4, 8)],
    "routes": [{"heads": "cxs"}, {"heads": "z"}],
    "reorder": [{"rate": 1}, {"rate": 3}],
    "window": [{"window": 1}, {"window": 2}, {"window": 3, "column": True}],
    "local": [{"directions": "v_flip w3"}, {"directions": "h"}, {"directions": "h v w7 w2_flip"}],
    "atrous": [{"step": 1}, {"step": 3}],
    "interslice": [{"slices": 1}],
}


def cases():
    """(name, options, grid) of every order, with its defaults and with each option."""
    for name in list_scans():
        for options in [{}, *OPTIONS.get(name, [])]:
            for grid in GRIDS:
                fits = "axes" not in options or len(options["axes"]) == len(grid)
                if len(grid) in find_scan(name).spatial_dims and fits:
                    yield pytest.param(name, options, grid, id=f"{name}-{options or ''}-{grid}")


def visits(table: np.ndarray, cells: int) -> np.ndarray:
    """How often each row reads each cell, padding left out: (K, L)."""
    return np.stack([np.bincount(row, minlength=cells + 1)[:cells] for row in table])


@pytest.mark.parametrize(("name", "options", "grid"), list(cases()))
def test_an_order_reads_every_cell(name, options, grid):
    """Each row of a permutation reads each cell once; the rows of any other order read each cell at least once."""
    table, cells = scan_array(name, grid, **options), math.prod(grid)
    count = visits(table, cells)
    assert table.shape == scan_shape(name, grid, **options)
    if find_scan(name).permutation:
        assert (count == 1).all()
    assert (count.sum(axis=0) >= 1).all()
    assert not visits_once(name) or count.max() == 1


@pytest.mark.parametrize("name", list_scans())
def test_every_option_of_an_order_is_tested(name):
    tested = {option for options in OPTIONS.get(name, []) for option in options}
    assert tested == set(find_scan(name).defaults)


def test_the_orders_are_these():
    """A removal, or a name taken twice, is a decision."""
    both = ["bidirectional", "cross", "hilbert", "hilbert_pow2", "interslice", "morton", "raster", "reorder", "slices",
            "snake", "window"]  # fmt: skip
    flat = ["atrous", "bidi", "diagonal", "hybrid", "local", "rot90", "routes", "spiral", "unidi"]
    assert list_scans(1) == ["reorder"]
    assert list_scans(2) == sorted([*both, *flat])
    assert list_scans(3) == both
    assert list_scans() == list_scans(2)


def steps(path: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """How far each step of a path goes, in cells along the axes."""
    return np.abs(np.diff(np.unravel_index(path, grid))).sum(axis=0)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if len(grid) > 1], ids=str)
@pytest.mark.parametrize("name", ["snake", "spiral"])
def test_snakes_and_spirals_step_from_neighbour_to_neighbour(name, grid):
    if len(grid) in find_scan(name).spatial_dims:
        assert all((steps(row, grid) == 1).all() for row in scan_array(name, grid))


HALVES = ("bidirectional", "cross", "hilbert", "hilbert_pow2", "morton", "diagonal", "spiral", "hybrid", "window")


@pytest.mark.parametrize("name", [*HALVES, "snake", "routes"])
@pytest.mark.parametrize("grid", [(3, 7), (4, 4)], ids=str)
def test_every_path_is_read_backwards_too(name, grid):
    """The second half of the rows reverses the first; snakes and routes alternate."""
    table = scan_array(name, grid)
    forwards, backwards = np.split(table, 2) if name in HALVES else (table[::2], table[1::2])
    assert (forwards[:, ::-1] == backwards).all()


def test_diagonals():
    assert scan_array("diagonal", (3, 2)).tolist() == [[0, 1, 2, 4, 3, 5], [5, 3, 4, 2, 1, 0]]
    assert scan_array("diagonal", (3, 2), walk="up")[0].tolist() == [0, 2, 1, 4, 3, 5]
    assert scan_array("diagonal", (3, 2), walk="down")[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert scan_array("diagonal", (3, 2), mirror=True)[0].tolist() == [1, 0, 3, 5, 2, 4]
    with pytest.raises(ValueError, match="walk must be one of zigzag, up, down, got 'left'"):
        scan_array("diagonal", (2, 2), walk="left")


@pytest.mark.parametrize("grid", [(5, 7), (6, 2), (1, 4)], ids=str)
def test_diagonals_are_read_one_after_the_other(grid):
    for walk, sign in (("up", {-1}), ("down", {1}), ("zigzag", {-1, 1})):
        row, column = np.divmod(scan_array("diagonal", grid, walk=walk)[0], grid[1])
        number = row + column
        assert (np.diff(number) >= 0).all()
        inside = np.diff(number) == 0
        assert set(np.diff(row)[inside].tolist()) <= sign


def test_spirals():
    assert scan_array("spiral", (3, 3)).tolist()[0] == [0, 1, 2, 5, 8, 7, 6, 3, 4]
    assert scan_array("spiral", (3, 2), clockwise=False).tolist() == [[0, 2, 4, 5, 3, 1], [1, 3, 5, 4, 2, 0]]


def test_slices():
    assert scan_array("slices", (2, 2, 2)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert scan_array("slices", (2, 2, 2), axes="wdh").tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert scan_shape("slices", (5, 7)) == (5, 7)
    assert scan_shape("slices", (5, 7), axes="wh") == (7, 5)


def test_snakes_in_volumes():
    """Every second line and every second plane backwards, by counting as an odometer that turns round."""
    depth, height, width = grid = (3, 2, 4)
    path = [
        (d * height + h) * width + w
        for d in range(depth)
        for h in (range(height) if d % 2 == 0 else range(height)[::-1])
        for w in (range(width) if (d * height + (h if d % 2 == 0 else height - 1 - h)) % 2 == 0 else range(width)[::-1])
    ]
    assert scan_array("snake", grid, axes="dhw").tolist() == [path, path[::-1]]
    assert scan_array("snake", grid)[:2].tolist() == [path, path[::-1]]


def test_hybrid_directions():
    """The path on the map, its transpose, the map turned, and that transposed; then all backwards."""
    eight = scan_array("hybrid", (2, 3), path="sweep").tolist()
    assert eight[:4] == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [2, 5, 1, 4, 0, 3], [2, 1, 0, 5, 4, 3]]
    assert scan_array("hybrid", (2, 3), path="sweep", directions=4).tolist() == [eight[i] for i in (0, 1, 4, 5)]
    assert scan_array("hybrid", (2, 3), path="sweep", directions=2).tolist() == [eight[0], eight[4]]
    with pytest.raises(ValueError, match="directions must be 2, 4 or 8, got 3"):
        scan_array("hybrid", (2, 2), directions=3)
    with pytest.raises(ValueError, match="path must be one of sweep, scan, zorder, zigzag, hilbert, got 'peano'"):
        scan_array("hybrid", (2, 2), path="peano")


@pytest.mark.parametrize("path", ["sweep", "scan", "zorder", "zigzag", "hilbert"])
def test_some_of_the_eight_directions_are_the_same(path):
    distinct = 6 if path in ("scan", "hilbert") else 8
    assert distinct == len({tuple(row) for row in scan_array("hybrid", (8, 8), path=path).tolist()})


def test_routes():
    """MHS-VM's own examples, on a grid of 3 x 4."""
    c, x, s, z = scan_array("routes", (3, 4)).reshape(4, 4, 12).tolist()
    assert c[::2] == [[0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11], [0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3]]
    assert x[::2] == [[0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11], [3, 2, 7, 11, 6, 1, 0, 5, 10, 9, 4, 8]]
    assert s[::2] == [[0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6], [8, 9, 10, 11, 7, 3, 2, 1, 0, 4, 5, 6]]
    assert z[::2] == [list(range(12)), [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]
    assert scan_array("routes", (1, 1), heads="s").tolist() == [[0]] * 4
    with pytest.raises(ValueError, match="heads must be letters of cxsz, got 'cy'"):
        scan_shape("routes", (2, 2), heads="cy")


def test_reorder():
    assert scan_array("reorder", (2, 3), rate=4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 6], [0, 4, 1, 5, 2, 6, 3, 6]]
    assert scan_shape("reorder", (11,)) == (2, 20)
    with pytest.raises(ValueError, match="rate must be at least 1, got 0"):
        scan_shape("reorder", (4,), rate=0)


def test_rasters():
    assert scan_array("raster", (2, 3)).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert scan_array("raster", (2, 1, 2), axes="whd").tolist() == [[0, 2, 1, 3]]
    assert scan_array("bidirectional", (2, 2), axes="wh").tolist() == [[0, 2, 1, 3], [3, 1, 2, 0]]


def test_cross():
    assert scan_array("cross", (2, 3)).tolist() == [
        [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0],
    ]  # fmt: skip
    forward = [[0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 1, 5, 2, 6, 3, 7], [0, 2, 4, 6, 1, 3, 5, 7]]  # dhw, hwd, wdh
    assert scan_array("cross", (2, 2, 2)).tolist() == forward + [row[::-1] for row in forward]


def test_vmamba_ablations():
    """Position l of sequence k reads pixel (h, w), by VMamba's own formulas."""
    height, width = 3, 4
    cells = height * width
    rows = list(range(cells))
    turned = [(l % height) * width + width - 1 - l // height for l in rows]
    back = [(height - 1 - l % height) * width + l // height for l in rows]
    assert scan_array("rot90", (height, width)).tolist() == [rows, turned, rows[::-1], back]
    assert scan_array("unidi", (height, width)).tolist() == [rows] * 4
    assert scan_array("bidi", (height, width)).tolist() == [rows, rows, rows[::-1], rows[::-1]]


def test_snake():
    assert scan_array("snake", (3, 2)).tolist() == [
        [0, 1, 3, 2, 4, 5], [5, 4, 2, 3, 1, 0], [0, 2, 4, 5, 3, 1], [1, 3, 5, 4, 2, 0],
    ]  # fmt: skip
    assert snake_directions((3, 2)).tolist() == [  # 0 start, 1 right, 2 left, 3 up, 4 down
        [0, 1, 4, 2, 4, 1], [0, 2, 3, 1, 3, 2], [0, 4, 4, 1, 3, 3], [0, 4, 4, 2, 3, 3],
    ]  # fmt: skip


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if len(grid) == 2], ids=str)
def test_every_step_of_a_snake_has_a_direction(grid):
    assert ((snake_directions(grid) > 0).sum(axis=1) == math.prod(grid) - 1).all()


def test_local():
    assert scan_array("local", (2, 3), directions="h v_flip").tolist() == [[0, 1, 2, 3, 4, 5], [5, 2, 4, 1, 3, 0]]
    assert scan_array("local", (1, 3), directions="w2_flip v").tolist() == [
        [3, 3, 3, 2, 3, 3, 1, 0], [0, 1, 2, 3, 3, 3, 3, 3],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="a direction is h, v or w and a number, perhaps with _flip, got 'w0'"):
        scan_array("local", (2, 2), directions="h w0")
    with pytest.raises(ValueError, match="directions must name one direction or more"):
        scan_array("local", (2, 2), directions=" ")


def test_windows():
    assert scan_array("window", (2, 4), window=2).tolist() == [[0, 1, 4, 5, 2, 3, 6, 7], [7, 6, 3, 2, 5, 4, 1, 0]]
    assert scan_array("window", (4, 2), window=2, column=True)[0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert scan_array("window", (1, 3), window=2)[0].tolist() == [0, 1, 3, 3, 2, 3, 3, 3]
    assert scan_array("window", (1, 2, 3), window=2)[0].tolist() == [0, 1, 3, 4, 6, 6, 6, 6, 2, 6, 5, 6, 6, 6, 6, 6]


def test_atrous():
    assert scan_array("atrous", (4, 4))[1].tolist() == [4, 12, 6, 14]
    assert scan_array("atrous", (3, 3)).tolist() == [[0, 2, 6, 8], [3, 9, 5, 9], [1, 9, 7, 9], [4, 9, 9, 9]]
    assert scan_array("atrous", (2, 3), step=3)[:3].tolist() == [[0], [3], [6]]  # 6 is padding: no third row


def test_interslice():
    assert scan_array("interslice", (2, 1, 3)).tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5]]
    assert scan_array("interslice", (2, 1, 3), slices=3)[2].tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("grid", [(4, 2, 3), (5, 3, 1), (20, 2, 2)], ids=str)
def test_interslice_reads_true_slices_by_default(grid):
    """Whatever the depth, all planes are read at one position before the next position is."""
    depth, positions = grid[0], grid[1] * grid[2]
    cell = scan_array("interslice", grid)[2].reshape(positions, depth)
    assert (cell == np.arange(positions)[:, None] + positions * np.arange(depth)).all()


def test_morton():
    assert scan_array("morton", (2, 3)).tolist() == [[0, 1, 3, 4, 2, 5], [5, 2, 4, 3, 1, 0]]
    assert scan_array("morton", (2, 3), axes="wh")[0].tolist() == [0, 3, 1, 4, 2, 5]
    assert scan_array("morton", (2, 2, 2), axes="whd")[0].tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    key = [
        int(f"{d >> 1}{h >> 1}{w >> 1}{d & 1}{h & 1}{w & 1}", 2) for d, h, w in itertools.product(range(4), repeat=3)
    ]
    assert scan_array("morton", (4, 4, 4))[0].tolist() == np.argsort(key).tolist()
