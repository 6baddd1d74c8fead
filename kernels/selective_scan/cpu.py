"""The selective scan on the CPU, compiled by Numba: the recurrence and its adjoint.

A job is one block of channels of one row of one sample, so that jobs are independent and threads share them out freely.
Inside a job channels are innermost, where they fill vector registers. With a = delta A, x = delta u and g[t] the
gradient of h[t],

    h[t] = exp(a[t]) h[t-1] + x[t] B[t],    y[t] = C[t] · h[t] + D u[t]

    g[t] = exp(a[t+1]) g[t+1] + dy[t] C[t],    da[t] = g[t] exp(a[t]) h[t-1],    dx[t] = Σ_n g[t] B[t]
    dB[t] = Σ_d g[t] x[t],    dC[t] = Σ_d dy[t] h[t],    dA = Σ_t da[t] delta[t],    dD = Σ_t dy[t] u[t]
    ddelta[t] = Σ_n da[t] A + dx[t] u[t],    du[t] = dx[t] delta[t] + D dy[t]

The forward pass keeps the state before each chunk of steps. The backward pass takes the chunks from the last to the
first: it recomputes the decayed states exp(a[t]) h[t-1] of one chunk into a buffer and runs the adjoint over it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vssm.kernels import threads
from vssm.kernels.cells import add, blocks_of, clear, flat, gather, in_dtype, inside, job_of, scatter, strides_of
from vssm.kernels.compiled import compiled, exp, inlined, part, softplus, softplus_slope
from vssm.kernels.selective_scan.problem import Problem
from vssm.kernels.selective_scan.rows import gate, operand_grad, ungate

CHUNK = 32  # steps between saved states
WIDTH = 96  # channels of a job, at most; it depends on sizes alone, so that no sum depends on the number of threads

# Rows of the array of strides, which holds those of batch, row and cell.
U, DELTA, B_, C_, Y, TABLE, READ, WRITE, A_, D_, BIAS, GU, GDELTA = range(13)


def saved(b: int, k: int, t: int, d: int, n: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """The state before each chunk, channels innermost; flat, so that exported sizes are not guarded one by one."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (b * k * ((t + CHUNK - 1) // CHUNK) * n * d,), compute


def forward(p: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, the states before each chunk, and y before its gate (the last two only to be saved)."""
    y = torch.zeros(p.y_shape, dtype=p.compute_dtype)  # merged rows are summed in place
    last_state = torch.empty(p.state_shape, dtype=p.compute_dtype)
    states = last_state.new_empty(saved(p.b, p.k, p.t, p.d, p.n, p.u.dtype)[0] if save else 0)
    first = last_state.new_empty(0) if p.initial_state is None else p.initial_state.contiguous()
    call = _Call(p, y, all_rows=p.merge)
    threads.run(_forward, call.jobs, *call.arguments, *map(flat, (first, last_state, states)), work=call.work)
    y, ungated = gate(p, y, save)
    return y, last_state, states, ungated


def backward(
    p: Problem, grad_y: Tensor, grad_last: Tensor, states: Tensor, ungated: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state."""
    grad_y, grad_z = ungate(p, grad_y, ungated)
    new, zeros, shape = grad_y.new_empty, grad_y.new_zeros, (p.b, p.k)
    u, delta = zeros(p.u.shape), zeros(p.delta.shape)  # those of rows that share them are summed in place
    A, first, D, bias = new(*shape, p.d, p.n), new(*shape, p.d, p.n), new(*shape, p.d), new(*shape, p.d)
    call = _Call(p, grad_y, all_rows=p.u.dim() == 3 or p.delta.dim() == 3, grads=(u, delta))
    B_parts, C_parts = (new(p.b * p.k, call.blocks, p.t, p.n) for _ in range(2))  # by block of channels, by step
    results = map(flat, (grad_last.contiguous(), states, u, delta, A, B_parts, C_parts, D, bias, first))
    threads.run(_backward, call.jobs, *call.arguments, *results, work=call.work)
    B, C = zeros(*shape, p.r, p.n), zeros(*shape, p.r, p.n)
    for parts, total in ((B_parts, B), (C_parts, C)):
        by_row = (parts.numpy(), total.flatten(0, 1).numpy())
        threads.run(_collect, p.b * p.k, *call.collect_arguments, *by_row, work=parts.numel())

    sums = {"A": A, "B": B, "C": C, "D": D, "delta_bias": bias, "initial_state": first}
    grads = {name: operand_grad(p, name, grad) for name, grad in sums.items()}
    grads |= {"u": u.to(p.u.dtype), "delta": delta.to(p.delta.dtype), "z": grad_z}
    return tuple(grads[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"))


class _Call:
    """The arguments that both kernels take: flat arrays in the compute dtype, and one array of strides for all.

    Jobs take one row each, or ``all_rows`` of a sample one after the other where these add to the same result.
    """

    def __init__(self, p: Problem, y: Tensor, all_rows: bool, grads: tuple[Tensor, ...] = ()) -> None:
        together = p.k if all_rows else 1
        width, self.blocks = blocks_of(p.d, WIDTH if p.b * p.d > WIDTH else WIDTH // 2)  # two jobs at least
        self.jobs = p.b * (p.k // together) * self.blocks
        self.work = p.b * p.k * p.t * p.d * p.n
        sizes = np.array((p.k, p.l, p.r, p.m, p.d, p.n, p.t, width, together))

        data = [*(in_dtype(x, y.dtype) for x in (p.u, p.delta, p.B, p.C)), y]
        tables, parameters = (p.table, p.read, p.write), (p.A, p.D, p.delta_bias)
        rows = [strides_of(x, "bkc", "k") for x in data]
        rows += [strides_of(x, "bk", "b") for x in tables]
        rows += [strides_of(x, axes, "k") for x, axes in zip(parameters, ("kc", "k", "k"))]
        rows += [strides_of(x, "bkc", "k") for x in grads]
        strides = np.array(rows)

        absent, order = flat(y.new_empty(0)), np.arange(p.t, dtype=np.int32)
        arrays = [absent if x is None else flat(x) for x in (*data, *parameters)]
        indices = [order if x is None else flat(x) for x in tables]
        self.arguments: tuple[Any, ...] = (sizes, strides, *arrays, *indices, p.delta_softplus)
        self.collect_arguments: tuple[Any, ...] = (sizes, strides, indices[1])


@part
def _parameters(row, c0, w, n, strides, A, D, bias, rate, skip, shift):
    """Read A (channels innermost), D and delta_bias of a block of channels; zeros for the last two if absent."""
    for c in range(w):
        for s in range(n):
            rate[s, c] = A[row * strides[A_, 1] + (c0 + c) * strides[A_, 2] + s]
        skip[c] = D[row * strides[D_, 1] + c0 + c] if D.size else 0
        shift[c] = bias[row * strides[BIAS, 1] + c0 + c] if bias.size else 0


@inlined
def _step_sizes(j, w, dt, shift, positive):
    """delta of step j from its raw value."""
    for c in range(w):
        dt[j, c] += shift[c]
    if positive:
        for c in range(w):
            dt[j, c] = softplus(dt[j, c], exp(-abs(dt[j, c])))


@inlined
def _slopes(j, w, dt, shift, positive, slope):
    """The derivative of delta by its raw value at step j."""
    for c in range(w):
        raw = dt[j, c] + shift[c]
        slope[j, c] = softplus_slope(raw, exp(-abs(raw))) if positive else 1


@inlined
def _advance(j, w, dt, ut, skip, Bt, Ct, rate, h, x, y):
    """Step j of the recurrence: the state h, and y."""
    for c in range(w):
        x[c] = dt[j, c] * ut[j, c]
        y[j, c] = skip[c] * ut[j, c]
    for s in range(rate.shape[0]):
        bs, cs = Bt[j, s], Ct[j, s]
        for c in range(w):
            state = exp(dt[j, c] * rate[s, c]) * h[s, c] + x[c] * bs
            h[s, c] = state
            y[j, c] += state * cs


@inlined
def _advance_and_keep(j, w, dt, ut, Bt, rate, h, x, factor, decayed):
    """Step j of the recurrence, with exp(a) and exp(a) h kept for the adjoint."""
    for c in range(w):
        x[j, c] = dt[j, c] * ut[j, c]
    for s in range(rate.shape[0]):
        bs = Bt[j, s]
        for c in range(w):
            e = exp(dt[j, c] * rate[s, c])
            kept = e * h[s, c]
            factor[j, s, c] = e
            decayed[j, s, c] = kept
            h[s, c] = kept + x[j, c] * bs


@inlined
def _retreat(j, w, dt, ut, x, dy, skip, slope, Bt, Ct, rate, factor, decayed, g, dx, ddt, sums, at, gB, gC):
    """Step j of the adjoint: g goes from the gradient of h[t] by later steps to that of h[t-1]; dx becomes du."""
    n = rate.shape[0]
    for c in range(w):
        dx[j, c], ddt[j, c] = 0, 0
    for s in range(n):
        bs, cs = Bt[j, s], Ct[j, s]
        dB = dC = rate.dtype.type(0)
        for c in range(w):
            grad = g[s, c] + dy[j, c] * cs
            dC += dy[j, c] * (decayed[j, s, c] + x[j, c] * bs)
            dB += grad * x[j, c]
            dx[j, c] += grad * bs
            da = grad * decayed[j, s, c]
            ddt[j, c] += da * rate[s, c]
            sums[s, c] += da * dt[j, c]
            g[s, c] = grad * factor[j, s, c]
        gB[at + s], gC[at + s] = dB, dC
    for c in range(w):
        ddt[j, c] = (ddt[j, c] + dx[j, c] * ut[j, c]) * slope[j, c]
        dx[j, c] = dx[j, c] * dt[j, c] + dy[j, c] * skip[c]
        sums[n, c] += dy[j, c] * ut[j, c]
        sums[n + 1, c] += ddt[j, c]


@compiled
def _forward(
    start, stop, sizes, strides, u, delta, B, C, y, A, D, bias, table, read, write, positive, first, last, states
):
    """Run jobs start to stop of the recurrence; y comes as zeros."""
    k, cells, entries, outputs, d, n, steps, width, together = sizes
    chunks, kind = -(-steps // CHUNK), u.dtype
    skip, shift, x = np.empty(width, kind), np.empty(width, kind), np.empty(width, kind)
    ut, dt, yt = np.empty((CHUNK, width), kind), np.empty((CHUNK, width), kind), np.empty((CHUNK, width), kind)
    Bt, Ct = np.empty((CHUNK, n), kind), np.empty((CHUNK, n), kind)
    rate, h = np.empty((n, width), kind), np.empty((n, width), kind)
    for job in range(start, stop):
        i, row0, c0, w = job_of(job, k, together, d, width)
        for row in range(row0, row0 + together):
            _parameters(row, c0, w, n, strides, A, D, bias, rate, skip, shift)
            own = i * k + row
            for c in range(w):
                for s in range(n):
                    h[s, c] = first[(own * d + c0 + c) * n + s] if first.size else 0
            for t0 in range(0, steps, CHUNK):
                length = min(steps - t0, CHUNK)
                if states.size:
                    for s in range(n):
                        at = np.uint64(((own * chunks + t0 // CHUNK) * n + s) * d + c0)
                        for c in range(w):
                            states[at + np.uint64(c)] = h[s, c]
                gather(u, strides, U, table, TABLE, i, row, t0, length, cells, c0, w, ut)
                gather(delta, strides, DELTA, read, READ, i, row, t0, length, entries, c0, w, dt)
                gather(B, strides, B_, read, READ, i, row, t0, length, entries, 0, n, Bt)
                gather(C, strides, C_, read, READ, i, row, t0, length, entries, 0, n, Ct)
                for j in range(length):
                    _step_sizes(j, w, dt, shift, positive)
                    _advance(j, w, dt, ut, skip, Bt, Ct, rate, h, x, yt)
                scatter(yt, y, strides, Y, write, WRITE, i, row, t0, length, outputs, c0, w)
            for c in range(w):
                for s in range(n):
                    last[(own * d + c0 + c) * n + s] = h[s, c]


@compiled
def _backward(
    start, stop, sizes, strides, u, delta, B, C, grad_y, A, D, bias, table, read, write, positive, grad_last, states,
    gu, gdelta, gA, gB, gC, gD, gbias, gfirst,
):  # fmt: skip
    """Run jobs start to stop of the adjoint; gu and gdelta come as zeros."""
    k, cells, entries, outputs, d, n, steps, width, together = sizes
    blocks, chunks, kind = -(-d // width), -(-steps // CHUNK), u.dtype
    skip, shift = np.empty(width, kind), np.empty(width, kind)
    ut, dt, slope = np.empty((CHUNK, width), kind), np.empty((CHUNK, width), kind), np.empty((CHUNK, width), kind)
    x, dy = np.empty((CHUNK, width), kind), np.empty((CHUNK, width), kind)
    dx, ddt = np.empty((CHUNK, width), kind), np.empty((CHUNK, width), kind)
    Bt, Ct = np.empty((CHUNK, n), kind), np.empty((CHUNK, n), kind)
    rate, h, g = np.empty((n, width), kind), np.empty((n, width), kind), np.empty((n, width), kind)
    factor, decayed = np.empty((CHUNK, n, width), kind), np.empty((CHUNK, n, width), kind)
    # Gradients of A, D and the bias are summed over a chunk, then over chunks: one long sum in float32 loses digits.
    sums, totals = np.empty((n + 2, width), kind), np.empty((n + 2, width), kind)
    for job in range(start, stop):
        i, row0, c0, w = job_of(job, k, together, d, width)
        for row in range(row0, row0 + together):
            _parameters(row, c0, w, n, strides, A, D, bias, rate, skip, shift)
            own = i * k + row
            clear(totals)
            for c in range(w):
                for s in range(n):
                    g[s, c] = grad_last[(own * d + c0 + c) * n + s]
            for chunk in range(chunks - 1, -1, -1):
                t0 = chunk * CHUNK
                length = min(steps - t0, CHUNK)
                for s in range(n):
                    at = np.uint64(((own * chunks + chunk) * n + s) * d + c0)
                    for c in range(w):
                        h[s, c] = states[at + np.uint64(c)]
                gather(u, strides, U, table, TABLE, i, row, t0, length, cells, c0, w, ut)
                gather(delta, strides, DELTA, read, READ, i, row, t0, length, entries, c0, w, dt)
                gather(B, strides, B_, read, READ, i, row, t0, length, entries, 0, n, Bt)
                gather(C, strides, C_, read, READ, i, row, t0, length, entries, 0, n, Ct)
                gather(grad_y, strides, Y, write, WRITE, i, row, t0, length, outputs, c0, w, dy)
                for j in range(length):
                    _slopes(j, w, dt, shift, positive, slope)
                    _step_sizes(j, w, dt, shift, positive)
                    _advance_and_keep(j, w, dt, ut, Bt, rate, h, x, factor, decayed)
                clear(sums)
                for j in range(length - 1, -1, -1):
                    at = ((own * blocks + c0 // width) * steps + t0 + j) * n
                    _retreat(
                        j, w, dt, ut, x, dy, skip, slope, Bt, Ct, rate, factor, decayed, g, dx, ddt, sums, at, gB, gC
                    )
                add(totals, sums)
                scatter(dx, gu, strides, GU, table, TABLE, i, row, t0, length, cells, c0, w)
                scatter(ddt, gdelta, strides, GDELTA, read, READ, i, row, t0, length, entries, c0, w)
            for c in range(w):
                at = own * d + c0 + c
                gD[at], gbias[at] = totals[n, c], totals[n + 1, c]
                for s in range(n):
                    gA[at * n + s], gfirst[at * n + s] = totals[s, c], g[s, c]


@compiled
def _collect(start, stop, sizes, strides, read, parts, total):
    """Sum gradients (bk, blocks, t, n) of B or C over blocks, into the entries that steps read: (bk, r, n), zeros."""
    for job in range(start, stop):
        i, row = job // sizes[0], job % sizes[0]
        for t in range(parts.shape[2]):
            entry = inside(read, strides, READ, i, row, t, total.shape[1])
            if entry >= 0:
                for block in range(parts.shape[1]):
                    for s in range(parts.shape[3]):
                        total[job, entry, s] += parts[job, block, t, s]
