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
from vssm.kernels.compat import causal_conv1d_fn, mamba_chunk_scan_combined, selective_scan_fn

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


def slow_chunk_scan(x, dt, A, B, C, D, z, dt_bias, h, softplus):
    """One step at a time, a matrix (p, n) of states for each head."""
    dt = dt + dt_bias
    dt, group, out = (torch.nn.functional.softplus(dt) if softplus else dt.relu()), x.shape[2] // B.shape[2], []
    B, C = (t.repeat_interleave(group, 2) for t in (B, C))
    for t in range(x.shape[1]):
        h = (A * dt[:, t]).exp()[..., None, None] * h
        h = h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        out.append((h * C[:, t, :, None]).sum(-1) + D * x[:, t])
    return torch.stack(out, 1) * torch.nn.functional.silu(z), h


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize(("b", "l", "h", "p", "g", "n"), [(2, 7, 6, 3, 2, 5), (1, 4, 4, 4, 4, 1), (3, 1, 2, 1, 1, 4)])
def test_the_scan_of_mamba_2(b, l, h, p, g, n, softplus):
    """Lengths that no chunk divides, a D for each channel, a first state; dt below 0 counts as 0 without softplus."""
    torch.manual_seed(0)
    shapes = [(b, l, h, p), (b, l, h), (h,), (b, l, g, n), (b, l, g, n), (h, p), (b, l, h, p), (h,), (b, h, p, n)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[2] = -inputs[2].abs()
    x, dt, A, B, C, D, z, bias, state = (t.requires_grad_() for t in inputs)
    found = mamba_chunk_scan_combined(x, dt, A, B, C, 4, D, z, bias, state, dt_softplus=softplus,
                                      return_final_states=True)  # fmt: skip
    expected = slow_chunk_scan(x, dt, A, B, C, D, z, bias, state, softplus)
    weights = [torch.randn_like(t) for t in expected]
    gradients = []
    for y, wanted in zip(found, expected, strict=True):
        assert error(y, wanted) < TOLERANCE[torch.float64]
    for outputs in (found, expected):
        loss = sum((y * weight).sum() for y, weight in zip(outputs, weights))
        gradients.append(torch.autograd.grad(loss, inputs))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_scan_of_mamba_2_has_a_d_for_each_head_and_bounds_of_dt():
    x, dt, B = torch.randn(2, 5, 4, 3), torch.rand(2, 5, 4), torch.randn(2, 5, 2, 6)
    A, D = -torch.rand(4), torch.randn(4)
    y = mamba_chunk_scan_combined(x, dt, A, B, B, D=D, dt_limit=(0.2, 0.6))
    assert torch.equal(y, mamba_chunk_scan_combined(x, dt.clamp(0.2, 0.6), A, B, B, D=D[:, None].expand(4, 3)))
    half = mamba_chunk_scan_combined(x.bfloat16(), dt, A, B.bfloat16(), B.bfloat16(), z=x.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seq_idx": torch.zeros(2, 5)}, "seq_idx and cu_seqlens must be None"),
        ({"B": torch.zeros(2, 5, 3, 6)}, r"with g a divisor of h, got \(2, 5, 4, 3\), \(2, 5, 3, 6\)"),
        ({"A": torch.zeros(4, 6)}, r"A must be \(4,\), got \(4, 6\)"),
        ({"D": torch.zeros(3)}, r"D must be \(4,\) or \(4, 3\), got \(3,\)"),
        ({"initial_states": torch.zeros(2, 4, 6, 3)}, r"initial_states must be \(2, 4, 3, 6\), got \(2, 4, 6, 3\)"),
    ],
)
def test_the_scan_of_mamba_2_refuses_what_does_not_fit(changed, message):
    B = changed.get("B", torch.zeros(2, 5, 2, 6))
    given = {"x": torch.zeros(2, 5, 4, 3), "dt": torch.zeros(2, 5, 4), "A": torch.zeros(4), "C": B, **changed, "B": B}
    with pytest.raises(ValueError, match="mamba_chunk_scan_combined: .*" + message):
        mamba_chunk_scan_combined(**given)


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
