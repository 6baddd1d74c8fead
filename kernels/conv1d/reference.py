"""The causal convolution along a table, by its definition: what every other backend is tested against.

Plain tensor operations, so it runs on any device in any float dtype and can be differentiated any number of times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm.kernels.conv1d.problem import Problem
from vssm.kernels.selective_scan.reference import put, take


def causal_conv1d(p: Problem) -> tuple[Tensor, Tensor]:
    """Correlate each row with its taps; the last tap meets the current step, the others the steps before it.

    Returns:
        y (b, k, m, d) and the last state (b, k, d, w - 1), both in the dtype of ``x``.
    """
    steps = take(p.rows("x"), p.rows("table"))  # (b, k, t, d)
    before = steps.new_zeros(p.state_shape) if p.initial_state is None else p.initial_state
    steps = torch.cat([before.transpose(-1, -2), steps], 2)  # (b, k, w - 1 + t, d)
    last_state = steps[:, :, p.t :].transpose(-1, -2)

    steps, weight = steps.to(p.compute_dtype), p.rows("weight")
    y = torch.stack([weight[:, None, :, tap] * steps[:, :, tap : tap + p.t] for tap in range(p.w)]).sum(0)
    if p.bias is not None:
        y = y + p.rows("bias")[:, None]
    if p.silu:
        y = F.silu(y)
    if p.write is not None:
        y = put(y, p.rows("write"), p.m)
    return y.to(p.x.dtype), last_state
