"""What the ops cost, for ``torch.utils.flop_counter``.

A selective scan counts as published tools count it: 9 for each step, channel and state (the exponential, the products
and sums of the recurrence and of the read-out), and 1 for each output of D and of the gate. A backward pass counts as
two forward passes and the one that it runs again. The convolution counts as PyTorch's own: 2 for a multiply-add.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import import_module
from math import prod
from typing import Any

import torch

from vssm.kernels import conv1d, scan2d, selective_scan  # noqa: F401  (they define the ops)

SCAN = 9
SCAN2D = 16  # two decays, two inputs and their mean, one read-out
BACKWARD = 3

Shape = Sequence[int]


def _counter() -> Any:
    """PyTorch's counter, whose import complains where Triton is missing: these formulas need none."""
    log = logging.getLogger("torch.utils.flop_counter")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return import_module("torch.utils.flop_counter")
    finally:
        log.setLevel(level)


register_flop_formula = _counter().register_flop_formula


@register_flop_formula(torch.ops.vssm.selective_scan)
def _selective_scan(u: Shape, *args: Any, out_shape: tuple[Shape, ...], **_: Any) -> int:
    y, last_state = out_shape[:2]
    return _scan(last_state, _steps(u, args[7:10]), D=args[4] is not None, gated=prod(y) if args[5] is not None else 0)


@register_flop_formula(torch.ops.vssm.selective_scan_backward)
def _selective_scan_backward(grad_y: Shape, grad_last: Shape, u: Shape, *args: Any, **_: Any) -> int:
    gated = prod(grad_y) if args[5] is not None else 0
    return BACKWARD * _scan(grad_last, _steps(u, args[7:10]), D=args[4] is not None, gated=gated)


@register_flop_formula(torch.ops.vssm.causal_conv1d)
def _causal_conv1d(x: Shape, weight: Shape, *args: Any, out_shape: tuple[Shape, Shape], **_: Any) -> int:
    b, k, d = out_shape[1][:3]
    return 2 * b * k * d * _steps(x, args[1:3]) * weight[-1]


@register_flop_formula(torch.ops.vssm.causal_conv1d_backward)
def _causal_conv1d_backward(grad_y: Shape, grad_last: Shape, x: Shape, weight: Shape, *args: Any, **_: Any) -> int:
    b, k, d = grad_last[:3]
    silu = args[4]  # its slope needs the convolution once more
    return (3 if silu else 2) * 2 * b * k * d * _steps(x, args[1:3]) * weight[-1]


@register_flop_formula(torch.ops.vssm.scan2d)
def _scan2d(u: Shape, *args: Any, **_: Any) -> int:
    return prod(u) * (SCAN2D * args[2][-1] + (args[7] is not None))


@register_flop_formula(torch.ops.vssm.scan2d_backward)
def _scan2d_backward(grad_y: Shape, u: Shape, *args: Any, **_: Any) -> int:
    return BACKWARD * _scan2d(u, *args)


def _scan(state: Shape, steps: int, *, D: bool, gated: int) -> int:
    b, k, d, n = state
    return b * k * d * steps * (SCAN * n + D) + gated


def _steps(x: Shape, tables: Sequence[Shape | None]) -> int:
    """Steps of a row: of the first table that is given, else the cells of x."""
    return next((table[-1] for table in tables if table is not None), x[-2])
