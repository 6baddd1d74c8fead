"""The loss that Mamba-YOLO is trained with: task-aligned assignment, complete IoU and distribution focal loss.

Task alignment: Feng et al., 2021, arXiv:2108.07755. Distribution focal loss: Li et al., 2020, arXiv:2006.04388.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vssm.models.boxes import cell_centres, complete_iou, corners, distances_to_sides, expected_distances, wide

Target = Mapping[str, Tensor]


@dataclass(frozen=True)
class Assignment:
    """For every cell of every image (B, A): is it to find an object, which, and how well."""

    positive: Tensor                                # bool
    index: Tensor                                   # of the object in its image
    labels: Tensor                                  # its class
    boxes: Tensor                                   # its box in pixels, (B, A, 4)
    score: Tensor                                   # wanted score of its class


class TaskAlignedLoss(nn.Module):
    """Losses of maps of logits (B, 4 * bins + classes, h, w), as a dict of three that are to be added up.

    Each is summed over the batch, divided by the sum of the wanted scores (1 if that is smaller), and multiplied by its
    gain and by the number of images, as published.

    Args:
        strides: Pixels of a cell of each map.
        box, cls, dfl: Gains of the three terms.
        bins: Bins of the distribution over each distance.
        topk: Cells that an object may claim.
        alpha, beta: Exponents of score and IoU in the alignment of a cell with an object.
    """

    eps = 1e-9

    def __init__(
        self,
        strides: Sequence[int] = (8, 16, 32),
        *,
        box: float = 7.5,
        cls: float = 0.5,
        dfl: float = 1.5,
        bins: int = 16,
        topk: int = 10,
        alpha: float = 0.5,
        beta: float = 6.0,
    ):
        super().__init__()
        self.strides, self.bins = tuple(strides), bins
        self.gains = {"loss_box": box, "loss_cls": cls, "loss_dfl": dfl}
        self.topk, self.alpha, self.beta = topk, alpha, beta

    def forward(self, raw: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """``targets``: for each image ``boxes`` (n, 4) x1, y1, x2, y2 in pixels and ``labels`` (n); n may be 0."""
        logits, classes, centres, pixels = self.unpacked(raw)
        wanted = self.assign(raw, targets)
        norm = wanted.score.sum().clamp(min=1)
        scores = torch.zeros_like(classes).scatter_(2, wanted.labels[..., None], wanted.score[..., None])
        losses = {"loss_cls": F.binary_cross_entropy_with_logits(classes, scores, reduction="sum") / norm}

        image, cell = wanted.positive.nonzero(as_tuple=True)
        weight, logits = wanted.score[image, cell], logits[image, cell]
        goal = wanted.boxes[image, cell] / pixels[cell]                         # in cells from here on
        bins = torch.arange(self.bins, dtype=logits.dtype, device=logits.device)
        found = corners(centres[cell], expected_distances(logits, bins))
        losses["loss_box"] = ((1 - complete_iou(found, goal)) * weight).sum() / norm
        sides = distances_to_sides(centres[cell], goal).clamp(0, self.bins - 1 - 0.01)
        losses["loss_dfl"] = (self.focal(logits, sides) * weight).sum() / norm
        return {name: losses[name] * gain * len(classes) for name, gain in self.gains.items()}

    @staticmethod
    def focal(logits: Tensor, distances: Tensor) -> Tensor:
        """Cross-entropy (n) of logits (n, 4, bins) with the two bins around each distance (n, 4)."""
        low = distances.floor().long()
        share = distances - low                                                 # of the upper bin
        log = logits.log_softmax(-1)
        lower, upper = (log.gather(-1, index[..., None])[..., 0] for index in (low, low + 1))
        return -((1 - share) * lower + share * upper).mean(-1)

    def unpacked(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of boxes (B, A, 4, bins) and classes (B, A, classes); of cells centres (A, 2) and pixels (A, 1)."""
        raw = wide(raw)
        flat = torch.cat([x.flatten(2) for x in raw], 2).mT
        boxes, classes = flat.split((4 * self.bins, flat.shape[-1] - 4 * self.bins), -1)
        return boxes.unflatten(-1, (4, self.bins)), classes, *cell_centres(raw, self.strides)

    @torch.no_grad()
    def assign(self, raw: Sequence[Tensor], targets: Sequence[Target]) -> Assignment:
        """Which cell is to find which object. The arguments are those of ``forward``."""
        logits, classes, centres, pixels = self.unpacked(raw)
        if len(targets) != len(classes):
            raise ValueError(f"TaskAlignedLoss: targets must be one an image, {len(classes)}, got {len(targets)}")
        bins = torch.arange(self.bins, dtype=logits.dtype, device=logits.device)
        boxes = corners(centres, expected_distances(logits, bins)) * pixels
        images = [self._image(*each, centres * pixels) for each in zip(boxes, classes.sigmoid(), targets, strict=True)]
        return Assignment(*(torch.stack(parts) for parts in zip(*images, strict=True)))

    def _image(self, boxes: Tensor, scores: Tensor, target: Target, centres: Tensor) -> tuple[Tensor, ...]:
        cells = len(centres)
        goal, labels = target["boxes"].to(boxes), target["labels"].to(boxes.device)
        if len(goal) == 0:
            zeros = torch.zeros(cells, dtype=torch.long, device=boxes.device)
            return zeros.bool(), zeros, zeros, torch.zeros_like(boxes), boxes.new_zeros(cells)
        if int(labels.min()) < 0 or int(labels.max()) >= scores.shape[1]:
            raise ValueError(
                f"TaskAlignedLoss: labels must be 0 to {scores.shape[1] - 1}, got {int(labels.min())} to "
                f"{int(labels.max())}"
            )
        inside = distances_to_sides(centres, goal[:, None]).amin(-1) > self.eps                 # (n, A)
        inside &= goal.sum(1, keepdim=True) != 0            # As published: a box around the corner (0, 0) is padding
        iou = torch.where(inside, complete_iou(goal[:, None], boxes[None]).clamp(min=0), 0)
        align = torch.where(inside, scores[:, labels].mT ** self.alpha * iou**self.beta, 0)
        # As published: where fewer cells are aligned, topk fills up with others; those inside are claimed, for score 0.
        best = align.topk(min(self.topk, cells), dim=1).indices
        claimed = torch.zeros_like(inside).scatter_(1, best, True) & inside
        winner = F.one_hot(iou.argmax(0), len(goal)).mT.bool()          # may be an object that did not claim the cell
        claimed = torch.where(claimed.sum(0) > 1, winner, claimed)
        index, positive = claimed.long().argmax(0), claimed.any(0)
        best_align, best_iou = ((x * claimed).amax(1, keepdim=True) for x in (align, iou))
        score = (align * claimed * best_iou / (best_align + self.eps)).amax(0)
        return positive, index, labels[index], goal[index], score
