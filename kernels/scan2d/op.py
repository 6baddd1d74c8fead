"""The public op: maths, checks, dispatch, gradients.

Eager calls go through ``autograd.Function``, a tenth of a custom op's cost; compilers see the custom op
``vssm::scan2d``. Both call :func:`_forward` and :func:`_backward`, which hand the problem to a backend. Nothing but the
operands is kept from the forward pass to the backward pass: backends run the recurrence again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vssm.kernels.backends import implementation, traced
from vssm.kernels.checks import match
from vssm.kernels.kinds import autocast_dtype, chosen
from vssm.kernels.operands import check_kinds, dense
from vssm.kernels.scan2d import reference
from vssm.kernels.scan2d.problem import Problem

OPERANDS = ("u", "delta_top", "delta_left", "A_top", "A_left", "B_top", "B_left", "C", "D")  # what has a gradient


def scan2d(
    u: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    grid: tuple[int, int] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Run the selective recurrence of Mamba2D over a grid, from its top left corner (arXiv:2412.16146).

        top[i, j]  = exp(delta_top[i, j] A_top) h[i-1, j] + delta_top[i, j] B_top[i, j] u[i, j]
        left[i, j] = exp(delta_left[i, j] A_left) h[i, j-1] + delta_left[i, j] B_left[i, j] u[i, j]
        h[i, j]    = (top[i, j] + left[i, j]) / 2;  left[i, j] alone in the first row;  top[i, j] alone below it in the
                     first column
        y[i, j]    = C[i, j] · h[i, j] + D u[i, j]

    Sizes: b batch, h rows and w columns of the grid, d channels, n states. Each operand by cell may come as
    (b, h, w, …) or, with ``grid``, flattened row by row as (b, h·w, …). Strides are free except that the last axis is
    contiguous (another layout is copied). Functional: published in github.com/cocoalex00/Mamba2D (no licence; this is
    written from the recurrence, not from that code).

    Args:
        u: Input by cell, (b, h, w, d), any float dtype.
        delta_top, delta_left: Step sizes by cell, (b, h, w, d); positive, or anything if ``delta_softplus``.
        A_top, A_left: State decay, negative, (d, n).
        B_top, B_left: Input gates by cell, (b, h, w, n).
        C: Output gate by cell, (b, h, w, n).
        D: Skip weights, (d).
        grid: (h, w), needed where an operand comes flattened.
        delta_softplus: Pass both deltas through softplus.
        reverse: Start in the bottom right corner: read above as below and left as right. Nothing is copied.
        backend: One of ``available_backends("scan2d")``; by default the fastest for ``u.device``.

    Returns:
        y in the shape and dtype of ``u``. States and exponentials are float32, float64 if ``u`` is. The b·h·w·d·n
        states are never all there: the backward pass recomputes them, holding some 2 sqrt(h + w) rows or diagonals at
        a time. Under autocast everything but A and D is cast to its dtype.

    Raises:
        ValueError: If shapes, devices or ``grid`` disagree, or the backend cannot run on ``u.device``.

    >>> x = torch.ones(1, 2, 3, 1)                                 # two rows of three cells, one channel, one state
    >>> A = torch.zeros(1, 1)                                      # nothing decays
    >>> scan2d(x, x, x, A, A, x, x, x, backend="reference").flatten().tolist()
    [1.0, 2.0, 3.0, 2.0, 3.0, 4.0]
    """
    who = "scan2d"
    values = dict(zip(OPERANDS, (u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D)))
    check_kinds(who, values, {})
    maps = dict(u="d", delta_top="d", delta_left="d", B_top="n", B_left="n", C="n")
    flat = [name for name in maps if values[name].dim() == 3]
    if flat and grid is None:
        name, shape = flat[0], tuple(values[flat[0]].shape)
        raise ValueError(f"{who}: {name} must be (b, h, w, {maps[name]}), got {shape}; give grid= or unflatten it")
    sizes = {} if grid is None else {"h": grid[0], "w": grid[1], "h·w": grid[0] * grid[1]}
    patterns = {name: f"b h·w {last}" if name in flat else f"b h w {last}" for name, last in maps.items()}
    patterns |= dict(A_top="d n", A_left="d n", D="d")
    sizes = match(who, sizes, **{name: (values[name], pattern) for name, pattern in patterns.items()})
    values |= {name: values[name].unflatten(1, (sizes["h"], sizes["w"])) for name in flat}
    if sizes["n"] == 0:
        raise ValueError(f"{who}: there must be at least one state, got A_top {tuple(A_top.shape)}")

    cast = autocast_dtype(u)
    kind = cast or u.dtype
    if cast is not None:
        values |= {name: values[name].to(cast) for name in maps}
    compute = torch.float64 if kind == torch.float64 else torch.float32
    values |= {name: None if values[name] is None else values[name].to(compute) for name in ("A_top", "A_left", "D")}

    name = chosen("scan2d", u.device, kind, backend)
    operands = [dense(values[name]) for name in OPERANDS]
    problem: list[Any] = [*operands, delta_softplus, reverse]
    if name == "reference":
        y = reference.scan2d(Problem(*problem)) if u.numel() else torch.zeros_like(operands[0])
    elif traced(u):
        y = torch.ops.vssm.scan2d(*problem, name)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        y = _Scan2d.apply(*problem, name)
    else:
        y = _forward(Problem(*problem), name)
    return y.flatten(1, 2) if u.dim() == 3 else y


def _forward(p: Problem, backend: str) -> Tensor:
    """y (b, h, w, d), contiguous, in the dtype of u."""
    if p.u.numel() == 0:
        return p.u.new_zeros(p.u.shape)
    return implementation("scan2d", backend).forward(p)


def _backward(p: Problem, grad_y: Tensor, backend: str) -> tuple[Tensor | None, ...]:
    """Gradients of OPERANDS, each contiguous and in its operand's shape and dtype; None where there is no operand."""
    if p.u.numel() == 0:
        return tuple(None if (x := getattr(p, name)) is None else _like(x).zero_() for name in OPERANDS)
    return implementation("scan2d", backend).backward(p, dense(grad_y))


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _Scan2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *problem, backend = args
        ctx.save_for_backward(*problem[: len(OPERANDS)])
        ctx.flags, ctx.backend = problem[len(OPERANDS) :], backend
        return _forward(Problem(*problem), backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(Problem(*ctx.saved_tensors, *ctx.flags), grad_y, ctx.backend), None, None, None


_PROBLEM = (
    "Tensor u, Tensor delta_top, Tensor delta_left, Tensor A_top, Tensor A_left, Tensor B_top, Tensor B_left, "
    "Tensor C, Tensor? D, bool delta_softplus, bool reverse, str backend"
)


@torch.library.custom_op("vssm::scan2d", mutates_args=(), schema=f"({_PROBLEM}) -> Tensor")
def _op(*args: Any) -> Tensor:
    *problem, backend = args
    return _forward(Problem(*problem), backend)


@_op.register_fake
def _(*args: Any) -> Tensor:
    return _like(args[0])


@torch.library.custom_op("vssm::scan2d_backward", mutates_args=(), schema=f"(Tensor grad_y, {_PROBLEM}) -> Tensor[]")
def _backward_op(grad_y: Tensor, *args: Any) -> list[Tensor]:
    *problem, backend = args
    return [g for g in _backward(Problem(*problem), grad_y, backend) if g is not None]


@_backward_op.register_fake
def _(grad_y: Tensor, *args: Any) -> list[Tensor]:
    return [_like(x) for x in args[: len(OPERANDS)] if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *problem, backend = inputs
    ctx.save_for_backward(*problem[: len(OPERANDS)])
    ctx.flags, ctx.backend = problem[len(OPERANDS) :], backend


def _op_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    operands = ctx.saved_tensors
    present = iter(torch.ops.vssm.scan2d_backward(grad_y, *operands, *ctx.flags, ctx.backend))
    return *(None if x is None else next(present) for x in operands), None, None, None


_op.register_autograd(_op_backward, setup_context=_save)
