"""Layer norm and RMS norm over the last axis, from any dtype to any other in one pass, in Triton.

With mean m (0 for RMS norm) and scale s = 1 / sqrt(mean((x - m)^2) + eps) of each row:

    forward     h = (x - m) s          y = weight h + bias
    backward    g = weight dy          dx = s (g - mean(g) - h mean(g h))
                dweight = sum(dy h)    dbias = sum(dy)

without mean(g) for RMS norm. Statistics are float32 and made again from x in the backward pass; a program holds whole
rows. Sums over rows are partial sums of programs, of chunks that the size alone decides, added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vssm.kernels.triton_launch import cdiv, launch, on, parameter_grads, power_of_2
from vssm.kernels.triton_replay import empty, replayed

PROGRAMS = 1024  # that sum over rows, at most


@triton.jit
def standard(x, at, inside, in_c, C: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr):
    """The normalised rows of a tile, (BLOCK_R, BLOCK_C), and the scale of each."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if not RMS:
        value = tl.where(in_c[None, :], value - (tl.sum(value, 1) / C)[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / C + EPS)
    return value * scale[:, None], scale


@triton.jit(do_not_specialize=("rows",))
def normalise(
    x, weight, bias, y, rows, C: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y, (rows, C)."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    in_c = c < C
    inside, at = (r < rows)[:, None] & in_c[None, :], r[:, None] * C + c[None, :]
    h, _ = standard(x, at, inside, in_c, C, EPS, RMS)
    h *= tl.load(weight + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        h += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, h.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows", "chunk"))
def gradients(
    x, weight, grad, dx, parts, rows, chunk, C: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of a chunk of rows, and its sums for weight and bias: parts (programs, 2, C)."""
    begin = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, rows)
    c = tl.arange(0, BLOCK_C)
    in_c = c < C
    w = tl.load(weight + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    to_weight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    to_bias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, chunk, BLOCK_R):
        r = begin + start + tl.arange(0, BLOCK_R)
        inside, at = (r < end)[:, None] & in_c[None, :], r[:, None] * C + c[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        h, scale = standard(x, at, inside, in_c, C, EPS, RMS)
        to_weight += g * h
        to_bias += g
        g *= w
        d = g - h * (tl.sum(g * h, 1) / C)[:, None]
        if not RMS:
            d -= (tl.sum(g, 1) / C)[:, None]
        tl.store(dx + at, (d * scale[:, None]).to(dx.dtype.element_ty), mask=inside)
    parts += tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(parts, tl.sum(to_weight, 0), mask=in_c)
    tl.store(parts + C, tl.sum(to_bias, 0), mask=in_c)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """y, contiguous, in ``dtype``; RMS norm if there is no bias. ``x`` is contiguous."""
    with on(x.device):
        (y,) = replayed(
            lambda: _forward(x, weight, bias, eps, dtype), (x, weight, bias), ("normalise", eps, dtype)
        )  # fmt: skip
    return y


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> list[Tensor | None]:
    c = x.shape[-1]
    rows, y = x.numel() // c, empty(x.shape, dtype, x.device)
    block_r, block_c, warps = _tile(c, 4096)
    launch(
        normalise, cdiv(rows, block_r), (x, weight, bias, y, rows),
        dict(C=c, EPS=eps, RMS=bias is None, BLOCK_R=block_r, BLOCK_C=block_c), warps,
    )  # fmt: skip
    return [y]


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Sequence[Tensor | None]:
    """Gradients of x, weight and bias, in their dtypes. ``grad`` and ``x`` are contiguous."""
    with on(x.device):
        return replayed(
            lambda: _backward(grad, x, weight, bias, eps), (grad, x, weight, bias), ("norm's gradients", eps)
        )  # fmt: skip


def _backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> list[Tensor | None]:
    c = x.shape[-1]
    rows, dx = x.numel() // c, empty(x.shape, x.dtype, x.device)
    block_r, block_c, warps = _tile(c, 2048)
    chunk = cdiv(cdiv(rows, PROGRAMS), block_r) * block_r
    programs = cdiv(rows, chunk)
    parts = empty((programs, 1, 2, c), torch.float32, x.device)
    launch(
        gradients, programs, (x, weight, grad, dx, parts, rows, chunk),
        dict(C=c, EPS=eps, RMS=bias is None, BLOCK_R=block_r, BLOCK_C=block_c), warps,
    )  # fmt: skip
    _, dweight, dbias = parameter_grads(parts, (None, weight, bias))
    return [dx, dweight, dbias]


def _tile(c: int, elements: int) -> tuple[int, int, int]:
    """Rows and columns that a program has in hand, and its warps."""
    block_c = power_of_2(c)
    block_r = max(1, elements // block_c)
    return block_r, block_c, max(4, min(16, block_r * block_c // 512))
