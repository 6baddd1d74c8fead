"""The convolutional blocks of UNETR (Hatamizadeh et al., arXiv:2103.10504) as MONAI has them, in 2D and 3D.

The same function as ``UnetrBasicBlock`` and ``UnetrUpBlock`` of github.com/Project-MONAI/MONAI (Apache-2.0) with
``norm_name="instance"`` and either ``res_block``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vssm.layers.again import MadeAgain
from vssm.layers.conv import CONVS, TRANSPOSED, SameConv3d, half, same_conv
from vssm.layers.instance_norm import InstanceNorm, has_kernels

SLOPE = 0.01


class ResidualBlock(nn.Module):
    """Two convolutions of side 3, each under an instance norm, and a residual. (B, C, *grid) to (B, C', *grid).

    The residual is the input, or a normed convolution of side 1 of it where the channels differ; without ``res_block``
    there is none.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, res_block: bool = True):
        super().__init__()
        conv, self.res_block = CONVS[spatial_dims], res_block
        self.conv1 = same_conv(spatial_dims, in_channels, out_channels, 3, bias=False)
        self.conv2 = same_conv(spatial_dims, out_channels, out_channels, 3, bias=False)
        projects = res_block and in_channels != out_channels
        self.conv3 = conv(in_channels, out_channels, 1, bias=False) if projects else None
        self.norm_act = InstanceNorm(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner_width(x)
        y = self.conv1(x, inner) if inner else self.conv1(x)
        y = self.conv2(self.norm_act(y), inner) if inner else self.conv2(self.norm_act(y))
        if self.conv3 is None:
            return self.norm_act(y, x if self.res_block else None)
        with MadeAgain() as again:
            return self.norm_act(y, again.later(self.conv3(x), self.conv3, x), normed=True)

    def inner_width(self, x: Tensor) -> int | None:
        """Channels between the convolutions where they are more than needed, zeros that stay zero through the norm.

        With 64 channels on both sides cuDNN's convolutions take half the time that they take with 48.
        """
        channels = self.conv2.out_channels
        fits = isinstance(self.conv2, SameConv3d) and 32 < channels < 64 and channels % 8 == 0 and x.shape[1] % 4 == 0
        fits = fits and self.res_block                              # the norm drops what the residual has not
        return 64 if fits and half(x) is not None and has_kernels(x) else None


class UpBlock(nn.Module):
    """Double the grid, put the skip beside it, a residual block. (B, C, *grid) and (B, C', *2 grid) to the latter.

    Neither the doubled map nor the two side by side are kept for the backward pass, which makes them again.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, res_block: bool = True):
        super().__init__()
        self.up = TRANSPOSED[spatial_dims](in_channels, out_channels, 2, stride=2, bias=False)
        self.block = ResidualBlock(spatial_dims, 2 * out_channels, out_channels, res_block)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        joined = self.join(x, skip)
        with MadeAgain() as again:
            return self.block(again.later(joined, self.join, x, skip))

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([self.up(x), skip], 1)
