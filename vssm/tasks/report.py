"""What a run leaves behind for people: metrics as CSV and curves, a confusion matrix, predictions."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import torch
from cycler import cycler
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vssm.checkpoints.files import written_whole

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
"""Colours that people with any colour vision tell apart (Okabe and Ito); the last one is too pale for lines."""


class RunReport(Callback):
    """Write ``metrics.csv`` (a row an epoch), ``curves.png`` and ``confusion_matrix.png`` into the run folder.

    The rows travel in checkpoints: after a resume the file goes on where it stopped. (The mean training loss of an
    epoch that was interrupted is that of its second part.)

    Args:
        draw_every_s: Seconds between two drawings of the curves during training; they are drawn at its end anyway.
    """

    def __init__(self, draw_every_s: float = 60.0):
        self.draw_every_s = draw_every_s
        self.rows: list[dict[str, float]] = []
        self._folder = Path()
        self._drawn = time.monotonic()
        self._started = time.monotonic()
        self._validated = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.rows[-1]["seconds"] if self.rows else 0.0
        self._started = time.monotonic() - before

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row["seconds"] = round(time.monotonic() - self._started, 1)
        row["lr"] = max(group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups)
        metrics = _metrics(trainer)  # Lightning keeps those of an earlier validation
        row |= {k: float(v) for k, v in metrics.items() if self._validated or not k.startswith("val/")}
        self.rows.append(row)
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        write_table(self._folder / "metrics.csv", self.rows)
        if time.monotonic() - self._drawn > self.draw_every_s:
            draw_curves(self._folder / "curves.png", self.rows)
            self._drawn = time.monotonic()

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rows and not trainer.fast_dev_run:
            draw_curves(self._folder / "curves.png", self.rows)
            self._draw_confusion(pl_module, "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "test")

    @rank_zero_only
    def _finish(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        if trainer.fast_dev_run:
            return
        metrics = {name: float(value) for name, value in _metrics(trainer).items() if name.startswith(f"{split}/")}
        with written_whole(self._folder / f"{split}_metrics.json") as file:
            file.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        self._draw_confusion(pl_module, split)

    def _draw_confusion(self, pl_module: LightningModule, split: str) -> None:
        confusion = getattr(pl_module, "confusion", None)
        if confusion is not None:
            file = self._folder / ("confusion_matrix.png" if split == "test" else f"{split}_confusion_matrix.png")
            draw_confusion(file, confusion.cpu(), pl_module.class_names)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


def _metrics(trainer: Trainer) -> dict[str, Tensor]:
    """Return the losses and scores of whole epochs: Lightning keeps the last step's and learning rates beside them."""
    metrics = sorted(trainer.callback_metrics.items())
    return {k: v for k, v in metrics if not k.endswith(("_step", "_epoch")) and not k.startswith("lr-")}


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write dicts as CSV; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with written_whole(file) as part, open(part, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(file: Path, rows: list[dict[str, float]]) -> None:
    """Draw losses, scores and, where there are any, distances (names with ``_mm``) beside each other, over epochs."""
    panels: dict[str, list[str]] = {"loss": [], "score": []}
    for name in dict.fromkeys(name for row in rows for name in row if "/" in name):
        kind = "loss" if name.endswith("loss") else "distance (mm)" if "_mm" in name else "score"
        panels.setdefault(kind, []).append(name)
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.set_prop_cycle(cycler(linestyle=("-", "--", ":")) * cycler(color=COLORS[:6]))
        for name in names:
            points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "", label=name)
        axes.set(xlabel="epochs done", ylabel=title)
        axes.set_xlim(0.5, max(row["epoch"] for row in rows) + 1.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(**({"fontsize": "small", "ncols": 2} if len(names) > 6 else {}))
    _save(figure, file)


def draw_confusion(file: Path, confusion: Tensor, names: list[str]) -> None:
    """Draw a confusion matrix (true, predicted): rows in percent, counts in the cells of small ones."""
    share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(len(names)), names)
        for row, column in confusion.nonzero().tolist():
            color = "white" if share[row, column] > 0.5 else "black"
            count = int(confusion[row, column])
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure)  # no pyplot: nothing global, no display
    with written_whole(file) as part:
        figure.savefig(part, dpi=110)


class PredictionWriter(Callback):
    """Write the predictions of all processes as CSV: the file, then what the task says, in the order of the files.

    Args:
        path: The file to write.
    """

    def __init__(self, path: str = "predictions.csv"):
        self.path = path
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is not None:  # None where no image of the batch could be read
            self.rows.extend(pl_module.prediction_rows(outputs))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts: list[Any] = [self.rows]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, self.rows)
        if trainer.is_global_zero:
            files = trainer.datamodule.data["predict"].names
            rows = sorted((row for part in parts for row in part), key=lambda row: row[0])
            write_table(Path(self.path), [{"file": files[index], **row} for index, row in rows])
