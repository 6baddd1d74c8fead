"""``model.to(memory_format=torch.channels_last)``, as timm's scripts call it."""

from __future__ import annotations

import pytest
import timm
import torch
from tolerance import TOLERANCE, error

import vssm


@pytest.mark.parametrize("name", [name for name in vssm.list_models(task="classification") if name.startswith("test_")])
def test_a_model_may_be_put_channels_last(name):
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, *model.default_cfg["input_size"][1:])
    with torch.no_grad():
        expected = model(x)
        y = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert error(y, expected) < TOLERANCE[torch.float32]
