"""Instance normalisation that keeps one map for the backward pass: its own output, which the next convolution keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vssm.layers.layout import to_map, to_tokens


class InstanceNorm(nn.Module):
    """Instance normalisation without parameters, a residual and a leaky ReLU behind it. (B, C, *grid) in and out.

        y = leaky_relu((x - mean(x)) / sqrt(var(x) + eps) + residual)

    Mean and variance are those of each channel of each sample. The normalised input, which the gradient needs, is
    recovered from y (In-Place Activated BatchNorm, arXiv:1712.02616), so that neither it nor x is kept.

    Args:
        slope: Of the leaky ReLU below 0; 1 for none.
        eps: Added to the variance.
    """

    def __init__(self, slope: float = 1.0, eps: float = 1e-5):
        super().__init__()
        if slope <= 0:
            raise ValueError(f"InstanceNorm: slope must be positive, so that the activation can be undone, got {slope}")
        self.slope, self.eps = slope, eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        # A compiler fuses the formula, and foresees strides that may not come true; a tracer cannot save a Function.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.plain(x, residual)
        if x.shape[2:].numel() == 1:
            raise ValueError(f"InstanceNorm: a channel of one cell has no variance; got a map {tuple(x.shape)}")
        return _InstanceNorm.apply(x, residual, self.slope, self.eps)

    def plain(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same, by the formula."""
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, tuple(range(2, x.ndim)), correction=0, keepdim=True)
        y = ((wide - mean) * torch.rsqrt(var + self.eps)).to(x.dtype)
        return nn.functional.leaky_relu(y if residual is None else y + residual, self.slope)

    def extra_repr(self) -> str:
        return f"slope={self.slope}, eps={self.eps}"


class _InstanceNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, slope: float, eps: float) -> Tensor:
        y, scale = _normalised(x, eps)
        if residual is not None:
            y += residual
        if slope != 1:
            y = nn.functional.leaky_relu_(y, slope)
        ctx.save_for_backward(y, residual, scale)
        ctx.slope = slope
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, residual, scale = ctx.saved_tensors
        if ctx.slope != 1:
            grad = torch.ops.aten.leaky_relu_backward(grad, y, ctx.slope, True)
            y = nn.functional.leaky_relu(y, 1 / ctx.slope)
        normed = y if residual is None else y - residual
        return _gradient(grad, normed, scale), None if residual is None else grad, None, None


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` with mean 0 and variance 1, in its layout, and what it was multiplied with, (samples, channels)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32    # of the statistics
    if not _channels_last(x):
        rows = x.contiguous().view(1, x.shape[0] * x.shape[1], -1)
        one, zero = _constants(rows.shape[1], dtype, x.device)
        y, _, scale = torch.native_batch_norm(rows, one, zero, None, None, True, 0.0, eps)
        return y.view(x.shape), scale[None]
    y, (one, zero) = torch.empty_like(x), _constants(x.shape[1], dtype, x.device)
    mean, scale = zero.clone(), torch.empty(x.shape[:2], dtype=dtype, device=x.device)
    for source, target, scale_of in zip(to_tokens(x), to_tokens(y), scale, strict=True):
        torch.ops.aten.native_batch_norm.out(
            source, one, zero, None, None, True, 0.0, eps, out=target, save_mean=mean, save_invstd=scale_of
        )
    return y, scale


def _gradient(grad: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """The gradient of ``_normalised``: of normalising what has mean 0 and variance 1 already, times the scale."""
    if not _channels_last(normed):
        rows = (1, normed.shape[0] * normed.shape[1], -1)
        return _row_gradient(grad.contiguous().view(rows), normed.contiguous().view(rows), scale[0]).view(normed.shape)
    samples = zip(to_tokens(grad), to_tokens(normed), scale, strict=True)
    grads = [_row_gradient(part.contiguous(), sample, scale_of) for part, sample, scale_of in samples]
    return to_map(grads[0][None] if len(grads) == 1 else torch.stack(grads), normed.shape[2:])


def _row_gradient(grad: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    one, zero = _constants(len(scale), scale.dtype, scale.device)
    mask = [True, False, False]
    return torch.ops.aten.native_batch_norm_backward(grad, normed, scale, None, None, zero, one, True, 0.0, mask)[0]


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _constants(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(count, dtype=dtype, device=device), torch.zeros(count, dtype=dtype, device=device)
