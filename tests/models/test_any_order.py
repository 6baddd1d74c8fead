"""Any model built on ScanMixer takes any registered order that reads its grids; of classifiers, see backbones.py."""

from __future__ import annotations

import inspect

import pytest
import torch

from vssm.cli.flops import input_shape
from vssm.layers.mixer import ScanMixer
from vssm.registries.zoo import find, list_models
from vssm.scans import list_scans


def dims_of(name: str) -> int:
    return len(input_shape(find(name))) - 2


def cases():
    """Each tiny model that holds a ScanMixer and has an order to choose, with each order."""
    for name in list_models("test_*"):
        row = find(name)
        if row.task == "classification" or "scan" not in inspect.signature(row.model).parameters:
            continue
        if not any(isinstance(module, ScanMixer) for module in row.build().modules()):
            continue
        for scan in list_scans(dims_of(name)):
            yield pytest.param(name, scan, id=f"{name}-{scan}")


@pytest.mark.parametrize(("name", "scan"), list(cases()))
def test_trains_one_step_with_any_order(name, scan):
    """On a grid that is not square: finite loss, a gradient for every parameter of every mixer, finite parameters."""
    torch.manual_seed(0)
    row = find(name)
    size = [64, 96] if dims_of(name) == 2 else [32, 32, 48]
    options = {"img_size": tuple(size)} if row.fixed_input_size else {}
    model = row.build(scan=scan, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = tensors(model(torch.randn(input_shape(row, size, batch=2))))
    loss = torch.stack([(y * torch.randn_like(y)).mean() for y in outputs]).sum()
    loss.backward()
    mixers = [key for key, module in model.named_modules() if isinstance(module, ScanMixer)]
    own = [key for key, _ in model.named_parameters() if any(key.startswith(f"{mixer}.") for mixer in mixers)]
    assert loss.isfinite()
    assert mixers
    assert [key for key in own if not model.get_parameter(key).grad.abs().amax() > 0] == []
    optimizer.step()
    assert all(value.isfinite().all() for value in model.parameters())


def tensors(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for value in values for tensor in tensors(value)]
