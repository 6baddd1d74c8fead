"""The 2D scan in plain tensor operations, on any device: one anti-diagonal of the grid after the other.

The cells of a diagonal k = i + j depend on the diagonal before it alone. With top and left as directions x, weights c_x
(1 where a cell has one source, 0 for the missing one, 0.5 in the interior) and g_x = exp(delta_x A_x),

    h = Σ_x c_x (g_x h_x + delta_x B_x u),    lam = dy C + [c_top g_top lam](below) + [c_left g_left lam](right)

    ddelta_x = Σ_n c_x lam (g_x h_x A_x + B_x u),    dA_x = Σ c_x lam g_x h_x delta_x,    dB_x = Σ_d c_x lam delta_x u
    du = Σ_x Σ_n c_x lam delta_x B_x + D dy,    dC = Σ_d dy h,    dD = Σ dy u

The backward pass keeps the states of every R-th diagonal and recomputes the R between, R about the square root of their
number, from the last segment to the first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm.kernels.scan2d.problem import Problem


def forward(p: Problem) -> Tensor:
    """y (b, h, w, d) in the dtype of u."""
    grid = _Diagonals(p)
    y = torch.empty(p.b, p.h * p.w, p.d, dtype=p.u.dtype, device=p.u.device)
    state = grid.before_the_first()
    for k in range(grid.count):
        cells = grid.cells(k)
        state = cells.state(*grid.sources(state, k))
        out = (state * cells.C.unsqueeze(2)).sum(-1)
        y[:, grid.flat(k)] = out if p.D is None else out + p.D * cells.u
    return _turned(y.view(p.u.shape), p.reverse)


def backward(p: Problem, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta_top, delta_left, A_top, A_left, B_top, B_left, C and D."""
    grid = _Diagonals(p)
    grad_y = _flat(grad_y, p.reverse)
    maps = (p.u, p.delta_top, p.delta_left, p.B_top, p.B_left, p.C)
    grads = [torch.empty(p.b, p.h * p.w, x.shape[3], dtype=x.dtype, device=x.device) for x in maps]
    du, ddelta_top, ddelta_left, dB_top, dB_left, dC = grads
    dA_top, dA_left = torch.zeros_like(p.A_top), torch.zeros_like(p.A_left)
    dD = None if p.D is None else torch.zeros_like(p.D)

    length = math.isqrt(grid.count - 1) + 1
    starts = range(0, grid.count, length)
    saved = []  # the states before each segment
    state = grid.before_the_first()
    for k in range(starts[-1]):
        if k % length == 0:
            saved.append(state)
        state = grid.cells(k).state(*grid.sources(state, k))
    saved.append(state)

    down, right = None, None  # what the cells below and to the right pass back, by diagonal k + 1
    for start in reversed(starts):
        states = [saved.pop()]
        for k in range(start, min(start + length, grid.count)):
            states.append(grid.cells(k).state(*grid.sources(states[-1], k)))
        for k in reversed(range(start, min(start + length, grid.count))):
            cells, at = grid.cells(k), grid.flat(k)
            dy = grad_y[:, at].to(p.compute_dtype)
            lam = dy.unsqueeze(3) * cells.C.unsqueeze(2)  # (b, m, d, n)
            if down is not None:
                low, high = grid.rows(k)
                lam = lam + grid.take(down, k + 1, low + 1, high + 1) + grid.take(right, k + 1, low, high)
            dC[:, at] = (dy.unsqueeze(3) * states.pop()).sum(2)
            top, left = grid.sources(states[-1], k)
            down, (u_top, A_top, delta_top, dB_top[:, at]) = cells.adjoint(
                lam, top, cells.delta_top, cells.c_top, p.A_top, cells.B_top
            )
            right, (u_left, A_left, delta_left, dB_left[:, at]) = cells.adjoint(
                lam, left, cells.delta_left, cells.c_left, p.A_left, cells.B_left
            )
            dA_top += A_top
            dA_left += A_left
            ddelta_top[:, at] = delta_top * cells.slope_top
            ddelta_left[:, at] = delta_left * cells.slope_left
            du[:, at] = u_top + u_left if p.D is None else u_top + u_left + p.D * dy
            if dD is not None:
                dD += (dy * cells.u).sum((0, 1))
    du, ddelta_top, ddelta_left, dB_top, dB_left, dC = (
        _turned(grad.view(x.shape), p.reverse) for grad, x in zip(grads, maps)
    )
    return du, ddelta_top, ddelta_left, dA_top, dA_left, dB_top, dB_left, dC, dD


class _Cells(NamedTuple):
    """The operands on one diagonal of m cells, in the compute dtype."""

    u: Tensor  # (b, m, d)
    delta_top: Tensor  # (b, m, d)
    delta_left: Tensor
    slope_top: Tensor | float  # what softplus multiplies the gradient by
    slope_left: Tensor | float
    B_top: Tensor  # (b, m, n)
    B_left: Tensor
    C: Tensor
    c_top: Tensor  # (m, 1, 1)
    c_left: Tensor
    A_top: Tensor  # (d, n)
    A_left: Tensor

    def state(self, top: Tensor, left: Tensor) -> Tensor:
        """States (b, m, d, n) from those above and to the left."""
        entering = self.c_top * (self.delta_top * self.u).unsqueeze(3) * self.B_top.unsqueeze(2)
        entering += self.c_left * (self.delta_left * self.u).unsqueeze(3) * self.B_left.unsqueeze(2)
        entering += self.c_top * torch.exp(self.delta_top.unsqueeze(3) * self.A_top) * top
        return entering.add_(self.c_left * torch.exp(self.delta_left.unsqueeze(3) * self.A_left) * left)

    def adjoint(
        self, lam: Tensor, before: Tensor, delta: Tensor, weight: Tensor, A: Tensor, B: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What one source gets back, (b, m, d, n), and this direction's gradients of u, A, delta and B."""
        message = weight * lam * torch.exp(delta.unsqueeze(3) * A)
        decay = message * before  # gradient of delta · A
        entering = (weight * lam * B.unsqueeze(2)).sum(3)  # gradient of delta · u
        step = (delta * self.u).unsqueeze(3)
        ddelta = (decay * A).sum(3) + entering * self.u
        dA = (decay * delta.unsqueeze(3)).sum((0, 1))
        return message, (entering * delta, dA, ddelta, (weight * lam * step).sum(2))


class _Diagonals:
    """A problem read by anti-diagonals: diagonal k holds the cells (i, k - i) in the order of their rows i."""

    def __init__(self, p: Problem) -> None:
        self.p, self.count = p, p.h + p.w - 1
        self.maps = [_flat(x, p.reverse) for x in (p.u, p.delta_top, p.delta_left, p.B_top, p.B_left, p.C)]
        c_top = torch.full((p.h, p.w), 0.5, dtype=p.compute_dtype, device=p.u.device)
        c_left = c_top.clone()
        c_top[1:, 0], c_left[1:, 0] = 1.0, 0.0
        c_top[0], c_left[0] = 0.0, 1.0
        self.c_top, self.c_left = c_top.view(-1, 1, 1), c_left.view(-1, 1, 1)

    def rows(self, k: int) -> tuple[int, int]:
        """First and last row of diagonal k."""
        return max(0, k - self.p.w + 1), min(k, self.p.h - 1)

    def flat(self, k: int) -> slice:
        """Where the cells of diagonal k are, row by row, in a flattened map."""
        low, high = self.rows(k)
        step = self.p.w - 1
        return slice(k + low * step, k + high * step + 1, max(step, 1))

    def cells(self, k: int) -> _Cells:
        p, at = self.p, self.flat(k)
        u, top, left, B_top, B_left, C = (x[:, at].to(p.compute_dtype) for x in self.maps)
        slope_top, slope_left = (torch.sigmoid(top), torch.sigmoid(left)) if p.delta_softplus else (1.0, 1.0)
        if p.delta_softplus:
            top, left = F.softplus(top), F.softplus(left)
        c_top, c_left = self.c_top[at], self.c_left[at]
        return _Cells(u, top, left, slope_top, slope_left, B_top, B_left, C, c_top, c_left, p.A_top, p.A_left)

    def before_the_first(self) -> Tensor:
        """Zero states of one row, from which diagonal 0 starts."""
        p = self.p
        return torch.zeros(p.b, 1, p.d, p.n, dtype=p.compute_dtype, device=p.u.device)

    def sources(self, state: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The states above and to the left of the cells of diagonal k, given those of diagonal k - 1."""
        low, high = self.rows(k)
        return self.take(state, k - 1, low - 1, high - 1), self.take(state, k - 1, low, high)

    def take(self, x: Tensor, k: int, low: int, high: int) -> Tensor:
        """Rows low to high of ``x`` (b, m, d, n), which holds those of diagonal k; 0 where there is none."""
        first, last = self.rows(k) if k >= 0 else (0, 0)
        return F.pad(x, (0, 0, 0, 0, first - low, high - last))


def _flat(x: Tensor, reverse: bool) -> Tensor:
    """A map (b, h, w, …) as (b, h·w, …), first cell first."""
    return _turned(x, reverse).flatten(1, 2)


def _turned(x: Tensor, reverse: bool) -> Tensor:
    return x.flip(1, 2) if reverse else x
