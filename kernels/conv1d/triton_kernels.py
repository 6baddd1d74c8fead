"""The causal convolution on GPUs, in Triton: every step of every row at once, no copy of a row is made.

With x[s] the input of step s (the cell that the table names, the initial state for s < 0, zero for padding):

    forward     v[t] = bias + sum_j weight[j] x[t - (w - 1) + j]         y[o] += act(v[t]),   o = write[t]
    backward    g[t] = dy[o] act'(v[t])                                  dbias = sum_t g[t]
                dweight[j] = sum_t g[t] x[t - (w - 1) + j]               dx[s] = sum_j weight[j] g[s + (w - 1) - j]

The last w - 1 inputs are the last state, so its gradient adds to dx there, and dx of s < 0 is the initial state's.
A program keeps the taps of its channels and walks through a chunk of steps; a thread has 16 bytes of a row at a time.
Where no row revisits a cell, each cell gathers its dx over the rows by the inverse tables; else steps leave theirs, and
they are summed by cell. Sums over steps and samples are partial sums of a program each, added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vssm.kernels.triton_shared import sigmoid

VARY = (
    "x_b", "x_k", "x_l", "g_b", "g_k", "g_m", "sets", "bias_sets", "table_b", "table_k", "write_b", "write_k",
    "visit_b", "visit_k", "initial_b", "initial_k", "initial_d", "last_b", "last_k", "last_d", "K", "L", "M", "T", "N",
    "units", "chunk",
)  # fmt: skip


@triton.jit
def place(d, K, steps, chunk, BLOCK_D: tl.constexpr):
    """Channels, row, number of the chunk, its first step, and sample of this program."""
    pid = tl.program_id(0)
    blocks, pieces = tl.cdiv(d, BLOCK_D), tl.cdiv(steps, chunk)
    channel = pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    pid = pid // blocks
    k, pid = pid % K, pid // K
    return channel, k.to(tl.int64), pid % pieces, pid % pieces * chunk, (pid // pieces).to(tl.int64)


@triton.jit
def taps_of(weight, bias, k, sets, bias_sets, channel, in_d, d, W: tl.constexpr):
    """The taps of a block of channels in row k, W rows, and their bias; of row 0 if there is but one set."""
    taps = ()
    for j in tl.static_range(W):
        at = (tl.minimum(k, sets - 1) * W + j) * d + channel
        taps = taps + (tl.load(weight + at, mask=in_d, other=0.0)[None, :],)
    if bias is None:
        return taps, tl.zeros_like(taps[0])
    else:
        return taps, tl.load(bias + tl.minimum(k, bias_sets - 1) * d + channel, mask=in_d, other=0.0)[None, :]


@triton.jit
def inputs(x, table, initial, s, channel, in_d, x_l, initial_d, L, T, W: tl.constexpr, UNIT: tl.constexpr):
    """x[s] for a block of steps, (BLOCK_T, BLOCK_D), float32."""
    inside = (s >= 0) & (s < T)
    cell = s
    if table is not None:
        cell = tl.load(table + s, mask=inside, other=-1)
    here = inside & (cell >= 0) & (cell < L)
    at = (cell.to(tl.int64) * x_l * UNIT)[:, None] + channel[None, :]
    value = tl.load(x + at, mask=here[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    if initial is not None:
        before = initial + channel[None, :] * initial_d + (s + (W - 1))[:, None]
        value += tl.load(before, mask=((s < 0) & (s > -W))[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["d"])
def turn(weight, taps, d, W: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr):
    """taps (sets, W, d), which load side by side, from the weight (sets, d, W)."""
    blocks = tl.cdiv(d, BLOCK_D)
    k = tl.program_id(0) // blocks
    channel, entry = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_W)
    here = (channel < d)[:, None] & (entry < W)[None, :]
    value = tl.load(weight + ((k * d + channel) * W)[:, None] + entry[None, :], mask=here, other=0.0)
    tl.store(taps + channel[:, None] + ((k * W + entry) * d)[None, :], value, mask=here)


@triton.jit(do_not_specialize=VARY)
def convolve(
    x, weight, bias, table, write, initial, y, last,
    x_b, x_k, x_l, sets, bias_sets, table_b, table_k, write_b, write_k, initial_b, initial_k, initial_d,
    K, L, M, T, units, chunk,
    W: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """y at the written cells, (b, K, M, d), and the last W - 1 inputs, (b, K, d, W - 1)."""
    d = units * UNIT
    channel, k, _, begin, b = place(d, K, T, chunk, BLOCK_D)
    in_d = channel < d
    x += (b * x_b + k * x_k) * UNIT
    y += (b * K + k) * M * d
    if table is not None:
        table += b * table_b + k * table_k
    if write is not None:
        write += b * write_b + k * write_k
    if initial is not None:
        initial += b * initial_b + k * initial_k
    taps, start_from = taps_of(weight, bias, k, sets, bias_sets, channel, in_d, d, W)
    for start in range(begin, tl.minimum(begin + chunk, T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32) + start_from
        for j in tl.static_range(W):
            s = t - (W - 1) + j
            total += taps[j] * inputs(x, table, initial, s, channel, in_d, x_l, initial_d, L, T, W, UNIT)
        if SILU:
            total *= sigmoid(total)
        cell = t
        if write is not None:
            cell = tl.load(write + t, mask=t < T, other=-1)
        here = (t < T) & (cell >= 0) & (cell < M)
        at = (cell.to(tl.int64) * d)[:, None] + channel[None, :]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=here[:, None] & in_d[None, :])
    if begin + chunk >= T:
        entry = tl.arange(0, BLOCK_W)
        s = tl.where(entry < W - 1, T - (W - 1) + entry, T)
        value = inputs(x, table, initial, s, channel, in_d, x_l, initial_d, L, T, W, UNIT)
        at = ((b * K + k) * d + channel)[None, :] * (W - 1) + entry[:, None]
        tl.store(last + at, value.to(last.dtype.element_ty), mask=(entry < W - 1)[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=VARY)
def slopes(
    grad, x, weight, bias, table, write, initial, g, parts,
    g_b, g_k, g_m, x_b, x_k, x_l, sets, bias_sets, table_b, table_k, write_b, write_k, initial_b, initial_k, initial_d,
    K, L, M, T, units, chunk,
    W: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """g by step, (b, K, T, d), and its parts of dweight and dbias, (b, chunks, K, W + 2, d); a row is left free."""
    d = units * UNIT
    channel, k, piece, begin, b = place(d, K, T, chunk, BLOCK_D)
    in_d = channel < d
    grad += (b * g_b + k * g_k) * UNIT
    x += (b * x_b + k * x_k) * UNIT
    g += (b * K + k) * T * d
    if table is not None:
        table += b * table_b + k * table_k
    if write is not None:
        write += b * write_b + k * write_k
    if initial is not None:
        initial += b * initial_b + k * initial_k
    taps, start_from = taps_of(weight, bias, k, sets, bias_sets, channel, in_d, d, W)
    sums = ()
    for _ in tl.static_range(W + 1):
        sums = sums + (tl.zeros((BLOCK_T, BLOCK_D), tl.float32),)
    for start in range(begin, tl.minimum(begin + chunk, T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        cell = t
        if write is not None:
            cell = tl.load(write + t, mask=t < T, other=-1)
        here = (t < T) & (cell >= 0) & (cell < M)
        at = (cell.to(tl.int64) * g_m * UNIT)[:, None] + channel[None, :]
        slope = tl.load(grad + at, mask=here[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        values = ()
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32) + start_from
        for j in tl.static_range(W):
            value = inputs(x, table, initial, t - (W - 1) + j, channel, in_d, x_l, initial_d, L, T, W, UNIT)
            total += taps[j] * value
            values = values + (value,)
        if SILU:
            gate = sigmoid(total)
            slope *= gate * (1.0 + total * (1.0 - gate))
        at = (t.to(tl.int64) * d)[:, None] + channel[None, :]
        tl.store(g + at, slope.to(g.dtype.element_ty), mask=(t < T)[:, None] & in_d[None, :])
        more = ()
        for j in tl.static_range(W):
            more = more + (sums[j] + slope * values[j],)
        sums = more + (sums[W] + slope,)
    parts += ((b * tl.cdiv(T, chunk) + piece) * K + k) * (W + 2) * d
    for j in tl.static_range(W + 1):
        tl.store(parts + j * d + channel, tl.sum(sums[j], 0), mask=in_d)


@triton.jit
def spread(g, taps, grad_last, s, channel, in_d, d, last_d, T, W: tl.constexpr):
    """dx[s] for a block of steps, (BLOCK_T, BLOCK_D); 0 for steps below -W."""
    total = tl.zeros((s.shape[0], channel.shape[0]), tl.float32)
    for j in tl.static_range(W):
        t = s + (W - 1) - j
        here = (s > -W) & (t >= 0) & (t < T)
        at = (t.to(tl.int64) * d)[:, None] + channel[None, :]
        slope = tl.load(g + at, mask=here[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        total += taps[j] * slope
    if grad_last is not None:
        entry = s - (T - (W - 1))
        here = (s > -W) & (entry >= 0) & (s < T)
        at = channel[None, :] * last_d + entry[:, None]
        total += tl.load(grad_last + at, mask=here[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=VARY)
def gather(
    g, weight, visit, grad_last, dx, sets, visit_b, visit_k, last_b, last_k, last_d, K, T, N, units,
    ROWS: tl.constexpr, W: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx by cell, (b, K / ROWS, N, d): the sum over ROWS rows. ``visit`` says which step visits a cell, -1 for none."""
    d = units * UNIT
    channel, row, _, begin, b = place(d, K // ROWS, N, BLOCK_T, BLOCK_D)
    in_d, cell = channel < d, begin + tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for i in tl.static_range(ROWS):
        k = row * ROWS + i
        s = cell
        if visit is not None:
            s = tl.load(visit + b * visit_b + k * visit_k + cell, mask=cell < N, other=-1)
        s = tl.where(s >= 0, s, -W)
        last = grad_last
        if last is not None:
            last += b * last_b + k * last_k
        taps, _ = taps_of(weight, None, k, sets, 1, channel, in_d, d, W)
        total += spread(g + (b * K + k) * T * d, taps, last, s, channel, in_d, d, last_d, T, W)
    at = (((b * (K // ROWS) + row) * N + cell) * d)[:, None] + channel[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(cell < N)[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=VARY)
def before(
    g, weight, grad_last, dinitial, sets, last_b, last_k, last_d, K, T, units,
    W: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dinitial (b, K, d, W - 1): dx of the steps before the first."""
    d = units * UNIT
    channel, k, _, _, b = place(d, K, 1, 1, BLOCK_D)
    in_d, entry = channel < d, tl.arange(0, BLOCK_W)
    s = tl.where(entry < W - 1, entry - (W - 1), -W)
    if grad_last is not None:
        grad_last += b * last_b + k * last_k
    taps, _ = taps_of(weight, None, k, sets, 1, channel, in_d, d, W)
    total = spread(g + (b * K + k) * T * d, taps, grad_last, s, channel, in_d, d, last_d, T, W)
    at = ((b * K + k) * d + channel)[None, :] * (W - 1) + entry[:, None]
    tl.store(dinitial + at, total.to(dinitial.dtype.element_ty), mask=(entry < W - 1)[:, None] & in_d[None, :])
