"""LeanMlp: timm's MLP, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from vssm.layers.mlp import LeanMlp


@pytest.mark.parametrize("options", [{}, {"drop": 0.5}, {"norm_layer": nn.LayerNorm}, {"act_layer": nn.ReLU}], ids=str)
def test_is_timms_bit_for_bit(options):
    ours, theirs = LeanMlp(6, 24, **options), Mlp(6, 24, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 6)
    results = []
    for mlp in (ours, theirs):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        y = mlp(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *mlp.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_keeps_one_hidden_layer(monkeypatch):
    """The hidden layer before its activation, not the one behind it."""
    from vssm.layers import again

    kept = []
    pack = again.MadeAgain._pack
    monkeypatch.setattr(again.MadeAgain, "_pack", lambda self, x: kept.append(pack(self, x)) or kept[-1])
    LeanMlp(6, 24)(torch.randn(2, 7, 6, requires_grad=True))
    assert sum(isinstance(packed[0], again._Recipe) for packed in kept) == 1
    assert sum(isinstance(packed[0], torch.Tensor) and packed[0].numel() == 2 * 7 * 24 for packed in kept) == 1
