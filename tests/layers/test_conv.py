"""Convolutions that GPUs run in another form: the same sums."""

from __future__ import annotations

import pytest
import torch
from tolerance import TOLERANCE, error
from torch import nn
from torch.nn import functional as F

from vssm.layers.conv import HalvingConv3d, SameConv3d, _ByGradient, over_cells


@pytest.mark.parametrize("size", [3, 5, 7])
def test_stride_2_is_stride_1_over_cells(size):
    x, weight = torch.randn(2, 3, 8, 12, 6, dtype=torch.double), torch.randn(5, 3, *[size] * 3, dtype=torch.double)
    assert error(F.conv3d(*over_cells(x, weight)), F.conv3d(x, weight, stride=2, padding=size // 2)) < 1e-12


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_convolution_is_a_gradient(size):
    x = torch.randn(2, 3, 4, 6, 5, dtype=torch.double, requires_grad=True)
    weight = torch.randn(4, 3, *[size] * 3, dtype=torch.double, requires_grad=True)
    y, expected = _ByGradient.apply(x, weight, (size // 2,) * 3), F.conv3d(x, weight, padding=size // 2)
    assert error(y, expected) < TOLERANCE[torch.float64]
    grads = [torch.autograd.grad(value, (x, weight), torch.ones_like(y)) for value in (y.sin(), expected.sin())]
    for ours, theirs in zip(*grads):
        assert error(ours, theirs) < TOLERANCE[torch.float64]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "channels", "size"), [(SameConv3d, 8, 3), (SameConv3d, 3, 3), (HalvingConv3d, 4, 7)])
def test_on_a_gpu_they_are_those_of_torch(kind, channels, size, dtype):
    conv = kind(channels, 16, size).cuda()
    rounded = lambda x: x.to(dtype).float()
    for parameter in conv.parameters():
        parameter.data = rounded(parameter.data)
    x = rounded(torch.randn(2, channels, 12, 8, 10, device="cuda")).to(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    with torch.autocast("cuda", dtype):
        y = conv(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    wide = [value.detach().double().requires_grad_() for value in (x, *conv.parameters())]
    expected = nn.functional.conv3d(*wide, conv.stride, conv.padding)
    grad = torch.randn_like(expected).to(dtype)
    actual = [y, *torch.autograd.grad(y, (x, *conv.parameters()), grad)]
    for ours, theirs in zip(actual, [expected, *torch.autograd.grad(expected, wide, grad.double())]):
        assert error(ours, theirs) < TOLERANCE[dtype] + error(theirs.to(dtype), theirs)
