"""What is decided once for a kind of call is decided again for every other kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import conv_inputs, scan_inputs
from torch import Tensor

from vssm.kernels import causal_conv1d, selective_scan, use_backend


def scan(**changed: Any) -> Tensor:
    torch.manual_seed(0)
    inputs = {name: x.float() for name, x in scan_inputs(1, 1, 5, 4, 2).items()}
    return selective_scan(**inputs | {"delta_softplus": True} | changed)[0]


def convolve(**changed: Any) -> Tensor:
    torch.manual_seed(0)
    inputs = {name: x.float() for name, x in conv_inputs(1, 1, 5, 4, 3).items()} | changed
    return causal_conv1d(**inputs)[0]


OPS = pytest.mark.parametrize(("op", "first"), [(scan, "u"), (convolve, "x")], ids=["scan", "conv1d"])
SHAPE = (1, 5, 4)


@OPS
def test_a_mistake_is_reported_each_time(op, first):
    for shape in ((1, 5, 3), (2, 5, 4)) * 2:  # the second has the strides of what fits
        op(**{first: torch.ones(SHAPE)})
        with pytest.raises(ValueError, match="must be"):
            op(**{first: torch.ones(shape)})
    table = torch.tensor([[4, 3, 2, 1, 0]])
    for _ in range(2):
        op(table=table)
        with pytest.raises(ValueError, match="must hold integers"):
            op(table=table.double())


@OPS
def test_the_wish_for_gradients_is_part_of_the_kind(op, first):
    x = torch.ones(SHAPE, requires_grad=True)
    for _ in range(2):
        with torch.no_grad():
            assert not op(**{first: x}).requires_grad
        assert not op(**{first: x.detach()}).requires_grad
        assert op(**{first: x}).requires_grad


@OPS
def test_the_backend_asked_for_is_part_of_the_kind(op, first):
    """The reference can be differentiated twice, the others once."""
    x = torch.ones(SHAPE, requires_grad=True)

    def gradient(forced: str | None, backend: str | None) -> Tensor:
        with use_backend(forced):
            y = op(**{first: x}, backend=backend)
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].square().sum()

    for _ in range(2):
        for reference, other in ((("reference", None), ("torch", None)), ((None, "reference"), (None, "torch"))):
            torch.autograd.grad(gradient(*reference), x)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                gradient(*other).backward()


@pytest.mark.parametrize(
    ("op", "options"),
    [(scan, {"delta_softplus": False}), (scan, {"merge": "sum"}), (convolve, {"activation": "silu"})],
    ids=["scan softplus", "scan merge", "conv1d activation"],
)
def test_options_are_part_of_the_kind(op, options):
    for _ in range(2):
        plain, other = op(), op(**options)
        assert plain.shape != other.shape or not torch.equal(plain, other)


def test_which_tables_are_one_and_the_same_is_part_of_the_kind():
    """Those that are int32 already are taken as they come."""
    table, other = torch.tensor([[4, 3, 2, 1, 0]]), torch.tensor([[1, 0, 4, 2, 3]])
    for read, write in ((table, other), (other, table), (table, table), (other, other)):
        expected = scan(table=table.int(), read=read.int(), write=write.int())
        assert torch.equal(scan(table=table, read=read, write=write), expected)


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
