"""What the Gluon kernels of NVIDIA GPUs share: layouts written down, rows copied into shared memory ahead of their use.

A program is one warp. Rows of 16-bit inputs travel 16 bytes a thread, for a group of steps at a time, asynchronously;
each step then reads its row from shared memory, and may leave a row there that is written out with its group. Importing
this module needs Triton.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def tile_layout(N, BLOCK_D):
    """(N, BLOCK_D): a thread holds all states of its neighbouring channels."""
    return gl.BlockedLayout([N, BLOCK_D // 32], [1, 32], [1, 1], [1, 0])


@gluon.constexpr_function
def row_layout(BLOCK_D):
    """(steps, BLOCK_D) of 16-bit numbers: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [1, 1], [1, 0])


@gluon.constexpr_function
def gate_layout(N):
    """(steps, N) of B or C."""
    wide = gl.BlockedLayout([1, 8], [16, 2], [1, 1], [1, 0])
    return wide if N == 16 else gl.BlockedLayout([1, 1], [32, 1], [1, 1], [1, 0])


FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def softplus(x):
    """log(1 + exp(x)) by a polynomial for log1p(w), w = exp(-|x|) in (0, 1], to 2e-6."""
    w = gl.exp2(-gl.abs(x) * LOG2E)
    p = ((((0.014202826 * w - 0.06658805) * w + 0.14943458) * w - 0.23514864) * w + 0.33112052) * w - 0.4998719
    return gl.maximum(x, 0.0) + (p * w + 1.0) * w


@gluon.jit
def sigmoid(x):
    return 1.0 / (1.0 + gl.exp2(-x * LOG2E))


@gluon.jit
def silu_slope(x):
    """silu'(x)."""
    weight = sigmoid(x)
    return weight * (1.0 + x * (1.0 - weight))


@gluon.jit
def entries(index, step, end, limit):
    """Cells below ``limit`` that ``index`` (None: the steps themselves) names at ``step``; negative for padding."""
    if index is None:
        return gl.where((step < end) & (step < limit), step, -1)
    else:
        cell = gl.load(index + step, mask=step < end, other=-1)
        return gl.where(cell < limit, cell, -1)


@gluon.jit
def row(x, x_b, x_k, b, k, VEC: gl.constexpr):
    """Where row k of sample b begins in ``x``; strides are multiples of VEC."""
    return x + gl.multiple_of(b.to(gl.int64) * x_b + k.to(gl.int64) * x_k, VEC)


@gluon.jit
def vectors(x, stride, cell, column, d):
    """Where rows of ``x`` lie, and whether they do. 8 divides the stride: in eights, offsets fit 32 bits."""
    at = gl.expand_dims((cell * (stride // 8)).to(gl.int64) * 8, 1)
    mask = gl.expand_dims(cell >= 0, 1) & gl.expand_dims(column // 8 * 8 < d, 0)
    return x + gl.expand_dims(column, 0) + at, mask


@gluon.jit
def copy(to, x, stride, cell, column, d):
    """Begin to copy the rows of ``x`` at ``cell`` to shared memory, zero for padding."""
    at, mask = vectors(x, stride, cell, column, d)
    async_copy.async_copy_global_to_shared(to, at, mask=mask)


@gluon.jit
def put(x, cell, column, d, value):
    """Write rows to ``x``, whose rows are d long, at ``cell``; nothing for padding."""
    at, mask = vectors(x, d, cell, column, d)
    gl.store(at, value, mask=mask)


@gluon.jit
def gates(x, stride, cell, state, n):
    """Rows of B or C at ``cell``, (steps, N), as stored."""
    at = gl.expand_dims(cell.to(gl.int64) * stride, 1) + gl.expand_dims(state, 0)
    return gl.load(x + at, mask=gl.expand_dims(cell >= 0, 1) & gl.expand_dims(state < n, 0), other=0.0)


@gluon.jit
def place(pid, d, K, chunks, BLOCK_D: gl.constexpr):
    """First channel, row, chunk and sample of a program: blocks of channels are neighbours, then rows, then chunks."""
    blocks = (d + BLOCK_D - 1) // BLOCK_D
    block = pid % blocks
    pid = pid // blocks
    k = pid % K
    pid = pid // K
    return block * BLOCK_D, k, pid % chunks, pid // chunks


@gluon.jit
def weights(x, at, inside):
    """One number a channel; 0 if there are none."""
    if x is None:
        return at * 0.0
    else:
        return gl.load(x + at, mask=inside, other=0.0)


@gluon.jit
def advance(h, a, step, x, B):
    """h[t] from h[t-1]: exp(delta A) h + delta B u."""
    return gl.exp2(gl.expand_dims(step, 0) * a) * h + gl.expand_dims(step * x, 0) * gl.expand_dims(B, 1)


@gluon.jit
def shorten(h):
    """States (n, d) as numbers of 16 bits, and rows of 16 bits that say in what unit: a power of 2 for each channel."""
    most = gl.max(gl.abs(h), 0).to(gl.int32, bitcast=True)
    unit = gl.maximum(most & 0x7F800000, 14 << 23)  # 2**14 times as large
    scale = ((254 << 23) - unit + (14 << 23)).to(gl.float32, bitcast=True)
    return (h * gl.expand_dims(scale, 0)).to(gl.float16).to(gl.int16, bitcast=True), (unit >> 16).to(gl.int16)


@gluon.jit
def lengthen(short, unit):
    """What ``shorten`` shortened, to a rounding of float16."""
    scale = ((unit.to(gl.int32) << 16) - (14 << 23)).to(gl.float32, bitcast=True)
    return short.to(gl.float16, bitcast=True).to(gl.float32) * gl.expand_dims(scale, 0)
