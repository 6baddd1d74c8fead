"""The 2D scan on a GPU, in Triton: launches. The kernels are in ``triton_kernels.py``, the equations in ``torch.py``.

One program a sample and block of channels walks the whole grid. The forward pass keeps one row of states for each; the
backward pass keeps every R-th row, R about the square root of h, and the rows of the band it works on. It takes as
many samples at a time as fit in WORKSPACE: more samples fill a GPU better, fewer need less memory.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from vssm.kernels.scan2d.problem import Problem
from vssm.kernels.scan2d.triton_kernels import gradients, outputs
from vssm.kernels.triton_launch import on

FORWARD, BACKWARD = (128, 1), (512, 4)  # states of one cell that a program holds (channels times states), warps
AHEAD = 2  # cells whose inputs are loaded before they are used
WORKSPACE = 1.32  # the backward pass may use this many float32 copies of u as scratch; one sample is always allowed


def forward(p: Problem) -> Tensor:
    """y (b, h, w, d) in the dtype of u."""
    tile, warps = FORWARD
    block_n, block_d, blocks = _blocks(p, tile)
    maps = [x.flatten(1, 2) for x in (p.u, p.delta_top, p.delta_left, p.B_top, p.B_left, p.C)]
    y = torch.empty(p.u.shape, dtype=p.u.dtype, device=p.u.device)
    lines = torch.empty(p.b * blocks, p.w, block_n, block_d, dtype=torch.float32, device=p.u.device)
    with on(p.u.device):
        outputs[(p.b * blocks,)](
            *maps[:3], p.A_top.contiguous(), p.A_left.contiguous(), *maps[3:], p.D, y, lines,
            *_strides(maps), p.h, p.w, p.d, p.n, 1,
            p.delta_softplus, p.reverse, AHEAD, block_n, block_d, num_warps=warps,
        )  # fmt: skip
    return y


def backward(p: Problem, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta_top, delta_left, A_top, A_left, B_top, B_left, C and D."""
    tile, warps = BACKWARD
    block_n, block_d, blocks = _blocks(p, tile)
    band = math.isqrt(p.h - 1) + 1
    lines = band - 1 + triton.cdiv(p.h, band)
    device, l = p.u.device, p.h * p.w
    maps = [x.flatten(1, 2) for x in (p.u, p.delta_top, p.delta_left, p.B_top, p.B_left, p.C, grad_y)]
    A_top, A_left = p.A_top.contiguous(), p.A_left.contiguous()
    du, ddelta_top, ddelta_left, dB_top, dB_left, dC = (
        torch.empty(x.shape, dtype=x.dtype, device=device)
        for x in (p.u, p.delta_top, p.delta_left, p.B_top, p.B_left, p.C)
    )
    dA_top, dA_left = torch.empty(2, p.b, p.d, p.n, dtype=torch.float32, device=device)
    dD = None if p.D is None else torch.empty(p.b, p.d, dtype=torch.float32, device=device)

    kept = p.u.dtype if p.u.dtype == torch.bfloat16 else torch.float32  # rows of states
    row = p.w * block_n * block_d
    needed = blocks * (row * (lines * kept.itemsize + 4) + 3 * l * p.n * 4)  # scratch bytes of a sample
    samples = min(p.b, max(1, int(WORKSPACE * p.u.numel() * 4) // needed))
    scratch = torch.empty(samples * blocks, lines, p.w, block_n, block_d, dtype=kept, device=device)
    messages = torch.empty(samples * blocks, row, dtype=torch.float32, device=device)
    parts = torch.empty(3, samples, blocks, l, p.n, dtype=torch.float32, device=device)  # of B_top, B_left, C
    for start in range(0, p.b, samples):
        part = slice(start, min(start + samples, p.b))
        count = part.stop - start
        u, delta_top, delta_left, B_top, B_left, C, dy = (x[part] for x in maps)
        with on(device):
            gradients[(count * blocks,)](
                u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, p.D, dy, scratch, messages,
                du[part], ddelta_top[part], ddelta_left[part], dA_top[part], dA_left[part], *parts,
                None if dD is None else dD[part],
                *_strides(maps), p.h, p.w, p.d, p.n, band, 1,
                p.delta_softplus, p.reverse, AHEAD, block_n, block_d, num_warps=warps,
            )  # fmt: skip
        for total, of_blocks in zip((dB_top, dB_left, dC), parts):
            total[part] = of_blocks[:count].sum(1).view(total[part].shape)
    dA_top, dA_left, dD = dA_top.sum(0), dA_left.sum(0), None if dD is None else dD.sum(0)
    return du, ddelta_top, ddelta_left, dA_top, dA_left, dB_top, dB_left, dC, dD


def _blocks(p: Problem, tile: int) -> tuple[int, int, int]:
    """States and channels of a program, powers of two, and programs for the channels of one sample."""
    block_n = triton.next_power_of_2(p.n)
    block_d = min(max(tile // block_n, 8), 128, triton.next_power_of_2(p.d))
    return block_n, block_d, triton.cdiv(p.d, block_d)


def _strides(maps: list[Tensor]) -> list[int]:
    """Batch and cell strides of flattened maps."""
    return [stride for x in maps for stride in x.stride()[:2]]
