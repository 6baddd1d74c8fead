"""One call of the selective scan, checked and cleaned: what every backend receives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Operands and options of one selective scan.

    Sizes: b batch, k rows, l cells of ``u``, r entries of the parameters, m cells of ``y``, d channels, n states,
    t steps. An operand without the k axis is shared by all rows; :meth:`rows` shows it with the axis, at stride 0.
    The compute dtype is float64 where ``u`` is, float32 otherwise.
    """

    u: Tensor  # (b, k?, l, d), any float dtype, last stride 1 like all operands
    delta: Tensor  # (b, k?, r, d)
    A: Tensor  # (k?, d, n), compute dtype
    B: Tensor  # (b, k?, r, n)
    C: Tensor  # (b, k?, r, n)
    D: Tensor | None  # (k?, d), compute dtype
    z: Tensor | None  # (b, m, d)
    delta_bias: Tensor | None  # (k?, d), compute dtype
    table: Tensor | None  # (b?, k, t) int32: the cell of u at each step; None: step t reads cell t
    read: Tensor | None  # the same for delta, B and C
    write: Tensor | None  # the same for y; None: y stays in step order, m = t
    initial_state: Tensor | None  # (b, k, d, n), compute dtype
    delta_softplus: bool
    merge: bool
    revisits: bool

    def rows(self, name: str) -> Tensor | None:
        """Operand or index ``name`` as a view with its batch (indices) and row axes present, stride 0 where shared."""
        x = getattr(self, name)
        if x is None:
            return None
        if name in ("table", "read", "write"):
            return x if x.dim() == 3 else x.unsqueeze(0).expand(self.b, -1, -1)
        if name in ("D", "delta_bias"):
            return x if x.dim() == 2 else x.unsqueeze(0).expand(self.k, -1)
        if name == "A":
            return x if x.dim() == 3 else x.unsqueeze(0).expand(self.k, -1, -1)
        return x if x.dim() == 4 else x.unsqueeze(1).expand(-1, self.k, -1, -1)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All operands and indices, in the order of the fields."""
        return self[:12]

    @property
    def distinct(self) -> tuple[Tensor | None, ...]:
        """The same, with None for ``read`` and ``write`` where they are the table itself."""
        table, read, write = self[8:11]
        return (*self[:9], None if read is table else read, None if write is table else write, self[11])

    @property
    def b(self) -> int:
        return self.u.shape[0]

    @property
    def k(self) -> int:
        """Rows, as the first operand that has the axis says; 1 if none has."""
        for index in (self.table, self.read, self.write):
            if index is not None:
                return index.shape[-2]
        for x, dims in ((self.u, 4), (self.delta, 4), (self.A, 3), (self.B, 4), (self.C, 4), (self.initial_state, 4)):
            if x is not None and x.dim() == dims:
                return x.shape[1] if dims == 4 else x.shape[0]
        for x in (self.D, self.delta_bias):
            if x is not None and x.dim() == 2:
                return x.shape[0]
        return 1

    @property
    def l(self) -> int:  # noqa: E743 - the paper's letter
        return self.u.shape[-2]

    @property
    def r(self) -> int:
        return self.delta.shape[-2]

    @property
    def m(self) -> int:
        return self.t if self.write is None else self.l

    @property
    def d(self) -> int:
        return self.u.shape[-1]

    @property
    def n(self) -> int:
        return self.A.shape[-1]

    @property
    def t(self) -> int:
        for index in (self.table, self.read, self.write):
            if index is not None:
                return index.shape[-1]
        return self.l

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.b, self.m, self.d) if self.merge else (self.b, self.k, self.m, self.d)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.b, self.k, self.d, self.n)
