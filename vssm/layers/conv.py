"""Depthwise convolutions: over the grid, and causally along the rows of a table."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vssm.kernels import causal_conv1d

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def depthwise(dim: int, size: int, spatial_dims: int = 2, bias: bool = True) -> nn.Module:
    """A convolution of each channel with itself that keeps the grid. (B, C, *grid) in and out."""
    if size % 2 == 0:
        raise ValueError(f"depthwise: size must be odd, so that the grid stays as it is, got {size}")
    return CONVS[spatial_dims](dim, dim, size, padding=size // 2, groups=dim, bias=bias)


class SequenceConv(nn.Module):
    """Causal depthwise convolution and SiLU along each row of a table. (b, l, d) to (b, k, l, d), in grid order.

    The row, not the grid, says which cells are neighbours: each sees itself and the ``size - 1`` cells read before it.
    """

    def __init__(self, dim: int, rows: int, size: int = 4, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim, size))  # the last tap meets the current step
        self.bias = nn.Parameter(torch.empty(rows, dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Conv1d with one input channel a group does."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, table: Tensor, revisits: bool | None = None) -> Tensor:
        y, _ = causal_conv1d(x, self.weight, self.bias, activation="silu", table=table, revisits=revisits)
        return y

    def extra_repr(self) -> str:
        rows, dim, size = self.weight.shape
        return f"{dim}, rows={rows}, size={size}, bias={self.bias is not None}"
