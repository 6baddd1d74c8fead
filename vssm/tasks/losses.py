"""Losses of segmenters: Dice and cross-entropy, for one output or for several of a deeply supervised network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import Tensor, nn


@dataclass(frozen=True)
class Loss:
    """MONAI's ``DiceCELoss``: Dice and cross-entropy with these weights, on softmax probabilities.

    Of a network with a single channel: on the sigmoid's, the cross-entropy being binary.

    Args:
        dice, ce: Weights.
        include_background: Let the background count in the Dice term.
        batch: Take the Dice over the whole batch, not sample by sample.
        squared: Square the predictions and targets in the denominator.
        smooth: Added to numerator and denominator of the Dice term.
    """

    dice: float = 1.0
    ce: float = 1.0
    include_background: bool = False
    batch: bool = False
    squared: bool = False
    smooth: float = 1e-5

    def build(self, channels: int) -> DiceCELoss:
        """Make the loss: logits (B, channels, …) and class numbers (B, 1, …) to a number."""
        return DiceCELoss(
            include_background=self.include_background or channels == 1,
            to_onehot_y=channels > 1,
            softmax=channels > 1,
            sigmoid=channels == 1,
            smooth_nr=self.smooth,
            smooth_dr=self.smooth,
            squared_pred=self.squared,
            batch=self.batch,
            lambda_dice=self.dice,
            lambda_ce=self.ce,
        )


def deep_supervision(criterion: nn.Module, outputs: Sequence[Tensor], target: Tensor) -> Tensor:
    """Weigh the losses of outputs, finest first, by 1, 1/2, 1/4, …, the coarsest by 0, over their sum (nnU-Net)."""
    weights = [0.5**level for level in range(len(outputs))]
    if len(weights) > 1:
        weights[-1] = 0.0
    terms = [
        weight * criterion(logits.float(), _shrunk(target, logits.shape[2:]))
        for weight, logits in zip(weights, outputs)
        if weight
    ]
    return torch.stack(terms).sum() / sum(weights)


def _shrunk(target: Tensor, size: tuple[int, ...]) -> Tensor:
    """Class numbers (B, 1, …) on a coarser grid, taken from the nearest voxel."""
    if target.shape[2:] == size:
        return target
    return F.interpolate(target.float(), size, mode="nearest-exact").to(target.dtype)
