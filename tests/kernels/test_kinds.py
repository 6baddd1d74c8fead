"""What is decided once for a kind of call is decided again for every other kind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from kernel_cases import conv_inputs, scan_inputs
from torch import Tensor
from torch.nn import Parameter

from vssm.kernels import causal_conv1d, kinds, selective_scan, use_backend
from vssm.kernels.kinds import Kind, kind_of
from vssm.kernels.selective_scan.rules import RULES


def scan(**changed: Any) -> Tensor:
    torch.manual_seed(0)
    inputs = {name: x.float() for name, x in scan_inputs(1, 1, 5, 4, 2).items()}
    return selective_scan(**inputs | {"delta_softplus": True} | changed)[0]


def convolve(**changed: Any) -> Tensor:
    torch.manual_seed(0)
    inputs = {name: x.float() for name, x in conv_inputs(1, 1, 5, 4, 3).items()} | changed
    return causal_conv1d(**inputs)[0]


OPS = pytest.mark.parametrize(("op", "first"), [(scan, "u"), (convolve, "x")], ids=["scan", "conv1d"])
SHAPE = (1, 5, 4)


@OPS
def test_a_mistake_is_reported_each_time(op, first):
    for shape in ((1, 5, 3), (2, 5, 4)) * 2:  # the second has the strides of what fits
        op(**{first: torch.ones(SHAPE)})
        with pytest.raises(ValueError, match="must be"):
            op(**{first: torch.ones(shape)})
    table = torch.tensor([[4, 3, 2, 1, 0]])
    for _ in range(2):
        op(table=table)
        with pytest.raises(ValueError, match="must hold integers"):
            op(table=table.double())


@OPS
def test_the_wish_for_gradients_is_part_of_the_kind(op, first):
    x = torch.ones(SHAPE, requires_grad=True)
    for _ in range(2):
        with torch.no_grad():
            assert not op(**{first: x}).requires_grad
        assert not op(**{first: x.detach()}).requires_grad
        assert op(**{first: x}).requires_grad


@OPS
def test_the_backend_asked_for_is_part_of_the_kind(op, first):
    """The reference can be differentiated twice, the others once."""
    x = torch.ones(SHAPE, requires_grad=True)

    def gradient(forced: str | None, backend: str | None) -> Tensor:
        with use_backend(forced):
            y = op(**{first: x}, backend=backend)
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].square().sum()

    for _ in range(2):
        for reference, other in ((("reference", None), ("torch", None)), ((None, "reference"), (None, "torch"))):
            torch.autograd.grad(gradient(*reference), x)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                gradient(*other).backward()


@pytest.mark.parametrize(
    ("op", "options"),
    [(scan, {"delta_softplus": False}), (scan, {"merge": "sum"}), (convolve, {"activation": "silu"})],
    ids=["scan softplus", "scan merge", "conv1d activation"],
)
def test_options_are_part_of_the_kind(op, options):
    for _ in range(2):
        plain, other = op(), op(**options)
        assert plain.shape != other.shape or not torch.equal(plain, other)


def test_which_tables_are_one_and_the_same_is_part_of_the_kind():
    """Those that are int32 already are taken as they come."""
    table, other = torch.tensor([[4, 3, 2, 1, 0]]), torch.tensor([[1, 0, 4, 2, 3]])
    for read, write in ((table, other), (other, table), (table, table), (other, other)):
        expected = scan(table=table.int(), read=read.int(), write=write.int())
        assert torch.equal(scan(table=table, read=read, write=write), expected)


@OPS
def test_autocast_is_part_of_the_kind(op, first):
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert op().dtype == torch.bfloat16
        assert op().dtype == torch.float32


@OPS
def test_strides_are_part_of_the_kind(op, first):
    x = torch.randn(SHAPE)
    expected = op(**{first: x})
    for other in (x.mT.contiguous().mT, torch.cat([x, x], -1)[..., :4], x.expand(1, 1, 5, 4)):
        for _ in range(2):
            torch.testing.assert_close(op(**{first: other}).view(SHAPE), expected.view(SHAPE))


@pytest.mark.parametrize("lay", [lambda x: x.mT.contiguous().mT, lambda x: torch.stack([x, x])[1]], ids=["mT", "moved"])
@OPS
def test_hooks_may_bring_saved_tensors_back_in_another_layout(op, first, lay):
    x = torch.randn(SHAPE, requires_grad=True)
    expected = torch.autograd.grad(op(**{first: x}).square().sum(), x)[0]
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda x: lay(x) if x.dim() > 1 else x):
            y = op(**{first: x})
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)


gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "table", "read", "write", "initial_state")
OPTIONS = (True, False, True)  # softplus, no merge, revisits


def operands(**changed: Any) -> tuple[Tensor | None, ...]:
    inputs = {name: x.float() for name, x in scan_inputs(1, 1, 5, 4, 4).items()}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()} | changed
    return tuple(inputs.get(name) for name in NAMES)


def detached(operands: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.detach() for x in operands)


def scan_kind(operands: tuple[Tensor | None, ...], same: tuple[bool, bool] = (True, True), **how: Any) -> Kind:
    return kind_of(RULES, operands, same, how.pop("options", OPTIONS), how.pop("backend", None), **how)


def by_key(monkeypatch: pytest.MonkeyPatch, find: Callable[[], Kind]) -> Kind:
    with monkeypatch.context() as patch:
        patch.setattr(kinds, "_guards", None)
        patch.setattr(kinds, "_guarded", {})
        return find()


@pytest.fixture
def met(monkeypatch):
    """Operands whose kind is known by guards."""
    monkeypatch.setattr(kinds, "_guarded", {})
    given = operands()
    kind = scan_kind(given)
    assert scan_kind(given) is kind is scan_kind(given)
    assert len(kinds._guarded) == 1
    return given, kind


ROW = torch.ones(1, 4)
TABLE = torch.tensor([[4, 3, 2, 1, 0]], dtype=torch.int32)
ORDER = TABLE.flip(1)
OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], Kind]]] = {
    "another shape behind u": (nullcontext, lambda: scan_kind(operands(delta=torch.ones(1, 5, 4)))),
    "other strides": (nullcontext, lambda: scan_kind(operands(u=torch.ones(1, 5, 8)[..., :4]))),
    "transposed": (nullcontext, lambda: scan_kind(operands(B=torch.ones(1, 4, 5).mT))),
    "another dtype": (nullcontext, lambda: scan_kind(operands(u=torch.ones(1, 5, 4, dtype=torch.bfloat16)))),
    "a table": (nullcontext, lambda: scan_kind(operands(table=TABLE, read=TABLE, write=TABLE))),
    "tables that differ": (nullcontext, lambda: scan_kind(operands(table=TABLE, read=TABLE), same=(True, False))),
    "no D": (nullcontext, lambda: scan_kind(operands(D=None))),
    "D, but no bias": (nullcontext, lambda: scan_kind(operands(D=ROW, delta_bias=None))),
    "a bias, but no D": (nullcontext, lambda: scan_kind(operands(D=None, delta_bias=ROW))),
    "nothing recorded": (torch.no_grad, lambda: scan_kind(operands())),
    "no gradient asked for": (nullcontext, lambda: scan_kind(detached(operands()))),
    "recorded by the caller": (torch.no_grad, lambda: scan_kind(operands(), save=True)),
    "inference": (torch.inference_mode, lambda: scan_kind(operands())),
    "bfloat16 by autocast": (partial(torch.autocast, "cpu", torch.bfloat16), lambda: scan_kind(operands())),
    "float16 by autocast": (partial(torch.autocast, "cpu", torch.float16), lambda: scan_kind(operands())),
    "autocast turned off": (partial(torch.autocast, "cpu", enabled=False), lambda: scan_kind(operands())),
    "a backend by name": (nullcontext, lambda: scan_kind(operands(), backend="torch")),
    "a backend forced": (partial(use_backend, "torch"), lambda: scan_kind(operands())),
    "other options": (nullcontext, lambda: scan_kind(operands(), options=(False, False, True))),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_guards_tell_the_kinds_that_keys_tell(monkeypatch, met, name):
    """Whichever came first, the other or the one that was met, and each time that it comes."""
    context, find = OTHERS[name]
    given, kind = met
    with context():
        expected = by_key(monkeypatch, find)
        assert all(find() is expected for _ in range(4))
    assert scan_kind(given) is kind
    assert (expected is kind) == (name in ("autocast turned off", "recorded by the caller"))


def test_guards_tell_what_the_caller_records(met):
    """A call that records tensors which ask for no gradient, between calls that do not."""
    given = detached(met[0])
    for _ in range(4):
        assert not scan_kind(given).save
        assert scan_kind(given, save=True).save


def test_guards_tell_the_dtypes_of_autocast(met):
    """Autocast is seen in how tensors are dispatched, its dtype is not."""
    given, _ = met
    found = {}
    for _ in range(3):
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                found.setdefault(dtype, scan_kind(given))
                assert scan_kind(given) is found[dtype]
                assert found[dtype].dtypes[0] == dtype


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_guards_see_autocast_on_the_device_of_the_operands(device):
    given = [torch.ones(2, 3, device=device)]
    guards = kinds.guards_of(given)
    assert guards.check(*given)
    with torch.autocast(device, torch.bfloat16):
        assert not guards.check(*given)
        assert kinds.guards_of(given).check(*given)


def test_guards_refuse_what_they_cannot_tell(monkeypatch, met):
    """Subclasses, wrapped tensors, negated views, one tensor in two places: the key decides, and it is not slower."""

    class Special(Tensor):
        pass

    given, _ = met
    u = given[0].detach()
    others = [u.as_subclass(Special), Parameter(u), torch._neg_view(u), u]
    torch.func.vmap(others.append, out_dims=None)(u[None])
    (guarded,) = next(iter(kinds._guarded.values()))
    for other in others:
        assert not guarded.holds([other, *[x for x in given[1:] if x is not None]])
    for other in (others[0], given[1]):
        before = dict(kinds._guarded)
        assert scan_kind((other, *given[1:])) is by_key(monkeypatch, partial(scan_kind, (other, *given[1:])))
        scan_kind((other, *given[1:]))
        assert kinds._guarded == before


def test_guards_of_a_parameter_are_those_of_parameters(met):
    given, kind = met
    as_parameter = (*given[:2], Parameter(given[2].detach()), *given[3:])
    for _ in range(3):
        assert scan_kind(as_parameter) is kind is scan_kind(given)
    assert [len(known) for known in kinds._guarded.values()] == [1, 1]


def test_guards_are_few_and_keep_no_tensor(met):
    given, kind = met
    for wanted in range(8):  # which of three tensors ask for gradients
        some = [
            given[0].detach(),
            *[x.detach().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(given[1:4])],
        ]
        scan_kind((*some, *given[4:]))
    assert [len(known) for known in kinds._guarded.values()] == [kinds.FEW]
    fresh = operands()
    alive = weakref.ref(fresh[0])
    assert scan_kind(fresh) is kind
    del fresh
    assert alive() is None


def test_guards_tell_reading_from_writing(met):
    """A table that is read, and the same one that is written."""
    for _ in range(4):
        read = scan_kind(operands(table=TABLE, read=ORDER, write=TABLE), same=(False, True))
        written = scan_kind(operands(table=TABLE, read=TABLE, write=ORDER), same=(True, False))
        assert (read.same, written.same) == ((False, True), (True, False))


def test_guards_go_with_the_kinds(monkeypatch, met):
    monkeypatch.setattr(kinds, "MOST", len(kinds._kinds))
    before = dict(kinds._guarded)
    scan_kind(operands(u=torch.ones(1, 5, 4, dtype=torch.float64), D=None, z=None))
    assert before
    assert not kinds._guarded
    assert len(kinds._kinds) == 1


def test_guards_know_the_state_of_their_thread(met):
    given, kind = met

    def in_thread(context: Callable[[], AbstractContextManager[Any]]) -> Kind:
        with context():
            return scan_kind(given)

    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        assert pool.submit(in_thread, nullcontext).result() is kind
        assert pool.submit(in_thread, partial(torch.autocast, "cpu", torch.bfloat16)).result() is not kind
        assert scan_kind(given) is not kind
