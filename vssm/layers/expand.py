"""Enlarge a map: what stands in the channels of a cell becomes a window of cells."""

from __future__ import annotations

from torch import Tensor, nn

from vssm.layers.layout import over_tokens
from vssm.layers.norm import ChannelNorm


def spread(x: Tensor, scale: int, spatial_dims: int = 2) -> Tensor:
    """Each cell's channels as ``scale`` cells along every axis: (B, scale² C, H, W) to (B, C, scale H, scale W).

    The channels of the input are numbered (row offset, column offset, channel), the last fastest; in 3D the offset of
    the first axis comes first. The result lies channels last in memory.

    >>> import torch
    >>> spread(torch.arange(4.0).view(1, 4, 1, 1), 2).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    x = x.movedim(1, -1).unflatten(-1, (*(scale,) * spatial_dims, -1))
    axes = [axis for i in range(1, spatial_dims + 1) for axis in (i, i + spatial_dims)]
    x = x.permute(0, *axes, 2 * spatial_dims + 1)
    for axis in range(1, spatial_dims + 1):
        x = x.flatten(axis, axis + 1)
    return x.movedim(-1, 1)


class PatchExpand(nn.Module):
    """Project, spread over ``scale`` cells along every axis, norm. (B, C, *grid) to (B, C', *(scale · grid))."""

    def __init__(self, dim: int, out: int, scale: int = 2, spatial_dims: int = 2):
        super().__init__()
        self.scale, self.spatial_dims = scale, spatial_dims
        self.expand = nn.Linear(dim, scale**spatial_dims * out, bias=False)
        self.norm = ChannelNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(spread(over_tokens(self.expand, x), self.scale, self.spatial_dims))
