"""Every backend of the selective scan against the definition in float64: outputs and all gradients."""

from __future__ import annotations

from functools import cache, partial

import kernel_cases
import pytest
import torch
from kernel_cases import assert_close, rounded, scan_inputs, signed, uniform
from tolerance import TOLERANCE, error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vssm.kernels import available_backends, selective_scan

BACKENDS = [name for name in available_backends("selective_scan") if name != "reference"]
EXACT = [name for name in BACKENDS if name != "triton"]  # in float64
# b, k, l, d, n: one of everything, lengths around the chunk of 32, primes, odd widths, more channels than a block
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 2, 5, 4),
    (1, 2, 31, 13, 8),
    (2, 1, 32, 8, 16),
    (1, 1, 33, 70, 1),
    (3, 4, 127, 20, 4),
    (2, 2, 40, 200, 3),
    (1, 1, 257, 3, 64),
    (1, 2, 1021, 9, 1),
    (1, 1, 4097, 2, 16),
]

defined, on = partial(kernel_cases.defined, selective_scan), partial(kernel_cases.on, selective_scan)


@cache
def case(sizes: tuple[int, ...], dtype: torch.dtype, shared: str = "") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Operands in ``dtype``, and what the definition makes of them in float64."""
    torch.manual_seed(0)
    inputs = rounded(scan_inputs(*sizes, shared=shared), dtype)
    return inputs, defined(inputs, delta_softplus=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_agrees_with_the_definition(backend, dtype, sizes, device):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton computes in float32")
    inputs, expected = case(sizes, dtype)
    assert_close(on(backend, device, inputs, delta_softplus=True), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", ["u", "delta", "A", "B", "C", "D delta_bias", "u delta A B C D delta_bias"])
@pytest.mark.parametrize("merge", [None, "sum"])
def test_operands_without_rows_are_shared(backend, shared, merge, device):
    inputs = rounded(scan_inputs(2, 3, 37, 6, 3, shared=shared), torch.float32)
    options = {"merge": merge, "delta_softplus": True, "table": torch.stack([torch.randperm(37) for _ in range(3)])}
    assert_close(on(backend, device, inputs, **options), defined(inputs, **options), TOLERANCE[torch.float32])


def tables(kind: str, l: int, t: int) -> Tensor:
    """Two rows of steps over l cells; or two for each of two samples."""
    if kind == "permutation":
        return torch.stack([torch.randperm(l), torch.randperm(l)])
    if kind == "revisits":
        return torch.randint(0, l, (2, t))
    if kind == "padding":
        return torch.randint(0, l + 1, (2, t)).index_fill(1, torch.tensor([0, t - 1]), l)
    return torch.randint(0, l + 1, (2, 2, t))


TABLES = {
    "a permutation": dict(table="permutation"),
    "revisits": dict(table="revisits"),
    "padding": dict(table="padding"),
    "a table per sample": dict(table="samples"),
    "parameters by step": dict(table="padding", read="steps"),
    "parameters by another table": dict(table="permutation", read="padding"),
    "another order of writing": dict(table="padding", write="permutation"),
    "written in steps": dict(table="samples", write="steps"),
    "read without a table": dict(read="permutation", write="samples"),
    "everything by sample": dict(table="samples", read="samples", write="samples"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", [None, "sum"])
@pytest.mark.parametrize("kinds", TABLES.values(), ids=TABLES)
def test_reads_and_writes_by_table(backend, kinds, merge, device):
    l, steps = 41, 41 if "permutation" in kinds.values() or "table" not in kinds else 47
    options = {name: kind if kind == "steps" else tables(kind, l, steps) for name, kind in kinds.items()}
    entries, cells = (steps if options.get(name) == "steps" else l for name in ("read", "write"))
    inputs = rounded(scan_inputs(2, 2, l, 6, 3, shared="u C", entries=entries, cells=cells), torch.float32)
    options |= {"delta_softplus": True, "merge": merge}
    assert_close(on(backend, device, inputs, **options), defined(inputs, **options), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_operands_may_be_absent(backend, device):
    inputs = rounded(scan_inputs(1, 2, 19, 5, 2), torch.float32)
    inputs = {name: inputs[name] for name in ("u", "delta", "A", "B", "C")} | {"delta": inputs["delta"].exp()}
    assert_close(on(backend, device, inputs), defined(inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("merge", [None, "sum"], ids=["rows", "sum"])
def test_the_gradient_of_the_gate_is_rounded_once(backend, merge, device):
    torch.manual_seed(0)
    inputs = rounded(scan_inputs(2, 2, 40, 24, 4), torch.bfloat16)
    name, options = "grad of z", dict(delta_softplus=True, merge=merge)
    expected = defined(inputs, **options)[name]
    found = on(backend, device, inputs, **options)[name]
    assert error(found, expected) < 1.05 * error(expected.bfloat16(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_free(backend, device):
    """Permuted, sliced, expanded and reversed operands give what their copies give."""
    b, k, l, d, n = 2, 2, 23, 6, 3
    plain = {name: x.to(device, torch.float32) for name, x in scan_inputs(b, k, l, d, n).items()}
    views = {
        "u": signed(l, b, k, 2 * d).permute(1, 2, 0, 3)[..., d:],
        "delta": signed(b, 1, l, d).expand(-1, k, -1, -1),
        "A": uniform(k, n, d, low=-4, high=-1).transpose(1, 2),
        "B": signed(b, k, n, l).transpose(2, 3),
        "C": signed(b, k, 1, n).expand(-1, -1, l, -1),
        "D": signed(d, k).t(),
        "z": signed(1, l, d).expand(b, -1, -1),
        "initial_state": signed(n, d, k, b).permute(3, 2, 1, 0),
    }
    views = {name: x.to(device, torch.float32) for name, x in views.items()}
    copies = {name: x.contiguous() for name, x in views.items()}
    table = torch.stack([torch.randperm(l), torch.randperm(l)]).repeat_interleave(2, 1).to(device)[:, ::2]
    actual = on(backend, device, plain | views, table=table)
    for name, value in on(backend, device, plain | copies, table=table.contiguous()).items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_joined_by_their_states_are_the_whole(backend, device):
    """A sequence cut in two, the state passed on, has the outputs and the gradients of the sequence in one piece."""
    inputs = {name: x.float().to(device).requires_grad_() for name, x in scan_inputs(2, 2, 70, 5, 3).items()}

    def scan(cells: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        cut = {name: inputs[name][..., cells, :] for name in ("u", "delta", "B", "C", "z")}
        rest = {name: inputs[name] for name in ("A", "D", "delta_bias")}
        return selective_scan(**cut, **rest, delta_softplus=True, initial_state=state, backend=backend)

    whole, last = scan(slice(None), inputs["initial_state"])
    first, state = scan(slice(0, 29), inputs["initial_state"])
    second, joined_last = scan(slice(29, None), state)
    joined = torch.cat([first, second], -2)
    weight = torch.randn_like(whole)
    expected = torch.autograd.grad([whole, last], list(inputs.values()), [weight, last.detach()])
    actual = torch.autograd.grad([joined, joined_last], list(inputs.values()), [weight, last.detach()])
    assert error(joined, whole) < 1e-5
    assert error(joined_last, last) < 1e-5
    for name, a, e in zip(inputs, actual, expected):
        assert error(a, e) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delta", [1e-6, 50.0])
@pytest.mark.parametrize("decay", [-1e-4, -64.0])
def test_extremes_are_finite_and_right(backend, delta, decay, device):
    """Where the sum has a closed form: constant inputs over 65,536 steps."""
    l = 65536
    values = {"u": 1.0, "delta": delta, "B": 1.0, "C": 1.0}
    inputs = {name: torch.full((1, l, 1), value, device=device) for name, value in values.items()}
    inputs = {
        name: x.requires_grad_() for name, x in (inputs | {"A": torch.full((1, 1), decay, device=device)}).items()
    }
    y, last = selective_scan(**inputs, backend=backend)
    a = torch.tensor(delta, dtype=torch.float64) * decay
    steps = torch.arange(1, l + 1, dtype=torch.float64)
    expected = delta * torch.expm1(a * steps) / torch.expm1(a)
    relative = (y.detach().flatten().double().cpu() - expected).abs() / expected
    assert relative.max() < 1e-3  # decays rounded to float32, 65,536 times
    for grad in torch.autograd.grad(y.mean() + last.sum(), list(inputs.values())):
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C"])
def test_what_is_not_finite_shows_and_stays_where_it_is(backend, bad, name, device):
    """From the bad step on in its own sample and channels; never in another sample."""
    inputs = {key: x.float().to(device) for key, x in scan_inputs(2, 1, 40, 18, 2).items() if key != "z"}
    inputs[name][1, 0, 20, 0] = bad
    y, last = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert not y[1, 0, 20, 0].isfinite()
    for unharmed in (y[0], y[1, 0, :20], y[1, 0, :, 16:] if name in ("u", "delta") else y[0], last[0]):
        assert unharmed.isfinite().all()
    if name != "C":
        assert not last[1, 0, 0].isfinite().all() or (name == "delta" and bad > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_none_has_gradients(backend, device):
    inputs = {name: x.float() for name, x in scan_inputs(0, 2, 5, 4, 3).items()}
    result = on(backend, device, inputs)
    assert (result["y"].shape, result["last_state"].shape) == ((0, 2, 5, 4), (0, 2, 4, 3))
    assert not result["grad of A"].any()


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("merge", [None, "sum"])
def test_gradcheck(backend, merge):
    inputs = scan_inputs(1, 2, 5, 3, 2, shared="B")
    table = torch.tensor([[0, 4, 2, 2, 5, 1], [3, 3, 3, 0, 1, 2]])

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        options = dict(table=table, merge=merge, delta_softplus=True, backend=backend)
        return selective_scan(**dict(zip(inputs, values)), **options)

    assert torch.autograd.gradcheck(scan, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(backend, full, device):
    """The custom op that compilers see: schema, fake tensors, autograd, dynamic shapes."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = {name: x.to(device, dtype).requires_grad_() for name, x in scan_inputs(2, 2, 7, 4, 3, shared="u").items()}
    table = torch.stack([torch.randperm(7), torch.randperm(7)]).int().to(device)
    optional = [inputs[name] if full else None for name in ("D", "z", "delta_bias")]
    state = inputs["initial_state"] if full else None
    operands = [inputs[name] for name in ("u", "delta", "A", "B", "C")]
    indices = [table if full else None] * 3
    args = (*operands, *optional, *indices, state, True, full, True, True, backend, 2)
    torch.library.opcheck(torch.ops.vssm.selective_scan.default, args)


class LargestTensor(TorchDispatchMode):
    """Watches how many elements the largest tensor has that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().size() // x.element_size())
        return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_grow_with_states(backend, device):
    """No tensor comes near b k l d n: what is allocated stays within a few b k l d."""
    b, k, l, d, n = 1, 2, 2048, 32, 32
    inputs = {name: x.float().to(device) for name, x in scan_inputs(b, k, l, d, n, shared="u").items()}
    with LargestTensor() as largest:
        on(backend, device, inputs, delta_softplus=True, merge="sum")
    assert largest.elements <= 4 * b * k * l * d
