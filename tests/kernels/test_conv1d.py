"""Every backend of the causal convolution against the definition in float64, and the definition against torch's own."""

from __future__ import annotations

from functools import cache, partial

import kernel_cases
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import assert_close, conv_inputs, rounded, signed, value_and_grads
from tolerance import TOLERANCE, error
from torch import Tensor

from vssm.kernels import available_backends, causal_conv1d

BACKENDS = [name for name in available_backends("conv1d") if name != "reference"]
EXACT = [name for name in BACKENDS if name != "triton"]  # in float64
# b, k, l, d, w: one of everything, shorter than the taps, lengths around the chunk of 64, many taps
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 2, 5, 4),
    (1, 2, 63, 13, 3),
    (2, 1, 64, 8, 4),
    (1, 4, 65, 70, 2),
    (1, 1, 1021, 3, 4),
    (1, 2, 131, 4, 19),
    (1, 2, 131, 4, 67),
]

defined, on = partial(kernel_cases.defined, causal_conv1d), partial(kernel_cases.on, causal_conv1d)


@cache
def case(
    sizes: tuple[int, ...], dtype: torch.dtype, activation: str | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Operands in ``dtype``, and what the definition makes of them in float64."""
    torch.manual_seed(0)
    inputs = rounded(conv_inputs(*sizes), dtype)
    return inputs, defined(inputs, activation=activation)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_definition_is_torchs_convolution(activation):
    """Without a table, for sequences of any length: pad on the left, convolve each channel."""
    x, weight, bias = signed(2, 9, 5), signed(5, 4), signed(5)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight.unsqueeze(1), bias, groups=5).transpose(1, 2)
    y, last = causal_conv1d(x, weight, bias, activation=activation, backend="reference")
    assert error(y, F.silu(expected) if activation else expected) < TOLERANCE[torch.float64]
    assert torch.equal(last, x[:, None, -3:].transpose(-1, -2))


def test_definition_reads_backwards_along_a_reversed_row():
    x, weight = signed(1, 6, 3), signed(3, 2)
    y, last = causal_conv1d(x, weight, table=torch.arange(6).flip(0)[None], backend="reference")
    expected = x * weight[:, 1] + F.pad(x[:, 1:], (0, 0, 0, 1)) * weight[:, 0]
    assert error(y[:, 0], expected) < TOLERANCE[torch.float64]
    assert torch.equal(last[:, 0, :, 0], x[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_agrees_with_the_definition(backend, dtype, activation, sizes, device):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton computes in float32")
    if backend == "triton" and sizes[-1] == 67:
        pytest.skip("Triton takes a minute to compile so many taps; 19 are tested")
    inputs, expected = case(sizes, dtype, activation)
    assert_close(on(backend, device, inputs, activation=activation), expected, TOLERANCE[dtype])


TABLES = {
    "a permutation": dict(table="permutation"),
    "revisits and padding": dict(table="padding"),
    "a table per sample": dict(table="samples"),
    "another order of writing": dict(table="padding", write="permutation"),
    "written in steps": dict(table="samples", write="steps"),
    "read without a table": dict(write="samples"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("shared", ["", "x", "x weight bias"])
def test_reads_and_writes_by_table(backend, kinds, shared, device):
    l, t = 71, 71 if "permutation" in kinds.values() or "table" not in kinds else 83
    indices = {
        "permutation": torch.stack([torch.randperm(l), torch.randperm(l)]),
        "padding": torch.randint(0, l + 1, (2, t)).index_fill(1, torch.tensor([0, t - 1]), l),
        "samples": torch.randint(0, l + 1, (2, 2, t)),
        "steps": "steps",
    }
    options = {name: indices[kind] for name, kind in kinds.items()} | {"activation": "silu"}
    inputs = rounded(conv_inputs(2, 2, l, 6, 4, shared=shared), torch.float32)
    assert_close(on(backend, device, inputs, **options), defined(inputs, **options), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_axis_appears_only_where_something_has_it(backend, device):
    x, weight = torch.randn(2, 7, 3, device=device), torch.randn(3, 4, device=device)
    y, last = causal_conv1d(x, weight, backend=backend)
    assert (y.shape, last.shape) == ((2, 7, 3), (2, 1, 3, 3))
    y, _ = causal_conv1d(x, weight, table=torch.arange(7, device=device)[None], backend=backend)
    assert y.shape == (2, 1, 7, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_free(backend, device):
    views = {
        "x": signed(7, 2, 3, 10).permute(1, 2, 0, 3)[..., 5:],
        "weight": signed(3, 4, 5).transpose(1, 2),
        "bias": signed(5, 3).t(),
    }
    views = {name: x.to(device, torch.float32) for name, x in views.items()}
    actual = on(backend, device, views)
    for name, value in on(backend, device, {name: x.contiguous() for name, x in views.items()}).items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 2, 40])
def test_pieces_joined_by_their_states_are_the_whole(backend, cut, device):
    inputs = {name: x.float().to(device).requires_grad_() for name, x in conv_inputs(2, 2, 70, 5, 4).items()}
    x, state, taps = inputs["x"], inputs["initial_state"], (inputs["weight"], inputs["bias"])
    whole, last = causal_conv1d(x, *taps, initial_state=state, backend=backend)
    first, state = causal_conv1d(x[:, :, :cut], *taps, initial_state=state, backend=backend)
    second, joined_last = causal_conv1d(x[:, :, cut:], *taps, initial_state=state, backend=backend)
    joined, weight = torch.cat([first, second], 2), torch.randn_like(whole)
    assert error(joined, whole) < 1e-6
    assert torch.equal(joined_last, last)
    expected = torch.autograd.grad([whole, last], list(inputs.values()), [weight, last.detach()])
    actual = torch.autograd.grad([joined, joined_last], list(inputs.values()), [weight, last.detach()])
    for name, a, e in zip(inputs, actual, expected):
        assert error(a, e) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_none_has_gradients(backend, device):
    result = on(backend, device, {name: x.float() for name, x in conv_inputs(0, 2, 5, 4, 3).items()})
    assert (result["y"].shape, result["last_state"].shape) == ((0, 2, 5, 4), (0, 2, 4, 2))
    assert not result["grad of weight"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_shows_and_stays_where_it_is(backend, device):
    inputs = {name: x.float().to(device) for name, x in conv_inputs(2, 1, 100, 18, 4).items()}
    inputs["x"][1, 0, 70, 2] = float("nan")
    y, _ = causal_conv1d(**inputs, activation="silu", backend=backend)
    assert y.isnan().nonzero().tolist() == [[1, 0, step, 2] for step in range(70, 74)]


@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck(backend):
    inputs, table = conv_inputs(1, 2, 5, 3, 3, shared="x"), torch.tensor([[0, 4, 2, 2, 5, 1], [3, 3, 3, 0, 1, 2]])

    def convolve(*values: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(**dict(zip(inputs, values)), table=table, activation="silu", backend=backend)

    assert torch.autograd.gradcheck(convolve, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(backend, full, device):
    """The custom op that compilers see: schema, fake tensors, autograd, dynamic shapes."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = {name: x.to(device, dtype).requires_grad_() for name, x in conv_inputs(2, 2, 7, 4, 3, shared="x").items()}
    table = torch.stack([torch.randperm(7), torch.randperm(7)]).int().to(device) if full else None
    bias, state = (inputs[name] if full else None for name in ("bias", "initial_state"))
    args = (inputs["x"], inputs["weight"], bias, table, table, state, full, True, backend)
    torch.library.opcheck(torch.ops.vssm.causal_conv1d.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(2, 2, 9, 4, 3), (1, 1, 5, 3, 2), (1, 1, 4, 1, 1)], ids=str)
def test_compiles_in_one_graph(backend, sizes, device):
    """Also where views of one buffer would pass for results of their own, which a custom op may not return."""
    torch._dynamo.reset()  # which counts how often one function was compiled
    inputs = {name: x.float().to(device) for name, x in conv_inputs(*sizes).items()}
    convolve = partial(causal_conv1d, activation="silu", backend=backend)
    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
    expected = value_and_grads(convolve, inputs)
    for name, value in value_and_grads(compiled, inputs).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_x_alone(backend, device):
    inputs = {name: x.float().to(device) for name, x in conv_inputs(1, 1, 9, 4, 3).items()}
    expected, _ = causal_conv1d(inputs["x"].bfloat16(), inputs["weight"], inputs["bias"], backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        y, last = causal_conv1d(inputs["x"], inputs["weight"], inputs["bias"], backend=backend)
    assert y.dtype == last.dtype == torch.bfloat16
    assert torch.equal(y, expected)


WRONG = {
    "weight must be .d=4, w., got .5, 3.": dict(weight=torch.ones(5, 3)),
    "there must be at least one row, cell, step and tap, got w=0": dict(weight=torch.ones(4, 0)),
    "bias must be .d=4., got .3,.": dict(bias=torch.ones(3)),
    "activation must be None or 'silu', got 'relu'": dict(activation="relu"),
    "write must be None, 'steps' or a table, got 'step'": dict(write="step"),
    "table must hold integers, got torch.float32": dict(table=torch.ones(1, 6)),
    "table must name cells 0 to 5, or 6 for padding, got 0 to 7": dict(table=torch.tensor([[0, 7]])),
    "write must name cells 0 to 5, or 6 for padding, got -1 to 1": dict(write=torch.arange(6)[None].clamp(max=2) - 1),
    "initial_state must be .b=2, k=1, d=4, w-1=2., got .2, 3, 4, 2.": dict(initial_state=torch.ones(2, 3, 4, 2)),
    "without a table there are as many steps as cells .6., got 2": dict(write=torch.tensor([[0, 1]])),
    "x must be .b, k., l, d., got .6, 4.": dict(x=torch.ones(6, 4)),
    "x must be real floating point, got torch.int64": dict(x=torch.ones(2, 6, 4, dtype=torch.long)),
}


@pytest.mark.parametrize(("message", "change"), WRONG.items(), ids=range(len(WRONG)))
def test_refuses_what_does_not_fit(message, change):
    operands = dict(x=torch.ones(2, 6, 4), weight=torch.ones(4, 3)) | change
    with pytest.raises(ValueError, match=f"^causal_conv1d: {message}"):
        causal_conv1d(**operands)
