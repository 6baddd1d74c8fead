"""UNETR's blocks against MONAI's."""

from __future__ import annotations

import pytest
import torch
from tolerance import TOLERANCE, error

from vssm.layers.unetr import ResidualBlock, UpBlock


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(("dim", "out"), [(3, 5), (4, 4)])
def test_blocks_are_those_of_monai(spatial_dims, dim, out):
    blocks = pytest.importorskip("monai.networks.blocks")
    common = dict(kernel_size=3, norm_name="instance", res_block=True)
    theirs = blocks.UnetrBasicBlock(spatial_dims, dim, out, stride=1, **common).double()
    ours = ResidualBlock(spatial_dims, dim, out).double()
    state = {key.removeprefix("layer.").replace(".conv.", "."): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(2, dim, *(4, 6, 2)[:spatial_dims], dtype=torch.double)
    assert error(ours(x), theirs(x)) < TOLERANCE[torch.float64]

    theirs = blocks.UnetrUpBlock(spatial_dims, dim, out, upsample_kernel_size=2, **common).double()
    up = UpBlock(spatial_dims, dim, out).double()
    names = {"transp_conv.conv.": "up.", "conv_block.": "block.", ".conv.weight": ".weight"}
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    up.load_state_dict(state)
    skip = torch.randn(2, out, *(8, 12, 4)[:spatial_dims], dtype=torch.double)
    assert error(up(x, skip), theirs(x, skip)) < TOLERANCE[torch.float64]


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
