"""A loss that is not finite stops the run and is traced to a module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vssm.tasks.finite import all_finite, first_nonfinite_module


class Log(nn.Module):
    """Non-finite by a function between its children: the module itself is to blame, not the child behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Linear(2, 2)

    def forward(self, x):
        return self.second(torch.log(self.first(x) * 0))


def test_the_innermost_module_with_finite_inputs_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), Log()), nn.Linear(2, 2))
    assert first_nonfinite_module(model, lambda: model(torch.ones(3, 2))) == "1.1 (Log)"
    assert not any(module._forward_hooks for module in model.modules())


def test_a_broken_parameter_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].bias.data[0] = torch.nan
    found = first_nonfinite_module(model, lambda: model(torch.ones(3, 2)))
    assert found == "1 (LayerNorm; its parameter bias is not finite)"


def test_nothing_is_named_where_all_is_finite_or_the_input_is_not():
    model = nn.Linear(2, 2)
    assert first_nonfinite_module(model, lambda: model(torch.ones(3, 2))) is None
    assert first_nonfinite_module(model, lambda: model(torch.full((3, 2), torch.inf))) is None


@pytest.mark.parametrize(
    ("value", "finite"),
    [
        ([torch.ones(2), {"a": (torch.zeros(1), None, "text")}], True),
        ([torch.ones(2), {"a": (torch.tensor(torch.inf),)}], False),
        (torch.tensor([1, 2]), True),
        (torch.tensor([complex(0, torch.nan)]), False),
        (torch.empty(0), True),
    ],
)
def test_nests_of_tensors_are_looked_through(value, finite):
    assert all_finite(value) is finite
