"""How well two masks agree: Dice, and the distance of their surfaces."""

from __future__ import annotations

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance


def dice(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return twice the overlap over the sum of the sizes of two masks; NaN if both are empty.

    >>> dice(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    total = int(truth.sum()) + int(predicted.sum())
    return 2 * int((truth & predicted).sum()) / total if total else float("nan")


def hausdorff95_mm(truth: np.ndarray, predicted: np.ndarray, spacing_mm: np.ndarray) -> float:
    """Return the 95th percentile of the distances between two surfaces, the larger of both ways, by MONAI.

    NaN if either mask is empty: there is no distance then. Axes of one voxel are left out.
    """
    if not truth.any() or not predicted.any():
        return float("nan")
    thick = [axis for axis, n in enumerate(truth.shape) if n > 1]
    either = np.nonzero(truth | predicted)
    box = tuple(slice(max(int(i.min()) - 1, 0), int(i.max()) + 2) for i in either)  # beyond it nothing changes
    flat = tuple(axis for axis in range(truth.ndim) if axis not in thick)
    a, b = (torch.from_numpy(np.ascontiguousarray(mask[box].squeeze(flat)))[None, None] for mask in (truth, predicted))
    spacing = [float(spacing_mm[axis]) for axis in thick]
    return float(compute_hausdorff_distance(b, a, include_background=True, percentile=95, spacing=spacing)[0, 0])
