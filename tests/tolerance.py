"""What "close" means in this suite: one measure, one bound for each dtype."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the standard deviation of ``expected``; inf where shapes differ or values are not finite.

    An expected tensor of one value, or of equal values, has no deviation: its magnitude takes the place, 1 if it is 0.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not actual.isfinite().all():
        return float("inf")
    spread = expected.std(correction=0).item() or expected.abs().max().item() or 1.0
    return (actual - expected).abs().max().item() / spread
