"""mamba_ssm's and causal_conv1d's functions over our ops, against the values that the published references gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import signed, uniform
from tolerance import TOLERANCE, error
from torch import Tensor

from vssm.kernels import selective_scan
from vssm.kernels.compat import causal_conv1d_fn, selective_scan_fn

GOLDEN = Path(__file__).parents[1] / "golden" / "selective_scan"


def cases(name: str) -> list[Any]:
    recorded = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    return [pytest.param(case, id=f"{name}-{case['case']}") for case in recorded]


def check(case: dict[str, Any], outputs: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> None:
    """Compare outputs, and gradients for the recorded cotangents, at 1e-9 of the largest entry."""
    named = dict(zip(case["outputs"], outputs))
    weights = {name: array(spec) for name, spec in case["grad_outputs"].items()}
    loss = sum((named[name.removeprefix("grad_")] * weight).sum() for name, weight in weights.items())
    named |= {f"gradient of {name}": x for name, x in zip(inputs, torch.autograd.grad(loss, tuple(inputs.values())))}
    expected = case["outputs"] | {f"gradient of {name}": spec for name, spec in case["grads"].items()}
    assert set(expected) == set(named)
    for name, spec in expected.items():
        value = torch.tensor(spec["value"], dtype=torch.float64)
        assert named[name].shape == value.shape
        assert (named[name] - value).abs().max() <= 1e-9 * value.abs().max(), name


def array(spec: dict[str, Any]) -> Tensor:
    return torch.tensor(spec["value"], dtype=torch.float64).reshape(spec["shape"])


@pytest.mark.parametrize("case", cases("L17_n4"))
def test_selective_scan_is_the_published_function(case):
    inputs = {name: array(spec).requires_grad_() for name, spec in case["inputs"].items()}
    outputs = selective_scan_fn(**inputs, delta_softplus=case["options"]["softplus"], return_last_state=True)
    check(case, outputs, inputs)


@pytest.mark.parametrize("case", cases("causal_conv1d"))
def test_causal_conv1d_is_the_published_function(case):
    inputs = {name: array(spec).requires_grad_() for name, spec in case["inputs"].items()}
    outputs = causal_conv1d_fn(**inputs, activation=case["options"]["activation"], return_final_states=True)
    check(case, outputs, inputs)


def test_half_precision_is_gated_before_it_is_rounded():
    """With groups, whose gate differs by row, as without: one rounding, at the end."""
    b, d, l, n = 2, 4, 9, 3
    u, z = signed(b, d, l).bfloat16(), signed(b, d, l).bfloat16()
    delta, A = uniform(b, d, l, low=0.1, high=1).bfloat16(), uniform(d, n, low=-2, high=-0.5).float()
    B, C = signed(b, 2, n, l).bfloat16(), signed(b, 2, n, l).bfloat16()
    expected = selective_scan_fn(*(x.double() for x in (u, delta, A, B, C)), z=z.double())
    y = selective_scan_fn(u, delta, A, B, C, z=z)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())


def test_channels_last_inputs_are_not_copied():
    """A transposed (b, l, d) tensor gives the bits that the op gives for the tensor itself."""
    u, B = torch.randn(2, 11, 6), torch.randn(2, 11, 3)
    delta, A = torch.rand(2, 11, 6), -torch.rand(6, 3)
    y = selective_scan_fn(*(x.transpose(1, 2) for x in (u, delta)), A, *(x.transpose(1, 2) for x in (B, B)))
    assert torch.equal(y.transpose(1, 2), selective_scan(u, delta, A, B, B)[0][:, 0])


def test_final_states_are_also_written_where_asked():
    x, out = torch.randn(2, 5, 9), torch.empty(2, 5, 3)
    _, last = causal_conv1d_fn(x, torch.randn(5, 4), return_final_states=True, final_states_out=out)
    assert torch.equal(out, x[..., -3:])
    assert last is out
    assert (
        error(causal_conv1d_fn(x, torch.ones(5, 1), activation="swish"), torch.nn.functional.silu(x))
        < TOLERANCE[torch.float32]
    )


SCAN = dict(
    u=torch.ones(1, 4, 5), delta=torch.ones(1, 4, 5), A=torch.ones(4, 2), B=torch.ones(1, 2, 5), C=torch.ones(1, 2, 5)
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(A=torch.ones(4, 2, dtype=torch.complex64)), "A must be real"),
        (dict(A=torch.ones(3, 2)), r"u must be \(b, d, l\) and A \(d, n\), got \(1, 4, 5\) and \(3, 2\)"),
        (dict(B=torch.ones(1, 3, 2, 5)), r"groups of B and C must divide d=4 and agree, got \[3, 1\]"),
        (dict(C=torch.ones(5, 2)), r"a constant C must be \(d=4, n\), got \(5, 2\)"),
    ],
)
def test_scan_refuses_what_it_cannot_run(change, message):
    with pytest.raises(ValueError, match=f"selective_scan_fn: {message}"):
        selective_scan_fn(**SCAN | change)


def test_convolution_refuses_what_it_cannot_run():
    x, weight = torch.ones(1, 4, 5), torch.ones(4, 3)
    with pytest.raises(ValueError, match="causal_conv1d_fn: seq_idx must be None"):
        causal_conv1d_fn(x, weight, seq_idx=torch.zeros(1, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="causal_conv1d_fn: activation must be None, 'silu' or 'swish', got 'gelu'"):
        causal_conv1d_fn(x, weight, activation="gelu")
