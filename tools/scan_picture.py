"""Draw docs/scans.svg: eight scan orders, the picture in README."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from vssm.scans import plot

ROOT = Path(__file__).resolve().parent.parent
ORDERS = [
    ("raster", (8, 8), {}), ("snake", (8, 8), {}), ("diagonal", (8, 8), {}), ("spiral", (8, 8), {}),
    ("hilbert", (8, 8), {}), ("morton", (8, 8), {}), ("window", (8, 8), {"window": 4}), ("hilbert", (4, 4, 4), {}),
]  # fmt: skip


def main() -> None:
    settings = {"svg.fonttype": "none", "svg.hashsalt": "vssm", "font.family": "sans-serif", "text.color": "#333333"}
    with plt.rc_context(settings):
        figure = plt.figure(figsize=(9.2, 5.0), layout="constrained", facecolor="white")
        for number, (name, grid, options) in enumerate(ORDERS):
            ax = figure.add_subplot(2, 4, number + 1, projection="3d" if len(grid) == 3 else None)
            plot(name, grid, 0, ax=ax, **options)
            ax.set_title(f"{name}, {'×'.join(map(str, grid))}" if len(grid) == 3 else name, fontsize=12)
        target = ROOT / "docs" / "scans.svg"
        figure.savefig(target, metadata={"Date": None})
    text = target.read_text(encoding="utf-8")
    # Two decimals of a point are enough, and half the size.
    target.write_text(re.sub(r"(\d+\.\d\d)\d+", r"\1", text), encoding="utf-8")
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
