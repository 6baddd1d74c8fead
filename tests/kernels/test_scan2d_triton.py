"""The GPU kernels of the 2D scan: in Triton's interpreter, compiled without a GPU, and against the published method."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import error
from torch import Tensor
from tree import run_python

from vssm.kernels.scan2d import scan2d

triton = pytest.importorskip("triton")
# Triton 3.6 interprets a loop bound as int(array of one element), which NumPy refuses from 2.4 on
interpreter_works = [int(part) for part in triton.__version__.split(".")[:2]] >= [3, 7] or (
    [int(part) for part in np.__version__.split(".")[:2]] < [2, 4]
)
has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

INTERPRETED = """
import dataclasses, os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from vssm.kernels.scan2d import torch as plain
from vssm.kernels.scan2d import triton
from vssm.kernels.scan2d.problem import Problem

triton.FORWARD, triton.BACKWARD, triton.AHEAD = (16, 1), (32, 4), 3
for (b, h, w, d, n), softplus, reverse, dtype in [
    ((2, 3, 5, 4, 3), False, False, torch.float32),
    ((1, 3, 2, 9, 2), True, True, torch.float32),
    ((1, 1, 3, 3, 1), False, True, torch.bfloat16),
    ((1, 5, 1, 2, 3), True, False, torch.float32),
]:
    torch.manual_seed(0)
    u, top, left, dy = torch.rand(4, b, h, w, d).mul(2).sub(1).to(dtype)
    A_top, A_left = -torch.rand(2, d, n)
    B_top, B_left, C = torch.rand(3, b, h, w, n).mul(2).sub(1).to(dtype)
    D = torch.rand(d) if softplus else None
    if not softplus:
        top, left = top.abs(), left.abs()
    p = Problem(u, top, left, A_top, A_left, B_top, B_left, C, D, softplus, reverse)
    wide = dataclasses.replace(p, **{name: x.double() for name, x in vars(p).items() if isinstance(x, torch.Tensor)})
    pairs = [(triton.forward(p), plain.forward(wide))]
    for triton.WORKSPACE in (0.0, 100.0) if b > 1 else (1.0,):  # one sample at a time, all at once
        pairs += zip(triton.backward(p, dy), plain.backward(wide, dy.double()))
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for i, (actual, expected) in enumerate(pairs):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert actual.isfinite().all()
            assert (actual.double() - expected).abs().max() <= bound * (expected.abs().max() + 1e-9), (b, h, w, d, n, i)
print("agrees")
"""

COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vssm.kernels.scan2d import triton, triton_kernels

HALF = {"u", "delta_top", "delta_left", "B_top", "B_left", "C", "dy", "y", "du", "ddelta_top", "ddelta_left"}
SINGLE = {"A_top", "A_left", "D", "lines", "messages", "dA_top", "dA_left", "dB_top", "dB_left", "dC", "dD"}
for fn, (tile, warps) in (triton_kernels.outputs, triton.FORWARD), (triton_kernels.gradients, triton.BACKWARD):
    fixed = dict(SOFTPLUS=True, REVERSE=True, AHEAD=triton.AHEAD, BLOCK_N=16, BLOCK_D=tile // 16)
    kinds = dict.fromkeys(HALF, "*bf16") | dict.fromkeys(SINGLE, "*fp32") | dict.fromkeys(fixed, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in fn.arg_names}
    kernel = compile(ASTSource(fn, signature, fixed), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(fn.__name__, kernel.metadata.shared, "st.local" in kernel.asm["ptx"])
"""


@pytest.mark.skipif(not interpreter_works, reason="this Triton's interpreter does not run beside this NumPy")
def test_kernels_agree_with_the_plain_backend_in_the_interpreter():
    """One row, one column, several bands, several blocks of channels, samples one by one and together."""
    assert run_python(INTERPRETED).split() == ["agrees"]


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here():
    """For an H100, with little shared memory: what states need is in registers."""
    lines = run_python(COMPILED).split("\n")[:2]
    assert [line.split()[0] for line in lines] == ["outputs", "gradients"]
    for line in lines:
        assert int(line.split()[1]) <= 32768
        assert line.split()[2] == "False", "a tensor was put into local memory"


class Published(torch.autograd.Function):
    """The method of Mamba2D's kernels in plain torch: a wavefront over anti-diagonals, all states stored in u's dtype.

    Written from the recurrence (specification of the operator), for comparison only. Maps come flattened, (b, h·w, …);
    states have a border of zeros, (b, (h + 1)·(w + 1), d, n), so that a diagonal and its neighbours are slices.
    """

    @staticmethod
    def forward(ctx: Any, u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, h, w):
        b, _, d = u.shape
        states = u.new_zeros(b, (h + 1) * (w + 1), d, A_top.shape[1])
        for at, own, above, left, c_top, c_left in diagonals(h, w, u):
            x = u[:, at]
            top = torch.exp(delta_top[:, at, :, None] * A_top) * states[:, above]
            top += (delta_top[:, at] * x)[..., None] * B_top[:, at, None]
            side = torch.exp(delta_left[:, at, :, None] * A_left) * states[:, left]
            side += (delta_left[:, at] * x)[..., None] * B_left[:, at, None]
            states[:, own] = c_top * top + c_left * side
        inner = states.view(b, h + 1, w + 1, d, -1)[:, 1:, 1:].view(b, h, w, d, -1)
        y = (inner * C.view(b, h, w, 1, -1)).sum(-1).view_as(u) + D * u
        ctx.save_for_backward(u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, states)
        ctx.grid = h, w
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, states = ctx.saved_tensors
        (h, w), (b, _, d) = ctx.grid, u.shape
        inner = states.view(b, h + 1, w + 1, d, -1)[:, 1:, 1:]
        dC = (dy.view(b, h, w, d, 1) * inner).sum(3).view_as(C)
        lam = dy[..., None] * C[:, :, None]
        down, right = (u.new_zeros(b, h + 1, d, A_top.shape[1]) for _ in range(2))  # by row, from the diagonal after
        du, ddelta_top, ddelta_left = D * dy, torch.empty_like(u), torch.empty_like(u)
        dB_top, dB_left, dA_top, dA_left = map(torch.zeros_like, (B_top, B_left, A_top, A_left))
        for k, (at, _, above, left, c_top, c_left) in reversed(list(enumerate(diagonals(h, w, u)))):
            low, high = max(0, k - w + 1), min(k, h - 1)
            g = lam[:, at] + down[:, low + 1 : high + 2] + right[:, low : high + 1]
            x = u[:, at]
            for c, delta, A, B, before, out, ddelta, dA, dB in (
                (c_top, delta_top, A_top, B_top, above, down, ddelta_top, dA_top, dB_top),
                (c_left, delta_left, A_left, B_left, left, right, ddelta_left, dA_left, dB_left),
            ):
                gate = torch.exp(delta[:, at, :, None] * A)
                weighted = c * g
                passed = weighted * gate
                decay = passed * states[:, before]
                enter = (weighted * B[:, at, None]).sum(3)
                ddelta[:, at] = (decay * A).sum(3) + enter * x
                du[:, at] += enter * delta[:, at]
                dA += (decay * delta[:, at, :, None]).sum((0, 1))
                dB[:, at] = (weighted * (delta[:, at] * x)[..., None]).sum(2)
                out[:, low : high + 1] = passed
        return du, ddelta_top, ddelta_left, dA_top, dA_left, dB_top, dB_left, dC, (dy * u).sum((0, 1)), None, None


def diagonals(h: int, w: int, like: Tensor):
    """For each anti-diagonal: its cells; they, those above and to the left among the bordered states; the weights."""
    c_top, c_left = torch.full((2, h, w), 0.5).unbind()
    c_top[1:, 0], c_left[1:, 0], c_top[0], c_left[0] = 1.0, 0.0, 0.0, 1.0
    c_top, c_left = (c.reshape(-1, 1, 1).to(like) for c in (c_top, c_left))
    for k in range(h + w - 1):
        low, high = max(0, k - w + 1), min(k, h - 1)
        at = slice(k + low * (w - 1), k + high * (w - 1) + 1, max(w - 1, 1))
        own = (low + 1) * (w + 1) + k - low + 1
        bordered = [slice(start, start + (high - low) * w + 1, w) for start in (own, own - w - 1, own - 1)]
        yield at, *bordered, c_top[at], c_left[at]


def published(h: int, w: int, *operands: Tensor) -> Tensor:
    return Published.apply(*operands, h, w)


def random_operands(b: int, h: int, w: int, d: int, n: int, **place) -> list[Tensor]:
    """Flattened leaves; A and D too are in the dtype asked for, as the published operator casts them."""
    u = torch.randn(b, h * w, d)
    steps = torch.rand(2, b, h * w, d) * 0.5
    gates = torch.randn(3, b, h * w, n)
    values = (u, *steps, *-(torch.rand(2, d, n) * n + 0.5), *gates, torch.randn(d))
    return [x.to(**place).requires_grad_() for x in values]


@pytest.mark.parametrize(("h", "w"), [(3, 5), (6, 4), (2, 2)])
def test_the_method_compared_with_is_the_same_function(h, w):
    operands = random_operands(2, h, w, 3, 2, dtype=torch.float64)
    y, expected = published(h, w, *operands), scan2d(*operands, grid=(h, w), backend="torch")
    assert error(y, expected) < 1e-9
    weight = torch.randn_like(y)
    for x, z in zip(torch.autograd.grad(y, operands, weight), torch.autograd.grad(expected, operands, weight)):
        assert error(x, z) < 1e-9


def measure(call: Callable[[], Tensor], operands: list[Tensor], weight: Tensor, repeats: int) -> tuple[float, int]:
    """Median milliseconds of forward and backward, and the peak of memory while they run, operands included."""
    torch.autograd.grad(call(), operands, weight)
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - sum(x.nbytes for x in (*operands, weight))  # left by other tests
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(call(), operands, weight)
    torch.cuda.synchronize()
    peak, times = torch.cuda.max_memory_allocated() - others, []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.autograd.grad(call(), operands, weight)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times), peak


@has_gpu
@pytest.mark.gpu
@pytest.mark.slow
def test_three_times_as_fast_as_the_published_method_in_a_quarter_of_the_memory():
    """Forward and backward at (b 32, 56×56, d 128, n 16) in bfloat16."""
    h = w = 56
    torch.use_deterministic_algorithms(False)  # which would fill torch.empty in what is timed
    operands = random_operands(32, h, w, 128, 16, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn_like(operands[0])
    theirs, their_memory = measure(lambda: published(h, w, *operands), operands, weight, 3)
    ours, our_memory = measure(lambda: scan2d(*operands, grid=(h, w), backend="triton"), operands, weight, 20)
    for name, time, memory in (("published", theirs, their_memory), ("scan2d", ours, our_memory)):
        print(f"{name}: {time:.2f} ms, {memory / 2**20:.0f} MiB")
    assert theirs >= 3 * ours
    assert their_memory >= 4 * our_memory
