"""MadeAgain: nothing changes but what is kept."""

from __future__ import annotations

import torch

from vssm.layers.again import MadeAgain


def test_keeps_how_to_make_a_tensor_in_its_place():
    x, w = torch.randn(4, 6, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    made, source = [], x.detach()

    def make():
        made.append(1)
        return source.tanh()

    y = x.tanh()
    expected = torch.autograd.grad((y @ w).square().sum(), (x, w), retain_graph=True)
    kept = set()
    with MadeAgain() as again:
        pack = again._pack
        again.later(y, make)
        z = y.view(2, 12, 5) @ w                                    # another shape of the same memory
        kept |= {type(pack(y)), type(pack(w))}
    actual = torch.autograd.grad(z.square().sum(), (x, w))
    assert made == [1]
    assert kept == {tuple, torch.Tensor}
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
