"""Maps and tokens: two views of one tensor.

A map is logically (B, C, *grid) and lies channels last in memory, so that its tokens (B, L, C) are the same bytes.
The channels are moved before cells are flattened: the other way round a batch of one gets a stride by which PyTorch no
longer knows the map as channels last, and its convolutions copy.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, *grid) to (B, L, C), cells in row-major order."""
    return x.movedim(1, -1).flatten(1, -2)


def to_map(x: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, L, C) to (B, C, *grid). Undoes ``to_tokens``.

    >>> import torch
    >>> x = torch.rand(2, 15, 4)
    >>> to_map(x, (3, 5)).is_contiguous(memory_format=torch.channels_last), torch.equal(to_tokens(to_map(x, (3, 5))), x)
    (True, True)
    """
    return x.unflatten(1, grid).movedim(-1, 1)


def over_map(module: nn.Module, x: Tensor, grid: Sequence[int]) -> Tensor:
    """Apply a module of maps to tokens; one that treats cells ``by_cell`` takes the tokens themselves."""
    if getattr(module, "by_cell", False):
        return module(x, axis=-1)
    return to_tokens(module(to_map(x, grid)))


def over_tokens(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module of tokens to a map."""
    return to_map(module(to_tokens(x)), x.shape[2:])
