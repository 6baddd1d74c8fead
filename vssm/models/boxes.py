"""Boxes of anchor-free detectors: cells, distances to the sides, and complete IoU. Boxes are x1, y1, x2, y2."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def wide(maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps in float32, or in float64 if they are: bfloat16 cannot tell the cells of a large map apart."""
    return [x if x.dtype == torch.float64 else x.float() for x in maps]


def cell_centres(maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Centres (x, y) of the cells of all maps, in cells of their own map, (A, 2), and the pixels of a cell, (A, 1).

    >>> cell_centres([torch.zeros(1, 8, 1, 2)], [16])
    (tensor([[0.5000, 0.5000],
            [1.5000, 0.5000]]), tensor([[16.],
            [16.]]))
    """
    centres, pixels = [], []
    for x, stride in zip(maps, strides, strict=True):
        height, width = x.shape[-2:]
        rows = torch.arange(height, dtype=x.dtype, device=x.device) + 0.5
        columns = torch.arange(width, dtype=x.dtype, device=x.device) + 0.5
        y, x_ = torch.meshgrid(rows, columns, indexing="ij")
        centres.append(torch.stack([x_, y], -1).flatten(0, 1))
        pixels.append(rows.new_full((height * width, 1), stride))
    return torch.cat(centres), torch.cat(pixels)


def expected_distances(logits: Tensor, bins: Tensor) -> Tensor:
    """Mean of a distribution over distances: logits (..., 4, bins) to (..., 4) (generalized focal loss, 2006.04388)."""
    return (logits.softmax(-1) * bins).sum(-1)


def corners(centres: Tensor, distances: Tensor) -> Tensor:
    """Boxes whose left, top, right and bottom sides lie at these distances (..., 4) from the centres (..., 2)."""
    low, high = distances.chunk(2, -1)
    return torch.cat([centres - low, centres + high], -1)


def distances_to_sides(centres: Tensor, boxes: Tensor) -> Tensor:
    """Distances of the centres to the left, top, right and bottom sides of boxes; negative outside."""
    low, high = boxes.chunk(2, -1)
    return torch.cat([centres - low, high - centres], -1)


def complete_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU (Zheng et al., 2020, arXiv:1911.08287) of boxes (..., 4) that broadcast: (...).

    As published: ``eps`` is added to heights, not to widths.
    """
    a1, a2, b1, b2 = a[..., :2], a[..., 2:], b[..., :2], b[..., 2:]
    zero_one = a.new_tensor([0.0, eps])
    (w, h), (v, g) = ((high - low + zero_one).unbind(-1) for low, high in ((a1, a2), (b1, b2)))
    overlap = (torch.minimum(a2, b2) - torch.maximum(a1, b1)).clamp(min=0).prod(-1)
    iou = overlap / (w * h + v * g - overlap + eps)
    diagonal = (torch.maximum(a2, b2) - torch.minimum(a1, b1)).square().sum(-1) + eps
    apart = ((b1 + b2 - a1 - a2).square().sum(-1)) / 4
    shape = 4 / math.pi**2 * (torch.atan(v / g) - torch.atan(w / h)).square()
    with torch.no_grad():
        weight = shape / (shape - iou + (1 + eps))
    return iou - (apart / diagonal + shape * weight)
