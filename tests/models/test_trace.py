"""Models traced with ``torch.jit.trace``, as MONAI's bundles are exported; loading needs ``import vssm``."""

from __future__ import annotations

import pytest
import torch
from tree import run_python

from vssm.registries.zoo import create_model

SIZES = {"test_vmamba": (3, 32, 48), "test_vim": (3, 32, 32), "test_mamba2d": (3, 32, 48), "test_segmamba": (3, 32, 48)}


@pytest.mark.filterwarnings("ignore")  # the tracer warns of each size that it takes for a constant
@pytest.mark.parametrize("name", SIZES)
def test_a_traced_model_is_the_model(name, tmp_path):
    model, x = create_model(name).eval(), torch.randn(2, *SIZES[name])
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, x), str(tmp_path / "model.ts"))
        torch.save({"x": x, "y": model(x)}, tmp_path / "case.pt")
    printed = run_python(f"""
import torch, vssm
case = torch.load({str(tmp_path / "case.pt")!r})
with torch.no_grad():
    y = torch.jit.load({str(tmp_path / "model.ts")!r})(case["x"])
print(torch.allclose(y, case["y"], rtol=1e-4, atol=1e-5))
""")
    assert printed.strip() == "True"
