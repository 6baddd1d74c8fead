"""The causal convolution on GPUs: the launches of ``triton_kernels``, which says what they compute."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from vssm.kernels.conv1d.problem import Problem
from vssm.kernels.conv1d.triton_kernels import before, convolve, gather, slopes
from vssm.kernels.triton_launch import (
    LARGE,
    cdiv,
    clear_unvisited,
    index_strides,
    launch,
    on,
    parameter_grad,
    power_of_2,
    strides,
    sum_by_cell,
    visits,
)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """y (b, k, m, d) and the last state (b, k, d, w - 1), both in the dtype of ``x``."""
    b, k, t, d = p.b, p.k, p.t, p.d
    direct = p.write is None or not p.revisits
    visited = p.write is None or not direct
    search = not visited and b * k * p.m * d >= LARGE
    make = p.x.new_empty if visited or search else p.x.new_zeros
    y, last = make(p.y_shape if direct else (b, k, t, d)), p.x.new_empty(p.state_shape)
    write, bias, sets = p.write if direct else None, None if p.bias is None else p.bias.contiguous(), _sets(p)
    unit, units, block_d = _columns(d, p.x.stride())
    block_t = 2048 // block_d
    chunk, pieces = _chunks(b * k * cdiv(d, block_d), t, block_t)
    with on(p.x.device):
        launch(
            convolve, cdiv(d, block_d) * k * pieces * b,
            (p.x, _taps(p), bias, p.table, write, p.initial_state, y, last,
             *_in_units(p.x, unit), *sets, *index_strides(p.table), *index_strides(write),
             *strides(p.initial_state), k, p.l, p.m if direct else t, t, units, chunk),
            dict(W=p.w, SILU=p.silu, UNIT=unit, BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_W=power_of_2(p.w)), 4,
        )  # fmt: skip
        if not direct:
            parts, y = y, p.x.new_empty(p.y_shape)
            sum_by_cell(parts, visits(p.write, p.m, True), y)
        elif search:
            clear_unvisited(y, visits(p.write, p.m, False))
    return y, last


def backward(p: Problem, grad_y: Tensor, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state. ``grad_last`` is None for zeros."""
    b, k, t, d, w = p.b, p.k, p.t, p.d, p.w
    unit, units, block_d = _columns(d, p.x.stride(), grad_y.stride())
    block_t, blocks_d = 1024 // block_d, cdiv(d, block_d)
    chunk, pieces = _chunks(b * k * blocks_d, t, block_t)
    g, taps = p.x.new_empty((b, k, t, d)), _taps(p)
    bias, sets = None if p.bias is None else p.bias.contiguous(), _sets(p)
    parts = p.weight.new_empty((b, pieces, k, w + 1, d))
    by_step = p.table is not None and p.revisits  # steps leave their dx
    merge = 1 if p.x.dim() == 4 or by_step else k
    dx = torch.empty((b, k, t, d) if by_step else p.x.shape, dtype=p.x.dtype, device=p.x.device)
    dinitial = None if p.initial_state is None else p.x.new_empty(p.state_shape)
    with on(p.x.device):
        launch(
            slopes, blocks_d * k * pieces * b,
            (grad_y, p.x, taps, bias, p.table, p.write, p.initial_state, g, parts,
             *_in_units(grad_y, unit), *_in_units(p.x, unit), *sets, *index_strides(p.table),
             *index_strides(p.write), *strides(p.initial_state), k, p.l, p.m, t, units, chunk),
            dict(W=w, SILU=p.silu, UNIT=unit, BLOCK_T=block_t, BLOCK_D=block_d), 4,
        )  # fmt: skip
        found = None if by_step or p.table is None else visits(p.table, p.l, False).visit
        cells = t if by_step else p.l
        unit, units, block_d = _columns(d)
        block_t, blocks_d = 2048 // block_d, cdiv(d, block_d)
        launch(
            gather, blocks_d * (k // merge) * cdiv(cells, block_t) * b,
            (g, taps, found, grad_last, dx, sets[0], *index_strides(found), *strides(grad_last), k, t, cells, units),
            dict(ROWS=merge, W=w, UNIT=unit, BLOCK_T=block_t, BLOCK_D=block_d), 4,
        )  # fmt: skip
        if dinitial is not None and w > 1:
            launch(
                before, blocks_d * k * b,
                (g, taps, grad_last, dinitial, sets[0], *strides(grad_last), k, t, units),
                dict(W=w, UNIT=unit, BLOCK_D=block_d, BLOCK_W=power_of_2(w)), 4,
            )  # fmt: skip
        if by_step:
            steps, dx = dx, torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device)
            sum_by_cell(steps, visits(p.table, p.l, True), dx)
        summed = parts.flatten(0, 1).sum(0)  # (k, w + 1, d)
    dweight = parameter_grad(summed[:, :w].transpose(1, 2), p.weight, 3)
    return dx, dweight, parameter_grad(summed[:, w], p.bias, 2), dinitial


def _columns(d: int, *strides: tuple[int, ...]) -> tuple[int, int, int]:
    """What divides channels and strides, up to 8; channels in it; channels of a block, which divides them if it can."""
    unit = gcd(8, d, *[stride for each in strides for stride in each[:-1]])
    divisor = d & -d
    return unit, d // unit, min(divisor if divisor >= 32 else power_of_2(d), 64)


def _chunks(rows: int, t: int, block_t: int) -> tuple[int, int]:
    """Steps that a program walks through, up to 8 blocks, and how many such chunks a row has."""
    blocks = min(max(1, rows * cdiv(t, block_t) // 4096), 8)
    return blocks * block_t, cdiv(t, blocks * block_t)


def _taps(p: Problem) -> Tensor:
    """The weight with its channels last, (k?, w, d)."""
    return p.weight.transpose(-1, -2).contiguous()


def _sets(p: Problem) -> tuple[int, int]:
    """How many rows have taps and a bias of their own: all, or one."""
    return p.k if p.weight.dim() == 3 else 1, p.k if p.bias is not None and p.bias.dim() == 2 else 1


def _in_units(x: Tensor, unit: int) -> tuple[int, ...]:
    return tuple(stride // unit for stride in strides(x))
