"""Models traced with ``torch.jit.trace``, as MONAI's bundles are exported; loading needs ``import vssm``."""

from __future__ import annotations

import warnings

import pytest
import torch
from tree import run_python

from vssm.registries.zoo import create_model

SIZES = {"test_vmamba": (3, 32, 48), "test_vim": (3, 32, 32), "test_mamba2d": (3, 32, 48), "test_segmamba": (3, 32, 48)}


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory):
    """Names of the models that are themselves again in another process, once for all: it takes long to start."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("traced")
    for name, size in SIZES.items():
        model, x = create_model(name).eval(), torch.randn(2, *size)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns of each size that it takes for a constant
            torch.jit.save(torch.jit.trace(model, x), str(folder / f"{name}.ts"))
            torch.save({"x": x, "y": model(x)}, folder / f"{name}.pt")
    return run_python(f"""
import torch, vssm
for name in {list(SIZES)}:
    case = torch.load(f"{folder}/{{name}}.pt")
    with torch.no_grad():
        y = torch.jit.load(f"{folder}/{{name}}.ts")(case["x"])
    if torch.allclose(y, case["y"], rtol=1e-4, atol=1e-5):
        print(name)
""").split()


@pytest.mark.parametrize("name", SIZES)
def test_a_traced_model_is_the_model(name, agreeing):
    assert name in agreeing


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim"])
def test_a_model_may_be_traced_with_gradients_on(name):
    """The tracer's own check holds, and what was traced has the model's gradients."""
    torch.manual_seed(0)
    model, x = create_model(name).eval(), torch.randn(2, *SIZES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    actual = torch.autograd.grad(traced(x).square().sum(), parameters)
    for value, other in zip(actual, expected):
        assert torch.allclose(value, other, rtol=1e-4, atol=1e-5)
