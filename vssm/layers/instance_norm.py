"""Instance normalisation that keeps one map for the backward pass: its own output, which the next convolution keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vssm.kernels.backends import forced_backend, implementation, traced, why_not
from vssm.layers.layout import to_map, to_tokens


class InstanceNorm(nn.Module):
    """Instance normalisation without parameters, a residual and a leaky ReLU behind it. (B, C, *grid) in and out.

        y = leaky_relu((x - mean(x)) / sqrt(var(x) + eps) + residual)

    Mean and variance are those of each channel of each sample. The normalised input, which the gradient needs, is
    recovered from y (In-Place Activated BatchNorm, arXiv:1712.02616), so that neither it nor x is kept; with a ReLU,
    which does not tell it, x is kept on a GPU.

    Args:
        slope: Of the leaky ReLU below 0; 1 for none, 0 for a ReLU.
        eps: Added to the variance.
    """

    def __init__(self, slope: float = 1.0, eps: float = 1e-5):
        super().__init__()
        if slope < 0:
            raise ValueError(f"InstanceNorm: slope must not be negative, so that signs stay, got {slope}")
        self.slope, self.eps = float(slope), float(eps)

    def forward(self, x: Tensor, residual: Tensor | None = None, normed: bool = False) -> Tensor:
        """``normed``: normalise the residual as well. Channels of x behind those of the residual are dropped."""
        # A compiler fuses the formula, and foresees strides that may not come true; a tracer cannot save a Function.
        if traced(x) or x.numel() == 0:
            return self.plain(x if residual is None else x[:, : residual.shape[1]], residual, normed)
        if x.shape[2:].numel() == 1:
            raise ValueError(f"InstanceNorm: a channel of one cell has no variance; got a map {tuple(x.shape)}")
        if has_kernels(x):
            return _KernelNorm.apply(x, residual, normed, self.slope, self.eps)
        if residual is not None:
            x = x[:, : residual.shape[1]]
        if residual is not None and normed:
            residual = _InstanceNorm.apply(residual, None, 1.0, self.eps)
        if self.slope == 0:
            y = _InstanceNorm.apply(x, residual, 1.0, self.eps)
            return nn.functional.relu(y)
        return _InstanceNorm.apply(x, residual, self.slope, self.eps)

    def plain(self, x: Tensor, residual: Tensor | None = None, normed: bool = False) -> Tensor:
        """The same, by the formula."""
        y = self._normalised(x)
        if residual is not None:
            y = y + (self._normalised(residual) if normed else residual)
        return nn.functional.leaky_relu(y, self.slope)

    def _normalised(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, tuple(range(2, x.ndim)), correction=0, keepdim=True)
        return ((wide - mean) * torch.rsqrt(var + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"slope={self.slope}, eps={self.eps}"


def has_kernels(x: Tensor) -> bool:
    """Whether the GPU kernels take ``x``: its channels lie last."""
    if not x.is_cuda and x.device.type != "xpu":
        return False
    wanted = forced_backend() in (None, "triton")
    return wanted and why_not("instance_norm", "triton", x.device, x.dtype) is None and _channels_last(x)


class _KernelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, normed: bool, slope: float, eps: float) -> Tensor:
        kernels = implementation("instance_norm", "triton")
        tokens, others = to_tokens(x), None
        if residual is not None:
            others = to_tokens(residual)
            tokens = tokens[..., : others.shape[-1]]
        y, stats, stats_of_residual = kernels.forward(tokens, others, normed, slope, eps)
        ctx.save_for_backward(y if slope else tokens, others, stats, stats_of_residual)
        ctx.slope, ctx.width, ctx.grid = slope, x.shape[1], x.shape[2:]
        return to_map(y, ctx.grid)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernels = implementation("instance_norm", "triton")
        dx, dresidual = kernels.backward(to_tokens(grad), *ctx.saved_tensors, ctx.slope, ctx.width)
        return to_map(dx, ctx.grid), None if dresidual is None else to_map(dresidual, ctx.grid), None, None, None


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
