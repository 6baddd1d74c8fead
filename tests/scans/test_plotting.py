"""Pictures of orders: what is drawn, where, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from vssm.scans import list_scans, plot, scan_array, scan_rows

plt = pytest.importorskip("matplotlib.pyplot")
plt.switch_backend("agg")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def drawn(ax) -> list[np.ndarray]:
    """The lines of the path, the grid's left out."""
    return ax.collections[1].get_segments()


@pytest.mark.parametrize("name", ["raster", "hilbert", "spiral", "atrous", "morton"])
def test_the_lines_are_the_path(name):
    """Joined end to end they visit the row's cells in its order; the markers stand at its ends."""
    ax = plot(name, (5, 7), 0)
    row, column = np.divmod([cell for cell in scan_array(name, (5, 7))[0] if cell < 35], 7)
    pieces = drawn(ax)
    joined = np.concatenate([pieces[0], *(piece[1:] for piece in pieces[1:])])
    assert joined.tolist() == np.stack([column, row], 1).tolist()
    end, start = ax.lines
    assert (*start.get_xydata()[0], *end.get_xydata()[0]) == (column[0], row[0], column[-1], row[-1])


def test_colours_run_along_the_path_and_long_steps_are_thin():
    ax = plot("raster", (4, 4), cmap="viridis")
    lines = ax.collections[1]
    colors, widths = lines.get_colors(), lines.get_linewidths()
    viridis = plt.get_cmap("viridis")
    assert np.abs(colors[0, :3] - viridis(0.03)[:3]).max() < 0.05
    assert np.abs(colors[-1, :3] - viridis(0.97)[:3]).max() < 0.05
    thin = [np.abs(np.diff(line, axis=0)).max() > 1 for line in drawn(ax)]
    assert sum(thin) == 3
    assert {width for width, far in zip(widths, thin) if far} < set(widths)


def test_axes_come_back_as_in_matplotlib():
    """One row: its Axes; several: an array of them, side by side; those that are given are used."""
    assert plot("raster", (3, 3)).get_title() == "raster"
    assert [ax.get_title() for ax in plot("cross", (3, 3))] == ["cross 0", "cross 1", "cross 2", "cross 3"]
    assert [ax.get_title() for ax in plot("cross", (3, 3), [3, 1])] == ["cross 3", "cross 1"]
    figure, axes = plt.subplots(1, 2)
    assert plot("cross", (3, 3), 2, ax=axes[0]) is axes[0]
    assert plot("window", (4, 4), ax=axes, window=2).tolist() == axes.tolist()
    assert [len(ax.collections) for ax in axes] == [4, 2]  # grid and path, twice on the first
    assert figure.axes == list(axes)


@pytest.mark.parametrize("dims", [2, 3])
def test_every_order_can_be_drawn(dims):
    """To the last pixel, on small and odd grids."""
    for name in list_scans(dims):
        for grid in ((1, 1, 1), (2, 3, 1), (3, 4, 5)):
            ax = plot(name, grid[-dims:], 0)
            ax.figure.canvas.draw()
            plt.close(ax.figure)
    assert len(plot("snake", (2, 3, 4))) == scan_rows("snake", 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("spirral", (3, 3)), {}, "no order named 'spirral'; did you mean spiral"),
        (("cross", (3, 3), 4), {}, "rows must be from 0 to 3 for 'cross', got 4"),
        (("cross", (3, 3), []), {}, "rows must be from 0 to 3"),
        (("slices", (20, 2)), {}, "has 20 rows; say which to draw, at most 16"),
        (("reorder", (9,)), {}, r"a grid has 2 or 3 sizes, got \(9,\)"),
        (("cross", (3, 3)), {"ax": "one"}, "ax must hold 4 Axes, one for each row, got 1"),
        (("raster", (3, 3, 3)), {"ax": "one"}, "a volume needs Axes of three dimensions"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, options, message):
    if "ax" in options:
        options = {"ax": plt.subplots()[1]}
    with pytest.raises(ValueError, match=message):
        plot(*arguments, **options)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        plot("raster", (2, 2))
