"""The causal convolution on GPUs: the launches of ``triton_kernels``, which says what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import gcd
from typing import Any

from torch import Tensor

from vssm.kernels.conv1d.problem import Problem
from vssm.kernels.conv1d.triton_kernels import before, convolve, gather, slopes, turn
from vssm.kernels.kinds import Kind
from vssm.kernels.operands import is_fleeting
from vssm.kernels.triton_launch import (
    LARGE,
    UNKNOWN,
    Visits,
    cdiv,
    clear_unvisited,
    index_strides,
    is_current,
    launch,
    on,
    parameter_grads,
    power_of_2,
    shorten,
    strides,
    sum_by_cell,
    visits,
)
from vssm.kernels.triton_replay import empty, replayed


def forward_again(kind: Kind, operands: Sequence[Tensor | None]) -> Sequence[Any] | None:
    """y and the last inputs, by the kind's shortcut; None if there is none that fits."""
    shortcut = kind.shortcuts.get(LARGE)
    return None if shortcut is None else shortcut.follow(operands)


def backward_again(kind: Kind, tensors: Sequence[Tensor | None]) -> Sequence[Any] | None:
    """Gradients, by the kind's shortcut; ``tensors`` are operands, grad_y and grad_last."""
    shortcut = kind.shortcuts.get(_name(tensors[6:]))
    return None if shortcut is None else shortcut.follow(tensors)


def _name(given: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return LARGE, *[x if x is None else (x.dtype, x.shape, x.stride()) for x in given]


def forward(p: Problem, kind: Kind | None = None) -> tuple[Tensor, Tensor]:
    """y (b, k, m, d) and the last state (b, k, d, w - 1), both in the dtype of ``x``. ``kind`` is that of the call."""
    if not is_current(p.x.device):
        with on(p.x.device):
            return forward(p, kind)
    direct = p.write is None or not p.revisits
    needed = not direct or p.b * p.k * p.m * p.d >= LARGE
    found = visits(p.write, p.l, p.revisits) if needed or not is_fleeting() else UNKNOWN
    options = ("convolve", found.complete, LARGE, p.silu, p.revisits)
    shortcut = None if kind is None else partial(shorten, kind, LARGE, found)
    y, last = replayed(lambda: _forward(p, direct, found), (*p.distinct, *found.tensors), options, kind, shortcut)
    return y, last


def _forward(p: Problem, direct: bool, found: Visits) -> list[Tensor | None]:
    b, k, t, d = p.b, p.k, p.t, p.d
    # Cells that no step visits are zero: in large outputs they are looked for, small ones are zeroed before.
    visited = p.write is None or found.complete or not direct
    search = not visited and b * k * p.m * d >= LARGE
    make = partial(empty, dtype=p.x.dtype, device=p.x.device)
    y, last = make(p.y_shape if direct else (b, k, t, d), zero=not (visited or search)), make(p.state_shape)
    write, (taps, bias, sets) = p.write if direct else None, _taps(p)
    unit, units, block_d = _columns(d, p.x.stride())
    block_t = 2048 // block_d
    chunk, pieces = _chunks(b * k * cdiv(d, block_d), t, block_t)
    launch(
        convolve, cdiv(d, block_d) * k * pieces * b,
        (p.x, taps, bias, p.table, write, p.initial_state, y, last,
         *_in_units(p.x, unit), *sets, *index_strides(p.table), *index_strides(write),
         *strides(p.initial_state), k, p.l, p.m if direct else t, t, units, chunk),
        dict(W=p.w, SILU=p.silu, UNIT=unit, BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_W=power_of_2(p.w)), 4,
    )  # fmt: skip
    if not direct:
        parts, y = y, make(p.y_shape)
        sum_by_cell(parts, found, y)
    elif search:
        clear_unvisited(y, found)
    return [y, last]


def backward(
    p: Problem, grad_y: Tensor, grad_last: Tensor | None, kind: Kind | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state. ``grad_last`` is None for zeros.

    ``kind`` is that of the call if the problem is as it was.
    """
    if not is_current(p.x.device):
        with on(p.x.device):
            return backward(p, grad_y, grad_last, kind)
    found = visits(p.table, p.l, p.revisits)
    name = _name((grad_y, grad_last))
    shortcut = None if kind is None else partial(shorten, kind, name, found)
    grads = replayed(
        lambda: _backward(p, grad_y, grad_last, found), (*p.distinct, grad_y, grad_last, *found.tensors),
        ("slopes", LARGE, p.silu, p.revisits), kind and (kind, name), shortcut,
    )  # fmt: skip
    return tuple(grads)


def _backward(p: Problem, grad_y: Tensor, grad_last: Tensor | None, found: Visits) -> list[Tensor | None]:
    b, k, t, d, w = p.b, p.k, p.t, p.d, p.w
    unit, units, block_d = _columns(d, p.x.stride(), grad_y.stride())
    block_t, blocks_d = 1024 // block_d, cdiv(d, block_d)
    chunk, pieces = _chunks(b * k * blocks_d, t, block_t)
    make = partial(empty, dtype=p.x.dtype, device=p.x.device)
    g, (taps, bias, sets) = make((b, k, t, d)), _taps(p)
    parts = empty((b, pieces, k, w + 2, d), p.weight.dtype, p.weight.device)
    by_step = p.table is not None and p.revisits  # steps leave their dx
    merge = 1 if p.x.dim() == 4 or by_step else k
    dx = make((b, k, t, d) if by_step else p.x.shape)
    dinitial = None if p.initial_state is None else make(p.state_shape)
    launch(
        slopes, blocks_d * k * pieces * b,
        (grad_y, p.x, taps, bias, p.table, p.write, p.initial_state, g, parts,
         *_in_units(grad_y, unit), *_in_units(p.x, unit), *sets, *index_strides(p.table),
         *index_strides(p.write), *strides(p.initial_state), k, p.l, p.m, t, units, chunk),
        dict(W=w, SILU=p.silu, UNIT=unit, BLOCK_T=block_t, BLOCK_D=block_d), 4,
    )  # fmt: skip
    visit = None if by_step else found.visit
    cells = t if by_step else p.l
    unit, units, block_d = _columns(d)
    block_t, blocks_d = 2048 // block_d, cdiv(d, block_d)
    launch(
        gather, blocks_d * (k // merge) * cdiv(cells, block_t) * b,
        (g, taps, visit, grad_last, dx, sets[0], *index_strides(visit), *strides(grad_last), k, t, cells, units),
        dict(ROWS=merge, W=w, UNIT=unit, BLOCK_T=block_t, BLOCK_D=block_d), 4,
    )  # fmt: skip
    if dinitial is not None and w > 1:
        launch(
            before, blocks_d * k * b,
            (g, taps, grad_last, dinitial, sets[0], *strides(grad_last), k, t, units),
            dict(W=w, UNIT=unit, BLOCK_D=block_d, BLOCK_W=power_of_2(w)), 4,
        )  # fmt: skip
    if by_step:
        steps, dx = dx, make(p.x.shape)
        sum_by_cell(steps, found, dx)
    dweight, dbias, _ = parameter_grads(parts, (p.weight, p.bias, None))
    return [dx, dweight, dbias, dinitial]


def _columns(d: int, *strides: tuple[int, ...]) -> tuple[int, int, int]:
    """What divides channels and strides, up to 8; channels in it; channels of a block, which divides them if it can."""
    unit = gcd(8, d, *[stride for each in strides for stride in each[:-1]])
    divisor = d & -d
    return unit, d // unit, min(divisor if divisor >= 32 else power_of_2(d), 64)


def _chunks(rows: int, t: int, block_t: int) -> tuple[int, int]:
    """Steps that a program walks through, up to 8 blocks, and how many such chunks a row has."""
    blocks = min(max(1, rows * cdiv(t, block_t) // 4096), 8)
    return blocks * block_t, cdiv(t, blocks * block_t)


def _taps(p: Problem) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """The weight with its channels last, the bias, and how many rows have their own: all, or one."""
    sets = p.k if p.weight.dim() == 3 else 1, p.k if p.bias is not None and p.bias.dim() == 2 else 1
    taps = empty((sets[0], p.w, p.d), p.weight.dtype, p.weight.device)
    launch(turn, sets[0] * cdiv(p.d, 64), (p.weight.contiguous(), taps, p.d),
           dict(W=p.w, BLOCK_D=64, BLOCK_W=power_of_2(p.w)), 1)  # fmt: skip
    return taps, None if p.bias is None else p.bias.contiguous(), sets


def _in_units(x: Tensor, unit: int) -> tuple[int, ...]:
    return tuple(stride // unit for stride in strides(x))
