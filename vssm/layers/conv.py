"""Convolutions: depthwise over the grid, causally along the rows of a table, and one in the place of a mixer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vssm.kernels import causal_conv1d
from vssm.layers.layout import over_map

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def depthwise(dim: int, size: int, spatial_dims: int = 2, bias: bool = True) -> nn.Module:
    """A convolution of each channel with itself that keeps the grid. (B, C, *grid) in and out."""
    if size % 2 == 0:
        raise ValueError(f"depthwise: size must be odd, so that the grid stays as it is, got {size}")
    return CONVS[spatial_dims](dim, dim, size, padding=size // 2, groups=dim, bias=bias)


class ConvMixer(nn.Module):
    """SiLU and a convolution of side 3, in the place of a mixer of the same width. (B, L, C) tokens in and out.

    The mixer of the twins without Mamba.
    """

    def __init__(self, dim: int, spatial_dims: int = 2):
        super().__init__()
        self.act, self.conv = nn.SiLU(), CONVS[spatial_dims](dim, dim, 3, padding=1)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        return over_map(self.conv, self.act(x), grid)


class SequenceConv(nn.Module):
    """Causal depthwise convolution and SiLU along each row of a table, in grid order.

    (b, l, d) or (b, k, l, d) to (b, k, l, d). One set of taps, ``rows=1``, serves a table of any number of rows.

    The row, not the grid, says which cells are neighbours: each sees itself and the ``size - 1`` cells read before it.
    """

    def __init__(self, dim: int, rows: int, size: int = 4, bias: bool = True):
        super().__init__()
        self.one_set = rows == 1
        self.weight = nn.Parameter(torch.empty(rows, dim, size))  # the last tap meets the current step
        self.bias = nn.Parameter(torch.empty(rows, dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Conv1d with one input channel a group does."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, table: Tensor, revisits: bool | None = None) -> Tensor:
        weight, bias = self.taps()
        y, _ = causal_conv1d(x, weight, bias, activation="silu", table=table, revisits=revisits)
        return y

    def taps(self) -> tuple[Tensor, Tensor | None]:
        """Weight (k, d, w) and bias (k, d), without k where one set serves all rows."""
        if not self.one_set:
            return self.weight, self.bias
        return self.weight[0], None if self.bias is None else self.bias[0]

    def extra_repr(self) -> str:
        rows, dim, size = self.weight.shape
        return f"{dim}, rows={rows}, size={size}, bias={self.bias is not None}"
