"""Normalisation over channels, and what may stand between a scan and its output projection."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm, RmsNorm
from torch import Tensor, nn

from vssm.kernels.backends import implementation, launches
from vssm.kernels.kinds import once, recording
from vssm.layers.conv import depthwise

WIDEST = 4096  # channels that the GPU kernels take


class TokenNorm(LayerNorm):
    """timm's layer norm, (…, C) in and out; under autocast on a GPU in one pass to autocast's dtype.

    Autocast itself casts up, normalises into a float32 tensor, and casts down for the layer behind: three passes.
    """

    def forward(self, x: Tensor) -> Tensor:
        return narrow_norm(x, self.weight, self.bias, self.eps) if has_narrow_norm(x) else super().forward(x)


class TokenRmsNorm(RmsNorm):
    """timm's RMS norm, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return narrow_norm(x, self.weight, None, self.eps) if has_narrow_norm(x) else super().forward(x)


class ChannelNorm(LayerNorm):
    """Layer norm over the channels of each cell. (B, C, *grid) in and out, a view where memory is channels last.

    Tokens (B, L, C) come with ``axis=-1``.

    Args:
        dim: Channels.
        eps: Added to the variance.
        narrow: The layers behind read autocast's dtype: see ``TokenNorm``.
    """

    by_cell = True  # see over_map

    def __init__(self, dim: int, eps: float = 1e-5, narrow: bool = False):
        super().__init__(dim, eps=eps)
        self.narrow = narrow

    def forward(self, x: Tensor, axis: int = 1) -> Tensor:
        x = x if axis == -1 else x.movedim(axis, -1)
        narrow = self.narrow and has_narrow_norm(x)
        y = narrow_norm(x, self.weight, self.bias, self.eps) if narrow else super().forward(x)
        return y if axis == -1 else y.movedim(-1, axis)


def narrow_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last axis, RMS norm without a bias, to autocast's dtype, where ``has_narrow_norm(x)``."""
    x, dtype = x.contiguous(), torch.get_autocast_dtype(x.device.type)
    if torch.is_grad_enabled():
        return _apply(x, weight, bias, eps, dtype)
    return implementation("channel_norm", "triton").forward(x, weight, bias, eps, dtype)


class _Norm(torch.autograd.Function):
    """Layer norm, or RMS norm without a bias, of contiguous rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return implementation("channel_norm", "triton").forward(x, weight, bias, eps, dtype)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = implementation("channel_norm", "triton").backward
        return (*backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None, None)


_apply = recording(_Norm)


def has_narrow_norm(x: Tensor) -> bool:
    """Whether autocast is on and the GPU kernels take the rows of ``x``; a compiler fuses the passes itself."""
    if not isinstance(x, Tensor) or not launches("channel_norm", x) or not torch.is_autocast_enabled(x.device.type):
        return False
    return x.shape[-1] <= WIDEST and x.numel() > 0


class SoftmaxOverCells(nn.Module):
    """Each channel divided up among the cells. (B, C, *grid) in and out."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).softmax(-1).view_as(x)


def _layer_conv(dim: int, spatial_dims: int) -> nn.Module:
    return nn.Sequential(ChannelNorm(dim), depthwise(dim, 3, spatial_dims, bias=False))


NORMS = {"layer": ChannelNorm, "batch": nn.BatchNorm2d}
TOKEN_NORMS = {"rms": TokenRmsNorm, "layer": TokenNorm}

OUT_NORMS = {  # of a mixer, by name: (dim, spatial_dims) -> module of maps
    "layer": lambda dim, spatial_dims: ChannelNorm(dim, narrow=True),
    "conv": lambda dim, spatial_dims: depthwise(dim, 3, spatial_dims, bias=False),
    "layer_conv": _layer_conv,
    "softmax": lambda dim, spatial_dims: SoftmaxOverCells(),
    "sigmoid": lambda dim, spatial_dims: nn.Sigmoid(),
}
