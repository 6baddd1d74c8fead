"""The 2D scan, one cell at a time: the definition that every other backend is tested against.

Plain tensor operations, so it runs on any device in any float dtype and can be differentiated any number of times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm.kernels.scan2d.problem import Problem


def scan2d(p: Problem) -> Tensor:
    """Run the recurrence of Mamba2D (arXiv:2412.16146) over the grid, row by row.

    Returns:
        y (b, h, w, d) in the dtype of ``u``.
    """
    u, delta_top, delta_left, B_top, B_left, C = (
        _first_cell_first(x.to(p.compute_dtype), p.reverse)
        for x in (p.u, p.delta_top, p.delta_left, p.B_top, p.B_left, p.C)
    )
    if p.delta_softplus:
        delta_top, delta_left = F.softplus(delta_top), F.softplus(delta_left)

    rows: list[list[Tensor]] = []  # the states h[i][j], (b, d, n) each
    for i in range(p.h):
        rows.append([])
        for j in range(p.w):

            def source(delta: Tensor, A: Tensor, B: Tensor, before: Tensor | None, i: int = i, j: int = j) -> Tensor:
                step = delta[:, i, j, :, None]  # (b, d, 1)
                entering = step * B[:, i, j, None, :] * u[:, i, j, :, None]
                return entering if before is None else torch.exp(step * A) * before + entering

            if i == 0:
                state = source(delta_left, p.A_left, B_left, rows[0][j - 1] if j else None)
            elif j == 0:
                state = source(delta_top, p.A_top, B_top, rows[i - 1][0])
            else:
                left = source(delta_left, p.A_left, B_left, rows[i][j - 1])
                state = 0.5 * (left + source(delta_top, p.A_top, B_top, rows[i - 1][j]))
            rows[i].append(state)
    states = torch.stack([torch.stack(row, 1) for row in rows], 1)  # (b, h, w, d, n)
    y = (states * C[:, :, :, None, :]).sum(-1)
    if p.D is not None:
        y = y + p.D * u
    return _first_cell_first(y, p.reverse).to(p.u.dtype)


def _first_cell_first(x: Tensor, reverse: bool) -> Tensor:
    """A map (b, h, w, …) turned round if the recurrence starts in its last cell; its own inverse."""
    return x.flip(1, 2) if reverse else x
