"""Instance normalisation that keeps one map for the backward pass: its own output, which the next convolution keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
        rows = _rows(x)
        one, zero = _constant(rows, 1.0), _constant(rows, 0.0)              # float32: the statistics get their dtype
        y, _, scale = torch.native_batch_norm(rows, one, zero, None, None, True, 0.0, eps)
        y = y.view(x.shape)
        if residual is not None:
            y += residual
        if slope != 1:
            y = nn.functional.leaky_relu_(y, slope)
        ctx.save_for_backward(y, residual, scale)
        ctx.slope, ctx.eps = slope, eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, residual, scale = ctx.saved_tensors
        if ctx.slope != 1:
            grad = torch.ops.aten.leaky_relu_backward(grad, y, ctx.slope, True)
            y = nn.functional.leaky_relu(y, 1 / ctx.slope)
        normed = y if residual is None else y - residual
        rows = _rows(normed)
        # The gradient of normalising what has mean 0 and variance 1 already, times the scale that made it so.
        grad_x, _, _ = torch.ops.aten.native_batch_norm_backward(
            _rows(grad), rows, scale, None, None, _constant(rows, 0.0), _constant(rows, 1.0), True, ctx.eps,
            [True, False, False],
        )  # fmt: skip
        return grad_x.view(y.shape), None if residual is None else grad, None, None


def _rows(x: Tensor) -> Tensor:
    """(B, C, *grid) as one sample of B C channels, (1, B C, L)."""
    return x.contiguous().view(1, x.shape[0] * x.shape[1], -1)


def _constant(rows: Tensor, value: float) -> Tensor:
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return torch.full((rows.shape[1],), value, dtype=dtype, device=rows.device)
