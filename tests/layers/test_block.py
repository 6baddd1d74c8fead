"""Residual blocks around a mixer."""

from __future__ import annotations

import pytest
import torch

from vssm.layers.block import MixerBlock
from vssm.layers.mixer import ScanMixer


@pytest.mark.parametrize("mlp", [None, lambda dim: torch.nn.Linear(dim, dim)], ids=["alone", "mlp"])
def test_hands_on_a_map_of_its_own_channels_last(mlp):
    """Compiled with open sizes, a block that handed on a view of its tokens could not be trained."""
    block = MixerBlock(4, lambda dim: ScanMixer(dim, scan="cross"), mlp)
    y = block(torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last))
    assert y.shape == (2, 4, 3, 5)
    assert not y._is_view()
    assert y.is_contiguous(memory_format=torch.channels_last)
