"""torch.compile and torch.export take the models whole, with sizes left open."""

from __future__ import annotations

import pytest
import timm
import torch
from tolerance import TOLERANCE, error
from torch import nn
from torch.export import Dim

import vssm  # noqa: F401  (registers the models)
from vssm.models.vmamba import VANILLA

CASES = {  # model, its options, and images of several sizes
    "vmamba": ("test_vmamba", {}, [(2, 3, 46, 38), (3, 3, 64, 97), (1, 3, 71, 50)]),
    "vanilla": ("test_vmamba", VANILLA, [(2, 3, 90, 70), (3, 3, 64, 97), (1, 3, 71, 90)]),
    "vim": ("test_vim", {}, [(2, 3, 32, 32), (3, 3, 32, 32)]),
    "vim_any_size": ("test_vim", {"dynamic_img_size": True}, [(2, 3, 48, 40), (3, 3, 32, 64)]),
}


def case(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    model, options, sizes = CASES[name]
    return timm.create_model(model, num_classes=5, **options).eval(), [torch.randn(size) for size in sizes]


@pytest.mark.parametrize("name", CASES)
def test_exports_with_open_sizes(name):
    model, images = case(name)
    sides = {} if name == "vim" else {2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(model, (images[0],), dynamic_shapes={"x": {0: Dim.AUTO, **sides}}).module()
    for x in images:
        assert error(program(x), model(x)) < TOLERANCE[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in CASES), ("vmamba", "inductor"), ("vim", "inductor")]
)
def test_compiles_whole_and_trains(name, backend):
    """One graph for all sizes; the same outputs and gradients."""
    torch._dynamo.reset()
    model, images = case(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for x in images:
        with torch.no_grad():
            assert error(compiled(x), model(x)) < TOLERANCE[torch.float32]
    grads = []
    for call in (model, compiled):
        model.zero_grad()
        call(images[0]).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(error(a, b) < 1e-4 for a, b in zip(*grads, strict=True))      # sums over cells in another order
