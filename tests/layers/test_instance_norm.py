"""InstanceNorm against torch's, and what it keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret, needs_interpreter
from tolerance import TOLERANCE, error
from torch.nn import functional as F
from tree import ROOT

from vssm.layers.instance_norm import InstanceNorm
from vssm.layers.layout import to_map, to_tokens

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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
    with pytest.raises(ValueError, match="slope must not be negative, so that signs stay, got -1"):
        InstanceNorm(-1)


INTERPRETED = f"""
sys.path += [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "layers")!r}]
import torch
from test_instance_norm import agree
from vssm.kernels.instance_norm import triton as kernels

def call(x, residual, normed, slope, grad):
    y, *stats = kernels.forward(x, residual, normed, slope, 1e-5)
    return y, *kernels.backward(grad, y if slope else x, residual, *stats, slope)

torch.manual_seed(0)
agree(call, (2, 37, 4), torch.float32, "normed", 0.01)
agree(call, (1, 300, 12), torch.float32, "added", 0.01)
agree(call, (1, 5, 5), torch.float32, "added", 1.0)
agree(call, (1, 200, 96), torch.bfloat16, "none", 0.0)
agree(call, (2, 400, 48), torch.bfloat16, "normed", 0.01)
x, grad = torch.randn(2, 2, 50, 48)
y, *stats = kernels.forward(x, None, False, 0.01, 1e-5)
dx, _ = kernels.backward(grad, y, None, *stats, 0.01)
wide, _ = kernels.backward(grad, y, None, *stats, 0.01, 64)
assert torch.equal(wide[..., :48], dx) and not wide[..., 48:].any()
"""


def agree(call, size, dtype, mode, slope, device="cpu"):
    """``call`` on tokens (b, n, c), whose gradient and residual lie in wider ones, against float64."""
    b, n, c = size
    make = lambda: torch.randn(b, n, 2 * c, device=device).to(dtype)[..., c:]
    x, residual, grad = make() / 2 + 3, None if mode == "none" else make(), make()
    inputs = [x] if residual is None else [x, residual]
    wide = [value.double().requires_grad_() for value in inputs]
    maps = [value.mT for value in wide]
    if mode == "normed":
        maps[1] = F.instance_norm(maps[1], eps=1e-5)
    expected = plain(*maps, *[None] * (2 - len(maps)), slope).mT
    grad = grad * (expected.abs() > 1e-3 * max(slope, 1e-9))        # a rounding decides on which side of 0 others lie
    grads = torch.autograd.grad(expected, wide, grad.double())
    found = call(x, residual, mode == "normed", slope, grad)
    assert found[0].dtype == found[1].dtype == dtype
    # A half precision y is rounded, and the normalised input recovered from it, to 2^-9 of what may be 4 deviations.
    bound = 4 * TOLERANCE[torch.float32] if dtype == torch.float32 else 3 * TOLERANCE[dtype]
    for actual, value in zip(found, [expected, *grads]):
        assert error(actual, value) < bound


@needs_interpreter
def test_kernels_agree_with_the_formula_in_tritons_interpreter():
    interpret(INTERPRETED)


def on_gpu(x, residual, normed, slope, grad):
    """The layer on maps of a grid of three sides."""

    def to_grid(x):
        return to_map(x, (1, 1, x.shape[1])) if x.shape[1] % 6 else to_map(x, (2, 3, x.shape[1] // 6))

    inputs = [to_grid(value).detach().requires_grad_() for value in (x, residual) if value is not None]
    y = InstanceNorm(slope)(*inputs, *[None] * (2 - len(inputs)), normed)
    return [to_tokens(value) for value in (y, *torch.autograd.grad(y, inputs, to_grid(grad)))]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slope", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("mode", ["none", "added", "normed"])
@pytest.mark.parametrize("size", [(2, 1170, 48), (1, 9240, 12), (3, 97, 4), (2, 60, 5), (2, 4096, 96), (1, 64, 384)])
def test_kernels_agree_with_the_formula(dtype, slope, mode, size):
    agree(on_gpu, size, dtype, mode, slope, "cuda")


@pytest.mark.gpu
@needs_gpu
def test_kernels_repeat_bit_for_bit_and_take_any_layout():
    x, residual, grad = torch.randn(3, 2, 50000, 48, device="cuda", dtype=torch.bfloat16).unbind()
    first, second = (on_gpu(x, residual, True, 0.01, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))
    wide = on_gpu(x.float(), residual.float(), True, 0.01, grad.float())[0]
    maps = [to_map(value.float(), (50, 1000)).contiguous() for value in (x, residual)]      # channels first
    assert error(to_tokens(InstanceNorm(0.01)(*maps, normed=True)), wide) < TOLERANCE[torch.float32]
    none = torch.randn(0, 48, 5, 4, device="cuda", requires_grad=True)
    assert InstanceNorm()(none).shape == none.shape
