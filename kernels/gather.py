"""Reading and writing cells by table in plain tensor operations, for the backends that run on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor | None) -> Tensor:
    """Read (b, k, cells, c) at ``index`` (b, k, t) as (b, k, t, c); an entry outside the cells reads 0."""
    if index is None:
        return x
    cells = x.shape[2]
    inside = (index >= 0) & (index < cells)
    where = torch.where(inside, index, 0).long().unsqueeze(-1)
    taken = x.gather(2, where.expand(-1, -1, -1, x.shape[3]))
    return torch.where(inside.unsqueeze(-1), taken, taken.new_zeros(()))  # a product would spread a NaN of cell 0


def put(y: Tensor, index: Tensor | None, cells: int, revisits: bool = True) -> Tensor:
    """Add (b, k, t, c) into ``cells`` cells at ``index`` (b, k, t), in step order; an entry outside them is dropped.

    Deterministic: on a GPU, where scattered additions are atomic and their order is not, rows that may visit a cell
    twice are sorted (``index_put_`` with accumulation does that).
    """
    if index is None:
        return y
    b, k, t, c = y.shape
    where = torch.where((index >= 0) & (index < cells), index, cells).long()
    out = y.new_zeros(b, k, cells + 1, c)
    if not revisits or y.device.type == "cpu":
        where = where.unsqueeze(-1).expand(b, k, t, c)
        out = out.scatter_add_(2, where, y) if revisits else out.scatter_(2, where, y)
    else:
        row = torch.arange(b * k, device=y.device).view(b, k, 1) * (cells + 1)
        where = (where + row).flatten()
        out.view(b * k * (cells + 1), c).index_put_((where,), y.reshape(b * k * t, c), accumulate=True)
    return out[:, :, :cells].contiguous()
