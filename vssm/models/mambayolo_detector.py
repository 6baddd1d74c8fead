"""Mamba-YOLO under torchvision's protocol: letterbox, network, loss or non-maximum suppression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_convert, clip_boxes_to_image

from vssm.models.mambayolo import MambaYOLO
from vssm.models.mambayolo_loss import TaskAlignedLoss

GREY = 114 / 255                # of the padding
MAX_CANDIDATES = 30000          # boxes that suppression looks at, the best ones


@dataclass(frozen=True)
class Placement:
    """Where an image (H, W) lies in the batch: scaled, then moved right and down by pixels."""

    size: tuple[int, int]
    scale: float
    left: int
    top: int

    def to_batch(self, boxes: Tensor) -> Tensor:
        return boxes * self.scale + boxes.new_tensor([self.left, self.top] * 2)

    def to_image(self, boxes: Tensor) -> Tensor:
        moved = (boxes - boxes.new_tensor([self.left, self.top] * 2)) / self.scale
        return clip_boxes_to_image(moved, self.size)


class MambaYOLODetector(nn.Module):
    """Images, a list of (C, H, W) in [0, 1], in; losses (training mode) or boxes, labels and scores out.

    Images keep their ratio of sides: the longer one becomes ``image_size``, and the rest is grey. In evaluation mode a
    batch is only as large as its images ask for, in multiples of 32.

    Args:
        model: The network; it has one class less than the labels, which count the background as 0.
        image_size: Longer side of the images in pixels, a multiple of 32.
        score_thresh: Boxes below are dropped; 0.001 to measure precision, 0.25 to look at.
        nms_thresh: IoU above which the worse box of a class is dropped.
        detections_per_img: Boxes that are kept of an image.
        multi_label: A cell may find a box of every class, as precision is measured; or of its best class alone, as the
            published code predicts.
        box, cls, dfl: Gains of the losses.
    """

    def __init__(
        self,
        model: MambaYOLO,
        *,
        image_size: int = 640,
        score_thresh: float = 0.001,
        nms_thresh: float = 0.7,
        detections_per_img: int = 300,
        multi_label: bool = True,
        box: float = 7.5,
        cls: float = 0.5,
        dfl: float = 1.5,
    ):
        super().__init__()
        if image_size < 32 or image_size % 32:
            raise ValueError(f"MambaYOLODetector: image_size must be a multiple of 32, got {image_size}")
        self.model, self.image_size = model, image_size
        self.score_thresh, self.nms_thresh, self.detections_per_img = score_thresh, nms_thresh, detections_per_img
        self.multi_label = multi_label
        self.loss = TaskAlignedLoss(model.head.strides, box=box, cls=cls, dfl=dfl)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """``targets``: of each image ``boxes`` (n, 4) in pixels and ``labels`` (n) from 1 on; in training mode only."""
        batch, placements = self.letterbox(images)
        if not self.training:
            decoded = self.model(batch)
            return [self.found(each, placement) for each, placement in zip(decoded, placements, strict=True)]
        if targets is None or len(targets) != len(images):
            raise ValueError(
                f"MambaYOLODetector: training needs targets, one an image ({len(images)}), got "
                f"{'none' if targets is None else len(targets)}"
            )
        moved = [self.moved(target, placement) for target, placement in zip(targets, placements, strict=True)]
        raw = self.model(batch)
        with torch.autocast(batch.device.type, enabled=False):
            return self.loss(raw, moved)

    def letterbox(self, images: Sequence[Tensor]) -> tuple[Tensor, list[Placement]]:
        """The images as a batch, and where each lies in it."""
        scaled, scales = [], []
        for image in images:
            height, width = image.shape[-2:]
            scale = min(self.image_size / height, self.image_size / width)
            size = max(round(height * scale), 1), max(round(width * scale), 1)
            if size != (height, width):
                image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
            scaled.append(image)
            scales.append(scale)
        height, width = self.image_size, self.image_size
        if not self.training:
            height, width = (-(-max(image.shape[i] for image in scaled) // 32) * 32 for i in (1, 2))
        batch = scaled[0].new_full((len(scaled), scaled[0].shape[0], height, width), GREY)
        placements = []
        for slot, image, scale, original in zip(batch, scaled, scales, images, strict=True):
            high, wide = image.shape[-2:]
            top, left = round((height - high) / 2 - 0.1), round((width - wide) / 2 - 0.1)
            slot[:, top : top + high, left : left + wide] = image
            placements.append(Placement((original.shape[-2], original.shape[-1]), scale, left, top))
        return batch, placements

    def moved(self, target: Mapping[str, Tensor], placement: Placement) -> dict[str, Tensor]:
        """A target in pixels of the batch, with classes from 0 on."""
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4 or len(labels) != len(boxes):
            raise ValueError(
                "MambaYOLODetector: a target has boxes (n, 4) and labels (n), got "
                f"{tuple(boxes.shape)} and {tuple(labels.shape)}"
            )
        if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= self.model.num_classes:
            raise ValueError(
                f"MambaYOLODetector: labels must be 1 to {self.model.num_classes}, got {int(labels.min())} to "
                f"{int(labels.max())}"
            )
        return {"boxes": placement.to_batch(boxes), "labels": labels - 1}

    def found(self, decoded: Tensor, placement: Placement) -> dict[str, Tensor]:
        """Boxes, labels and scores of one image, the best first."""
        boxes, scores = box_convert(decoded[:4].T, "cxcywh", "xyxy"), decoded[4:].T
        wanted = scores > self.score_thresh
        if not self.multi_label:
            wanted &= F.one_hot(scores.argmax(1), scores.shape[1]).bool()
        cell, label = wanted.nonzero(as_tuple=True)
        score = scores[cell, label]
        best = score.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
        cell, label, score = cell[best], label[best], score[best]
        kept = batched_nms(boxes[cell], score, label, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": placement.to_image(boxes[cell[kept]]), "labels": label[kept] + 1, "scores": score[kept]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward, see ``MambaYOLO``."""
        self.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """What the published recipe does not decay."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers of the backbone, for learning rates that fall with depth."""
        stage = r"^model\.stages\.(\d+)"
        fine = [(stage + r"\.downsample", (0,)), (stage + r"\.blocks\.(\d+)", None)]
        return {"stem": r"^model\.stem", "blocks": stage if coarse else fine}
