"""The 2D scan: the published operator's recorded values, and every backend against the definition."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerance import TOLERANCE, error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vssm.kernels.backends import available_backends
from vssm.kernels.scan2d import scan2d

GOLDEN = Path(__file__).parents[1] / "golden" / "mamba2d"
NAMES = ("u", "delta_top", "delta_left", "A_top", "A_left", "B_top", "B_left", "C", "D")
BACKENDS = available_backends("scan2d")
COMPILED = [name for name in BACKENDS if name != "reference"]
# b, h, w, d, n: one cell, one row, one column, wide, tall, more channels than a block
SIZES = [(1, 1, 1, 1, 1), (2, 1, 7, 3, 2), (1, 6, 1, 5, 4), (3, 2, 11, 4, 3), (1, 9, 4, 2, 16), (2, 5, 6, 70, 3)]


def operands(b: int, h: int, w: int, d: int, n: int, softplus: bool = False, **place) -> dict[str, Tensor]:
    """Random operands."""
    u, top, left = torch.rand(3, b, h, w, d) * 2 - 1  # evenly spread: no value dwarfs the others' deviation
    top, left = (top, left) if softplus else (F.softplus(top), F.softplus(left))
    A_top, A_left = -torch.rand(2, d, n) - 0.1
    B_top, B_left, C = torch.rand(3, b, h, w, n) * 2 - 1
    values = (u, top, left, A_top, A_left, B_top, B_left, C, torch.rand(d) * 2 - 1)
    return {name: x.to(**place) for name, x in zip(NAMES, values)}


def value_and_grads(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """y, and the gradient of a fixed weighted sum of y with respect to each operand, in its dtype."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = scan2d(**inputs, **options)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().reshape(y.shape).to(y)
    # on grids of one row or one column the definition does not use all operands
    grads = torch.autograd.grad(y, tuple(inputs.values()), weight, materialize_grads=True)
    for x, grad in zip(inputs.values(), grads):
        assert grad.dtype == x.dtype
    return {"y": y.detach(), **dict(zip(inputs, grads))}


@cache
def golden(name: str) -> list[dict]:
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def place_of(backend: str, device: torch.device) -> tuple[dict, float]:
    """Where a backend runs, its widest dtype, and how close it must come there."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    return dict(dtype=dtype, device=device), 1e-4 if backend == "triton" else 1e-9


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_published_operator(backend, case, device):
    """Outputs and gradients recorded from Mamba2D's own kernels."""
    record = golden("op_scan2d_core")[case]
    place, bound = place_of(backend, device)
    inputs = {name: torch.tensor(x, dtype=torch.float64).to(**place) for name, x in record["inputs"].items()}
    grad_y = inputs.pop("grad_y")
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    y = scan2d(*(inputs[name] for name in ("x", "deltaT", "deltaL", "AT", "AL", "BT", "BL", "C", "D")), backend=backend)
    y.backward(grad_y)
    assert error(y, torch.tensor(record["y"], dtype=torch.float64)) < bound
    for name, x in inputs.items():
        assert error(x.grad, torch.tensor(record["grads"][name], dtype=torch.float64)) < bound, name


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_published_operator_behind_its_projections(backend, case, device):
    """The softplus inside the op; gates that are strided slices of one projection."""
    record = golden("op_scan2d_projected")[case]
    place, bound = place_of(backend, device)
    p = {name: torch.tensor(x, dtype=torch.float64).to(**place) for name, x in record["inputs"].items()}
    p = {name: x.requires_grad_() for name, x in p.items()}
    rank, n = p["dt_projT_weight"].shape[1], p["AT_log"].shape[1]
    top, left, B_top, B_left, C = (p["x"] @ p["x_proj_weight"].T).split([rank, rank, n, n, n], -1)
    y = scan2d(
        p["x"],
        F.linear(top, p["dt_projT_weight"], p["dt_projT_bias"]),
        F.linear(left, p["dt_projL_weight"], p["dt_projL_bias"]),
        -p["AT_log"].exp(), -p["AL_log"].exp(), B_top, B_left, C, p["D"], delta_softplus=True, backend=backend,
    )  # fmt: skip
    y.backward(p["grad_y"].detach())
    assert error(y, torch.tensor(record["y"], dtype=torch.float64)) < bound
    for name, grad in record["grads"].items():
        assert error(p[name].grad, torch.tensor(grad, dtype=torch.float64)) < bound, name


@pytest.mark.parametrize("options", [{}, {"delta_softplus": True, "reverse": True}], ids=["plain", "softplus-reverse"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", COMPILED)
def test_agrees_with_reference(backend, sizes, dtype, options, device):
    """The output and every gradient agree with the float64 definition."""
    bound = TOLERANCE[dtype]
    if dtype == torch.bfloat16:
        bound *= 2  # the largest values are some ten deviations; bfloat16 rounds them by half a percent of that
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton computes in float32")
    inputs = operands(*sizes, softplus="delta_softplus" in options, dtype=dtype)
    expected = value_and_grads({name: x.double() for name, x in inputs.items()}, backend="reference", **options)
    actual = value_and_grads({name: x.to(device) for name, x in inputs.items()}, backend=backend, **options)
    for name, value in expected.items():
        if value.abs().max() == 0:  # what only interior cells use
            assert actual[name].abs().max() == 0, name
        else:
            assert error(actual[name], value) < bound, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_borders_follow_the_table_of_the_paper(backend, device):
    """Nothing decays, everything is 1: a cell has one source on the border and the mean of two inside."""
    place, _ = place_of(backend, device)
    x, A = torch.ones(1, 3, 3, 1, **place), torch.zeros(1, 1, **place)
    y = scan2d(x, x, 2 * x, A, A, x, x, x, backend=backend)  # a step down adds 1, a step right adds 2
    assert y.view(3, 3).tolist() == [[2.0, 4.0, 6.0], [3.0, 5.0, 7.0], [4.0, 6.0, 8.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_is_the_scan_of_the_map_turned_round(backend, device):
    place, bound = place_of(backend, device)
    inputs = operands(2, 3, 5, 4, 2, **place)
    turned = {name: x.flip(1, 2) if x.dim() == 4 else x for name, x in inputs.items()}
    expected = scan2d(**turned, backend=backend).flip(1, 2)
    assert error(scan2d(**inputs, reverse=True, backend=backend), expected) < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_do_not_matter(backend, device):
    """Flattened maps with ``grid``, channels first in memory, maps cut out of wider ones."""
    place, bound = place_of(backend, device)
    inputs = operands(2, 3, 5, 4, 2, **place)
    expected = value_and_grads(inputs, backend=backend)
    flat = {name: x.flatten(1, 2) if x.dim() == 4 else x for name, x in inputs.items()}
    y = scan2d(**flat, grid=(3, 5), backend=backend)
    assert y.shape == (2, 15, 4)
    assert error(y, expected["y"].flatten(1, 2)) < bound
    first = {name: x.movedim(-1, 0).contiguous().movedim(0, -1) for name, x in inputs.items()}
    wide = {name: F.pad(x, (3, 2, 1, 0))[..., 1:, 3:-2] if x.dim() == 4 else x for name, x in inputs.items()}
    for changed in (first, wide):
        actual = value_and_grads(changed, backend=backend)
        for name, value in expected.items():
            assert error(actual[name], value) < bound, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_may_differ_and_one_gate_may_serve_both_directions(backend, device):
    """As in Mamba2D's first generation, B_left is B_top; steps stay in float32 while the map is in half precision."""
    inputs = operands(1, 3, 4, 5, 2, device=device)
    for name in ("u", "B_top", "C"):
        inputs[name] = inputs[name].to(torch.bfloat16)
    inputs["B_left"] = inputs["B_top"]
    actual = value_and_grads(inputs, backend=backend)
    expected = value_and_grads({name: x.double().cpu() for name, x in inputs.items()}, backend="reference")
    for name, value in expected.items():
        assert error(actual[name], value) < TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_gradcheck(backend):
    inputs = operands(1, 3, 4, 2, 2, softplus=True, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: scan2d(*x, delta_softplus=True, backend=backend), inputs)
    assert torch.autograd.gradcheck(lambda *x: scan2d(*x, delta_softplus=True, backend=backend), inputs[:-1])  # no D


def test_reference_can_be_differentiated_twice():
    inputs = [x.requires_grad_() for x in operands(1, 2, 2, 1, 2, dtype=torch.float64).values()]
    assert torch.autograd.gradgradcheck(lambda *x: scan2d(*x, backend="reference"), inputs)


@pytest.mark.parametrize("with_D", [True, False])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_custom_op_keeps_torchs_rules(backend, with_D):
    inputs = [x.requires_grad_() for x in operands(1, 2, 3, 4, 2).values()]
    inputs[-1] = inputs[-1] if with_D else None
    torch.library.opcheck(torch.ops.vssm.scan2d.default, (*inputs, False, True, backend))


@pytest.mark.parametrize("backend", COMPILED)
def test_compiles_without_breaks_for_any_size(backend, device):
    def call(**inputs: Tensor) -> Tensor:
        return scan2d(**inputs, delta_softplus=True, backend=backend) * 2

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in [(2, 3, 4, 8, 2), (3, 5, 2, 16, 4)]:
        inputs = {name: x.requires_grad_() for name, x in operands(*sizes, softplus=True, device=device).items()}
        expected, actual = call(**inputs), compiled(**inputs)
        assert error(actual, expected) < TOLERANCE[torch.float32]
        wanted = torch.autograd.grad(expected.square().sum(), tuple(inputs.values()))
        for name, x, y in zip(NAMES, torch.autograd.grad(actual.square().sum(), tuple(inputs.values())), wanted):
            assert error(x, y) < TOLERANCE[torch.float32], name


def test_exports_as_one_op():
    class Scan(torch.nn.Module):
        def forward(self, u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D):
            return scan2d(u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D)

    inputs = tuple(operands(2, 3, 4, 5, 2).values())
    program = torch.export.export(Scan(), inputs)
    assert any(node.target == torch.ops.vssm.scan2d.default for node in program.graph.nodes)
    assert torch.equal(program.module()(*inputs), scan2d(*inputs))


@pytest.mark.parametrize("backend", COMPILED)
def test_runs_agree_to_the_last_bit(backend, device):
    """Whatever the number of threads; only torch's own sums in the plain backend may split otherwise."""
    inputs = operands(2, 9, 7, 40, 3, device=device)
    first = value_and_grads(inputs, backend=backend)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if backend == "cpu" and threads > 1 else threads)
    try:
        again = value_and_grads(inputs, backend=backend)
    finally:
        torch.set_num_threads(threads)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return out


def test_the_plain_backend_never_holds_all_states():
    b, h, w, d, n = 1, 32, 24, 16, 16
    inputs = operands(b, h, w, d, n)
    with Largest() as largest:
        value_and_grads(inputs, backend="torch")
    assert largest.elements < b * h * w * d * n / 8


def test_autocast_casts_everything_but_the_parameters():
    inputs = operands(1, 3, 4, 5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = scan2d(**inputs)
    half = {name: x.bfloat16() if x.dim() == 4 else x for name, x in inputs.items()}
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, scan2d(**half))


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5, 2), (2, 0, 4, 5, 2), (2, 3, 0, 5, 2), (2, 3, 4, 0, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_nothing_out(backend, sizes, device):
    inputs = {name: x.requires_grad_() for name, x in operands(*sizes, device=device).items()}
    y = scan2d(**inputs, backend=backend)
    assert y.shape == inputs["u"].shape
    if backend != "reference":
        y.sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in inputs.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(B_left=torch.zeros(2, 3, 4, 7)), r"scan2d: B_left must be \(b=2, h=3, w=4, n=2\), got \(2, 3, 4, 7\)"),
        (dict(A_top=torch.zeros(5, 3)), r"A_top must be \(d=5, n=2\), got \(5, 3\)"),
        (dict(C=torch.zeros(2, 12, 2)), r"C must be \(b, h, w, n\), got \(2, 12, 2\); give grid= or unflatten it"),
        (dict(grid=(4, 3)), r"u must be \(b, h=4, w=3, d\), got \(2, 3, 4, 5\)"),
        (dict(C=torch.zeros(2, 11, 2), grid=(3, 4)), r"C must be \(b=2, h·w=12, n=2\), got \(2, 11, 2\)"),
        (dict(u=torch.zeros(2, 3, 4, 5, dtype=torch.int32)), "u must be real floating point, got torch.int32"),
        (dict(D=torch.zeros(5, device="meta")), "D must be on cpu like u, got meta"),
        (dict(backend="triton"), "backend 'triton' cannot run: it needs a GPU, the inputs are on cpu"),
        (dict(A_top=torch.zeros(5, 0), A_left=torch.zeros(5, 0), B_top=torch.zeros(2, 3, 4, 0),
              B_left=torch.zeros(2, 3, 4, 0), C=torch.zeros(2, 3, 4, 0)), r"at least one state, got A_top \(5, 0\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_work_starts(change, message):
    with pytest.raises(ValueError, match=message):
        scan2d(**operands(2, 3, 4, 5, 2) | change)
