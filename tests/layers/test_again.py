"""MadeAgain: nothing changes but what is kept."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vssm  # noqa: F401 - its models become timm's
from vssm.layers.again import MadeAgain


def test_keeps_how_to_make_a_tensor_in_its_place():
    """Two operations save it, one in another shape: it is made once a backward pass, and not kept."""
    x, w = torch.randn(4, 6, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    made = []

    def make(source):
        made.append(1)
        return source.tanh()

    y = x.tanh() * 1
    expected = torch.autograd.grad((y @ w).square().sum() + y.square().sum(), (x, w))
    y = make(x) * 1
    with MadeAgain() as again:
        again.later(y, lambda source: make(source) * 1, x)
        z, square = y.view(2, 12, 5) @ w, y.square().sum()
    kept = weakref.ref(y.untyped_storage())
    del y, again
    assert kept() is None  # at once, without garbage collection
    for count in (2, 3):
        actual = torch.autograd.grad(z.square().sum() + square, (x, w), retain_graph=True)
        assert len(made) == count
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_makes_it_under_the_same_autocast():
    x, w = torch.randn(2, 3), torch.randn(3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), MadeAgain() as again:
        y = x @ w
        z = again.later(y, torch.matmul, x, w).square().sum()
    z.backward()
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.autograd.grad((x @ w).square().sum(), w)[0]
    assert torch.equal(w.grad, expected)


def test_refuses_what_was_changed_in_place_as_autograd_does():
    x, scale = torch.randn(3, requires_grad=True), torch.randn(3)
    for changed in ("input", "other"):
        y, other = x * scale, torch.randn(3)
        with MadeAgain() as again:
            z = (again.later(y, torch.mul, x, scale) ** 2 * other).sum()
        (scale if changed == "input" else other).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.backward()


def test_leaves_saved_tensors_to_those_who_look_after_them():
    """Checkpointing, hooks, functorch, and no gradient at all."""
    x = torch.randn(3, requires_grad=True)

    def call(x):
        y = x.exp()
        with MadeAgain() as again:
            return again.later(y, lambda _: pytest.fail("made again"), x) ** 3

    expected = torch.autograd.grad((x.exp() ** 3).sum(), x)[0]
    assert torch.allclose(torch.autograd.grad(checkpoint(call, x, use_reentrant=False).sum(), x)[0], expected)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        y = call(x)
    assert len(seen) == 2
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], expected)
    assert torch.allclose(torch.func.grad(lambda x: call(x).sum())(x.detach()), expected)
    with torch.no_grad():
        call(x)


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim", "test_localvmamba", "test_groupmamba"])
def test_a_model_keeps_less_and_learns_the_same(name, monkeypatch):
    """Gradients bit for bit those without it."""
    import timm

    from vssm.layers import again

    model = timm.create_model(name).train()
    x = torch.randn(2, 3, *model.default_cfg["input_size"][1:])

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    with_it = gradients()
    monkeypatch.setattr(again, "free", lambda: False)
    without = gradients()
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
