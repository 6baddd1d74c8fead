"""What the GPU kernels of several ops share: activations, reading by table, sums over the steps that visit a cell.

Plain Triton, so that it runs wherever Triton does. Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x, EXACT: tl.constexpr):
    """log(1 + exp(x)) by a polynomial for log1p(w), w = exp(-|x|) in (0, 1]; to 2e-7, or 2e-6 if not EXACT."""
    w = tl.exp2(-tl.abs(x) * LOG2E)
    if EXACT:
        p = (((-0.0032563785 * w + 0.019907162) * w - 0.0570642) * w + 0.10614265) * w - 0.15311863
        p = (((p * w + 0.19678117) * w - 0.24954559) * w + 0.33330005) * w - 0.49999905
    else:
        p = ((((0.014202826 * w - 0.06658805) * w + 0.14943458) * w - 0.23514864) * w + 0.33112052) * w - 0.4998719
    return tl.maximum(x, 0.0) + (p * w + 1.0) * w


@triton.jit
def power(x, EXACT: tl.constexpr):
    """2 to the power x <= 1; EXACT to a rounding, where the hardware's 2e-7 would add up over long memories."""
    if EXACT:
        x = tl.maximum(x, -126.0)
        shifted = x + 12582912.0  # 1.5 * 2**23: the nearest integer stands in the low bits
        f = x - (shifted - 12582912.0)
        p = ((((0.00015461448 * f + 0.0013390867) * f + 0.009618057) * f + 0.05550357) * f + 0.24022651) * f + 0.6931472
        return (p * f + 1.0) * ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    else:
        return tl.exp2(x)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def silu_slope(x):
    """silu'(x)."""
    weight = sigmoid(x)
    return weight * (1.0 + x * (1.0 - weight))


@triton.jit
def entries(index, t, end, limit, STEPS: tl.constexpr):
    """Cells below ``limit`` that ``index`` (None: the steps themselves) names at steps t to t + STEPS - 1.

    Padding is negative: what lies outside the cells, and every step from ``end`` on.
    """
    cells = ()
    for j in tl.static_range(STEPS):
        if index is None:
            cell = tl.where(t + j < end, t + j, -1)
        else:
            cell = tl.load(index + (t + j), mask=t + j < end, other=-1)
        cells = cells + (tl.where(cell < limit, cell, -1),)
    return cells


@triton.jit
def row(x, x_b, x_k, b, k, VEC: tl.constexpr):
    """Where row k of sample b begins in ``x``; strides are multiples of VEC."""
    return x + tl.multiple_of(b.to(tl.int64) * x_b + k.to(tl.int64) * x_k, VEC)


@triton.jit
def rows(x, stride, cells, column, inside, STEPS: tl.constexpr, VEC: tl.constexpr):
    """Rows of ``x`` at ``cells``, columns ``column``, as stored; 0 for padding and where a column is not ``inside``."""
    values = ()
    for j in tl.static_range(STEPS):
        at = tl.multiple_of(cells[j].to(tl.int64) * stride, VEC) + column
        values = values + (tl.load(x + at, mask=inside & (cells[j] >= 0), other=0.0),)
    return values


@triton.jit
def put(x, cell, width, column, value, inside, VEC: tl.constexpr):
    """Write a row of ``x``, whose rows are ``width`` long, at ``cell``; nothing if that is padding."""
    at = tl.multiple_of(cell.to(tl.int64) * width, VEC) + column
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside & (cell >= 0))


# A kernel's state is a tile (N, BLOCK_D), or (BLOCK_D) where N is 1; these read and write either.


@triton.jit
def state_index(N: tl.constexpr):
    """Indices of the states."""
    if N == 1:
        return 0
    else:
        return tl.arange(0, N)


@triton.jit
def gates(x, stride, index, cells, t, end, limit, state, in_n, STEPS: tl.constexpr, N: tl.constexpr):
    """Rows of B or C at steps t to t + STEPS - 1, for ``apart``: if N > 1 a tile (STEPS, N), which is one wide load."""
    if N == 1:
        return rows(x, stride, cells, state, in_n, STEPS, 1)
    else:
        step = t + tl.arange(0, STEPS)
        cell = step
        if index is not None:
            cell = tl.load(index + step, mask=step < end, other=-1)
        here = (step < end) & (cell >= 0) & (cell < limit)
        at = cell.to(tl.int64)[:, None] * stride + state[None, :]
        return tl.load(x + at, mask=here[:, None] & in_n[None, :], other=0.0)


@triton.jit
def apart(tile, STEPS: tl.constexpr, N: tl.constexpr):
    """The rows that ``gates`` loaded."""
    if N == 1:
        return tile
    elif STEPS == 1:
        return (tl.reshape(tile, (N,)),)
    elif STEPS == 2:
        return tl.split(tl.trans(tile))
    else:
        low, high = tl.split(tl.permute(tl.reshape(tile, (2, STEPS // 2, N)), (1, 2, 0)))
        return apart(low, STEPS // 2, N) + apart(high, STEPS // 2, N)


@triton.jit
def along_n(x, N: tl.constexpr):
    """One number a state, as a factor of the tile."""
    return x if N == 1 else x[:, None]


@triton.jit
def along_d(x, N: tl.constexpr):
    """One number a channel, as a factor of the tile."""
    return x if N == 1 else x[None, :]


@triton.jit
def sum_n(tile, N: tl.constexpr):
    """Sum over states: one number a channel."""
    return tile if N == 1 else tl.sum(tile, 0)


@triton.jit
def sum_d(tile, N: tl.constexpr):
    """Sum over the channels of the block: one number a state."""
    return tl.sum(tile, 0) if N == 1 else tl.sum(tile, 1)


@triton.jit
def shorten(h):
    """States (n, d) as numbers of 16 bits, and rows of 16 bits that say in what unit: a power of 2 for each channel."""
    most = tl.max(tl.abs(h), 0).to(tl.int32, bitcast=True)
    unit = tl.maximum(most & 0x7F800000, 14 << 23)  # 2**14 times as large
    scale = ((254 << 23) - unit + (14 << 23)).to(tl.float32, bitcast=True)
    return (h * scale[None, :]).to(tl.float16).to(tl.int16, bitcast=True), (unit >> 16).to(tl.int16)


@triton.jit
def lengthen(short, unit):
    """What ``shorten`` shortened, to a rounding of float16."""
    scale = ((unit.to(tl.int32) << 16) - (14 << 23)).to(tl.float32, bitcast=True)
    return short.to(tl.float16, bitcast=True).to(tl.float32) * scale[None, :]


# do_not_specialize keeps a kernel from being compiled again for each length that 16 divides, or that is 1.
@triton.jit(do_not_specialize=["T", "cells", "index_row"])
def invert(index, visit, T, cells, index_row, BLOCK: tl.constexpr):
    """visit[row, index[row, t]] = t, for rows that name a cell at most once; padding is skipped."""
    blocks = tl.cdiv(T, BLOCK)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    cell = tl.load(index + line * index_row + t, mask=t < T, other=-1)
    tl.store(visit + line * cells + cell, t, mask=(cell >= 0) & (cell < cells))


@triton.jit(do_not_specialize=["visit_b", "visit_k", "K", "cells", "units"])
def clear(
    visit, out, visit_b, visit_k, K, cells, units, UNIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Zero in the cells of out (b, K, cells, units UNIT) that no step visits."""
    E = units * UNIT
    blocks = tl.cdiv(cells, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // blocks
    b, k = (pid // K).to(tl.int64), pid % K
    missing = (tl.load(visit + b * visit_b + k * visit_k + c, mask=c < cells, other=0) < 0) & (c < cells)
    if tl.max(missing.to(tl.int32), 0) > 0:
        to = (pid.to(tl.int64) * cells + c) * E
        for begin in range(0, E, BLOCK_E):
            e = begin + tl.arange(0, BLOCK_E)
            zero = tl.zeros((BLOCK_C, BLOCK_E), out.dtype.element_ty)
            tl.store(out + (to[:, None] + e[None, :]), zero, mask=missing[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["count"])
def zero(x, counter, count, BLOCK: tl.constexpr):
    """Zero in x (count), and in a counter."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.zeros((BLOCK,), x.dtype.element_ty), mask=i < count)
    tl.store(counter, 0, mask=tl.program_id(0) == 0)


@triton.jit(
    do_not_specialize=["z_b", "z_m", "visit_b", "visit_k", "first_b", "first_k", "T", "J", "units", "cells", "split"]
)
def sum_visits(
    parts, visit, first, z, out, out_2,
    z_b, z_m, visit_b, visit_k, first_b, first_k, T, J, units, cells, split,
    K: tl.constexpr, MERGE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sum what steps left for the cells they visit, parts (b, K, T, J, E) to out (b, K, cells, E).

    If MERGE, rows are summed too, to (b, cells, E). The order is fixed: rows, visits in step order, J. ``visit`` is the
    step that visits each cell, -1 for none, (b, K, cells); or, with ``first``, all steps ordered by cell, those of a
    cell from first[cell] to first[cell + 1]; or None: step t visits cell t. The sum is gated by silu(z), if given.
    Columns from ``split`` on go to ``out_2``. There are E = units UNIT columns, so that the compiler knows what divides
    them.
    """
    E = units * UNIT
    pid = tl.program_id(0)
    blocks_e, blocks_c = tl.cdiv(E, BLOCK_E), tl.cdiv(cells, BLOCK_C)
    e = pid % blocks_e * BLOCK_E + tl.arange(0, BLOCK_E)
    pid = pid // blocks_e
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // blocks_c  # sample, or sample and row
    b = (pid if MERGE else pid // K).to(tl.int64)
    j = tl.arange(0, BLOCK_J)
    column = j[:, None] * E + e[None, :]  # (BLOCK_J, BLOCK_E)
    in_column = (j < J)[:, None] & (e < E)[None, :]

    total = tl.zeros((BLOCK_C, BLOCK_E), tl.float32)
    for i in tl.static_range(K if MERGE else 1):
        k = i if MERGE else pid % K
        part = parts + (b * K + k) * T * J * E
        if first is None:
            step = c
            if visit is not None:
                step = tl.load(visit + b * visit_b + k * visit_k + c, mask=c < cells, other=-1)
            here = (c < cells) & (step >= 0) & (step < T)
            at = (step.to(tl.int64) * J * E)[:, None, None] + column[None, :, :]
            values = tl.load(part + at, mask=here[:, None, None] & in_column[None, :, :], other=0.0)
            total += tl.sum(values.to(tl.float32), 1)
        else:
            begin = tl.load(first + b * first_b + k * first_k + c, mask=c < cells, other=0)
            end = tl.load(first + b * first_b + k * first_k + c + 1, mask=c < cells, other=0)
            for v in range(tl.max(end - begin, 0)):
                here = begin + v < end
                step = tl.load(visit + b * visit_b + k * visit_k + begin + v, mask=here, other=0)
                at = (step.to(tl.int64) * J * E)[:, None, None] + column[None, :, :]
                values = tl.load(part + at, mask=here[:, None, None] & in_column[None, :, :], other=0.0)
                total += tl.sum(values.to(tl.float32), 1)

    inside = (c < cells)[:, None] & (e < E)[None, :]
    to = pid.to(tl.int64) * cells + c
    if z is not None:
        at = b * z_b + c.to(tl.int64)[:, None] * z_m + e[None, :]
        gate = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        total *= gate * sigmoid(gate)
    if out_2 is None:
        tl.store(out + (to[:, None] * E + e[None, :]), total.to(out.dtype.element_ty), mask=inside)
    else:
        at = to[:, None] * split + e[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside & (e < split)[None, :])
        at = to[:, None] * (E - split) + (e - split)[None, :]
        tl.store(out_2 + at, total.to(out_2.dtype.element_ty), mask=inside & (e >= split)[None, :])


@triton.jit(do_not_specialize=["pieces", "K", "d", "n"])
def sum_parameters(
    parts, dA, dD, dbias, pieces, K, d, n,
    A_SHARED: tl.constexpr, D_SHARED: tl.constexpr, BIAS_SHARED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum parts (pieces, K, n + 2, d) over pieces, and over rows where a parameter is shared, in a fixed order.

    Entries 0 to n - 1 make dA (K, d, n), entry n makes dD and entry n + 1 dbias, (K, d).
    """
    blocks = tl.cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    channel = pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    s = pid // blocks % (n + 2)
    k = pid // blocks // (n + 2)
    shared = ((s < n) & A_SHARED) | ((s == n) & D_SHARED) | ((s == n + 1) & BIAS_SHARED)
    count = tl.where(shared, pieces * K, pieces)  # of a shared parameter pieces and rows are taken as they lie
    if (k == 0) | (shared == 0):
        total = tl.zeros((BLOCK_D,), tl.float32)
        for begin in range(0, count, BLOCK_S):
            i = begin + tl.arange(0, BLOCK_S)
            line = tl.where(shared, i, i * K + k).to(tl.int64) * (n + 2) + s
            inside = (i < count)[:, None] & (channel < d)[None, :]
            total += tl.sum(tl.load(parts + (line[:, None] * d + channel[None, :]), mask=inside, other=0.0), 0)
        at = k * d + channel
        if dA is not None:
            tl.store(dA + (at * n + s), total, mask=(channel < d) & (s < n))
        if dD is not None:
            tl.store(dD + at, total, mask=(channel < d) & (s == n))
        if dbias is not None:
            tl.store(dbias + at, total, mask=(channel < d) & (s == n + 1))
