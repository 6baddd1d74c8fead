"""Halve a map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vssm.layers.layout import to_map, to_tokens
from vssm.layers.norm import ChannelNorm


class PatchMerging(nn.Module):
    """Stack the four cells of each 2 x 2 window, norm, project. (B, C, H, W) to (B, C', H / 2, W / 2), rounded up."""

    def __init__(self, dim: int, out: int, norm: Callable[[int], nn.Module] = ChannelNorm):
        super().__init__()
        self.norm, self.reduction = norm(4 * dim), nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        x = torch.cat([x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)
        return to_map(self.reduction(to_tokens(self.norm(x))), x.shape[2:])


class ConvDownsample(nn.Module):
    """A convolution of side 2 or 3 and stride 2, and a norm. (B, C, H, W) to (B, C', H / 2, W / 2), up for 3."""

    def __init__(self, dim: int, out: int, norm: Callable[[int], nn.Module] = ChannelNorm, size: int = 3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, out, size, stride=2, padding=1 if size == 3 else 0), norm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))
