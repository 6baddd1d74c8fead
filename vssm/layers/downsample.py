"""Halve a map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from vssm.layers.conv import CONVS
from vssm.layers.layout import to_map, to_tokens
from vssm.layers.norm import ChannelNorm


class PatchMerging(nn.Module):
    """Stack the cells of each window of side 2, norm, project. (B, C, H, W) to (B, C', H / 2, W / 2), rounded up.

    The offset along the first axis varies fastest among the stacked cells.
    """

    def __init__(
        self, dim: int, out: int, norm: Callable[[int], nn.Module] = ChannelNorm, *, spatial_dims: int = 2
    ):
        super().__init__()
        self.offsets = [offset[::-1] for offset in product((0, 1), repeat=spatial_dims)]
        stacked = len(self.offsets) * dim
        self.norm, self.reduction = norm(stacked), nn.Linear(stacked, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        axes = range(len(self.offsets[0]))
        x = nn.functional.pad(x, [n for axis in reversed(axes) for n in (0, x.shape[2 + axis] % 2)])
        x = torch.cat([x[self.cells(offset)] for offset in self.offsets], 1)
        return to_map(self.reduction(to_tokens(self.norm(x))), x.shape[2:])

    @staticmethod
    def cells(offset: Sequence[int]) -> Any:
        """Index of the cells that lie at this offset in their windows."""
        return (..., *(slice(start, None, 2) for start in offset))


class ConvDownsample(nn.Module):
    """A convolution of side 2 or 3 and stride 2, and a norm. (B, C, H, W) to (B, C', H / 2, W / 2), up for 3."""

    def __init__(
        self,
        dim: int,
        out: int,
        norm: Callable[[int], nn.Module] = ChannelNorm,
        size: int = 3,
        *,
        spatial_dims: int = 2,
    ):
        super().__init__()
        self.conv = CONVS[spatial_dims](dim, out, size, stride=2, padding=1 if size == 3 else 0)
        self.norm = norm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))
