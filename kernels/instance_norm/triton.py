"""Instance normalisation on GPUs, in Triton, of maps with their channels last, the residual and the activation with it.

With mean m and scale s = 1 / sqrt(var + eps) of each channel of each sample:

    forward     h = (x - m) s          z = h + r          y = z if z > 0 else slope z
    backward    dz = dy if z > 0 else slope dy            dx = s (dz - mean(dz) - h mean(dz h))        dr = dz

r is the residual, or the residual normalised in the same way. h and z are made again from y, or from x where y does
not tell them (slope 0). Maps are (b, n, c): samples, cells, channels. Each pass reads a map once: bandwidth is all.
Sums over cells are partial sums of a program each, of chunks that the size alone decides, added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vssm.kernels.triton_launch import cdiv, launch, on, power_of_2

TILE = 2048  # elements that a program has in hand: 16 a thread
PROGRAMS = 4096  # that sum, at most, if the chunks do not get small: many, so that no multiprocessor waits for long

VARY = ("x_b", "x_n", "r_b", "r_n", "g_b", "g_n", "cells", "units", "wide", "chunk", "pieces")


@triton.jit
def place(cells, units, chunk, UNIT: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels, which of them there are, first cell, chunk and sample of this program; the number of channels."""
    C = units * UNIT
    pid = tl.program_id(0)
    blocks, pieces = tl.cdiv(C, BLOCK_C), tl.cdiv(cells, chunk)
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // blocks
    return c, c < C, pid % pieces * chunk, pid % pieces, (pid // pieces).to(tl.int64), C


@triton.jit
def tile(x, n, x_n, c, inside, UNIT: tl.constexpr):
    """Cells ``n`` of a map, (BLOCK_N, BLOCK_C), float32; its strides are in units."""
    at = (n.to(tl.int64) * x_n * UNIT)[:, None] + c[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=VARY)
def moments(
    x, parts, x_b, x_n, cells, units, chunk,
    UNIT: tl.constexpr, UNROLL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of x - x[0] and of its square over the cells of a chunk: parts (b, chunks, 2, c)."""
    c, in_c, begin, piece, b, C = place(cells, units, chunk, UNIT, BLOCK_C)
    x += b * x_b * UNIT
    first = tl.load(x + c, mask=in_c, other=0.0).to(tl.float32)[None, :]  # near the mean: squares lose no digits
    end = tl.minimum(begin + chunk, cells)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_N * UNROLL):
        for i in tl.static_range(UNROLL):
            n = start + i * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = (n < end)[:, None] & in_c[None, :]
            value = tl.where(inside, tile(x, n, x_n, c, inside, UNIT) - first, 0.0)
            total += value
            square += value * value
    parts += (b * tl.cdiv(cells, chunk) + piece) * 2 * C
    tl.store(parts + c, tl.sum(total, 0), mask=in_c)
    tl.store(parts + C + c, tl.sum(square, 0), mask=in_c)


@triton.jit(do_not_specialize=VARY)
def statistics(
    x, parts, stats, x_b, cells, units, pieces,
    EPS: tl.constexpr, UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and scale of each channel, stats (b, 2, c), from the sums of ``moments``."""
    C = units * UNIT
    blocks = tl.cdiv(C, BLOCK_C)
    c, b = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C), (tl.program_id(0) // blocks).to(tl.int64)
    in_c = c < C
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, pieces, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = (s < pieces)[:, None] & in_c[None, :]
        at = ((b * pieces + s) * 2 * C)[:, None] + c[None, :]
        total += tl.load(parts + at, mask=inside, other=0.0)
        square += tl.load(parts + C + at, mask=inside, other=0.0)
    shift = tl.sum(total, 0) / cells
    variance = tl.maximum(tl.sum(square, 0) / cells - shift * shift, 0.0)
    first = tl.load(x + b * x_b * UNIT + c, mask=in_c, other=0.0).to(tl.float32)
    tl.store(stats + b * 2 * C + c, first + shift, mask=in_c)
    tl.store(stats + b * 2 * C + C + c, 1.0 / tl.sqrt_rn(variance + EPS), mask=in_c)


@triton.jit
def statistic(stats, b, c, in_c, C):
    """Mean and scale of the channels of a block, as rows."""
    mean = tl.load(stats + b * 2 * C + c, mask=in_c, other=0.0)[None, :]
    return mean, tl.load(stats + b * 2 * C + C + c, mask=in_c, other=0.0)[None, :]


@triton.jit(do_not_specialize=VARY)
def normalise(
    x, residual, stats, stats_r, y, x_b, x_n, r_b, r_n, cells, units,
    SLOPE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y, (b, n, c). The residual is normalised if it has statistics."""
    c, in_c, begin, _, b, C = place(cells, units, BLOCK_N, UNIT, BLOCK_C)
    n = begin + tl.arange(0, BLOCK_N)
    inside = (n < cells)[:, None] & in_c[None, :]
    value = tile(x + b * x_b * UNIT, n, x_n, c, inside, UNIT)
    mean, scale = statistic(stats, b, c, in_c, C)
    if residual is None:
        z = (value - mean) * scale
    else:
        r = tile(residual + b * r_b * UNIT, n, r_n, c, inside, UNIT)
        if stats_r is not None:
            mean_r, scale_r = statistic(stats_r, b, c, in_c, C)
            r = (r - mean_r) * scale_r
        z = (value - mean) * scale + r
    if SLOPE != 1:
        z = tl.where(z > 0, z, z * SLOPE)
    at = ((b * cells + n) * C)[:, None] + c[None, :]
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def again(
    grad, source, residual, n, g_n, x_n, r_n, c, inside, mean, scale, mean_r, scale_r,
    NORMED: tl.constexpr, SLOPE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dz, h and r of a tile; r is 0 without a residual. ``source`` is y, or x if SLOPE is 0."""
    dz = tile(grad, n, g_n, c, inside, UNIT)
    h = tile(source, n, x_n, c, inside, UNIT)
    r = tl.zeros_like(h)
    if residual is not None:
        r = tile(residual, n, r_n, c, inside, UNIT)
        if NORMED:
            r = tl.where(inside, (r - mean_r) * scale_r, 0.0)
    if SLOPE == 0:
        h = tl.where(inside, (h - mean) * scale, 0.0)
        dz = tl.where(h + r > 0, dz, 0.0)
    else:
        if SLOPE != 1:
            dz = tl.where(h > 0, dz, dz * SLOPE)
            h = tl.where(h > 0, h, h * (1 / SLOPE))
        h -= r
    return dz, h, r


@triton.jit(do_not_specialize=VARY)
def products(
    grad, source, residual, stats, stats_r, parts,
    g_b, g_n, x_b, x_n, r_b, r_n, cells, units, chunk,
    SLOPE: tl.constexpr, UNIT: tl.constexpr, UNROLL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dz, dz h, and dz r if r is normalised, over the cells of a chunk: parts (b, chunks, 3, c)."""
    c, in_c, begin, piece, b, C = place(cells, units, chunk, UNIT, BLOCK_C)
    NORMED: tl.constexpr = stats_r is not None
    mean, scale = statistic(stats, b, c, in_c, C)
    mean_r, scale_r = mean, scale
    if NORMED:
        mean_r, scale_r = statistic(stats_r, b, c, in_c, C)
    if residual is not None:
        residual += b * r_b * UNIT
    grad += b * g_b * UNIT
    source += b * x_b * UNIT
    end = tl.minimum(begin + chunk, cells)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    with_h = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    with_r = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_N * UNROLL):
        for i in tl.static_range(UNROLL):
            n = start + i * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = (n < end)[:, None] & in_c[None, :]
            dz, h, r = again(
                grad, source, residual, n, g_n, x_n, r_n, c, inside, mean, scale, mean_r, scale_r,
                NORMED, SLOPE, UNIT,
            )  # fmt: skip
            total += dz
            with_h += dz * h
            if NORMED:
                with_r += dz * r
    parts += (b * tl.cdiv(cells, chunk) + piece) * 3 * C
    tl.store(parts + c, tl.sum(total, 0), mask=in_c)
    tl.store(parts + C + c, tl.sum(with_h, 0), mask=in_c)
    if NORMED:
        tl.store(parts + 2 * C + c, tl.sum(with_r, 0), mask=in_c)


@triton.jit(do_not_specialize=VARY)
def means(
    parts, out, cells, units, pieces, SUMS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The means of what ``products`` summed, out (b, 3, c), of which SUMS are made."""
    C = units * UNIT
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    which, b = pid // blocks % SUMS, (pid // blocks // SUMS).to(tl.int64)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, pieces, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = (((b * pieces + s) * 3 + which) * C)[:, None] + c[None, :]
        total += tl.load(parts + at, mask=(s < pieces)[:, None] & (c < C)[None, :], other=0.0)
    tl.store(out + (b * 3 + which) * C + c, tl.sum(total, 0) / cells, mask=c < C)


@triton.jit(do_not_specialize=VARY)
def differences(
    grad, source, residual, stats, stats_r, mean_of, dx, dr,
    g_b, g_n, x_b, x_n, r_b, r_n, cells, units, wide,
    SLOPE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, (b, n, wide UNIT), zero behind its channels, and dr, (b, n, c), if there is room for it."""
    c, in_c, begin, _, b, C = place(cells, units, BLOCK_N, UNIT, BLOCK_C)
    n = begin + tl.arange(0, BLOCK_N)
    inside = (n < cells)[:, None] & in_c[None, :]
    NORMED: tl.constexpr = stats_r is not None
    mean, scale = statistic(stats, b, c, in_c, C)
    mean_r, scale_r = mean, scale
    if NORMED:
        mean_r, scale_r = statistic(stats_r, b, c, in_c, C)
    if residual is not None:
        residual += b * r_b * UNIT
    dz, h, r = again(
        grad + b * g_b * UNIT, source + b * x_b * UNIT, residual, n, g_n, x_n, r_n, c, inside,
        mean, scale, mean_r, scale_r, NORMED, SLOPE, UNIT,
    )  # fmt: skip
    mean_of += b * 3 * C + c
    of_dz = tl.load(mean_of, mask=in_c, other=0.0)[None, :]
    of_h = tl.load(mean_of + C, mask=in_c, other=0.0)[None, :]
    value = tl.where(in_c[None, :], scale * (dz - of_dz - h * of_h), 0.0)
    at = ((b * cells + n) * (wide * UNIT))[:, None] + c[None, :]
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=(n < cells)[:, None] & (c < wide * UNIT)[None, :])
    if dr is not None:
        at = ((b * cells + n) * C)[:, None] + c[None, :]
        if NORMED:
            of_r = tl.load(mean_of + 2 * C, mask=in_c, other=0.0)[None, :]
            dz = scale_r * (dz - of_dz - r * of_r)
        tl.store(dr + at, dz.to(dr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor, residual: Tensor | None, normed: bool, slope: float, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y (b, n, c), contiguous, and the statistics (b, 2, c) of ``x`` and, if it is ``normed``, of ``residual``."""
    x, residual = dense(x), None if residual is None else dense(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on(x.device):
        stats = _statistics(x, eps)
        stats_r = _statistics(residual, eps) if residual is not None and normed else None
        unit, block_c, units = _columns(x.shape[2])
        block_n = 2 * TILE // block_c
        launch(
            normalise, cdiv(x.shape[1], block_n) * cdiv(x.shape[2], block_c) * x.shape[0],
            (x, residual, stats, stats_r, y, *_strides(x), *_strides(residual), x.shape[1], units),
            dict(SLOPE=slope, UNIT=unit, BLOCK_N=block_n, BLOCK_C=block_c), 4,
        )  # fmt: skip
    return y, stats, stats_r


def backward(
    grad: Tensor,
    source: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    stats_r: Tensor | None,
    slope: float,
    width: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the residual, contiguous. ``source`` is x if the slope is 0, or y.

    That of x may be given more channels, up to ``widest(c)``, which are zero.
    """
    grad, source, residual = dense(grad), dense(source), None if residual is None else dense(residual)
    b, cells, c = source.shape
    width = c if width is None else width
    assert c <= width <= widest(c)
    dx = torch.empty((b, cells, width), dtype=source.dtype, device=source.device)
    plain = slope == 1 and stats_r is None  # dr is grad itself
    dr = None if residual is None or plain else torch.empty(source.shape, dtype=residual.dtype, device=dx.device)
    unit, block_c, units = _columns(c)
    chunk, pieces = _chunks(b, cells, c)
    parts = torch.empty((b, pieces, 3, c), dtype=torch.float32, device=source.device)
    mean_of = torch.empty((b, 3, c), dtype=torch.float32, device=source.device)
    operands = (grad, source, residual, stats, stats_r)
    strides = (*_strides(grad), *_strides(source), *_strides(residual))
    sums = 2 if stats_r is None else 3
    with on(source.device):
        launch(
            products, pieces * cdiv(c, block_c) * b,
            (*operands, parts, *strides, cells, units, chunk),
            dict(SLOPE=slope, UNIT=unit, UNROLL=2, BLOCK_N=TILE // block_c, BLOCK_C=block_c), 4,
        )  # fmt: skip
        launch(
            means, cdiv(c, 32) * sums * b, (parts, mean_of, cells, units, pieces),
            dict(SUMS=sums, UNIT=unit, BLOCK_S=256, BLOCK_C=32), 8,
        )  # fmt: skip
        launch(
            differences, cdiv(cells, TILE // block_c) * cdiv(c, block_c) * b,
            (*operands, mean_of, dx, dr, *strides, cells, units, width // unit),
            dict(SLOPE=slope, UNIT=unit, BLOCK_N=TILE // block_c, BLOCK_C=block_c), 4,
        )  # fmt: skip
    return dx, grad if residual is not None and plain else dr


def widest(c: int) -> int:
    """Channels that the blocks of channels cover."""
    block_c = _columns(c)[1]
    return cdiv(c, block_c) * block_c


def _statistics(x: Tensor, eps: float) -> Tensor:
    b, cells, c = x.shape
    unit, block_c, units = _columns(c)
    chunk, pieces = _chunks(b, cells, c)
    parts = torch.empty((b, pieces, 2, c), dtype=torch.float32, device=x.device)
    stats = torch.empty((b, 2, c), dtype=torch.float32, device=x.device)
    x_b, x_n = _strides(x)
    launch(
        moments, pieces * cdiv(c, block_c) * b, (x, parts, x_b, x_n, cells, units, chunk),
        dict(UNIT=unit, UNROLL=4, BLOCK_N=TILE // block_c, BLOCK_C=block_c), 4,
    )  # fmt: skip
    launch(
        statistics, cdiv(c, 32) * b, (x, parts, stats, x_b, cells, units, pieces),
        dict(EPS=eps, UNIT=unit, BLOCK_S=256, BLOCK_C=32), 8,
    )  # fmt: skip
    return stats


def dense(x: Tensor) -> Tensor:
    """``x`` if its channels lie side by side, in units that its strides and its address are multiples of."""
    unit = _columns(x.shape[2])[0]
    fits = x.stride(2) == 1 or x.shape[2] == 1
    fits = fits and x.stride(0) % unit == 0 and x.stride(1) % unit == 0
    return x if fits and x.data_ptr() % (unit * x.element_size()) == 0 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of samples and cells in units of columns."""
    if x is None:
        return 0, 0
    unit = _columns(x.shape[2])[0]
    return x.stride(0) // unit, x.stride(1) // unit


def _columns(c: int) -> tuple[int, int, int]:
    """Unit, block and number of units of channels: blocks divide the channels, if there are such of 32."""
    divisor = c & -c
    unit = min(divisor, 8)
    return unit, min(divisor if divisor >= 32 else power_of_2(c), 64), c // unit


def _chunks(b: int, cells: int, c: int) -> tuple[int, int]:
    """Cells of a chunk, and chunks of a sample."""
    block_c = _columns(c)[1]
    least = 4 * TILE // block_c
    pieces = min(max(1, PROGRAMS // (b * cdiv(c, block_c))), cdiv(cells, least))
    chunk = cdiv(cdiv(cells, pieces), least) * least
    return chunk, cdiv(cells, chunk)
