"""Tensors that the backward pass makes again instead of keeping them: cheap to make, and large."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vssm.kernels.backends import watched

Make = Callable[..., Tensor]


class MadeAgain:
    """A context in which what operations save of some tensors is how to make these.

    Checkpointing recomputes all that stands between two tensors; this leaves the expensive operations alone and makes
    their operands again. Where others look after saved tensors (``torch.utils.checkpoint``, compilers, tracers,
    functorch, hooks of the user), and where none are saved, it does nothing.

    >>> x = torch.ones(3, requires_grad=True)
    >>> y = x.exp()
    >>> with MadeAgain() as again:
    ...     z = again.later(y, torch.exp, x) ** 3                  # keeps no y
    >>> z.sum().backward()
    >>> bool(torch.allclose(x.grad, 3 * x.exp() ** 3))
    True
    """

    def __init__(self) -> None:
        self._recipes: dict[int, _Recipe] = {}
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    def later(self, x: Tensor, make: Make, *inputs: Tensor) -> Tensor:
        """``x``, which ``make(*inputs)`` gives again, bit for bit and in the same layout; under the same autocast.

        The caller keeps ``x`` until the context ends: it is known by its place in memory.
        """
        if self._hooks is not None and isinstance(x, Tensor) and (place := x.data_ptr()):
            self._recipes[place] = _Recipe(make, inputs, x.device.type)
        return x

    def __enter__(self) -> MadeAgain:
        if free():
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
            self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
            self._hooks, self._recipes = None, {}  # the hooks hold this object: what it holds would wait for gc

    def _pack(self, x: Tensor) -> tuple[Any, ...]:
        recipe = self._recipes.get(x.data_ptr())
        if recipe is None:
            return x, x._version
        recipe.asked += 1
        return recipe, x.shape, x.stride()


class _Recipe:
    """A tensor that is made once for all who ask for it in one backward pass."""

    def __init__(self, make: Make, inputs: tuple[Tensor, ...], device: str):
        self.make, self.inputs = make, tuple(x.detach() for x in inputs)
        self.versions = [x._version for x in inputs]
        self.autocast = autocast_now(device)
        self.asked = self.served = 0
        self.made: Tensor | None = None

    def result(self) -> Tensor:
        made = self.made
        if made is None:
            for x, version in zip(self.inputs, self.versions, strict=True):
                _check(x, version)
            with torch.no_grad(), self.autocast():
                made = self.make(*self.inputs)
        self.served = (self.served + 1) % self.asked
        self.made = made if self.served else None
        return made


def _unpack(packed: tuple[Any, ...]) -> Tensor:
    first, *rest = packed
    if isinstance(first, _Recipe):
        return first.result().as_strided(*rest)
    _check(first, *rest)
    return first


def _check(x: Tensor, version: int) -> None:
    """What autograd checks itself where there are no hooks."""
    if x._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {tuple(x.shape)} is at version {x._version}, expected version {version}"
        )


def autocast_now(device: str) -> Callable[[], AbstractContextManager[object]]:
    """What makes the contexts in which autocast is as it is now."""
    on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def context() -> AbstractContextManager[object]:
        as_now = on == torch.is_autocast_enabled(device) and (not on or dtype == torch.get_autocast_dtype(device))
        return nullcontext() if as_now else torch.autocast(device, dtype, enabled=on)

    return context


def free() -> bool:
    """Whether autograd saves tensors, and nobody else looks after them."""
    return (
        torch.is_grad_enabled()
        and not watched()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )
