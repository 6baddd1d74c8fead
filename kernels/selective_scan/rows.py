"""Around the recurrence, for backends that run it alone: the gate, and gradients of what rows and samples share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm.kernels.selective_scan.problem import Problem


def gate(p: Problem, y: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """y in its own dtype from the merged sum in the compute dtype, and y before the gate, as it is, if it is saved."""
    if p.z is None:
        return y.to(p.u.dtype), y.new_empty(0)
    return (y * F.silu(_z(p))).to(p.u.dtype), y if save else y.new_empty(0)


def ungate(p: Problem, grad_y: Tensor, ungated: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient of the merged sum in the compute dtype, and the gradient of z."""
    grad = grad_y.to(p.compute_dtype)
    if p.z is None:
        return grad, None
    z = _z(p)
    sigmoid = torch.sigmoid(z)
    grad_z = grad * ungated * sigmoid * (1 + z * (1 - sigmoid))
    return grad * (z * sigmoid), (grad_z if p.merge else grad_z.sum(1)).to(p.z.dtype)


def operand_grad(p: Problem, name: str, grad: Tensor) -> Tensor | None:
    """The gradient of operand ``name`` from its gradient by sample and row, (b, k, …): sums over what it shares."""
    operand = getattr(p, name)
    if operand is None:
        return None
    axes = [] if name in ("u", "delta", "B", "C", "initial_state") else [0]
    if operand.dim() + len(axes) < grad.dim():
        axes.append(1)
    return (grad.sum(axes) if axes else grad).to(operand.dtype)


def _z(p: Problem) -> Tensor:
    z = p.z.to(p.compute_dtype)
    return z if p.merge else z.unsqueeze(1)
