"""The selective scan, one step at a time: the definition that every other backend is tested against.

Plain tensor operations, so it runs on any device in any float dtype and can be differentiated any number of times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm.kernels.selective_scan.problem import Problem


def selective_scan(p: Problem) -> tuple[Tensor, Tensor]:
    """Run the recurrence of Mamba (arXiv:2312.00752, Algorithm 2) along each row of the table.

    With p = table[k, t], q = read[k, t], o = write[k, t] and delta already biased and, if asked, softplus'd:

        h[t] = exp(delta[q] A) h[t-1] + delta[q] B[q] u[p],    y[o] += C[q] · h[t] + D u[p]

    Returns:
        y in the dtype of ``u`` and the last state (b, k, d, n) in the compute dtype.
    """
    kind = p.compute_dtype
    u = take(p.rows("u").to(kind), p.rows("table"))  # (b, k, t, d)
    delta = take(p.rows("delta").to(kind), p.rows("read"))
    B = take(p.rows("B").to(kind), p.rows("read"))  # (b, k, t, n)
    C = take(p.rows("C").to(kind), p.rows("read"))
    A = p.rows("A")
    if p.delta_bias is not None:
        delta = delta + p.rows("delta_bias")[:, None]
    if p.delta_softplus:
        delta = F.softplus(delta)

    h = u.new_zeros(p.state_shape) if p.initial_state is None else p.initial_state
    outputs = []
    for t in range(p.t):
        step = delta[:, :, t, :, None]  # (b, k, d, 1)
        h = torch.exp(step * A) * h + step * u[:, :, t, :, None] * B[:, :, t, None, :]
        outputs.append((h * C[:, :, t, None, :]).sum(-1))
    y = torch.stack(outputs, 2)
    if p.D is not None:
        y = y + p.rows("D")[:, None] * u
    if p.write is not None:
        y = put(y, p.rows("write"), p.m)
    if p.merge:
        y = y.sum(1)
    if p.z is not None:
        z = p.z.to(kind)
        y = y * F.silu(z if p.merge else z.unsqueeze(1))
    return y.to(p.u.dtype), h


def take(x: Tensor, index: Tensor | None) -> Tensor:
    """Read (b, k, cells, c) at ``index`` (b, k, t) as (b, k, t, c); an entry outside the cells reads 0."""
    if index is None:
        return x
    padded = F.pad(x, (0, 0, 0, 1))
    return padded.gather(2, _cells(index, x.shape[2]).expand(-1, -1, -1, x.shape[3]))


def put(y: Tensor, index: Tensor, cells: int) -> Tensor:
    """Add (b, k, t, c) into ``cells`` cells at ``index`` (b, k, t), in step order; an entry outside them is dropped."""
    out = y.new_zeros(*y.shape[:2], cells + 1, y.shape[3])
    return out.scatter_add(2, _cells(index, cells).expand_as(y), y)[:, :, :cells]


def _cells(index: Tensor, cells: int) -> Tensor:
    inside = (index >= 0) & (index < cells)
    return torch.where(inside, index, cells).long().unsqueeze(-1)
