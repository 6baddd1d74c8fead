"""The contract of selective_scan carries every published scan: the hard cases, each in a few lines.

The expected values come from :func:`mamba`, a scalar recurrence that knows nothing of tables; each test orders its
operands by plain indexing, as the published code does.
"""

from __future__ import annotations

import pytest
import torch
from tolerance import TOLERANCE, error
from torch import Tensor

from vssm.kernels import available_backends, selective_scan

BACKENDS = [name for name in available_backends("selective_scan") if name != "triton"] + ["triton"]


def mamba(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor | None = None) -> Tensor:
    """One sequence, one row: u, delta (t, d); A (d, n); B, C (t, n); D (d)."""
    h = torch.zeros_like(A) if h is None else h
    y = []
    for t in range(len(u)):
        h = torch.exp(delta[t][:, None] * A) * h + delta[t][:, None] * B[t] * u[t][:, None]
        y.append(h @ C[t] + D * u[t])
    return torch.stack(y)


class Operands:
    """Random float64 operands in grid order, moved and rounded for the backend under test."""

    def __init__(self, b: int, k: int, cells: int, d: int = 5, n: int = 3, entries: int | None = None):
        entries = entries or cells
        self.u = torch.randn(b, cells, d).double()
        self.delta = torch.rand(b, k, entries, d).double()
        self.A = -torch.rand(k, d, n).double() - 0.1
        self.B, self.C = torch.randn(2, b, k, entries, n).double().unbind()
        self.D = torch.randn(k, d).double()


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest):
    """selective_scan on one backend: operands go there in its widest dtype, y comes back in float64."""
    backend = request.param
    if backend not in available_backends("selective_scan"):
        pytest.skip(f"{backend} cannot run here")
    place = dict(device="cuda", dtype=torch.float32) if backend == "triton" else dict(device="cpu", dtype=torch.float64)

    def call(*operands: Tensor, **options) -> Tensor:
        def move(x):
            return x if not isinstance(x, Tensor) else x.to(**place) if x.is_floating_point() else x.to(place["device"])

        y, _ = selective_scan(*map(move, operands), **{name: move(x) for name, x in options.items()}, backend=backend)
        return y.double().cpu()

    call.tolerance = TOLERANCE[place["dtype"]]
    return call


def test_cross_scan_of_vmamba(run):
    """Four orders of one map, each with its own parameters, come back to the map and add up."""
    o, cells = Operands(2, 4, 6), torch.arange(6).reshape(2, 3)
    orders = [cells.flatten(), cells.T.flatten(), cells.flatten().flip(0), cells.T.flatten().flip(0)]
    expected = torch.zeros(2, 6, 5).double()
    for b in range(2):
        for k, p in enumerate(orders):
            expected[b, p] += mamba(o.u[b, p], o.delta[b, k, p], o.A[k], o.B[b, k, p], o.C[b, k, p], o.D[k])
    y = run(o.u, o.delta, o.A, o.B, o.C, o.D, table=torch.stack(orders), merge="sum", revisits=False)
    assert error(y, expected) < run.tolerance


def test_two_directions_of_vim_with_class_token_and_gate(run):
    """The class token is a cell in the middle; per-direction convolutions give u a row axis; the gate is shared."""
    o, p = Operands(1, 2, 5), torch.arange(5)
    u, z = torch.randn(1, 2, 5, 5).double(), torch.randn(1, 5, 5).double()
    forward = mamba(u[0, 0], o.delta[0, 0], o.A[0], o.B[0, 0], o.C[0, 0], o.D[0])
    flipped = [x.flip(0) for x in (u[0, 1], o.delta[0, 1], o.B[0, 1], o.C[0, 1])]
    backward = mamba(*flipped[:2], o.A[1], *flipped[2:], o.D[1])
    gate = torch.nn.functional.silu(z[0])
    expected = forward * gate + (backward * gate.flip(0)).flip(0)
    y = run(u, o.delta, o.A, o.B, o.C, o.D, z, table=torch.stack([p, p.flip(0)]), merge="sum", revisits=False)
    assert error(y[0], expected) < run.tolerance


def test_plainmamba_reads_parameters_by_step(run):
    """u follows the zigzag, delta, B and C do not; B gets a term of the direction that enters the step."""
    o = Operands(1, 2, 4)
    orders = torch.tensor([[0, 1, 3, 2], [2, 3, 1, 0]])
    codes, terms = torch.tensor([[0, 1, 4, 2], [0, 1, 3, 2]]), torch.randn(5, 3).double()
    B = o.B[:, 0, None] + terms[codes]  # (1, 2, 4, 3)
    expected = torch.zeros(4, 5).double()
    for k, p in enumerate(orders):
        expected[p] += mamba(o.u[0, p], o.delta[0, 0], o.A[0], B[0, k], o.C[0, 0], o.D[0])
    y = run(o.u, o.delta[:, 0], o.A[0], B, o.C[:, 0], o.D[0], table=orders, read="steps", merge="sum", revisits=False)
    assert error(y[0], expected) < run.tolerance


def test_localvim_windows_whose_padding_carries_values_and_another_write_order(run):
    """Padding that went through a convolution is a cell of its own; its output is dropped; write differs from table."""
    o = Operands(1, 1, 9)  # a 2x3 map is cells 0..5; cells 6..8 are what window padding became
    read = torch.tensor([[0, 1, 3, 4, 2, 6, 5, 7, 8]])
    write = torch.tensor([[0, 2, 4, 1, 3, 9, 5, 9, 9]])  # the published inverse of columns, wrong off squares
    sequence = mamba(o.u[0, read[0]], o.delta[0, 0, read[0]], o.A[0], o.B[0, 0, read[0]], o.C[0, 0, read[0]], o.D[0])
    expected = torch.zeros(9, 5).double()
    expected[write[0, write[0] < 9]] = sequence[write[0] < 9]
    y = run(o.u, o.delta, o.A, o.B, o.C, o.D, table=read, write=write, revisits=False)
    assert error(y[0, 0], expected) < run.tolerance


def test_localvmamba_window_padding_decays_the_state(run):
    """Entry l reads u = B = C = 0 and a raw delta of 0, so that softplus(bias) still decays the state."""
    o, bias = Operands(1, 1, 3), torch.randn(1, 5).double()
    row = torch.tensor([0, 3, 1, 3, 3, 2])

    def padded(x):
        return torch.cat([x, torch.zeros_like(x[:1])])[row]

    step = torch.nn.functional.softplus(padded(o.delta[0, 0]) + bias)
    sequence = mamba(padded(o.u[0]), step, o.A[0], padded(o.B[0, 0]), padded(o.C[0, 0]), o.D[0])
    y = run(o.u, o.delta, o.A, o.B, o.C, o.D, None, bias, delta_softplus=True, table=row[None], revisits=False)
    assert error(y[0, 0], sequence[[0, 2, 5]]) < run.tolerance


def test_msvmamba_v1_visits_cells_three_times_and_leaves_steps(run):
    """One row of 3 l steps carries its state across the junctions; v1 norms the sequence before bringing it back."""
    o, cells = Operands(2, 1, 6), torch.arange(6).reshape(2, 3)
    row = torch.cat([cells.flatten().flip(0), cells.T.flatten(), cells.T.flatten().flip(0)])
    expected = torch.stack([
        mamba(o.u[b, row], o.delta[b, 0, row], o.A[0], o.B[b, 0, row], o.C[b, 0, row], o.D[0]) for b in range(2)
    ])
    y = run(o.u, o.delta, o.A, o.B, o.C, o.D, table=row[None], write="steps")
    assert error(y[:, 0], expected) < run.tolerance


def test_msvmamba_v3_adds_up_revisited_cells(run):
    """v3 merges inside the scan: what a row leaves at a cell adds up."""
    o, cells = Operands(2, 1, 6), torch.arange(6).reshape(2, 3)
    row = torch.cat([cells.flatten().flip(0), cells.T.flatten(), cells.T.flatten().flip(0)])
    expected = torch.zeros(2, 6, 5).double()
    for b in range(2):
        sequence = mamba(o.u[b, row], o.delta[b, 0, row], o.A[0], o.B[b, 0, row], o.C[b, 0, row], o.D[0])
        for step, cell in enumerate(row):
            expected[b, cell] += sequence[step]
    y = run(o.u, o.delta, o.A, o.B, o.C, o.D, table=row[None])
    assert error(y[:, 0], expected) < run.tolerance


def test_efficientvmamba_disjoint_quarters_share_one_operand(run):
    """Four rows read a quarter of the map each, with padding; no operand needs a row axis but A and D."""
    o = Operands(1, 4, 6)  # 2x3
    rows = torch.tensor([[0, 2], [3, 5], [1, 6], [4, 6]])
    expected = torch.zeros(6, 5).double()
    for k, row in enumerate(rows):
        real = row[row < 6]
        sequence = mamba(o.u[0, real], o.delta[0, 0, real], o.A[k], o.B[0, 0, real], o.C[0, 0, real], o.D[k])
        expected[real] = sequence  # the padding comes last in each quarter here
    y = run(o.u, o.delta[:, 0], o.A, o.B[:, 0], o.C[:, 0], o.D, table=rows, merge="sum", revisits=False)
    assert error(y[0], expected) < run.tolerance


def test_segmamba_inter_slice(run):
    """Forward, backward, and all slices at one position before the next position."""
    o, cells = Operands(1, 3, 12), torch.arange(12)
    orders = torch.stack([cells, cells.flip(0), cells.reshape(3, 4).T.flatten()])
    expected = torch.zeros(3, 12, 5).double()
    for k, p in enumerate(orders):
        expected[k, p] = mamba(o.u[0, p], o.delta[0, k, p], o.A[k], o.B[0, k, p], o.C[0, k, p], o.D[k])
    y = run(o.u, o.delta, o.A, o.B, o.C, o.D, table=orders, revisits=False)
    assert error(y[0], expected) < run.tolerance


def test_mambairv2_has_a_table_for_each_sample(run):
    """Tokens are sorted by a class that the sample decides; the prompt on C stays in raster order."""
    o, prompt = Operands(2, 1, 5), torch.randn(2, 5, 3).double()
    perm = torch.stack([torch.randperm(5), torch.randperm(5)])
    expected = torch.zeros(2, 5, 5).double()
    for b in range(2):
        p = perm[b]
        C = o.C[b, 0, p] + prompt[b]
        expected[b, p] = mamba(o.u[b, p], o.delta[b, 0, p], o.A[0], o.B[b, 0, p], C, o.D[0])
    C = o.C + prompt.gather(1, perm.argsort(1)[..., None].expand_as(prompt))[:, None]
    y = run(o.u, o.delta, o.A, o.B, C, o.D, table=perm[:, None], merge="sum", revisits=False)
    assert error(y, expected) < run.tolerance


def test_heads_and_groups_are_rows(run):
    """Channels split into heads give u a row axis by a strided view; every head has its own order."""
    o, wide = Operands(1, 2, 4), torch.randn(1, 4, 2 * 5).double()
    orders = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]])
    heads = wide.reshape(1, 4, 2, 5).transpose(1, 2)
    expected = torch.zeros(2, 4, 5).double()
    for k, p in enumerate(orders):
        u = wide[0, p, 5 * k : 5 * k + 5]
        expected[k, p] = mamba(u, o.delta[0, k, p], o.A[k], o.B[0, k, p], o.C[0, k, p], o.D[k])
    y = run(heads, o.delta, o.A, o.B, o.C, o.D, table=orders, revisits=False)
    assert error(y[0], expected) < run.tolerance


@pytest.mark.parametrize("backend", available_backends("selective_scan"))
def test_a_long_scan_can_be_cut_in_pieces(backend, device):
    """The last state of one piece is the initial state of the next, gradients included."""
    o = Operands(1, 1, 7)
    dtype = torch.float32 if backend == "triton" else torch.float64
    u, delta, A, B, C, D = (x.to(device, dtype).requires_grad_() for x in (o.u, o.delta, o.A, o.B, o.C, o.D))
    whole, end = selective_scan(u, delta, A, B, C, D, backend=backend)
    expected = torch.autograd.grad(whole.square().sum() + end.square().sum(), (u, delta, A, B, C, D))

    pieces, h = [], None
    for part in (slice(3), slice(3, 7)):
        parts = (u[:, part], delta[:, :, part], A, B[:, :, part], C[:, :, part], D)
        y, h = selective_scan(*parts, initial_state=h, backend=backend)
        pieces.append(y)
    pieces = torch.cat(pieces, 2)
    actual = torch.autograd.grad(pieces.square().sum() + h.square().sum(), (u, delta, A, B, C, D))
    assert error(pieces, whole) < TOLERANCE[dtype]
    assert error(h, end) < TOLERANCE[dtype]
    for name, x, y in zip(("u", "delta", "A", "B", "C", "D"), actual, expected):
        assert error(x, y) < TOLERANCE[dtype], name


def test_reference_can_be_differentiated_twice():
    o = Operands(1, 1, 3, d=2, n=2)
    inputs = [x.requires_grad_() for x in (o.u, o.delta, o.A, o.B, o.C, o.D)]
    assert torch.autograd.gradgradcheck(lambda *x: selective_scan(*x, backend="reference"), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(B=torch.zeros(2, 4, 5, 3)), r"selective_scan: B must be \(b=2, k=4, r=6, n=3\), got \(2, 4, 5, 3\)"),
        (dict(table=torch.zeros(4, 6)), "table must hold integers, got torch.float32"),
        (dict(table=torch.full((4, 6), 7)), "table must name cells 0 to 5, or 6 for padding, got 7 to 7"),
        (dict(table=torch.full((4, 6), -1)), "got -1 to -1"),
        (dict(write=torch.full((4, 6), 7)), "write must name cells 0 to 5"),
        (dict(A=torch.zeros(4, 5, 0), B=torch.zeros(2, 4, 6, 0), C=torch.zeros(2, 4, 6, 0)), "at least one .* got n=0"),
        (dict(merge="mean"), "merge must be None or 'sum', got 'mean'"),
        (dict(read="cells"), "read must be None, 'steps' or a table, got 'cells'"),
        (dict(u=torch.zeros(2, 6, 5, dtype=torch.int32)), "u must be real floating point"),
        (dict(backend="cuda"), "no backend named 'cuda'; there are reference, torch, cpu, triton"),
        (dict(backend="triton"), "backend 'triton' cannot run: it needs a GPU, the inputs are on cpu"),
        (dict(read="steps", table=torch.zeros(4, 9, dtype=torch.int64)), r"delta must be \(b=2, k=4, r=9, d=5\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_work_starts(change, message):
    o = Operands(2, 4, 6)
    operands = dict(u=o.u, delta=o.delta, A=o.A, B=o.B, C=o.C, D=o.D, table=torch.arange(6).expand(4, 6))
    with pytest.raises(ValueError, match=message):
        selective_scan(**operands | change)
