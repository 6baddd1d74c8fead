"""Convolutions: depthwise over the grid, causally along the rows of a table, and one in the place of a mixer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vssm.kernels import causal_conv1d
from vssm.kernels.backends import traced
from vssm.layers.layout import over_map

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class SameConv3d(nn.Conv3d):
    """A 3D convolution of odd side that keeps the grid. (B, C, D, H, W) to (B, C', D, H, W).

    In half precision on a GPU it runs as the gradient of the convolution with the mirrored taps, which is the same sum:
    for few channels cuDNN's kernels of gradients are made for Hopper GPUs, those of convolutions are not.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int, bias: bool = True):
        super().__init__(in_channels, out_channels, size, padding=size // 2, bias=bias)

    def forward(self, x: Tensor, width: int | None = None) -> Tensor:
        """``width``: channels of the result, zero behind C'; x may have such too. In half precision on a GPU alone."""
        dtype = half(x)
        if dtype is None or x.shape[1] % 4 or self.out_channels % 8:
            return super().forward(x)
        fill = (0, x.shape[1] - self.in_channels, 0, (width or self.out_channels) - self.out_channels)
        weight = self.weight.to(dtype)
        weight = nn.functional.pad(weight, (0, 0) * 3 + fill) if any(fill) else weight
        y = _ByGradient.apply(x.to(dtype), weight, self.padding)
        return y if self.bias is None else y + self.bias.to(dtype).view(-1, 1, 1, 1)


class HalvingConv3d(nn.Conv3d):
    """A 3D convolution of odd side and stride 2. (B, C, D, H, W), even sides, to (B, C', D / 2, H / 2, W / 2).

    In half precision on a GPU it runs as a convolution of stride 1 over cells of 2 voxels a side, whose voxels are
    channels: matrix units want more than the few channels of an image.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int):
        super().__init__(in_channels, out_channels, size, stride=2, padding=size // 2)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = half(x)
        if dtype is None or x.shape[1] > 8 or any(side % 2 for side in x.shape[2:]):
            return super()._conv_forward(x, weight, bias)
        return nn.functional.conv3d(*over_cells(x.to(dtype), weight.to(dtype)), bias)


def half(x: Tensor) -> torch.dtype | None:
    """The half precision that a convolution of ``x`` on a GPU runs in, if it does, and nobody traces it."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype if x.is_cuda and dtype.itemsize == 2 and not traced(x) else None


def over_cells(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution of stride 2 over cells of 2 voxels a side: image (B, 8 C, *cells), weight (C', 8 C, n, n, n).

    Voxels of a cell, then channels, are the new channels. The image has the margin that the convolution needs, and its
    channels last.
    """
    out, channels, size = weight.shape[:3]
    front = size // 2 % 2  # zero taps, so that a window begins with a cell
    before, n = size // 2 + front, (size + front + 1) // 2
    weight = nn.functional.pad(weight, (front, 2 * n - size - front) * 3)
    weight = weight.reshape(out, channels, n, 2, n, 2, n, 2).permute(0, 3, 5, 7, 1, 2, 4, 6).flatten(1, 4)
    cells = [side // 2 + n - 1 for side in x.shape[2:]]
    image = x.new_zeros((len(x), channels, *(2 * count for count in cells)))
    depth, height, width = (slice(before, before + side) for side in x.shape[2:])
    image[:, :, depth, height, width] = x
    for axis, count in zip((2, 4, 6), cells):
        image = image.unflatten(axis, (count, 2))
    return image.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).movedim(-1, 1), weight


class _ByGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        mirrored = weight.flip(2, 3, 4).transpose(0, 1)
        with torch.autocast("cuda", enabled=False):
            return nn.functional.conv_transpose3d(x, mirrored, padding=padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs, one = [*ctx.needs_input_grad[:2], False], [1, 1, 1]
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            grad, *ctx.saved_tensors, None, one, ctx.padding, one, False, [0, 0, 0], 1, needs
        )
        return dx, dweight, None


def same_conv(spatial_dims: int, in_channels: int, out_channels: int, size: int, bias: bool = True) -> nn.Module:
    """A convolution of odd side that keeps the grid, in 2D or 3D."""
    if spatial_dims == 3:
        return SameConv3d(in_channels, out_channels, size, bias)
    return CONVS[spatial_dims](in_channels, out_channels, size, padding=size // 2, bias=bias)


def halving_conv(spatial_dims: int, in_channels: int, out_channels: int, size: int) -> nn.Module:
    """A convolution of odd side and stride 2, in 2D or 3D."""
    if spatial_dims == 3:
        return HalvingConv3d(in_channels, out_channels, size)
    return CONVS[spatial_dims](in_channels, out_channels, size, stride=2, padding=size // 2)


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
