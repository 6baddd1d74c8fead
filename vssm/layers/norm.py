"""Normalisation over channels, and what may stand between a scan and its output projection."""

from __future__ import annotations

from timm.layers import LayerNorm
from torch import Tensor, nn

from vssm.layers.conv import depthwise


class ChannelNorm(LayerNorm):
    """Layer norm over the channels of each cell. (B, C, *grid) in and out, a view where memory is channels last."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SoftmaxOverCells(nn.Module):
    """Each channel divided up among the cells. (B, C, *grid) in and out."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).softmax(-1).view_as(x)


def _layer_conv(dim: int, spatial_dims: int) -> nn.Module:
    return nn.Sequential(ChannelNorm(dim), depthwise(dim, 3, spatial_dims, bias=False))


NORMS = {"layer": ChannelNorm, "batch": nn.BatchNorm2d}

OUT_NORMS = {  # of a mixer, by name: (dim, spatial_dims) -> module of maps
    "layer": lambda dim, spatial_dims: ChannelNorm(dim),
    "conv": lambda dim, spatial_dims: depthwise(dim, 3, spatial_dims, bias=False),
    "layer_conv": _layer_conv,
    "softmax": lambda dim, spatial_dims: SoftmaxOverCells(),
    "sigmoid": lambda dim, spatial_dims: nn.Sigmoid(),
}
