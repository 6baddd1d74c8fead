"""One call of the causal convolution, checked and cleaned: what every backend receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Operands and options of one causal convolution.

    Sizes: b batch, k rows, l cells of ``x``, m cells of ``y``, d channels, w taps, t steps. An operand without the k
    axis is shared by all rows; :meth:`rows` shows it with the axis, at stride 0. The compute dtype is float64 where
    ``x`` is, float32 otherwise.
    """

    x: Tensor  # (b, k?, l, d), any float dtype, last stride 1
    weight: Tensor  # (k?, d, w), compute dtype, last stride 1
    bias: Tensor | None  # (k?, d), compute dtype
    table: Tensor | None  # (b?, k, t) int32: the cell of x at each step; None: step t reads cell t
    write: Tensor | None  # the same for y; None: y stays in step order, m = t
    initial_state: Tensor | None  # (b, k, d, w - 1), dtype of x: the inputs before step 0, the latest one last
    silu: bool
    revisits: bool

    def rows(self, name: str) -> Tensor | None:
        """Operand or index ``name`` as a view with its batch (indices) and row axes present, stride 0 where shared."""
        x = getattr(self, name)
        if x is None:
            return None
        if name in ("table", "write"):
            return x if x.dim() == 3 else x.unsqueeze(0).expand(self.b, -1, -1)
        if name == "x":
            return x if x.dim() == 4 else x.unsqueeze(1).expand(-1, self.k, -1, -1)
        if name == "weight":
            return x if x.dim() == 3 else x.unsqueeze(0).expand(self.k, -1, -1)
        return x if x.dim() == 2 else x.unsqueeze(0).expand(self.k, -1)

    @property
    def distinct(self) -> tuple[Tensor | None, ...]:
        """All operands and indices, with None for ``write`` where it is the table itself."""
        write = None if self.write is self.table else self.write
        return self.x, self.weight, self.bias, self.table, write, self.initial_state

    @property
    def b(self) -> int:
        return self.x.shape[0]

    @property
    def k(self) -> int:
        """Rows, as the first operand that has the axis says; 1 if none has."""
        for index in (self.table, self.write):
            if index is not None:
                return index.shape[-2]
        for x, dims, axis in ((self.x, 4, 1), (self.weight, 3, 0), (self.bias, 2, 0)):
            if x is not None and x.dim() == dims:
                return x.shape[axis]
        return 1

    @property
    def l(self) -> int:  # noqa: E743 - the paper's letter
        return self.x.shape[-2]

    @property
    def m(self) -> int:
        return self.t if self.write is None else self.l

    @property
    def d(self) -> int:
        return self.x.shape[-1]

    @property
    def w(self) -> int:
        return self.weight.shape[-1]

    @property
    def t(self) -> int:
        for index in (self.table, self.write):
            if index is not None:
                return index.shape[-1]
        return self.l

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.b, self.k, self.m, self.d)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.b, self.k, self.d, self.w - 1)
