"""The frame of MLLA (Demystify Mamba in Vision, arXiv:2405.16605): a stem, a downsampling and a block around any mixer.

Spatial-Mamba and VSSD took it over.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vssm.layers.conv import depthwise
from vssm.layers.layout import over_tokens, to_map, to_tokens
from vssm.layers.mlp import LeanMlp
from vssm.layers.norm import ChannelNorm


class ConvUnit(nn.Module):
    """A convolution that keeps the grid or halves it, and what may follow: a batch norm, a ReLU. (B, C, H, W)."""

    def __init__(
        self, dim: int, out: int, size: int, stride: int = 1, *,
        groups: int = 1, bias: bool = False, norm: bool = True, act: bool = True, padding: int | None = None,
    ):  # fmt: skip
        super().__init__()
        padding = size // 2 if padding is None else padding
        self.conv = nn.Conv2d(dim, out, size, stride, padding=padding, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ResidualStem(nn.Module):
    """Convolutions at half the size, two of them residual, then to a quarter. (B, 3, H, W) to (B, C, H / 4, W / 4).

    Sizes are rounded up. The map lies channels last in memory, whatever the images do.
    """

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        half = dim // 2
        self.conv1 = ConvUnit(in_chans, half, 3, 2)
        self.conv2 = nn.Sequential(ConvUnit(half, half, 3), ConvUnit(half, half, 3, act=False))
        self.conv3 = nn.Sequential(ConvUnit(half, 4 * dim, 3, 2), ConvUnit(4 * dim, dim, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.conv3(x + self.conv2(x))
        return x.contiguous(memory_format=torch.channels_last)


class UnitStem(nn.Module):
    """One convolution that does not overlap, and a norm. (B, 3, H, W) to (B, C, H / 4, W / 4), rounded down."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1, self.norm = ConvUnit(in_chans, dim, 4, 4, padding=0), ChannelNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv1(x)).contiguous(memory_format=torch.channels_last)


class UnitDownsample(nn.Module):
    """One convolution of stride 2, and a norm. (B, C, H, W) to (B, C', H / 2, W / 2), rounded up."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.widen, self.norm = ConvUnit(dim, out, 3, 2, bias=True, norm=False), ChannelNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.widen(x))


class InvertedDownsample(nn.Module):
    """Widen, convolve each channel with stride 2, narrow. (B, C, H, W) to (B, C', H / 2, W / 2), rounded up."""

    def __init__(self, dim: int, out: int, ratio: int = 4):
        super().__init__()
        width = ratio * out
        self.widen = ConvUnit(dim, width, 1, bias=True, norm=False)
        self.shrink = ConvUnit(width, width, 3, 2, groups=width, bias=True, norm=False)
        self.narrow = ConvUnit(width, out, 1, bias=True, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.shrink(self.widen(x)))


class ConditionedBlock(nn.Module):
    """Mix, add; MLP, add; each after a depthwise convolution that tells positions apart, and a norm.

    (B, C, H, W) in and out, channels last in memory. ``mixer``: (tokens (B, L, C), grid) to tokens.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.position1, self.norm1, self.mixer = depthwise(dim, 3), ChannelNorm(dim, narrow=True), mixer
        self.position2, self.norm2 = depthwise(dim, 3), ChannelNorm(dim, narrow=True)
        self.mlp = LeanMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        x = x + self.position1(x)
        x = x + self.drop_path(to_map(self.mixer(to_tokens(self.norm1(x)), grid), grid))
        x = x + self.position2(x)
        return x + self.drop_path(over_tokens(self.mlp, self.norm2(x)))
