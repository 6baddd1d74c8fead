"""Tensors that the backward pass makes again instead of keeping them: cheap to make, and large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Make = Callable[[], Tensor]


class MadeAgain:
    """A context in which what operations save of some tensors is how to make these.

    Checkpointing recomputes all that stands between two tensors; this leaves the expensive operations alone and makes
    their operands again. Inside another such context (``torch.utils.checkpoint``) only this one applies.

    >>> x = torch.ones(3, requires_grad=True)
    >>> y = x.exp()
    >>> with MadeAgain() as again:
    ...     z = again.later(y, x.detach().exp) ** 3                # keeps no y
    >>> z.sum().backward()
    >>> bool(torch.allclose(x.grad, 3 * x.exp() ** 3))
    True
    """

    def __init__(self) -> None:
        self._makers: dict[int, Make] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def later(self, x: Tensor, make: Make) -> Tensor:
        """``x``, which ``make()`` gives again, bit for bit and in the same layout.

        The caller keeps ``x`` until the context ends: it is known by its place in memory.
        """
        self._makers[x.data_ptr()] = make
        return x

    def __enter__(self) -> MadeAgain:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, x: Tensor) -> Any:
        make = self._makers.get(x.data_ptr())
        return x if make is None else (make, x.shape, x.stride())

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        make, shape, stride = packed
        with torch.no_grad():
            return make().as_strided(shape, stride)
