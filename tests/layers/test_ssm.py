"""The SSM's parameters, and the scan that they feed."""

from __future__ import annotations

import math

import pytest
import torch
from interpreter import interpret, needs_interpreter
from tolerance import TOLERANCE, error

from vssm.layers import again
from vssm.layers import ssm as module
from vssm.layers.ssm import DT_MAX, DT_MIN, SelectiveSSM, decay, ssm_parameters
from vssm.scans import scan_table

WEIGHTS = """
import torch
from vssm.kernels.ssm_weights import triton

def exact(x_proj, dt_weight, A_log, copies, m):
    wide, tall = x_proj.new_zeros(len(x_proj), m, x_proj.shape[2]), dt_weight.new_zeros(*dt_weight.shape[:2], m)
    wide[:, : x_proj.shape[1]], tall[..., : dt_weight.shape[2]] = x_proj, dt_weight
    return wide.repeat(copies[0] // len(wide), 1, 1), tall.repeat(copies[1] // len(tall), 1, 1), -A_log.exp()

for (sets, used, d, rank, n), copies, dtype in (
    ((2, 35, 40, 3, 16), (6, 6), torch.bfloat16),
    ((4, 9, 96, 6, 1), (4, 160), torch.float32),
    ((1, 8, 17, 2, 3), (1, 3), torch.float16),
    ((2, 5, 12, 1, 2), (0, 0), torch.float32),
):
    x_proj, dt_weight = torch.randn(sets, used, d, device=DEVICE), torch.randn(sets, d, rank, device=DEVICE)
    A_log, m = torch.randn(2, d, n, device=DEVICE), -(-used // 8) * 8
    for turned in (False, True):
        wide, tall, A = triton.forward(x_proj, dt_weight, A_log, copies, dtype)
        wanted = exact(x_proj, dt_weight, A_log, copies, m)
        cut = 2**-7 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0  # the interpreter does not round
        for made, exactly in zip((wide, tall), wanted):
            torch.testing.assert_close(made, exactly.to(dtype), rtol=cut, atol=0)
        torch.testing.assert_close(A, wanted[2])
        assert triton.forward(x_proj, dt_weight, None, copies, dtype)[2] is None
        leaves = [x.double().requires_grad_() for x in (x_proj, dt_weight, A_log)]
        dwide, dtall = (torch.randn(count, m, d, device=DEVICE).to(dtype) for count in copies)
        if turned:
            dwide = dwide.mT.contiguous().mT
        dA = torch.randn(2, d, n, device=DEVICE)
        grads = torch.autograd.grad(exact(*leaves, copies, m), leaves, [dwide.double(), dtall.mT.double(), dA.double()])
        like = [(x.shape, x.dtype) for x in (x_proj, dt_weight, A_log)]
        for ours, theirs in zip(triton.backward(dwide, dtall, dA, A, like), grads, strict=True):
            torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)
print("agrees")
"""


FUSED = """
import torch
from vssm.kernels.backends import implementation
from vssm.layers import ssm as module
from vssm.scans import scan_table

torch.manual_seed(0)
table = scan_table("cross", (3, 4))
kernels, called = implementation("ssm_weights", "triton"), []
for name in ("forward", "backward"):
    setattr(kernels, name, lambda *args, run=getattr(kernels, name), name=name: called.append(name) or run(*args))

def results(fused, ssm, u, half, rows):
    module.has_fused_weights = lambda x: fused and not torch.is_grad_enabled()
    ssm.zero_grad()
    leaf = u.clone().requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=half):
        with torch.no_grad():
            first = ssm(u, table[rows], rows=rows)
        y = ssm(leaf, table[rows], rows=rows)
    y.float().square().sum().backward()
    return [first, y, leaf.grad, *(p.grad for p in ssm.parameters())]

for rows, shared, per_row, b, half, dtype, chosen in (
    (4, False, False, 2, False, torch.float32, None),
    (4, False, True, 2, False, torch.float32, None),
    (4, True, False, 2, False, torch.float32, None),
    (1, False, True, 2, False, torch.float32, None),
    (4, False, True, 0, False, torch.float32, None),
    (4, False, False, 2, False, torch.float32, slice(None, None, 2)),
    (4, False, False, 2, True, torch.float32, None),
    (4, False, True, 2, True, torch.float32, None),
    (4, False, True, 2, False, torch.float16, None),
):
    for layout in ("as made", "transposed"):
        ssm = module.SelectiveSSM(16, rows, 2, 3, per_row=per_row, shared=shared).to(dtype)
        u = torch.randn((b, 4, 12, 16) if per_row else (b, 12, 16), dtype=dtype)
        if layout == "transposed":
            u = u.mT.contiguous().mT
            for name in ("x_proj", "dt_weight", "A_log"):
                p = getattr(ssm, name)
                p.data = p.data.mT.contiguous().mT
        used = slice(None) if chosen is None else chosen
        coarse = half or dtype != torch.float32
        for ours, theirs in zip(results(True, ssm, u, half, used), results(False, ssm, u, half, used), strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            bound = (0.1 if coarse else 1e-4) * (theirs.float().abs().max() if b else 1)
            assert not b or (ours - theirs).abs().max() <= bound, (rows, shared, per_row, b, half, dtype, layout)
        assert called == ["forward", "forward", "forward", "backward"]  # without a gradient, with one, and back
        called.clear()

ssm = module.SelectiveSSM(16, 2, 2, 3)
ssm.dt_weight.data = ssm.dt_weight.data[:, :8]
try:
    results(True, ssm, torch.randn(1, 12, 16), False, slice(None))
except ValueError as error:
    print(error)
"""


@needs_interpreter
def test_weights_of_one_launch_change_nothing():
    """In the interpreter, as if the CPU were a GPU; and what does not fit is refused."""
    said = interpret(FUSED)
    assert "x_proj (sets, m, d), dt_weight (sets, d, rank) and A_log (k, d, n) must agree" in said


@needs_interpreter
def test_kernels_of_weights_agree_with_torch_in_the_interpreter():
    assert interpret(f"DEVICE = 'cpu'\n{WEIGHTS}").split() == ["agrees"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_of_weights_agree_with_torch_on_a_gpu(capsys):
    exec(WEIGHTS, {"DEVICE": "cuda"})
    assert capsys.readouterr().out.split() == ["agrees"]


def plain(ssm: SelectiveSSM, u, table, z=None):
    """The recurrence of Mamba, step by step, with the module's parameters. u: (k, l, d), table: lists."""
    total = 0
    for k, row in enumerate(table.tolist()):
        s = 0 if ssm.shared else k
        h, y = 0, torch.zeros_like(u[k])
        for cell in row:
            dt, B, C = (ssm.x_proj[s] @ u[k, cell]).split(ssm.splits)
            dt = torch.nn.functional.softplus(ssm.dt_weight[s] @ dt + ssm.dt_bias[s])
            h = torch.exp(dt[:, None] * -ssm.A_log[k].exp()) * h + (dt * u[k, cell])[:, None] * B
            y[cell] = h @ C + ssm.D[s] * u[k, cell]
        total = total + y
    return total if z is None else total * torch.nn.functional.silu(z)


@pytest.mark.parametrize(("per_row", "shared"), [(False, False), (True, False), (False, True)])
def test_is_the_recurrence_of_mamba_in_every_row(per_row, shared):
    table = scan_table("cross", (3, 5))
    ssm = SelectiveSSM(6, 4, d_state=3, dt_rank=2, per_row=per_row, shared=shared).double()
    torch.nn.init.normal_(ssm.dt_bias)
    torch.nn.init.normal_(ssm.D)
    u = torch.randn(2, 4, 15, 6, dtype=torch.double) if per_row else torch.randn(2, 15, 6, dtype=torch.double)
    z = torch.randn(2, 15, 6, dtype=torch.double)
    rows = u if per_row else u[:, None].expand(-1, 4, -1, -1)
    expected = torch.stack([plain(ssm, rows[b], table, z[b]) for b in range(2)])
    assert error(ssm(u, table, z), expected) < TOLERANCE[torch.float64]


def test_rows_choose_parameters():
    """Two of four rows with a table of two."""
    ssm = SelectiveSSM(6, 4, d_state=3, dt_rank=2).double()
    u, table = torch.randn(2, 15, 6, dtype=torch.double), scan_table("cross", (3, 5))
    halves = [ssm(u, table[half], rows=half) for half in (slice(0, 2), slice(2, 4))]
    assert error(sum(halves), ssm(u, table)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("options", [{}, {"merge": None}, {"write": "steps"}], ids=str)
@pytest.mark.parametrize(("sets", "per_row"), [(4, False), (4, True), (1, False)])
def test_gradients_are_those_of_its_operations(sets, per_row, options, half, monkeypatch):
    """As one node of the graph, which makes its input again, and by operations, as compilers see it: bit for bit.

    Under autocast the one node sums the gradients of its weights over samples in float32, which is no less exact.
    """
    ssm = SelectiveSSM(6, 4, d_state=3, dt_rank=2, per_row=per_row, shared=sets == 1)
    table = scan_table("cross", (3, 5))
    x = torch.randn(2, 4, 15, 6) if per_row else torch.randn(2, 15, 6)
    z = None if "merge" in options else torch.randn(2, 15, 6, requires_grad=True)
    x.requires_grad_()
    silu, results = torch.nn.functional.silu, []
    for alone in (True, False):
        monkeypatch.setattr(again, "free", lambda alone=alone: alone)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = ssm(silu(x), table, z, origin=(silu, [x]), **options)
        leaves = [x, *([] if z is None else [z]), *ssm.parameters()]
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    of_weights = [x is ssm.x_proj or x is ssm.dt_weight for x in (None, *leaves)]  # None: y
    for summed, a, b in zip(of_weights, *results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b) or (half and summed and error(a, b) < TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("sets", "per_row"), [(4, False), (4, True), (1, False)])
def test_widths_filled_up_for_a_gpu_change_nothing(sets, per_row, half, monkeypatch):
    """As one node and by operations, beside the CPU in float64."""
    ssm = SelectiveSSM(32, 4, d_state=5, dt_rank=3, per_row=per_row, shared=sets == 1)
    table, silu, results = scan_table("cross", (3, 5)), torch.nn.functional.silu, []
    x = torch.randn(2, 4, 15, 32) if per_row else torch.randn(2, 15, 32)
    for device, alone in (("cuda", True), ("cuda", False), ("cpu", False)):
        monkeypatch.setattr(again, "free", lambda alone=alone: alone)
        moved, leaf = ssm.to(device), x.to(device).requires_grad_()
        if device == "cpu":
            moved, leaf = ssm.double(), x.double().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            y = moved(silu(leaf), table.to(device), origin=(silu, [leaf]))
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *moved.parameters()])])
    bound = 0.2 if half else 1e-4  # half: on a CPU, where nothing is filled up, up to 0.14 over 12 seeds (A_log's)
    for one, other, exact in zip(*results, strict=True):
        assert error(one, exact) < bound
        assert error(other, exact) < bound


def test_keeps_neither_its_input_nor_the_step_sizes():
    """What is as large as they are is what the input was made from."""
    ssm, table = SelectiveSSM(6, 4, d_state=3, dt_rank=2), scan_table("cross", (3, 5))
    x = torch.randn(2, 15, 6, requires_grad=True)
    y = ssm(x.sigmoid(), table, origin=(torch.sigmoid, [x]))
    large = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape[-2:] == (15, 6)]
    assert {t.data_ptr() for t in large} == {x.data_ptr()}


@pytest.mark.parametrize(("sets", "per_row"), [(4, False), (4, True), (1, False)])
def test_learns_nothing_from_no_samples(sets, per_row):
    ssm = SelectiveSSM(6, 4, d_state=3, dt_rank=2, per_row=per_row, shared=sets == 1)
    u = torch.randn(0, 4, 15, 6, requires_grad=True) if per_row else torch.randn(0, 15, 6, requires_grad=True)
    y = ssm(u, scan_table("cross", (3, 5)))
    assert y.shape == (0, 15, 6)
    y.sum().backward()
    assert all((p.grad == 0).all() for p in ssm.parameters())


def test_refuses_what_changed_since_the_forward_pass():
    ssm, table = SelectiveSSM(6, 4, d_state=3, dt_rank=2), scan_table("cross", (3, 5))
    x = torch.randn(2, 15, 6, requires_grad=True) * 1
    y = ssm(x.sigmoid(), table, origin=(torch.sigmoid, [x]))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_starts_as_mamba_does():
    ssm = SelectiveSSM(64, 2, d_state=16, dt_rank=4)
    assert torch.allclose(-decay(ssm.A_log)[1, 3], torch.arange(1.0, 17.0), atol=1e-5)
    assert (ssm.D == 1).all()
    dt = torch.nn.functional.softplus(ssm.dt_bias)
    assert DT_MIN * 0.99 <= dt.min() <= 2e-3
    assert 5e-2 <= dt.max() <= DT_MAX * 1.01
    assert ssm.dt_weight.abs().max() <= 4**-0.5
    assert ssm.x_proj.abs().max() <= 1 / math.sqrt(64)


@pytest.mark.parametrize("init", module.INITS)
def test_every_start_is_finite_and_its_own(init):
    ssm = SelectiveSSM(8, 2, d_state=4, dt_rank=2, init=init)
    assert all(p.isfinite().all() for p in ssm.parameters())
    expected = {"mamba": math.log(4), "uniform": 0.0}
    if init in expected:
        assert ssm.A_log[0, 0, -1].item() == pytest.approx(expected[init])


def test_decay_is_computed_in_float32_for_half_precision_parameters():
    assert decay(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.float32
    assert decay(torch.zeros(3, dtype=torch.double)).dtype == torch.float64


def test_keeps_its_parameters_in_float32_under_autocast():
    ssm = SelectiveSSM(8, 2, d_state=4, dt_rank=2)
    u, table = torch.randn(2, 15, 8), scan_table("bidirectional", (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        y = ssm(u, table)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in ssm.parameters())
    assert error(y, ssm(u, table)) < 3 * TOLERANCE[torch.bfloat16]      # the projections are bfloat16, too


def test_names_the_parameters_that_mamba_does_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), SelectiveSSM(4, 1, 2, 1))
    assert set(ssm_parameters(model)) == {"1.A_log", "1.D", "1.dt_bias"}
    assert set(ssm_parameters(model, "D")) == {"1.D"}
    assert set(ssm_parameters(model[1], "D")) == {"D"}


def test_refuses_rows_of_their_own_with_shared_parameters():
    with pytest.raises(ValueError, match="SelectiveSSM: rows with inputs of their own cannot share"):
        SelectiveSSM(4, 2, 2, 1, per_row=True, shared=True)
