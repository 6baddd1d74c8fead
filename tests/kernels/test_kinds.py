"""What is decided once for a kind of call is decided again for every other kind."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import conv_inputs, scan_inputs
from torch import Tensor

from vssm.kernels import causal_conv1d, selective_scan, use_backend


def scan(**changed: Tensor) -> Tensor:
    torch.manual_seed(0)
    inputs = {name: x.float() for name, x in scan_inputs(1, 1, 5, 4, 2).items()} | changed
    return selective_scan(**inputs, delta_softplus=True)[0]


def convolve(**changed: Tensor) -> Tensor:
    torch.manual_seed(0)
    inputs = {name: x.float() for name, x in conv_inputs(1, 1, 5, 4, 3).items()} | changed
    return causal_conv1d(**inputs)[0]


OPS = pytest.mark.parametrize(("op", "first"), [(scan, "u"), (convolve, "x")], ids=["scan", "conv1d"])
SHAPE = (1, 5, 4)


@OPS
def test_a_mistake_is_reported_each_time(op, first):
    for _ in range(2):
        op()
        with pytest.raises(ValueError, match="must be"):
            op(**{first: torch.ones(1, 5, 3)})


@OPS
def test_the_wish_for_gradients_is_part_of_the_kind(op, first):
    x = torch.ones(SHAPE, requires_grad=True)
    for _ in range(2):
        assert op(**{first: x}).requires_grad
        assert not op(**{first: x.detach()}).requires_grad
        with torch.no_grad():
            assert not op(**{first: x}).requires_grad


@OPS
def test_the_backend_asked_for_is_part_of_the_kind(op, first):
    """The reference can be differentiated twice, the others once."""
    x = torch.ones(SHAPE, requires_grad=True)
    for _ in range(2):
        with use_backend("reference"):
            (once,) = torch.autograd.grad(op(**{first: x}).square().sum(), x, create_graph=True)
        torch.autograd.grad(once.square().sum(), x)
        with use_backend("torch"):
            (once,) = torch.autograd.grad(op(**{first: x}).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            once.square().sum().backward()


@OPS
def test_autocast_is_part_of_the_kind(op, first):
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert op().dtype == torch.bfloat16
        assert op().dtype == torch.float32


@OPS
def test_strides_are_part_of_the_kind(op, first):
    x = torch.randn(SHAPE)
    expected = op(**{first: x})
    for other in (x.mT.contiguous().mT, torch.cat([x, x], -1)[..., :4], x.expand(1, 1, 5, 4)):
        for _ in range(2):
            torch.testing.assert_close(op(**{first: other}).view(SHAPE), expected.view(SHAPE))
