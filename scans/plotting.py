"""Pictures of scan orders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vssm.scans.registry import Option, scan_array

PIECES = 48  # of one colour each, along a path
MOST_ROWS = 16
ACROSS = 4  # pictures side by side


def plot(
    name: str,
    grid: Sequence[int],
    rows: int | Sequence[int] | None = None,
    *,
    ax: Any = None,
    cmap: Any = "viridis",
    **options: Option,
) -> Any:
    """Draw the paths of a scan order on a grid, each from the first colour to the last.

    A circle marks the first cell, a square the last one. Steps that do not go to a cell beside or across a corner are
    thin; padding is left out. Needs matplotlib, which is imported here only.

    Args:
        name: One of ``list_scans()``.
        grid: (H, W) or (D, H, W); a volume is drawn in three dimensions.
        rows: Which rows of the table, a number or several; all by default.
        ax: The ``matplotlib.axes.Axes`` to draw into, as many as rows; of a volume with ``projection="3d"``. By default
            a new figure, with its pictures side by side.
        cmap: Colours, by matplotlib's name or a ``Colormap``.
        **options: The order's own, such as ``window=7``.

    Returns:
        The Axes of one row; of several an array of Axes, in their order.

    Raises:
        ValueError: If there is no such order, option or row, or the numbers of rows and Axes differ.

    >>> plot("cross", (4, 6), rows=1).get_title()                       # doctest: +SKIP
    'cross 1'
    >>> plot("window", (8, 8), window=4).shape                          # doctest: +SKIP
    (2,)
    """
    table, grid = scan_array(name, grid, **options), tuple(grid)
    if len(grid) not in (2, 3):
        raise ValueError(f"plot: a grid has 2 or 3 sizes, got {grid}")
    one = len(table) == 1 if rows is None else np.ndim(rows) == 0
    chosen: list[int] = np.atleast_1d(np.arange(len(table)) if rows is None else rows).tolist()
    if not chosen or not all(-len(table) <= row < len(table) for row in chosen):
        raise ValueError(f"plot: rows must be from 0 to {len(table) - 1} for {name!r}, got {rows!r}")
    if len(chosen) > MOST_ROWS:
        raise ValueError(f"plot: {name!r} has {len(chosen)} rows; say which to draw, at most {MOST_ROWS}: rows=[0, 1]")
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot: matplotlib is not installed; run: pip install matplotlib") from error
    if ax is None:
        figure = plt.figure(layout="constrained")
        down = math.ceil(len(chosen) / ACROSS)
        across = math.ceil(len(chosen) / down)
        figure.set_size_inches(2.6 * across, 2.8 * down)
        projection = "3d" if len(grid) == 3 else None
        pictures = [figure.add_subplot(down, across, i + 1, projection=projection) for i in range(len(chosen))]
    else:
        pictures = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(pictures) != len(chosen):
        raise ValueError(f"plot: ax must hold {len(chosen)} Axes, one for each row, got {len(pictures)}")
    draw = _draw_map if len(grid) == 2 else _draw_volume
    if len(grid) == 3 and not all(hasattr(picture, "get_zlim") for picture in pictures):
        raise ValueError("plot: a volume needs Axes of three dimensions, subplots(subplot_kw={'projection': '3d'})")
    for row, picture in zip(chosen, pictures):
        path = table[row]
        path = path[path < math.prod(grid)]
        colors = plt.get_cmap(cmap)
        draw(picture, np.stack(np.unravel_index(path, grid), axis=1), grid, colors)
        picture.set_title(name if len(table) == 1 else f"{name} {row % len(table)}", fontsize=10)
    return pictures[0] if one else np.asarray(pictures, dtype=object)


def _pieces(points: np.ndarray) -> Iterable[tuple[np.ndarray, float, bool]]:
    """The path (t, dims) as lines of one colour (s, dims), with where in the path they lie (0 to 1), near or far."""
    near = np.abs(np.diff(points, axis=0)).max(axis=1, initial=0) <= 1
    steps = len(points) - 1
    color = np.arange(steps) * min(PIECES, steps) // max(steps, 1)
    starts = np.flatnonzero(np.r_[True, (np.diff(color) > 0) | (np.diff(near) != 0)]) if steps else np.empty(0, int)
    for start, stop in zip(starts, np.r_[starts[1:], steps]):
        yield points[start : stop + 1], float((start + stop) / 2 / steps), bool(near[start])


def _draw_map(ax: Any, points: np.ndarray, grid: Sequence[int], colors: Any) -> None:
    from matplotlib.collections import LineCollection

    height, width = grid
    points = points[:, ::-1]  # x, y
    lines = [[(x, -0.5), (x, height - 0.5)] for x in np.arange(width + 1) - 0.5]
    lines += [[(-0.5, y), (width - 0.5, y)] for y in np.arange(height + 1) - 0.5]
    ax.add_collection(LineCollection(lines, colors="0.88", linewidths=0.6, zorder=1))
    thick = min(3.0, max(0.9, 24 / max(height, width)))
    pieces = list(_pieces(points))
    ax.add_collection(LineCollection(
        [line for line, _, _ in pieces],
        colors=[colors(place, alpha=1.0 if near else 0.45) for _, place, near in pieces],
        linewidths=[thick if near else thick / 3 for _, _, near in pieces],
        capstyle="round", joinstyle="round", zorder=2,
    ))  # fmt: skip
    size = max(4.5, 2.6 * thick)
    for point, marker, place in ((points[-1], "s", 1.0), (points[0], "o", 0.0)):
        ax.plot(*point, marker, color=colors(place), markersize=size, markeredgecolor="white", zorder=3)
    ax.set(xlim=(-0.6, width - 0.4), ylim=(height - 0.4, -0.6), aspect="equal")
    ax.set_axis_off()


def _draw_volume(ax: Any, points: np.ndarray, grid: Sequence[int], colors: Any) -> None:
    from mpl_toolkits.mplot3d.art3d import Line3DCollection  # type: ignore[import-untyped]

    points = points[:, ::-1].astype(float)  # w, h, d as x, y, z
    sizes = np.array(grid[::-1]) - 1.0
    corners = np.array([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)])
    edges = [(a, b) for a in range(8) for b in range(a) if np.abs(corners[a] - corners[b]).sum() == 1]
    box = [corners[list(edge)] * sizes for edge in edges]
    ax.add_collection3d(Line3DCollection(box, colors="0.85", linewidths=0.6))
    thick = min(3.0, max(0.9, 14 / max(grid)))
    pieces = list(_pieces(points))
    if pieces:
        ax.add_collection3d(Line3DCollection(
            [line for line, _, _ in pieces],
            colors=[colors(place, alpha=1.0 if near else 0.45) for _, place, near in pieces],
            linewidths=[thick if near else thick / 3 for _, _, near in pieces],
            capstyle="round",
        ))  # fmt: skip
    for point, marker, place in ((points[-1], "s", 1.0), (points[0], "o", 0.0)):
        ax.plot(*point[:, None], marker, color=colors(place), markersize=max(4.5, 2.4 * thick), markeredgecolor="white")
    ax.set(xlim=(0, max(sizes[0], 1)), ylim=(max(sizes[1], 1), 0), zlim=(max(sizes[2], 1), 0))
    ax.set_box_aspect(np.maximum(sizes, 1), zoom=1.0)
    ax.view_init(elev=22, azim=-62)
    ax.set_axis_off()
