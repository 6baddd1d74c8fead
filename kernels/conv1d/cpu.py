"""The causal convolution on the CPU, compiled by Numba.

A job is one block of channels of one row of one sample, or of all rows where they add to the same gradient. Steps run
in chunks: the inputs of a chunk, and the w - 1 before it, are gathered from their cells into a small buffer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vssm.kernels import threads
from vssm.kernels.cells import add, blocks_of, clear, flat, gather, in_dtype, job_of, scatter, strides_of
from vssm.kernels.compiled import compiled, inlined, part, sigmoid, silu_slope
from vssm.kernels.conv1d.problem import Problem

CHUNK = 64  # steps
WIDTH = 96  # channels of a job, at most; it depends on sizes alone, so that no sum depends on the number of threads

# Rows of the array of strides, which holds those of batch, row and cell.
X, Y, TABLE, WRITE, WEIGHT, BIAS, GX = range(7)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """y (b, k, m, d) and the last state (b, k, d, w - 1), both in the dtype of ``x``."""
    y = torch.zeros(p.y_shape, dtype=p.compute_dtype)
    last_state = torch.empty(p.state_shape, dtype=p.compute_dtype)
    jobs, work, arguments = _arguments(p, y, together=1)
    threads.run(_forward, jobs, *arguments, flat(last_state), work=work)
    return y.to(p.x.dtype), last_state.to(p.x.dtype)


def backward(p: Problem, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state."""
    kind, shape = p.compute_dtype, (p.b, p.k, p.d)
    x = torch.zeros(p.x.shape, dtype=kind)  # summed in place where rows share it
    weight, bias, first = (torch.empty(*shape, size, dtype=kind) for size in (p.w, 1, p.w - 1))
    jobs, work, arguments = _arguments(p, in_dtype(grad_y, kind), together=p.k if p.x.dim() == 3 else 1, grad_x=x)
    results = map(flat, (grad_last.to(kind).contiguous(), x, weight, bias, first))
    threads.run(_backward, jobs, *arguments, *results, work=work)
    return (
        x.to(p.x.dtype),
        weight.sum(0) if p.weight.dim() == 3 else weight.sum((0, 1)),
        None if p.bias is None else bias.squeeze(-1).sum(0) if p.bias.dim() == 2 else bias.squeeze(-1).sum((0, 1)),
        None if p.initial_state is None else first.to(p.x.dtype),
    )


def _arguments(p: Problem, y: Tensor, together: int, grad_x: Tensor | None = None) -> tuple[int, int, tuple]:
    """The number of jobs of ``together`` rows, the number of products, and the arguments of both kernels."""
    width, blocks = blocks_of(p.d, WIDTH)
    jobs = p.b * (p.k // together) * blocks
    x = in_dtype(p.x, y.dtype)
    first = None if p.initial_state is None else p.initial_state.to(y.dtype).contiguous()
    strides = [strides_of(values, "bkc", "k") for values in (x, y)]
    strides += [strides_of(index, "bk", "b") for index in (p.table, p.write)]
    strides += [strides_of(p.weight, "kc", "k"), strides_of(p.bias, "k", "k"), strides_of(grad_x, "bkc", "k")]
    order, absent = np.arange(p.t, dtype=np.int32), flat(y.new_empty(0))
    arrays = [absent if value is None else flat(value) for value in (x, y, p.weight, p.bias, first)]
    indices = [order if index is None else flat(index) for index in (p.table, p.write)]
    sizes = np.array((p.k, p.l, p.m, p.d, p.w, p.t, width, together))
    return jobs, p.b * p.k * p.t * p.d * p.w, (sizes, np.array(strides), *arrays, *indices, p.silu)


@part
def _parameters(row, c0, w, strides, weight, bias, taps, shift):
    """Read the taps (channels innermost) and the bias of a block of channels."""
    for c in range(w):
        for tap in range(taps.shape[0]):
            taps[tap, c] = weight[row * strides[WEIGHT, 1] + (c0 + c) * strides[WEIGHT, 2] + tap]
        shift[c] = bias[row * strides[BIAS, 1] + c0 + c] if bias.size else 0


@part
def _before(at, w, before, first, xs):
    """Read the inputs before step 0, from ``at`` on, into the first rows of ``xs``."""
    for c in range(w):
        for j in range(before):
            xs[j, c] = first[(at + c) * before + j] if first.size else 0


@inlined
def _convolve(j, w, xs, taps, shift, out):
    for c in range(w):
        out[j, c] = shift[c]
    for tap in range(taps.shape[0]):
        for c in range(w):
            out[j, c] += taps[tap, c] * xs[j + tap, c]


@inlined
def _transpose(length, w, g, taps, dx):
    """Gradients of the inputs of a chunk from those of the sums in it and after it."""
    last = taps.shape[0] - 1
    for j in range(length):
        for c in range(w):
            dx[j, c] = 0
        for tap in range(last + 1):
            for c in range(w):
                dx[j, c] += taps[tap, c] * g[j + last - tap, c]


@compiled
def _forward(start, stop, sizes, strides, x, y, weight, bias, first, table, write, silu, last):
    """Run jobs start to stop; y comes as zeros."""
    k, cells, outputs, d, taps_, steps, width, together = sizes
    before, kind = taps_ - 1, x.dtype
    taps, shift = np.empty((taps_, width), kind), np.empty(width, kind)
    xs, out = np.empty((before + CHUNK, width), kind), np.empty((CHUNK, width), kind)
    for job in range(start, stop):
        i, row0, c0, w = job_of(job, k, together, d, width)
        for row in range(row0, row0 + together):
            _parameters(row, c0, w, strides, weight, bias, taps, shift)
            own = (i * k + row) * d + c0
            _before(own, w, before, first, xs)
            for t0 in range(0, steps, CHUNK):
                length = min(steps - t0, CHUNK)
                gather(x, strides, X, table, TABLE, i, row, t0, length, cells, c0, w, xs[before:])
                for j in range(length):
                    _convolve(j, w, xs, taps, shift, out)
                    if silu:
                        for c in range(w):
                            out[j, c] *= sigmoid(out[j, c])
                scatter(out, y, strides, Y, write, WRITE, i, row, t0, length, outputs, c0, w)
                for j in range(before):
                    for c in range(w):
                        xs[j, c] = xs[length + j, c]
            for c in range(w):
                for j in range(before):
                    last[(own + c) * before + j] = xs[j, c]


@compiled
def _backward(start, stop, sizes, strides, x, grad_y, weight, bias, first, table, write, silu,
              grad_last, gx, gweight, gbias, gfirst):  # fmt: skip
    """Run jobs start to stop of the adjoint, chunks from the last to the first; gx comes as zeros."""
    k, cells, outputs, d, taps_, steps, width, together = sizes
    before, kind = taps_ - 1, x.dtype
    taps, shift = np.empty((taps_, width), kind), np.empty(width, kind)
    chunk = max(CHUNK, before)  # so that a chunk, the first apart, has all the inputs before it in the table
    xs, out = np.empty((before + chunk, width), kind), np.empty((chunk, width), kind)
    g = np.zeros((chunk + before, width), kind)  # gradients before the activation, in the chunk and just after it
    dx = np.empty((chunk, width), kind)
    zero = kind.type(0)
    # Sums over steps, of a chunk and of all: in two levels, or float32 loses digits on long sequences.
    sums, totals = np.empty((taps_ + 1, width), kind), np.empty((taps_ + 1, width), kind)
    for job in range(start, stop):
        i, row0, c0, w = job_of(job, k, together, d, width)
        for row in range(row0, row0 + together):
            _parameters(row, c0, w, strides, weight, bias, taps, shift)
            own = (i * k + row) * d + c0
            clear(totals)
            clear(g)
            for t0 in range((steps - 1) // chunk * chunk, -1, -chunk):
                length = min(steps - t0, chunk)
                if t0 == 0:
                    _before(own, w, before, first, xs)
                    gather(x, strides, X, table, TABLE, i, row, 0, length, cells, c0, w, xs[before:])
                else:
                    gather(x, strides, X, table, TABLE, i, row, t0 - before, before + length, cells, c0, w, xs)
                for j in range(before):
                    for c in range(w):
                        g[length + j, c] = g[j, c]
                gather(grad_y, strides, Y, write, WRITE, i, row, t0, length, outputs, c0, w, g)
                if silu:
                    for j in range(length):
                        _convolve(j, w, xs, taps, shift, out)
                        for c in range(w):
                            g[j, c] *= silu_slope(out[j, c])
                _transpose(length, w, g, taps, dx)
                for m in range(before):  # the last inputs are results too
                    j = steps - before + m - t0
                    if 0 <= j < length:
                        for c in range(w):
                            dx[j, c] += grad_last[(own + c) * before + m]
                scatter(dx, gx, strides, GX, table, TABLE, i, row, t0, length, cells, c0, w)
                clear(sums)
                for j in range(length):
                    for tap in range(taps_):
                        for c in range(w):
                            sums[tap, c] += g[j, c] * xs[j + tap, c]
                    for c in range(w):
                        sums[taps_, c] += g[j, c]
                add(totals, sums)
            for c in range(w):
                at = own + c
                for tap in range(taps_):
                    gweight[at * taps_ + tap] = totals[tap, c]
                gbias[at] = totals[taps_, c]
                for m in range(before):  # of the input at step m - before
                    total = grad_last[at * before + m - steps] if m >= steps else zero
                    for tap in range(m + 1):
                        total += taps[tap, c] * g[m - tap, c]
                    gfirst[at * before + m] = total
