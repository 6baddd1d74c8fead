"""Images to the map of the first stage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vssm.layers.conv import CONVS
from vssm.layers.norm import ChannelNorm


class Stem(nn.Module):
    """A position table of ``side`` x ``side`` cells that a stem adds to its map, if ``side`` is not None."""

    def __init__(self, dim: int, side: int | None):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, dim, side, side)) if side else None
        if side:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def place(self, x: Tensor) -> Tensor:
        return x if self.pos_embed is None else x + self.pos_embed


class PatchStem(Stem):
    """One convolution whose kernel is its stride, and a norm. (B, 3, H, W) to (B, C, H // p, W // p)."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        norm: Callable[[int], nn.Module] = ChannelNorm,
        side: int | None = None,
        *,
        spatial_dims: int = 2,
    ):
        super().__init__(dim, side)
        self.conv1, self.norm1 = CONVS[spatial_dims](in_chans, dim, patch_size, stride=patch_size), norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.place(self.norm1(self.conv1(x)))


class ConvStem(Stem):
    """Two overlapping convolutions. (B, 3, H, W) to (B, C, H / p, W / p), rounded up for p = 4."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        norm: Callable[[int], nn.Module] = ChannelNorm,
        side: int | None = None,
        *,
        spatial_dims: int = 2,
    ):
        super().__init__(dim, side)
        stride, conv = patch_size // 2, CONVS[spatial_dims]
        self.conv1 = conv(in_chans, dim // 2, stride + 1, stride, padding=1)
        self.norm1, self.act = norm(dim // 2), nn.GELU()
        self.conv2 = conv(dim // 2, dim, stride + 1, stride, padding=1)
        self.norm2 = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        return self.place(self.norm2(self.conv2(x)))
