"""Cells of a grid inside compiled kernels: how tensors come in, and reading and writing what a table names.

Kernels take flat arrays, and one array of strides for all: a row for each tensor, with its strides of batch, row and
cell, or of batch, row and (none) for an index. Channels are contiguous.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vssm.kernels.compiled import inlined, part


def flat(x: Tensor) -> np.ndarray:
    """The memory under ``x`` as a one-dimensional array: one type for all strides, so one compilation."""
    if x.numel() == 0:
        return x.detach().reshape(0).numpy()
    span = x.numel() if x.is_contiguous() else 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    return x.detach().as_strided((span,), (1,)).numpy()


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as ``dtype``; what is shared (stride 0) is converted once and stays shared."""
    if x.dtype == dtype:
        return x
    once = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
    return once.to(dtype, memory_format=torch.contiguous_format).expand_as(x)


def strides_of(x: Tensor | None, axes: str, optional: str) -> list[int]:
    """Strides of batch, row and cell, 0 for what ``x`` lacks: it has ``axes`` before its last, one of them optional."""
    if x is None:
        return [0, 0, 0]
    if x.dim() <= len(axes):
        axes = axes.replace(optional, "")
    strides = dict(zip(axes, x.stride()))
    return [strides.get(axis, 0) for axis in "bkc"]


def blocks_of(d: int, width: int) -> tuple[int, int]:
    """The channels of a job, a multiple of 16 of at most ``width``, and how many such blocks make ``d`` channels."""
    even = -(-d // (16 * -(-d // width))) * 16
    return even, -(-d // even)


@inlined
def job_of(job, k, together, d, width):
    """Sample, first row (of ``together`` rows), first channel and number of channels of a job."""
    groups, blocks = k // together, -(-d // width)
    c0 = job % blocks * width
    return job // (groups * blocks), job // blocks % groups * together, c0, min(d - c0, width)


@inlined
def inside(index, strides, which, i, row, t, cells):
    """The cell of a step, -1 for padding."""
    cell = index[i * strides[which, 0] + row * strides[which, 1] + t]
    return cell if 0 <= cell < cells else -1


@part
def gather(x, strides, which, index, by, i, row, t0, length, cells, c0, w, out):
    """Read w channels from c0 of the cells that steps t0 … name, zeros for padding."""
    for j in range(length):
        cell = inside(index, strides, by, i, row, t0 + j, cells)
        if cell < 0:
            for c in range(w):
                out[j, c] = 0
        else:
            at = np.uint64(i * strides[which, 0] + row * strides[which, 1] + cell * strides[which, 2] + c0)
            for c in range(w):
                out[j, c] = x[at + np.uint64(c)]  # unsigned: no test for an index from the end, so vectors


@part
def scatter(values, out, strides, which, index, by, i, row, t0, length, cells, c0, w):
    """Add w channels to the cells that steps t0 … name."""
    for j in range(length):
        cell = inside(index, strides, by, i, row, t0 + j, cells)
        if cell >= 0:
            at = np.uint64(i * strides[which, 0] + row * strides[which, 1] + cell * strides[which, 2] + c0)
            for c in range(w):
                out[at + np.uint64(c)] += values[j, c]


@inlined
def clear(x):
    """Fill a matrix with zeros. (``x[:] = 0`` compiles for a second.)"""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] = 0


@inlined
def add(total, x):
    """Add one matrix to another."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            total[i, j] += x[i, j]
