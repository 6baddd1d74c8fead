"""What the evaluation of volumes leaves behind: a table of cases, and slices with truth and prediction."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vssm.checkpoints.files import written_whole
from vssm.tasks.report import COLORS, write_table


@dataclass(frozen=True)
class Picture:
    """Slices of a case through the most of its truth: image, truth and prediction, (H, W) each, and their aspect."""

    name: str
    slices: tuple[tuple[np.ndarray, np.ndarray, np.ndarray, float], ...]

    @classmethod
    def of(
        cls,
        name: str,
        image: np.ndarray,
        truth: np.ndarray,
        predicted: np.ndarray,
        spacing_mm: np.ndarray,
        *,
        rows_first: bool = False,
    ) -> Picture:
        """Cut volumes (X, Y, Z) of one grid; ``rows_first`` shows an image (H, W, 1) as its file does."""
        slices = []
        for axis in range(3):
            height, width = (other for other in range(3) if other != axis)
            if truth.shape[height] == 1 or truth.shape[width] == 1:
                continue
            filled = (truth > 0).sum(axis=(height, width))
            place = int(filled.argmax()) if filled.any() else truth.shape[axis] // 2
            cut = [np.take(volume, place, axis=axis) for volume in (image, truth, predicted)]
            if not rows_first:
                cut, height, width = [plane.T[::-1] for plane in cut], width, height
            slices.append((*(plane.copy() for plane in cut), float(spacing_mm[height] / spacing_mm[width])))
        return cls(name, tuple(slices))

    def draw(self, file: Path, class_names: Sequence[str]) -> None:
        """Write a PNG: a row for each slice; image, truth and prediction, and below what the colours mean."""
        few = len(class_names) - 1 <= len(COLORS)
        colors = ListedColormap(COLORS) if few else matplotlib.colormaps["tab20"]
        top = colors.N
        figure = Figure(figsize=(9, 3 * len(self.slices)), layout="constrained")
        grid = figure.subplots(len(self.slices), 3, squeeze=False)
        for row, (image, truth, predicted, aspect) in zip(grid, self.slices):
            low, high = np.percentile(image, (1, 99))
            for axes, label, title in zip(row, (None, truth, predicted), ("image", "truth", "prediction")):
                axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
                if label is not None:
                    shown = np.ma.masked_equal(label, 0)
                    axes.imshow((shown - 1) % top, cmap=colors, vmin=0, vmax=top - 1, alpha=0.55, aspect=aspect,
                                interpolation="nearest")
                axes.set_title(title if axes in grid[0] else "")
                axes.set_axis_off()
        figure.suptitle(self.name)
        patches = [Patch(color=colors((number - 1) % top)) for number in range(1, len(class_names))]
        figure.legend(patches, class_names[1:], loc="outside lower center", ncols=min(len(patches), 5))
        FigureCanvasAgg(figure)
        with written_whole(file) as part:
            figure.savefig(part, dpi=100, format="png")


class CaseReport(Callback):
    """Write ``val_cases.csv``, ``test_cases.csv`` and ``overlays/SPLIT_CASE.png`` into the run folder.

    Args:
        draw_every_s: Seconds between two drawings while a run is training; the last validation is always drawn.
    """

    def __init__(self, draw_every_s: float = 60.0):
        self.draw_every_s = draw_every_s
        self._drawn = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        last = trainer.state.fn == "validate" or trainer.current_epoch + 1 == trainer.max_epochs
        due = last or time.monotonic() - self._drawn > self.draw_every_s
        self._write(trainer, pl_module, "val", draw=due)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, "test", draw=True)

    def _write(self, trainer: Trainer, pl_module: Any, split: str, *, draw: bool) -> None:
        parts: list[Any] = [pl_module.case_rows]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, pl_module.case_rows)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        rows = sorted((row for part in parts for row in part), key=lambda row: row[0])
        write_table(folder / f"{split}_cases.csv", [row for _, row in rows])
        if draw:
            self._drawn = time.monotonic()
            for picture in pl_module.case_pictures:
                picture.draw(folder / "overlays" / f"{split}_{picture.name}.png", pl_module.class_names)
