"""One call of the 2D scan, checked and cleaned: what every backend receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Operands and options of one 2D scan.

    Sizes: b batch, h rows and w columns of the grid, d channels, n states. Operands by cell have last stride 1, other
    strides as they come. The compute dtype is float64 where ``u`` is, float32 otherwise.
    """

    u: Tensor  # (b, h, w, d), any float dtype
    delta_top: Tensor  # (b, h, w, d), any float dtype
    delta_left: Tensor  # (b, h, w, d)
    A_top: Tensor  # (d, n), compute dtype
    A_left: Tensor  # (d, n)
    B_top: Tensor  # (b, h, w, n), any float dtype
    B_left: Tensor  # (b, h, w, n)
    C: Tensor  # (b, h, w, n)
    D: Tensor | None  # (d), compute dtype
    delta_softplus: bool
    reverse: bool  # cell (i, j) of the recurrence lies at (h - 1 - i, w - 1 - j) in memory

    @property
    def b(self) -> int:
        return self.u.shape[0]

    @property
    def h(self) -> int:
        return self.u.shape[1]

    @property
    def w(self) -> int:
        return self.u.shape[2]

    @property
    def d(self) -> int:
        return self.u.shape[3]

    @property
    def n(self) -> int:
        return self.A_top.shape[1]

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32
