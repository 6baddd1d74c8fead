"""Maps stay in one layout: between the kernels nothing is copied."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vssm  # noqa: F401  (registers the models)
from vssm.layers import conv, ssm


class Copies(TorchDispatchMode):
    """Counts copies of tensors of at least ``size`` elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copying = ("clone", "copy_", "_to_copy", "contiguous", "cat", "constant_pad_nd", "index", "gather", "flip")
        if func.overloadpacket.__name__ in copying and isinstance(out, Tensor) and out.numel() >= self.size:
            self.found.append((str(func), tuple(out.shape)))
        return out


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_copies_no_map(name, batch, monkeypatch):
    """The layout is that of the kernels throughout. What they do inside is theirs; step sizes have small factors."""
    def scanned(u, *args, **kwargs):
        return u.new_zeros(u.shape[0], *u.shape[-2:]), None

    monkeypatch.setattr(ssm, "selective_scan", scanned)
    monkeypatch.setattr(conv, "causal_conv1d", lambda x, *args, **kwargs: (torch.stack([x, x], 1), None))
    model = timm.create_model(name).eval()
    if name == "test_vmamba":
        block, x = model.stages[0].blocks[0], torch.randn(batch, 8, 9, 7).contiguous(memory_format=torch.channels_last)
        arguments = (x,)
    else:
        block, x = model.blocks[0], torch.randn(batch, 1025, 16)
        arguments = (x, (32, 32))
    block(*arguments)                                                       # tables are made once
    with torch.no_grad(), Copies(x.numel()) as copies:
        y = block(*arguments)
    assert y.stride() == x.stride()
    assert copies.found == []
