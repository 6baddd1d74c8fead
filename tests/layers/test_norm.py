"""Norms against torch's; their GPU kernels in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret, needs_interpreter
from tolerance import TOLERANCE, error
from torch.nn import functional as F

from vssm.layers.norm import ChannelNorm, TokenNorm, TokenRmsNorm

INTERPRETED = """
import torch
import vssm
from torch.nn import functional as F
from vssm.kernels.channel_norm import triton

CASES = (7, 96, False, torch.float32), (1100, 5, False, torch.float32), (9, 24, True, torch.bfloat16)
for rows, c, rms, dtype in CASES:
    x = (torch.randn(rows, c) * 2 + 3).to(dtype)
    weight, bias = torch.randn(c), None if rms else torch.randn(c)
    grad = torch.randn(rows, c)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    if rms:
        expected = F.rms_norm(leaves[0], (c,), leaves[1], 1e-5)
    else:
        leaves.append(bias.double().requires_grad_())
        expected = F.layer_norm(leaves[0], (c,), leaves[1], leaves[2], 1e-5)
    y = triton.forward(x, weight, bias, 1e-5, torch.float32)
    actual = [y, *(g for g in triton.backward(grad, x, weight, bias, 1e-5) if g is not None)]
    wanted = [expected, *torch.autograd.grad(expected, leaves, grad.double())]
    assert len(actual) == len(wanted)
    for a, b in zip(actual, wanted):
        bound = 1e-2 if a.dtype == torch.bfloat16 else 1e-5
        assert (a - b).abs().max() <= bound * b.abs().max(), (rows, c, rms, (a - b).abs().max())
print("agrees")
"""


@needs_interpreter
def test_kernels_agree_with_torch_in_the_interpreter():
    assert interpret(INTERPRETED).split() == ["agrees"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 96, 56, 56), (3, 192, 5, 7), (1, 768, 3, 3), (2, 5, 40, 50)], ids=str)
def test_under_autocast_on_a_gpu(shape, dtype, wide):
    """Values and gradients of the float64 norm, in one rounding; the same bits every time."""
    x = torch.randn(shape, device="cuda").mul(2).add(1).to(wide).contiguous(memory_format=torch.channels_last)
    for kind in (ChannelNorm, TokenNorm, TokenRmsNorm):
        norm = kind(shape[1], **({"narrow": True} if kind is ChannelNorm else {})).cuda()
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        rows = x if kind is ChannelNorm else x.movedim(1, -1)
        leaf = rows.detach().requires_grad_()
        grad = torch.randn_like(rows, dtype=dtype)
        results = []
        for _ in range(2):
            with torch.autocast("cuda", dtype):
                y = norm(leaf)
            results.append([y, *torch.autograd.grad(y, [leaf, *norm.parameters()], grad)])
        assert y.dtype == dtype
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        exact, double = norm.double(), leaf.detach().double().requires_grad_()
        wanted = exact(double)
        gradients = torch.autograd.grad(wanted, [double, *exact.parameters()], grad.double())
        for a, b in zip(results[0], (wanted, *gradients), strict=True):
            rounding = error(b.to(a.dtype), b)  # large beside the deviation where values are
            assert error(a, b) < rounding + (1e-4 if a.dtype == torch.float32 else TOLERANCE[a.dtype] / 4)


def test_narrow_changes_nothing_without_a_gpu():
    x = torch.randn(2, 6, 3, 4)
    norm = ChannelNorm(6, narrow=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
    assert torch.equal(norm(x), F.layer_norm(x.movedim(1, -1), (6,), eps=1e-5).movedim(-1, 1))
