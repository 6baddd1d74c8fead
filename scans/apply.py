"""Read a grid of tokens as sequences, and write sequences back, by table.

For layers that need the sequence itself. ``vssm.kernels.selective_scan`` reads the table inside the kernel and needs
neither.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_sequences(x: Tensor, table: Tensor) -> Tensor:
    """Read (b, l, d) tokens in the order of each row of ``table``, (k, t) or (b, k, t): (b, k, t, d).

    Entry l is padding and reads zero.

    >>> to_sequences(torch.tensor([[[10.0], [20.0]]]), torch.tensor([[1, 0, 2]])).flatten().tolist()
    [20.0, 10.0, 0.0]
    """
    _check("to_sequences", x, 3, "(b, l, d)", table)
    b, l, d = x.shape
    padded = torch.cat([x, x.new_zeros(b, 1, d)], dim=1)
    return padded.flatten(0, 1).index_select(0, _flat(table, b, l + 1)).view(b, *table.shape[-2:], d)


def to_grid(y: Tensor, table: Tensor, cells: int) -> Tensor:
    """Write (b, k, t, d) sequences to the ``cells`` they came from: (b, k, l, d). Undoes ``to_sequences``.

    A cell that a row visits several times holds the sum of the visits; one that it never visits holds zero; padding is
    dropped.

    >>> to_grid(torch.tensor([[[[1.0], [2.0], [3.0]]]]), torch.tensor([[1, 0, 2]]), cells=2).flatten().tolist()
    [2.0, 1.0]
    """
    _check("to_grid", y, 4, "(b, k, t, d)", table)
    b, k, t, d = y.shape
    if tuple(table.shape[-2:]) != (k, t):
        raise ValueError(f"to_grid: table must be (k={k}, t={t}) as y is, got {tuple(table.shape)}")
    rows = _flat(table, b, cells + 1, per_row=True)
    grid = y.new_zeros(b * k * (cells + 1), d).index_add(0, rows, y.reshape(-1, d))
    return grid.view(b, k, cells + 1, d)[:, :, :cells]


def _flat(table: Tensor, batch: int, stride: int, per_row: bool = False) -> Tensor:
    """Each entry as an index into samples (and rows, with ``per_row``) laid end to end, ``stride`` cells apart."""
    table = table.long().expand(batch, *table.shape[-2:])
    k = table.shape[1]
    if per_row:
        first = torch.arange(batch * k, device=table.device).view(batch, k, 1)
    else:
        first = torch.arange(batch, device=table.device).view(batch, 1, 1)
    return (table + first * stride).flatten()


def _check(who: str, x: Tensor, dims: int, layout: str, table: Tensor) -> None:
    if x.dim() != dims:
        raise ValueError(f"{who}: the tokens must be {layout}, got {tuple(x.shape)}")
    if table.dim() not in (2, 3) or (table.dim() == 3 and table.shape[0] != x.shape[0]):
        raise ValueError(f"{who}: table must be (k, t) or (b={x.shape[0]}, k, t), got {tuple(table.shape)}")
