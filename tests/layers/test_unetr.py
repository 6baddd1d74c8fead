"""UNETR's blocks against MONAI's."""

from __future__ import annotations

import pytest
import torch
from tolerance import TOLERANCE, error

from vssm.layers import conv, unetr
from vssm.layers.unetr import ResidualBlock, UpBlock


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(("dim", "out"), [(3, 5), (4, 4)])
@pytest.mark.parametrize("res_block", [True, False])
def test_blocks_are_those_of_monai(spatial_dims, dim, out, res_block):
    blocks = pytest.importorskip("monai.networks.blocks")
    common = dict(kernel_size=3, norm_name="instance", res_block=res_block)
    theirs = blocks.UnetrBasicBlock(spatial_dims, dim, out, stride=1, **common).double()
    ours = ResidualBlock(spatial_dims, dim, out, res_block).double()
    state = {key.removeprefix("layer.").replace(".conv.", "."): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(2, dim, *(4, 6, 2)[:spatial_dims], dtype=torch.double)
    assert error(ours(x), theirs(x)) < TOLERANCE[torch.float64]

    theirs = blocks.UnetrUpBlock(spatial_dims, dim, out, upsample_kernel_size=2, **common).double()
    up = UpBlock(spatial_dims, dim, out, res_block).double()
    names = {"transp_conv.conv.": "up.", "conv_block.": "block.", ".conv.weight": ".weight"}
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    up.load_state_dict(state)
    skip = torch.randn(2, out, *(8, 12, 4)[:spatial_dims], dtype=torch.double)
    assert error(up(x, skip), theirs(x, skip)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(("dim", "out"), [(40, 40), (4, 48), (80, 40)])
def test_zero_channels_between_convolutions_change_nothing(dim, out, monkeypatch):
    block = ResidualBlock(3, dim, out).double()
    x = torch.randn(1, dim, 3, 4, 2, dtype=torch.double, requires_grad=True)
    grads, widths = [], []
    for wide in (False, True):
        if wide:                                                    # as in half precision on a GPU
            for module in (conv, unetr):
                monkeypatch.setattr(module, "half", lambda x: x.dtype)
            monkeypatch.setattr(unetr, "has_kernels", lambda x: True)
            block.conv2.register_forward_hook(lambda module, inputs, y: widths.append(y.shape[1]))
        y = block(x)
        grads.append([y, *torch.autograd.grad(y.sin().sum(), [x, *block.parameters()])])
    assert widths == [64]
    assert all(error(a, b) < TOLERANCE[torch.float64] for a, b in zip(*grads, strict=True))


def test_joined_maps_are_not_kept():
    """Nor do gradients change."""
    block, kept = UpBlock(2, 6, 4), []
    x, skip = torch.randn(2, 6, 3, 5, requires_grad=True), torch.randn(2, 4, 6, 10, requires_grad=True)
    inputs = [x, skip, *block.parameters()]
    grads = torch.autograd.grad(block(x, skip).square().sum(), inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = block(x, skip)                                          # these hooks stand in its way
    assert torch.Size([2, 8, 6, 10]) in kept
    assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(y.square().sum(), inputs), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [4, 48])
def test_half_precision_on_a_gpu_is_near_float64(dim):
    """With zero channels between the convolutions, convolutions as gradients and fused norms."""
    block = ResidualBlock(3, dim, 48).cuda()
    x = torch.randn(2, dim, 16, 8, 12, device="cuda").to(memory_format=torch.channels_last_3d)
    with torch.autocast("cuda", torch.bfloat16):
        y = block(x)
    assert block.inner_width(x.bfloat16()) == 64
    assert y.shape == (2, 48, 16, 8, 12)
    assert error(y, block.double()(x.double())) < 5 * TOLERANCE[torch.bfloat16]      # four roundings in a row
