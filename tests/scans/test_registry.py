"""Registering an order, asking for its table, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from vssm.scans import list_scans, register_scan, scan_array, scan_shape, scan_table, visits_once

pytestmark = pytest.mark.usefixtures("unregister")


def odd_rows(grid):
    """An order whose table breaks promises: it reads every second row from the second on."""
    return np.arange(grid[0] * grid[1]).reshape(grid)[1::2].reshape(1, -1)


def test_a_new_order_is_one_function():
    @register_scan(spatial_dims=2, permutation=True, rows=1)
    def columns_up(grid, skip=0):
        return np.roll(np.arange(grid[0] * grid[1]).reshape(grid).T[:, ::-1].reshape(1, -1), skip)

    assert "columns_up" in list_scans(2)
    assert "columns_up" not in list_scans(3)
    assert visits_once("columns_up")
    assert scan_shape("columns_up", (5, 3)) == (1, 15)
    assert scan_array("columns_up", (2, 2)).tolist() == [[2, 0, 3, 1]]
    assert scan_table("columns_up", (2, 2), skip=1).tolist() == [[1, 2, 0, 3]]


def test_rows_and_steps_may_depend_on_grid_and_options():
    @register_scan(spatial_dims=(2, 3), permutation=False, rows=lambda grid, n: n * len(grid), steps=lambda grid, n: n)
    def corners(grid, n=2):
        return np.zeros((n * len(grid), n), dtype=np.int64)

    assert scan_shape("corners", (4, 4)) == (4, 2)
    assert scan_shape("corners", (4, 4, 4), n=3) == scan_array("corners", (4, 4, 4), n=3).shape == (9, 3)
    assert not visits_once("corners")


def test_tables_are_cached_and_read_only():
    table = scan_array("hilbert", (5, 9))
    assert table.dtype == np.int32
    assert scan_array("hilbert", (np.int64(5), 9), axes=None) is table
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1


def test_what_an_order_returns_is_copied():
    kept = np.arange(4)[None]

    @register_scan(spatial_dims=2, permutation=True, rows=1)
    def keeps(grid):
        return kept

    table = scan_array("keeps", (2, 2))
    kept[0, 0] = 3
    assert table.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("promise", "message"),
    [
        ({"permutation": True, "rows": 1}, r"the table must be integers of shape \(1, 12\), got int64 \(1, 4\)"),
        ({"permutation": False, "rows": 2, "steps": lambda grid: 4}, r"must be integers of shape \(2, 4\), got"),
        (
            {"permutation": True, "rows": 1, "steps": lambda grid: 4},
            "permutation=True, but cell 0 has 0 visits in row 0",
        ),
    ],
)
def test_a_broken_promise_is_named(promise, message):
    register_scan(spatial_dims=2, **promise)(odd_rows)
    with pytest.raises(ValueError, match=f"scan 'odd_rows' on grid .*{message}"):
        scan_array("odd_rows", (3, 4))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0.0, 1.0]], "must be integers .* got float64"),
        ([[0, 3]], r"cell numbers must lie in \[0, 2\], got 0 to 3"),
        ([[-1, 0]], r"cell numbers must lie in \[0, 2\], got -1 to 0"),
        ([[1, 1]], "visits_once=True, but cell 1 has 2 visits in row 0"),
    ],
)
def test_a_bad_table_is_refused(table, message):
    @register_scan(spatial_dims=2, permutation=False, visits_once=True, rows=1)
    def bad(grid):
        return np.array(table)

    with pytest.raises(ValueError, match=message):
        scan_array("bad", (1, 2))


def test_padding_may_repeat_where_cells_may_not():
    @register_scan(spatial_dims=2, permutation=False, visits_once=True, rows=1, steps=lambda grid: 4)
    def padded(grid):
        return np.array([[0, 2, 2, 1]])

    assert scan_array("padded", (1, 2)).tolist() == [[0, 2, 2, 1]]


def test_registration_refuses_what_cannot_work():
    register = register_scan(spatial_dims=2, permutation=True, rows=1)
    with pytest.raises(ValueError, match="the name 'odd_rows' is taken by"):
        register(register(odd_rows))
    with pytest.raises(ValueError, match="each option of 'no_default' needs a default"):
        register(_named("no_default", lambda grid, side: None))
    with pytest.raises(ValueError, match="a name other than name, grid, device, middle_token"):
        register(_named("clash", lambda grid, device=0: None))


def _named(name, function):
    function.__name__ = name
    return function


@pytest.mark.parametrize("ask", [scan_array, scan_shape, scan_table])
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("hilbrt", (4, 4)), {}, "no order named 'hilbrt'; did you mean hilbert.* choose from atrous, "),
        (("zzz", (4, 4)), {}, "no order named 'zzz'; choose from atrous, "),
        (
            ("window", (4, 4)),
            {"windw": 2},
            r"'window': no option named 'windw'; did you mean window.*column=False, window=7",
        ),
        (("cross", (4, 4)), {"window": 2}, "'cross': no option named 'window'; it takes none"),
        (("window", (4, 4)), {"window": "2"}, "'window': window must be of the type of its default, 7, got '2'"),
        (("window", (4, 4)), {"window": 0}, "'window': window must be at least 1, got 0"),
        (("atrous", (4, 4)), {"step": -1}, "'atrous': step must be at least 1, got -1"),
        (
            ("spiral", (4, 4)),
            {"clockwise": 1},
            "'spiral': clockwise must be of the type of its default, True, got 1",
        ),
        (("raster", (4, 4)), {"axes": ["h", "w"]}, "'raster': axes must be of the type of its default, None"),
        (("spiral", (2, 4, 4)), {}, r"'spiral': reads 2D grids, got \(2, 4, 4\); list_scans\(3\) names others"),
        (("cross", (4,)), {}, r"'cross': reads 2D or 3D grids, got \(4,\)"),
        (("cross", (4, 0)), {}, r"'cross': grid sizes must be whole numbers from 1, got \(4, 0\)"),
        (("cross", (4, 2.5)), {}, "'cross': grid sizes must be whole numbers from 1"),
        (("cross", (2**16, 2**16)), {}, "'cross': a table holds 32-bit cell numbers, got 4294967296 cells"),
    ],
    ids=str,
)
def test_a_wrong_request_is_refused_by_name(ask, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ask(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("raster", (4, 4)), {"axes": "hh"}, "axes must name each of 'hw' once, slowest first, got 'hh'"),
        (("bidirectional", (2, 4, 4)), {"axes": "hw"}, "axes must name each of 'dhw' once"),
        (("raster", (4, 4)), {"axes": 2}, "axes must name each of 'hw' once, slowest first, got 2"),
        (
            ("interslice", (2, 3, 4)),
            {"slices": 5},
            r"slices must divide the 24 cells of \(2, 3, 4\), got 5; leave it out",
        ),
        (("interslice", (2, 3, 4)), {"slices": 0}, "slices must divide the 24 cells"),
        (("interslice", (2, 3, 4)), {"slices": "2"}, "slices must divide the 24 cells of .* got '2'"),
    ],
    ids=str,
)
def test_an_order_refuses_what_it_cannot_draw(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        scan_array(*arguments, **options)
