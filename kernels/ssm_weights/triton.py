"""The weights of a selective SSM as its products and its scan take them, and their gradients, in Triton: a launch each.

With s sets of weights, and m columns, a multiple of 8, for the ``used`` rows of x_proj:

    wide[i] = x_proj[i % s] above zeros, (m, d)                    x_proj (s, used, d)
    tall[i] = dt_weight[i % s] beside zeros, (d, m)                dt_weight (s, d, rank)
    A = -exp(A_log)

There are as many copies i as products want, one of each sample. The gradients of a set are the sums over its copies, in
float32 and in a fixed order, and A times that of A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vssm.kernels.triton_launch import cdiv, launch, on
from vssm.kernels.triton_replay import empty, replayed

BLOCK = 1024  # elements of a program
COPIES = 32  # of these, summed at a time


@triton.jit(do_not_specialize=("wide_blocks", "tall_blocks", "size"))
def spread(
    x_proj, dt_weight, A_log, wide, tall, A, wide_blocks, tall_blocks, size,
    SETS: tl.constexpr, USED: tl.constexpr, M: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """wide (copies, M, D), tall (copies, D, M) and, in the programs behind theirs, A."""
    BLOCKS: tl.constexpr = (M * D + BLOCK - 1) // BLOCK  # of a copy
    at = tl.program_id(0)
    if at < wide_blocks:
        copy, e = at // BLOCKS, at % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x_proj + copy % SETS * (USED * D) + e, mask=e < USED * D, other=0.0)
        tl.store(wide + copy.to(tl.int64) * (M * D) + e, value.to(wide.dtype.element_ty), mask=e < M * D)
    elif at < wide_blocks + tall_blocks:
        at -= wide_blocks
        copy, e = at // BLOCKS, at % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        c, r = e // M, e % M
        value = tl.load(dt_weight + (copy % SETS * D + c) * RANK + r, mask=(c < D) & (r < RANK), other=0.0)
        tl.store(tall + copy.to(tl.int64) * (M * D) + e, value.to(tall.dtype.element_ty), mask=c < D)
    else:
        if A is not None:
            e = (at - wide_blocks - tall_blocks) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(A_log + e, mask=e < size, other=0.0).to(tl.float32)
            tl.store(A + e, -tl.exp(value), mask=e < size)


@triton.jit
def sum_copies(grads, copies, e, size, SETS: tl.constexpr, COPIES: tl.constexpr, STRIDE: tl.constexpr):
    """The sum of elements e of every SETS-th copy, (copies, STRIDE)."""
    total = tl.zeros((e.shape[0],), tl.float32)
    for start in range(0, copies, COPIES):
        i = start + tl.arange(0, COPIES)
        at = (i * SETS).to(tl.int64)[:, None] * STRIDE + e[None, :]
        value = tl.load(grads + at, mask=(i < copies)[:, None] & (e < size)[None, :], other=0.0)
        total += tl.sum(value.to(tl.float32), 0)
    return total


@triton.jit(do_not_specialize=("wide_copies", "tall_copies", "size"))
def gather(
    dwide, dtall, dA, A, dx_proj, ddt_weight, dA_log, wide_copies, tall_copies, size,
    SETS: tl.constexpr, USED: tl.constexpr, M: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr,
    TURNED: tl.constexpr, BLOCK: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Gradients of x_proj and dt_weight from those of the copies of a set, and dA_log.

    ``dtall`` is (copies, M, D), and so is ``dwide``, or (copies, D, M) if ``TURNED``.
    """
    SIZE: tl.constexpr = M * D if TURNED else USED * D
    WIDE: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK  # blocks of a set
    TALL: tl.constexpr = (RANK * D + BLOCK - 1) // BLOCK
    at = tl.program_id(0)
    if at < SETS * WIDE:
        s, e = at // WIDE, at % WIDE * BLOCK + tl.arange(0, BLOCK)
        row, c = (e % M, e // M) if TURNED else (e // D, e % D)
        value = sum_copies(dwide + s * (M * D), wide_copies, e, SIZE, SETS, COPIES, M * D)
        to = dx_proj + (s * USED + row) * D + c
        tl.store(to, value.to(dx_proj.dtype.element_ty), mask=(row < USED) & (e < SIZE))
    elif at < SETS * (WIDE + TALL):
        at -= SETS * WIDE
        s, e = at // TALL, at % TALL * BLOCK + tl.arange(0, BLOCK)
        value = sum_copies(dtall + s * (M * D), tall_copies, e, RANK * D, SETS, COPIES, M * D)
        to = ddt_weight + (s * D + e % D) * RANK + e // D
        tl.store(to, value.to(ddt_weight.dtype.element_ty), mask=e < RANK * D)
    else:
        e = (at - SETS * (WIDE + TALL)) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(dA + e, mask=e < size, other=0.0) * tl.load(A + e, mask=e < size, other=0.0)
        tl.store(dA_log + e, value.to(dA_log.dtype.element_ty), mask=e < size)


def forward(
    x_proj: Tensor, dt_weight: Tensor, A_log: Tensor | None, copies: tuple[int, int], dtype: torch.dtype
) -> Sequence[Tensor | None]:
    """wide and tall, so many copies of each, in ``dtype``; and A in float32, None for None. All contiguous.

    Raises:
        ValueError: If the weights lie on several devices, or their sets and channels differ.
    """
    x_proj, dt_weight = x_proj.contiguous(), dt_weight.contiguous()
    A_log = None if A_log is None else A_log.contiguous()
    with on(x_proj.device):
        return replayed(
            lambda: _forward(x_proj, dt_weight, A_log, copies, dtype),
            (x_proj, dt_weight, A_log),
            ("spread", copies, dtype),
        )


def _forward(
    x_proj: Tensor, dt_weight: Tensor, A_log: Tensor | None, copies: tuple[int, int], dtype: torch.dtype
) -> list[Tensor | None]:
    sets, used, d = x_proj.shape
    others = [x for x in (dt_weight, A_log) if x is not None]
    if any(x.device != x_proj.device or x.shape[1] != d for x in others) or len(dt_weight) != sets:
        found = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in (x_proj, *others))
        raise ValueError(
            f"SelectiveSSM: x_proj (sets, m, d), dt_weight (sets, d, rank) and A_log (k, d, n) must agree in sets, "
            f"channels d and device, got {found}; move the whole module"
        )
    m, device = cdiv(used, 8) * 8, x_proj.device
    wide, tall = empty((copies[0], m, d), dtype, device), empty((copies[1], d, m), dtype, device)
    A = None if A_log is None else empty(A_log.shape, torch.float32, device)
    size = 0 if A_log is None else A_log.numel()
    blocks = [count * cdiv(m * d, BLOCK) for count in copies]
    programs = max(sum(blocks) + cdiv(size, BLOCK), 1)  # no samples: none of them does anything
    launch(
        spread, programs, (x_proj, dt_weight, A_log, wide, tall, A, *blocks, size),
        dict(SETS=sets, USED=used, M=m, D=d, RANK=dt_weight.shape[2], BLOCK=BLOCK), 4,
    )  # fmt: skip
    return [wide, tall, A]


def backward(
    dwide: Tensor, dtall: Tensor, dA: Tensor, A: Tensor, like: Sequence[tuple[torch.Size, torch.dtype]]
) -> Sequence[Tensor | None]:
    """Gradients of x_proj, dt_weight and A_log, whose shapes and dtypes are ``like``.

    From those of their copies, ``dwide`` and ``dtall`` both (copies, m, d), and of A. All contiguous, but ``dwide`` may
    be the transpose of a contiguous tensor.
    """
    with on(dwide.device):
        return replayed(
            lambda: _backward(dwide, dtall, dA, A, like), (dwide, dtall, dA, A), ("gather", tuple(like))
        )  # fmt: skip


def _backward(
    dwide: Tensor, dtall: Tensor, dA: Tensor, A: Tensor, like: Sequence[tuple[torch.Size, torch.dtype]]
) -> list[Tensor | None]:
    made = [empty(shape, dtype, dwide.device) for shape, dtype in like]
    (sets, used, d), rank, size = like[0][0], like[1][0][2], A.numel()
    turned, m, block = not dwide.is_contiguous(), dwide.shape[1], BLOCK // COPIES * 2
    programs = sets * (cdiv((m if turned else used) * d, block) + cdiv(rank * d, block)) + cdiv(size, block)
    launch(
        gather, programs, (dwide, dtall, dA, A, *made, len(dwide) // sets, len(dtall) // sets, size),
        dict(SETS=sets, USED=used, M=m, D=d, RANK=rank, TURNED=turned, BLOCK=block, COPIES=COPIES), 4,
    )  # fmt: skip
    return [*made]
