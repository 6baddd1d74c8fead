"""The causal convolution on GPUs, in Triton: every step of every row at once, no copy of a row is made.

With x[s] the input of step s (the cell that the table names, the initial state for s < 0, zero for padding):

    forward     v[t] = bias + sum_j weight[j] x[t - (w - 1) + j]         y[o] += act(v[t]),   o = write[t]
    backward    g[t] = dy[o] act'(v[t])                                  dbias = sum_t g[t]
                dweight[j] = sum_t g[t] x[t - (w - 1) + j]               dx[s] = sum_j weight[j] g[s + (w - 1) - j]

The last w - 1 inputs are the last state, so its gradient adds to dx there, and dx of s < 0 is the initial state's.
Sums over steps and samples are partial sums of a program each, added in a fixed order; nothing is added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vssm.kernels.conv1d.problem import Problem
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
from vssm.kernels.triton_shared import sigmoid

VARY = (
    "x_b", "x_k", "x_l", "g_b", "g_k", "g_m", "w_k", "w_d", "bias_k", "table_b", "table_k", "write_b", "write_k",
    "initial_b", "initial_k", "initial_d", "last_b", "last_k", "last_d", "K", "L", "M", "T", "d",
)  # fmt: skip


@triton.jit
def place(d, K, steps, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels, steps, row, block of steps and sample of this program."""
    pid = tl.program_id(0)
    blocks_d, blocks_t = tl.cdiv(d, BLOCK_D), tl.cdiv(steps, BLOCK_T)
    channel = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    pid = pid // blocks_d
    k, pid = pid % K, pid // K
    return channel, pid % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T), k, pid % blocks_t, pid // blocks_t


@triton.jit
def inputs(x, table, initial, s, channel, in_d, x_l, initial_d, L, T, W: tl.constexpr):
    """x[s] for a block of steps, (BLOCK_T, BLOCK_D), float32."""
    inside = (s >= 0) & (s < T)
    cell = s
    if table is not None:
        cell = tl.load(table + s, mask=inside, other=-1)
    here = inside & (cell >= 0) & (cell < L)
    at = cell.to(tl.int64)[:, None] * x_l + channel[None, :]
    value = tl.load(x + at, mask=here[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    if initial is not None:
        before = initial + channel[None, :] * initial_d + (s + (W - 1))[:, None]
        value += tl.load(before, mask=((s < 0) & (s > -W))[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=VARY)
def convolve(
    x, weight, bias, table, write, initial, y, last,
    x_b, x_k, x_l, w_k, w_d, bias_k, table_b, table_k, write_b, write_k, initial_b, initial_k, initial_d, K, L, M, T, d,
    W: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y at the written cells, (b, K, M, d), and the last W - 1 inputs, (b, K, d, W - 1)."""
    channel, t, k, _, b = place(d, K, T, BLOCK_T, BLOCK_D)
    b, k = b.to(tl.int64), k.to(tl.int64)
    in_d, inside = channel < d, t < T
    x += b * x_b + k * x_k
    if table is not None:
        table += b * table_b + k * table_k
    if initial is not None:
        initial += b * initial_b + k * initial_k
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if bias is not None:
        total += tl.load(bias + k * bias_k + channel, mask=in_d, other=0.0)[None, :]
    last += (b * K + k) * d * (W - 1)
    for j in tl.static_range(W):
        s = t - (W - 1) + j
        value = inputs(x, table, initial, s, channel, in_d, x_l, initial_d, L, T, W)
        total += tl.load(weight + k * w_k + channel * w_d + j, mask=in_d, other=0.0)[None, :] * value
        if j == W - 1:
            at = channel[None, :] * (W - 1) + (t - (T - (W - 1)))[:, None]
            tl.store(last + at, value.to(last.dtype.element_ty), mask=(inside & (t > T - W))[:, None] & in_d[None, :])
        elif T < W - 1:  # the row is shorter than the state, whose first entries were there before
            early = inputs(x, table, initial, t * 0 + (T - (W - 1) + j), channel, in_d, x_l, initial_d, L, T, W)
            entry = (t == 0) & (T - (W - 1) + j < 0)
            tl.store(last + channel[None, :] * (W - 1) + (t * 0 + j)[:, None], early.to(last.dtype.element_ty),
                     mask=entry[:, None] & in_d[None, :])  # fmt: skip
    if SILU:
        total *= sigmoid(total)
    cell = t
    if write is not None:
        cell = tl.load(write + b * write_b + k * write_k + t, mask=inside, other=-1)
    here = inside & (cell >= 0) & (cell < M)
    at = ((b * K + k) * M + cell)[:, None] * d + channel[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=here[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=VARY)
def slopes(
    grad, x, weight, bias, table, write, initial, g, parts,
    g_b, g_k, g_m, x_b, x_k, x_l, w_k, w_d, bias_k, table_b, table_k, write_b, write_k, initial_b, initial_k, initial_d,
    K, L, M, T, d, W: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """g by step, (b, K, T, d), and its parts of dweight and dbias, (b, blocks of steps, K, W + 1, d)."""
    channel, t, k, block, b = place(d, K, T, BLOCK_T, BLOCK_D)
    b, k = b.to(tl.int64), k.to(tl.int64)
    in_d, inside = channel < d, t < T
    x += b * x_b + k * x_k
    if table is not None:
        table += b * table_b + k * table_k
    if initial is not None:
        initial += b * initial_b + k * initial_k
    cell = t
    if write is not None:
        cell = tl.load(write + b * write_b + k * write_k + t, mask=inside, other=-1)
    here = inside & (cell >= 0) & (cell < M)
    at = b * g_b + k * g_k + cell.to(tl.int64)[:, None] * g_m + channel[None, :]
    slope = tl.load(grad + at, mask=here[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    if SILU:
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        if bias is not None:
            total += tl.load(bias + k * bias_k + channel, mask=in_d, other=0.0)[None, :]
        for j in tl.static_range(W):
            value = inputs(x, table, initial, t - (W - 1) + j, channel, in_d, x_l, initial_d, L, T, W)
            total += tl.load(weight + k * w_k + channel * w_d + j, mask=in_d, other=0.0)[None, :] * value
        gate = sigmoid(total)
        slope *= gate * (1.0 + total * (1.0 - gate))
    at = ((b * K + k) * T + t)[:, None] * d + channel[None, :]
    tl.store(g + at, slope.to(g.dtype.element_ty), mask=inside[:, None] & in_d[None, :])
    parts += ((b * tl.cdiv(T, BLOCK_T) + block) * K + k) * (W + 1) * d
    for j in tl.static_range(W):
        value = inputs(x, table, initial, t - (W - 1) + j, channel, in_d, x_l, initial_d, L, T, W)
        tl.store(parts + j * d + channel, tl.sum(slope * value, 0), mask=in_d)
    tl.store(parts + W * d + channel, tl.sum(slope, 0), mask=in_d)


@triton.jit(do_not_specialize=VARY)
def spread(
    g, weight, table, grad_last, dx, dinitial, w_k, w_d, table_b, table_k, last_b, last_k, last_d, K, L, T, d,
    W: tl.constexpr, CELLS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx by cell, (b, K, L, d), or by step if not CELLS, (b, K, T, d); and dinitial, (b, K, d, W - 1), or None."""
    channel, s, k, _, b = place(d, K, T + (W - 1), BLOCK_T, BLOCK_D)
    s -= W - 1
    b, k = b.to(tl.int64), k.to(tl.int64)
    in_d = channel < d
    row = (b * K + k) * T
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for j in tl.static_range(W):
        t = s + (W - 1) - j
        inside = ((t >= 0) & (t < T))[:, None] & in_d[None, :]
        slope = tl.load(g + ((row + t)[:, None] * d + channel[None, :]), mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weight + k * w_k + channel * w_d + j, mask=in_d, other=0.0)[None, :] * slope
    entry = s - (T - (W - 1))
    at = b * last_b + k * last_k + channel[None, :] * last_d + entry[:, None]
    total += tl.load(grad_last + at, mask=((entry >= 0) & (s < T))[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    cell, limit = s, T
    if CELLS:
        if table is not None:
            cell = tl.load(table + b * table_b + k * table_k + s, mask=(s >= 0) & (s < T), other=-1)
        limit = L
    here = (s >= 0) & (s < T) & (cell >= 0) & (cell < limit)
    at = ((b * K + k) * limit + cell)[:, None] * d + channel[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=here[:, None] & in_d[None, :])
    if dinitial is not None:
        at = ((b * K + k) * d + channel)[None, :] * (W - 1) + (s + (W - 1))[:, None]
        tl.store(dinitial + at, total.to(dinitial.dtype.element_ty), mask=(s < 0)[:, None] & in_d[None, :])


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """y (b, k, m, d) and the last state (b, k, d, w - 1), both in the dtype of ``x``."""
    b, k, t, d = p.b, p.k, p.t, p.d
    direct = p.write is None or not p.revisits
    visited = p.write is None or not direct
    search = not visited and b * k * p.m * d >= LARGE
    make = p.x.new_empty if visited or search else p.x.new_zeros
    y, last = make(p.y_shape if direct else (b, k, t, d)), p.x.new_empty(p.state_shape)
    write = p.write if direct else None
    programs, tile = _tiles(p, t)
    with on(p.x.device):
        launch(
            convolve, programs,
            (p.x, p.weight, p.bias, p.table, write, p.initial_state, y, last,
             *strides(p.x), *_weights(p), *index_strides(p.table), *index_strides(write), *strides(p.initial_state),
             k, p.l, p.m if direct else t, t, d),
            dict(W=p.w, SILU=p.silu) | tile, 4,
        )  # fmt: skip
        if not direct:
            parts, y = y, p.x.new_empty(p.y_shape)
            sum_by_cell(parts, visits(p.write, p.m, True), y)
        elif search:
            clear_unvisited(y, visits(p.write, p.m, False))
    return y, last


def backward(p: Problem, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state."""
    b, k, t, d, w = p.b, p.k, p.t, p.d, p.w
    programs, tile = _tiles(p, t)
    g = p.x.new_empty((b, k, t, d))
    parts = p.weight.new_empty((b, cdiv(t, tile["BLOCK_T"]), k, w + 1, d))
    direct = (p.x.dim() == 4 or k == 1) and (p.table is None or not p.revisits)
    search = direct and p.table is not None and p.x.numel() >= LARGE
    make = torch.empty if search or p.table is None or not direct else torch.zeros
    dx = make(p.x.shape if direct else (b, k, t, d), dtype=p.x.dtype, device=p.x.device)
    dinitial = None if p.initial_state is None else p.x.new_empty(p.state_shape)
    with on(p.x.device):
        launch(
            slopes, programs,
            (grad_y, p.x, p.weight, p.bias, p.table, p.write, p.initial_state, g, parts,
             *strides(grad_y), *strides(p.x), *_weights(p), *index_strides(p.table), *index_strides(p.write),
             *strides(p.initial_state), k, p.l, p.m, t, d),
            dict(W=w, SILU=p.silu) | tile, 4,
        )  # fmt: skip
        launch(
            spread, _tiles(p, t + w - 1)[0],
            (g, p.weight, p.table, grad_last, dx, dinitial,
             *_weights(p)[:2], *index_strides(p.table), *strides(grad_last), k, p.l, t, d),
            dict(W=w, CELLS=direct) | tile, 4,
        )  # fmt: skip
        if not direct:
            steps, dx = dx, torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device)
            sum_by_cell(steps, visits(p.table, p.l, p.revisits), dx)
        elif search:
            clear_unvisited(dx, visits(p.table, p.l, False))
        summed = parts.flatten(0, 1).sum(0)  # (k, w + 1, d)
    dweight = parameter_grad(summed[:, :w].transpose(1, 2), p.weight, 3)
    return dx, dweight, parameter_grad(summed[:, w], p.bias, 2), dinitial


def _tiles(p: Problem, steps: int) -> tuple[int, dict[str, int]]:
    """Programs and block sizes: 2048 elements a program, channels first, as they lie."""
    block_d = min(128, power_of_2(p.d))
    block_t = 2048 // block_d
    programs = cdiv(p.d, block_d) * p.k * cdiv(steps, block_t) * p.b
    return programs, dict(BLOCK_T=block_t, BLOCK_D=block_d)


def _weights(p: Problem) -> tuple[int, int, int]:
    """Strides of the weight's rows (0 if shared) and channels, and of the bias's rows."""
    rows = p.weight.stride(0) if p.weight.dim() == 3 else 0
    return rows, p.weight.stride(-2), p.bias.stride(0) if p.bias is not None and p.bias.dim() == 2 else 0
