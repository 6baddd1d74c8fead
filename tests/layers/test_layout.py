"""Maps and tokens are views of one another."""

from __future__ import annotations

import math

import pytest
import torch

from vssm.layers.layout import over_map, over_tokens, to_map, to_tokens

GRIDS = [(1, 1), (3, 7), (5, 4), (2, 3, 5)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_are_the_cells_row_by_row_and_come_back(grid, batch):
    x = torch.randn(batch, 4, *grid)
    tokens = to_tokens(x)
    assert torch.equal(tokens, x.flatten(2).transpose(1, 2))
    assert torch.equal(to_map(tokens, grid), x)


@pytest.mark.parametrize("grid", [(3, 7), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_neither_copies_and_maps_stay_channels_last(grid, batch):
    """Also for a batch of one, where a careless view gets a stride that convolutions do not understand."""
    tokens = torch.randn(batch, math.prod(grid), 4)
    x = to_map(tokens, grid)
    layout = torch.channels_last if len(grid) == 2 else torch.channels_last_3d
    assert x.data_ptr() == tokens.data_ptr()
    assert x.is_contiguous(memory_format=layout)
    assert x.stride(0) == tokens.stride(0)
    assert to_tokens(x).data_ptr() == tokens.data_ptr()
    assert to_tokens(x).is_contiguous()


def test_modules_of_one_kind_apply_to_the_other():
    x = torch.randn(2, 4, 3, 5)
    linear, conv = torch.nn.Linear(4, 6), torch.nn.Conv2d(4, 6, 1)
    conv.weight.data, conv.bias.data = linear.weight.data[:, :, None, None], linear.bias.data
    expected = conv(x)
    assert torch.allclose(over_tokens(linear, x), expected, atol=1e-6)
    assert torch.allclose(to_map(over_map(conv, to_tokens(x), (3, 5)), (3, 5)), expected, atol=1e-6)
