"""Object detection: any detector with torchvision's protocol, its own losses, and precision as COCO measures it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.transforms.v2.functional import to_dtype, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from vssm.checkpoints.files import written_whole
from vssm.registries.torchvision import create_detector
from vssm.tasks.base import Task
from vssm.tasks.optimizer import Optimizer, Schedule

Shown = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]       # an image, what was found in it, what is there

PICTURES = 8        # images that are drawn
SIDE = 320          # pixels; smaller images are enlarged
FOUND, TRUTH = "#56B4E9", "#E69F00"  # told apart by people with any colour vision
SHOWN = 0.3         # score of the boxes that are drawn, and that stand in the table of predictions


class Detection(Task):
    """Train, validate, test and predict with one detector; images, a list of (C, H, W) in [0, 1], in, boxes out.

    Scores are COCO's: ``map`` is the mean of the average precision over IoUs from 0.5 to 0.95, ``map50`` that at 0.5;
    ``segm_map`` and so on are those of masks, where the data have them and the detector is Mask R-CNN.

    Args:
        detector: See ``vssm.create_detector``, or a module given by ``class_path``.
        num_classes: Classes of the data; the background is not one of them.
        backbone, backbone_kwargs, pyramid: See ``vssm.create_detector``.
        detector_kwargs: Its further arguments: ``min_size``, ``score_thresh``, ``image_size``, …
        pretrained: Start from the published weights of the backbone.
        checkpoint_path: Start from this file instead, published or ours: a classifier's checkpoint for the backbone.
        optimizer, schedule, ema_decay, ema_warmup: See ``Task``.
        grad_checkpointing: Recompute activations of the backbone in the backward pass to save memory.
    """

    score = "map"
    score_name = "mAP"

    def __init__(
        self,
        detector: str | nn.Module,
        num_classes: int,
        *,
        backbone: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        pyramid: dict[str, Any] | None = None,
        detector_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        optimizer: Optimizer = Optimizer(lr=1e-4),
        schedule: Schedule = Schedule(warmup_epochs=1),
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        grad_checkpointing: bool = False,
    ):
        if isinstance(detector, str):
            model = create_detector(
                detector, backbone, num_classes=num_classes + 1, pretrained=pretrained,
                checkpoint_path=checkpoint_path, backbone_kwargs=backbone_kwargs, pyramid=pyramid,
                **(detector_kwargs or {}),
            )  # fmt: skip
        elif backbone or backbone_kwargs or pyramid or detector_kwargs or pretrained or checkpoint_path:
            raise ValueError(
                "Detection: backbone, pyramid, weights and further arguments are for detectors given by name, got a "
                f"{type(detector).__name__}"
            )
        else:
            model = detector
        super().__init__(
            model, optimizer=optimizer, schedule=schedule, ema_decay=ema_decay, ema_warmup=ema_warmup,
            class_names=[str(number) for number in range(num_classes)],
        )  # fmt: skip
        self.save_hyperparameters(ignore=["detector"] if isinstance(detector, nn.Module) else [])
        self.prepare_model(grad_checkpointing)
        self.val_precision, self.test_precision = Precision(), Precision()
        self.pictures: list[Shown] = []

    # ---- training ----

    def run_model(self, images: list[Tensor], target: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return self.model(images, target)

    def loss(self, images: list[Tensor], target: list[dict[str, Tensor]]) -> Tensor:
        """Return the sum of the detector's losses, each of which is logged."""
        losses = self.run_model(images, target)
        for name, value in losses.items():
            name = f"train/{name.removeprefix('loss_')}_loss"
            self.log(name, value.detach(), on_step=False, on_epoch=True, batch_size=len(images))
        return torch.stack(list(losses.values())).sum()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.finite_loss(batch, batch["image"], batch["target"])

    # ---- evaluation ----

    def find(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Return what the detector finds, without the background, which torchvision's dense ones may name as well."""
        return [{name: x[each["labels"] > 0] for name, x in each.items()} for each in self.model(images)]

    def on_validation_epoch_start(self) -> None:
        self.pictures = []

    def on_test_epoch_start(self) -> None:
        self.pictures = []

    def validation_step(self, batch: dict[str, Any] | None, batch_idx: int) -> None:
        self._evaluate(batch, self.val_precision)

    def test_step(self, batch: dict[str, Any] | None, batch_idx: int) -> None:
        self._evaluate(batch, self.test_precision)

    def on_validation_epoch_end(self) -> None:
        self._log_precision("val", self.val_precision)

    def on_test_epoch_end(self) -> None:
        self._log_precision("test", self.test_precision)

    def _evaluate(self, batch: dict[str, Any] | None, precision: Precision) -> None:
        if batch is None:  # none of its images could be read
            return
        found = self.find(batch["image"])
        precision.update(found, batch["target"])
        for each in zip(batch["image"], found, batch["target"]):
            if len(self.pictures) < PICTURES:
                self.pictures.append(_on_cpu(each))

    def _log_precision(self, split: str, precision: Precision) -> None:
        values = precision.compute()  # over all processes
        precision.reset()
        shown = {"map", "map50"}
        for name, value in values.items():
            self.log(f"{split}/{name}", value, prog_bar=name in shown, sync_dist=True)

    # ---- prediction ----

    def predict_step(self, batch: dict[str, Any] | None, batch_idx: int) -> dict[str, Any] | None:
        """Return what is found in each image."""
        return None if batch is None else {"index": batch["index"], "found": self.find(batch["image"])}

    def prediction_rows(self, outputs: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        """Return class, score and box of every object."""
        rows = []
        for index, found in zip(outputs["index"].tolist(), outputs["found"], strict=True):
            for box, label, score in zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist()):
                if score >= SHOWN:
                    sides = {name: f"{value:.2f}" for name, value in zip(("x1", "y1", "x2", "y2"), box, strict=True)}
                    rows.append((index, {"class": self.class_names[label - 1], "score": f"{score:.4f}", **sides}))
        return rows

    def configure_callbacks(self) -> list[Callback]:
        return [*super().configure_callbacks(), Pictures()]


NAMES = {  # torchmetrics' scores, and ours
    "map": "map", "map_50": "map50", "map_75": "map75", "map_small": "map_small", "map_medium": "map_medium",
    "map_large": "map_large", "mar_100": "mar100",
}  # fmt: skip


class Precision(nn.Module):
    """COCO's average precision of boxes, and of masks if there are any, over a whole data set."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes = MeanAveragePrecision(iou_type="bbox")
        self.masks = MeanAveragePrecision(iou_type="segm")
        self.with_masks = False

    def update(self, found: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> None:
        names = {"boxes", "labels", "scores", "iscrowd", "area"}
        self.boxes.update(*([{k: v for k, v in each.items() if k in names} for each in x] for x in (found, targets)))
        if all("masks" in each for each in (*found, *targets)):
            self.with_masks = True
            flat = [{**each, "masks": each["masks"][:, 0] > 0.5} for each in found]
            self.masks.update(flat, [{**each, "masks": each["masks"].bool()} for each in targets])

    def compute(self) -> dict[str, Tensor]:
        """The scores that the data have (a size without objects has none)."""
        metrics = {"": self.boxes, "segm_": self.masks} if self.with_masks else {"": self.boxes}
        values = {}
        for prefix, metric in metrics.items():
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
                computed = metric.compute()
            for name, ours in NAMES.items():
                if computed[name] >= 0 or name == "map":
                    values[prefix + ours] = computed[name].clamp(min=0)
        return values

    def reset(self) -> None:
        self.boxes.reset()
        self.masks.reset()
        self.with_masks = False


class Pictures(Callback):
    """Draw some images with what was found in them (blue) and what is there (orange), into the run folder."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val_predictions.png")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "predictions.png")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes
        if trainer.is_global_zero and pl_module.pictures and not trainer.fast_dev_run:
            draw_scenes(folder / name, pl_module.pictures, pl_module.class_names)


def draw_scenes(file: Path, scenes: list[Shown], names: list[str]) -> None:
    """Draw images (C, H, W) with found and true objects, four in a row."""
    drawn = []
    for image, found, target in scenes:
        scale = max(1, SIDE // max(image.shape[1:]))
        pixels = to_dtype(image, torch.uint8, scale=True).expand(3, -1, -1)
        pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        sure = found["scores"] >= SHOWN
        pairs = zip(found["labels"][sure].tolist(), found["scores"][sure].tolist(), strict=True)
        labels = [f"{names[number - 1]} {score:.2f}" for number, score in pairs]
        if len(target["boxes"]):
            pixels = draw_bounding_boxes(pixels, target["boxes"] * scale, colors=TRUTH, width=2)
        if sure.any():
            pixels = draw_bounding_boxes(pixels, found["boxes"][sure] * scale, labels, colors=FOUND, width=2)
        drawn.append(pixels)
    height, width = (max(pixels.shape[i] for pixels in drawn) for i in (1, 2))
    padded = [nn.functional.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in drawn]
    sheet: Image.Image = to_pil_image(make_grid(padded, nrow=4, padding=2, pad_value=128))
    key = f"found (score {SHOWN} or more)", "truth"
    figure = Image.new("RGB", (max(sheet.width, 240), sheet.height + 16), "black")
    figure.paste(sheet)
    pen = ImageDraw.Draw(figure)
    for left, text, color in zip((4, 184), key, (FOUND, TRUTH), strict=True):
        pen.text((left, sheet.height + 2), text, fill=color)
    with written_whole(file) as part:
        figure.save(part, format="PNG")


def _on_cpu(each: Shown) -> Shown:
    image, *parts = each
    found, target = ({name: value.detach().cpu() for name, value in part.items()} for part in parts)
    return image.cpu(), found, target
