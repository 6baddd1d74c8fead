"""InstanceNorm against torch's, and what it keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
from tolerance import TOLERANCE, error
from torch.nn import functional as F

from vssm.layers.instance_norm import InstanceNorm


def plain(x, residual, slope):
    y = F.instance_norm(x, eps=1e-5)
    return F.leaky_relu(y if residual is None else y + residual, slope)


@pytest.mark.parametrize("slope", [1.0, 0.01])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (1, 1, 2, 1), (3, 2, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_is_that_of_torch_with_its_gradients(slope, size, with_residual, channels_last):
    x = torch.randn(size, dtype=torch.double) * 3 + 1
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    residual = torch.randn(size, dtype=torch.double, requires_grad=True) if with_residual else None
    inputs = [x, residual] if with_residual else [x]
    grad = torch.randn(size, dtype=torch.double)
    y, expected = InstanceNorm(slope)(x, residual), plain(x, residual, slope)
    assert error(y, expected) < TOLERANCE[torch.float64]
    assert error(InstanceNorm(slope).plain(x, residual), expected) < TOLERANCE[torch.float64]
    for ours, theirs in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        assert error(ours, theirs) < TOLERANCE[torch.float64]


def test_adds_eps_to_the_variance():
    x = torch.randn(1, 2, 6, dtype=torch.double)[..., None] * 1e-3
    assert error(InstanceNorm(eps=1e-2)(x), F.instance_norm(x, eps=1e-2)) < TOLERANCE[torch.float64]
    constant = torch.full((1, 2, 3, 3), 7.0)
    assert InstanceNorm()(constant).abs().max() < 1e-4


def test_keeps_its_output_alone():
    """Beside the residual, which somebody else keeps, one map is kept: the output."""
    kept = []
    x, residual = torch.randn(2, 3, 8, 8, requires_grad=True) * 2, torch.randn(2, 3, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = InstanceNorm(0.01)(x, residual)
    maps = {t.data_ptr() for t in kept if t.numel() == x.numel()}
    assert maps == {y.data_ptr(), residual.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_has_float32_statistics(dtype):
    x = torch.randn(2, 3, 40, 40).mul(0.1).add(3).to(dtype).requires_grad_()
    y = InstanceNorm(0.01)(x)
    grad = torch.randn(2, 3, 40, 40)
    wide = x.detach().float().requires_grad_()
    expected = plain(wide, None, 0.01)
    assert y.dtype == dtype
    assert error(y, expected) < TOLERANCE[dtype]
    (ours,), (theirs,) = torch.autograd.grad(y, x, grad.to(dtype)), torch.autograd.grad(expected, wide, grad)
    assert error(ours, theirs) < 2 * TOLERANCE[dtype]               # the normalised input is read from a rounded output


def test_refuses_what_has_no_variance_or_cannot_be_undone():
    with pytest.raises(ValueError, match=r"a channel of one cell has no variance; got a map \(2, 3, 1, 1\)"):
        InstanceNorm()(torch.randn(2, 3, 1, 1))
    with pytest.raises(ValueError, match="slope must be positive, so that the activation can be undone, got 0"):
        InstanceNorm(0)
