"""The causal convolution in plain tensor operations, on any device: rows are gathered, taps are shifted products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm.kernels.conv1d.problem import Problem
from vssm.kernels.gather import put, take


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """y (b, k, m, d) and the last state (b, k, d, w - 1), both in the dtype of ``x``."""
    steps = _steps(p)
    last_state = steps[:, :, p.t :].transpose(-1, -2).contiguous()
    y = _convolved(p, steps)
    if p.silu:
        y = F.silu(y)
    return put(y, p.rows("write"), p.m, p.revisits).to(p.x.dtype), last_state


def backward(p: Problem, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state."""
    steps, weight, t = _steps(p), p.rows("weight"), p.t
    g = take(grad_y, p.rows("write")).to(p.compute_dtype)  # (b, k, t, d)
    if p.silu:
        gate = _convolved(p, steps)
        sigmoid = torch.sigmoid(gate)
        g = g * sigmoid * (1 + gate * (1 - sigmoid))
    grad_steps = F.pad(grad_last.transpose(-1, -2), (0, 0, t, 0)).to(p.compute_dtype)  # (b, k, w - 1 + t, d)
    for tap in range(p.w):
        grad_steps[:, :, tap : tap + t].addcmul_(g, weight[:, None, :, tap])
    grad_weight = torch.stack([(g * steps[:, :, tap : tap + t]).sum((0, 2)) for tap in range(p.w)], -1)
    before, inside = grad_steps[:, :, : p.w - 1], grad_steps[:, :, p.w - 1 :]
    grad_x = put(inside, p.rows("table"), p.l, p.revisits).contiguous()
    return (
        (grad_x if p.x.dim() == 4 else grad_x.sum(1)).to(p.x.dtype),
        grad_weight if p.weight.dim() == 3 else grad_weight.sum(0),
        None if p.bias is None else g.sum((0, 2)) if p.bias.dim() == 2 else g.sum((0, 1, 2)),
        None
        if p.initial_state is None
        else torch.empty_like(p.initial_state, memory_format=torch.contiguous_format).copy_(before.transpose(-1, -2)),
    )


def _steps(p: Problem) -> Tensor:
    """The inputs of every step behind the initial state, (b, k, w - 1 + t, d), in the dtype of x."""
    steps = take(p.rows("x"), p.rows("table"))
    if p.initial_state is None:
        return F.pad(steps, (0, 0, p.w - 1, 0))
    return torch.cat([p.initial_state.transpose(-1, -2), steps], 2)


def _convolved(p: Problem, steps: Tensor) -> Tensor:
    """The convolution before its activation, (b, k, t, d), compute dtype."""
    weight, t = p.rows("weight")[:, None], p.t
    y = steps[:, :, :t] * weight[..., 0]  # half precision times float32: float32
    for tap in range(1, p.w):
        y.addcmul_(steps[:, :, tap : tap + t], weight[..., tap])
    return y if p.bias is None else y.add_(p.rows("bias")[:, None])
