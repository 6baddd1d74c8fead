"""MLPs of tokens: timm's, with less kept for the backward pass, and one that sees the neighbours of a cell."""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import Mlp
from torch import Tensor, nn

from vssm.layers.again import MadeAgain
from vssm.layers.conv import depthwise
from vssm.layers.layout import over_map


class LeanMlp(Mlp):
    """timm's MLP, whose backward pass makes the activated hidden layer again: half of what it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        if self.drop1.p or not isinstance(self.norm, nn.Identity):
            return super().forward(x)
        hidden = self.fc1(x)
        with MadeAgain() as again:
            y = self.fc2(again.later(self.act(hidden), self.act, hidden))
        return self.drop2(y)


class ConvMlp(nn.Module):
    """An MLP with a depthwise convolution over the grid before its activation. (B, L, C) tokens in and out."""

    def __init__(self, dim: int, hidden: int, spatial_dims: int = 2):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv, self.act = depthwise(hidden, 3, spatial_dims), nn.GELU()

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        return self.fc2(self.act(over_map(self.conv, self.fc1(x), grid)))
