"""The 2D scan on the CPU, compiled by Numba: the recurrence and its adjoint (equations in ``torch.py``).

A job is one block of channels of one sample; jobs are independent, so threads share them out freely. It walks the grid
row by row with two rows of states (w, n, BLOCK) in memory, channels innermost, where they fill vector registers. The
backward pass keeps one row in about the square root of h, recomputes the rows between, band by band from the bottom,
and runs the adjoint over each.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vssm.kernels import threads
from vssm.kernels.compiled import compiled, exp, inlined, part, softplus, softplus_slope
from vssm.kernels.scan2d.problem import Problem

BLOCK = 32  # channels of a job; fixed, so that no sum depends on the number of threads


def forward(p: Problem) -> Tensor:
    """y (b, h, w, d) in the dtype of u."""
    y = torch.empty(p.u.shape, dtype=p.compute_dtype)
    threads.run(_forward, _jobs(p), *_arguments(p), y.view(-1).numpy())
    return y.to(p.u.dtype)


def backward(p: Problem, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta_top, delta_left, A_top, A_left, B_top, B_left, C and D."""
    kind, blocks = p.compute_dtype, _jobs(p) // p.b
    du, ddelta_top, ddelta_left = (torch.empty(p.u.shape, dtype=kind) for _ in range(3))
    dA_top, dA_left = (torch.empty(p.b, p.d, p.n, dtype=kind) for _ in range(2))
    parts = [torch.empty(p.b, blocks, p.h, p.w, p.n, dtype=kind) for _ in range(3)]  # of B_top, B_left and C
    dD = torch.empty(p.b, p.d, dtype=kind)
    results = (du, ddelta_top, ddelta_left, dA_top, dA_left, *parts, dD)
    threads.run(_backward, _jobs(p), *_arguments(p), _array(grad_y, kind), math.isqrt(p.h - 1) + 1,
                *(x.view(-1).numpy() for x in results))  # fmt: skip
    maps = dict(u=du, delta_top=ddelta_top, delta_left=ddelta_left)
    maps |= {name: of_blocks.sum(1) for name, of_blocks in zip(("B_top", "B_left", "C"), parts)}
    grads = {name: grad.to(getattr(p, name).dtype) for name, grad in maps.items()}
    return (
        grads["u"], grads["delta_top"], grads["delta_left"], dA_top.sum(0), dA_left.sum(0),
        grads["B_top"], grads["B_left"], grads["C"], None if p.D is None else dD.sum(0),
    )  # fmt: skip


def _jobs(p: Problem) -> int:
    return p.b * ((p.d + BLOCK - 1) // BLOCK)


def _arguments(p: Problem) -> tuple:
    """What every kernel takes: sizes, the operands as flat arrays of one dtype, the flags."""
    sizes = np.array([p.h, p.w, p.d, p.n])
    maps = (p.u, p.delta_top, p.delta_left, p.A_top, p.A_left, p.B_top, p.B_left, p.C)
    D = p.A_top.new_zeros(p.d) if p.D is None else p.D
    return sizes, *(_array(x, p.compute_dtype) for x in (*maps, D)), p.delta_softplus, p.reverse


def _array(x: Tensor, kind: torch.dtype) -> np.ndarray:
    return x.detach().to(kind).contiguous().view(-1).numpy()


@part
def _rates(A, c0, width, n):
    """Decay rates of a block of channels, (n, BLOCK)."""
    out = np.zeros((n, BLOCK), A.dtype)
    for s in range(n):
        for c in range(width):
            out[s, c] = A[(c0 + c) * n + s]
    return out


@inlined
def _weights(i, j, kind):
    """What the sources above and to the left of cell (i, j) count."""
    if i == 0:
        return kind(0), kind(1)
    if j == 0:
        return kind(1), kind(0)
    return kind(0.5), kind(0.5)


@inlined
def _steps(raw, width, softplus_on, out):
    for c in range(width):
        out[c] = softplus(raw[c], exp(-abs(raw[c]))) if softplus_on else raw[c]


@inlined
def _state(u, dt, dl, a_top, a_left, b_top, b_left, c_top, c_left, above, left, width, out):
    """The states of one cell, (n, BLOCK)."""
    for s in range(len(b_top)):
        bt, bl = b_top[s] * c_top, b_left[s] * c_left
        for c in range(width):
            out[s, c] = (
                c_top * exp(dt[c] * a_top[s, c]) * above[s, c]
                + c_left * exp(dl[c] * a_left[s, c]) * left[s, c]
                + (dt[c] * bt + dl[c] * bl) * u[c]
            )


@part
def _row(i, base, above, out, edge, sizes, u, delta_top, delta_left, a_top, a_left, B_top, B_left, softplus_on, reverse,
         c0, width, dt, dl):  # fmt: skip
    """The states of row i, (w, n, BLOCK), from those of the row above, in other memory: else loops are not vectors."""
    h, w, d, n = sizes
    for j in range(w):
        p = base + (h * w - 1 - i * w - j if reverse else i * w + j)
        at = p * d + c0
        _steps(delta_top[at : at + width], width, softplus_on, dt)
        _steps(delta_left[at : at + width], width, softplus_on, dl)
        c_top, c_left = _weights(i, j, u.dtype.type)
        _state(u[at : at + width], dt, dl, a_top, a_left, B_top[p * n : p * n + n], B_left[p * n : p * n + n],
               c_top, c_left, above[j], out[j - 1] if j else edge, width, out[j])  # fmt: skip


@compiled
def _forward(start, stop, sizes, u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, softplus_on, reverse, y):
    """Outputs of jobs start to stop."""
    h, w, d, n = sizes
    blocks = (d + BLOCK - 1) // BLOCK
    edge, pair = np.zeros((n, BLOCK), u.dtype), np.empty((2, w, n, BLOCK), u.dtype)  # two rows, by turns
    dt, dl = np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype)
    for job in range(start, stop):
        base, c0 = job // blocks * h * w, job % blocks * BLOCK
        width = min(d - c0, BLOCK)
        a_top, a_left = _rates(A_top, c0, width, n), _rates(A_left, c0, width, n)
        pair[1] = 0
        for i in range(h):
            row = pair[i % 2]
            _row(i, base, pair[1 - i % 2], row, edge, sizes, u, delta_top, delta_left, a_top, a_left, B_top, B_left,
                 softplus_on, reverse, c0, width, dt, dl)  # fmt: skip
            for j in range(w):
                p = base + (h * w - 1 - i * w - j if reverse else i * w + j)
                at = p * d + c0
                out = y[at : at + width]
                for c in range(width):
                    out[c] = D[c0 + c] * u[at + c]
                for s in range(n):
                    gate = C[p * n + s]
                    for c in range(width):
                        out[c] += gate * row[j, s, c]


@compiled
def _backward(start, stop, sizes, u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, softplus_on, reverse,
              grad_y, band, gu, gdelta_top, gdelta_left, gA_top, gA_left, gB_top, gB_left, gC, gD):  # fmt: skip
    """Gradients of jobs start to stop; those of B and C by block of channels, those of A and D by sample."""
    h, w, d, n = sizes
    kind = u.dtype.type
    blocks, bands = (d + BLOCK - 1) // BLOCK, (h + band - 1) // band
    edge = np.zeros((n, BLOCK), u.dtype)
    saved = np.empty((bands, w, n, BLOCK), u.dtype)  # the row above each band
    states = np.empty((band + 1, w, n, BLOCK), u.dtype)  # the same and the rows of one band
    down, right = np.empty((w, n, BLOCK), u.dtype), np.empty((n, BLOCK), u.dtype)  # the adjoint's messages
    da_top, da_left = np.empty((n, BLOCK), u.dtype), np.empty((n, BLOCK), u.dtype)
    dt, dl, dskip = np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype)
    decay_top, decay_left = np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype)
    enter_top, enter_left = np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype)
    for job in range(start, stop):
        sample, c0 = job // blocks, job % blocks * BLOCK
        base = sample * h * w
        width = min(d - c0, BLOCK)
        a_top, a_left = _rates(A_top, c0, width, n), _rates(A_left, c0, width, n)
        saved[0] = states[1] = 0
        for i in range((bands - 1) * band):
            row = states[i % 2]
            _row(i, base, states[1 - i % 2], row, edge, sizes, u, delta_top, delta_left, a_top, a_left, B_top, B_left,
                 softplus_on, reverse, c0, width, dt, dl)  # fmt: skip
            if (i + 1) % band == 0:
                saved[(i + 1) // band] = row
        down[:] = 0
        da_top[:] = 0
        da_left[:] = 0
        dskip[:] = 0
        for first in range((bands - 1) * band, -1, -band):
            rows = min(band, h - first)
            states[0] = saved[first // band]
            for r in range(rows):
                _row(first + r, base, states[r], states[r + 1], edge, sizes, u, delta_top, delta_left, a_top, a_left,
                     B_top, B_left, softplus_on, reverse, c0, width, dt, dl)  # fmt: skip
            for r in range(rows - 1, -1, -1):
                right[:] = 0
                for j in range(w - 1, -1, -1):
                    p = base + (h * w - 1 - (first + r) * w - j if reverse else (first + r) * w + j)
                    at = p * d + c0
                    ut, dy = u[at : at + width], grad_y[at : at + width]
                    _steps(delta_top[at : at + width], width, softplus_on, dt)
                    _steps(delta_left[at : at + width], width, softplus_on, dl)
                    c_top, c_left = _weights(first + r, j, kind)
                    here, above, left = states[r + 1, j], states[r, j], states[r + 1, j - 1] if j else edge
                    below = down[j]
                    entry = (p + (sample * (blocks - 1) + job % blocks) * h * w) * n
                    for c in range(width):
                        decay_top[c] = decay_left[c] = enter_top[c] = enter_left[c] = 0
                    for s in range(n):
                        bt, bl, gate = B_top[p * n + s] * c_top, B_left[p * n + s] * c_left, C[p * n + s]
                        sum_top = sum_left = sum_c = kind(0)
                        for c in range(width):
                            lam = dy[c] * gate + below[s, c] + right[s, c]
                            sum_c += dy[c] * here[s, c]
                            x = lam * ut[c]
                            sum_top += x * dt[c]
                            sum_left += x * dl[c]
                            enter_top[c] += lam * bt
                            enter_left[c] += lam * bl
                            back_top = lam * c_top * exp(dt[c] * a_top[s, c])
                            back_left = lam * c_left * exp(dl[c] * a_left[s, c])
                            below[s, c] = back_top
                            right[s, c] = back_left
                            back_top *= above[s, c]
                            back_left *= left[s, c]
                            decay_top[c] += back_top * a_top[s, c]
                            decay_left[c] += back_left * a_left[s, c]
                            da_top[s, c] += back_top * dt[c]
                            da_left[s, c] += back_left * dl[c]
                        gB_top[entry + s], gB_left[entry + s], gC[entry + s] = sum_top * c_top, sum_left * c_left, sum_c
                    for c in range(width):
                        step_top = decay_top[c] + enter_top[c] * ut[c]
                        step_left = decay_left[c] + enter_left[c] * ut[c]
                        if softplus_on:
                            raw_top, raw_left = delta_top[at + c], delta_left[at + c]
                            step_top *= softplus_slope(raw_top, exp(-abs(raw_top)))
                            step_left *= softplus_slope(raw_left, exp(-abs(raw_left)))
                        gdelta_top[at + c], gdelta_left[at + c] = step_top, step_left
                        gu[at + c] = enter_top[c] * dt[c] + enter_left[c] * dl[c] + dy[c] * D[c0 + c]
                        dskip[c] += dy[c] * ut[c]
        for c in range(width):
            for s in range(n):
                gA_top[(sample * d + c0 + c) * n + s] = da_top[s, c]
                gA_left[(sample * d + c0 + c) * n + s] = da_left[s, c]
            gD[sample * d + c0 + c] = dskip[c]
