"""The public op: kinds, dispatch, gradients.

An eager call finds its :class:`Kind` (checked once), is recorded by ``autograd.Function``, a tenth of a custom op's
cost, and handed to a backend; compilers see the custom op ``vssm::causal_conv1d``. Both call :func:`_forward` and
:func:`_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vssm.kernels.backends import implementation, traced
from vssm.kernels.checks import match
from vssm.kernels.conv1d import reference
from vssm.kernels.conv1d.problem import Problem
from vssm.kernels.kinds import (
    Kind,
    Operands,
    Rules,
    autocast_dtype,
    decided,
    kind_of,
    layouts,
    once,
    recording,
)
from vssm.kernels.operands import check_cells, check_kinds, dense, fleeting, index_or_steps

OPERANDS = ("x", "weight", "bias", "initial_state")  # what has a gradient, in this order


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    table: Tensor | None = None,
    write: Tensor | str | None = None,
    initial_state: Tensor | None = None,
    revisits: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own taps along each row of ``table``, seeing only earlier steps.

        y[o] += act(bias + sum_j weight[j] x[table[k, t - (w - 1) + j]]),    o = write[k, t]

    Sizes: b batch, k rows (directions, heads, groups), l cells, d channels, w taps, t steps. ``x``, ``weight`` and
    ``bias`` may come without their k axis: they are shared by the rows, never copied, and their gradients are sums over
    them. Functional: published as ``causal_conv1d_fn`` in github.com/Dao-AILab/causal-conv1d (BSD-3-Clause), whose
    signature is in :mod:`vssm.kernels.compat`.

    Args:
        x: Input by cell, (b, l, d) or (b, k, l, d), any float dtype.
        weight: Taps, (d, w) or (k, d, w); the last one meets the current step.
        bias: (d) or (k, d).
        activation: None or ``"silu"``.
        table: The cell of each step, integers, (k, t), or (b, k, t) if the order depends on the sample; None reads the
            cells as they lie. A row may revisit cells or leave some out. Entry l is padding: x reads 0, y is dropped.
            A CUDA graph keeps the order that it was captured with.
        write: Where y is written: None for ``table``, ``"steps"`` to leave y in step order, or a table. What a row
            writes to one cell adds up in step order; a cell that it never writes is 0.
        initial_state: The w - 1 inputs before the first step, the latest one last, (b, k, d, w - 1); zero if None.
        revisits: False promises that each row names a cell at most once, in every table given, which saves a GPU the
            ordering of revisits; a broken promise loses contributions there. None or True promises nothing.
        backend: One of ``available_backends("conv1d")``; by default the fastest for ``x.device``.

    Returns:
        y, (b, k, l, d), (b, l, d) where neither an operand nor a table has the k axis (t instead of l with
        ``write="steps"``); and the last w - 1 inputs, (b, k, d, w - 1). Both have gradients and the dtype of ``x``.
        Sums are float32, float64 if ``x`` is. Under autocast x is cast to its dtype, weight and bias are left alone.

    Raises:
        ValueError: If shapes or devices disagree, a table names a cell that is not there (found on the CPU only; a GPU
            takes it for padding), or the backend cannot run on ``x.device``.

    >>> x = torch.arange(4.0).view(1, 4, 1)                        # four cells, one channel: 0, 1, 2, 3
    >>> y, _ = causal_conv1d(x, torch.ones(1, 2), table=torch.tensor([[3, 2, 1, 0]]), backend="reference")
    >>> y.flatten().tolist()                                       # each cell and the one after it
    [1.0, 3.0, 5.0, 3.0]
    """
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
    write = table if write is None else index_or_steps("causal_conv1d", "write", write, table)
    operands: Operands = (x, weight, bias, table, write, initial_state)
    options = (activation == "silu", revisits is not False)
    same = (write is table,)
    if traced(x):
        return _traced(operands, same, options, backend)
    kind = kind_of(RULES, operands, same, options, backend)
    if not kind.as_given:
        operands = kind.cleaned(operands)
    if kind.backend == "reference":
        y, last_state = reference.causal_conv1d(_checked(Problem(*[*operands, *options])))
    elif kind.save:
        y, last_state = _apply(kind, *kind.saved(operands))
    else:
        y, last_state = _forward_again(kind, kind.saved(operands))
    return y.squeeze(1) if kind.checked else y, last_state


def _traced(
    operands: Operands, same: tuple[bool], options: tuple[bool, bool], backend: str | None
) -> tuple[Tensor, Tensor]:
    """The call as compilers and tracers see it."""
    one_row, problem, name = decided(RULES, operands, same, options, backend)
    if name == "reference":
        y, last_state = reference.causal_conv1d(_checked(Problem(*problem)))
    else:
        y, last_state = torch.ops.vssm.causal_conv1d(*problem, name)
    return y.squeeze(1) if one_row else y, last_state


def _check(operands: Operands, _: tuple[bool, ...]) -> bool:
    """Check operands, or their Facts, against each other; returns whether none has rows, so that y shall not either."""
    who = "causal_conv1d"
    x, weight, bias, table, write, initial_state = operands
    sizes = match(who, x=(x, "b k? l d"))
    sizes = match(who, sizes, table=(table, "b? k t"), write=(write, "b? k t"))
    cells = sizes["l"]
    steps = sizes.setdefault("t", cells)
    if table is None and steps != cells:
        raise ValueError(f"{who}: without a table there are as many steps as cells ({cells}), got {steps}")
    sizes = match(who, sizes, weight=(weight, "k? d w"), bias=(bias, "k? d"))
    one_row = "k" not in sizes
    sizes.setdefault("k", 1)
    empty = [axis for axis in "kltw" if sizes[axis] == 0]
    if empty:
        raise ValueError(f"{who}: there must be at least one row, cell, step and tap, got {empty[0]}=0")
    match(who, sizes | {"w-1": sizes["w"] - 1}, initial_state=(initial_state, "b k d w-1"))
    values = dict(x=x, weight=weight, bias=bias, initial_state=initial_state)
    check_kinds(who, values, dict(table=table, write=write))
    return one_row


def _dtypes(operands: Operands) -> list[torch.dtype | None]:
    """The dtype in which backends take each operand."""
    given = autocast_dtype(operands[0]) or operands[0].dtype
    compute = torch.float64 if given == torch.float64 else torch.float32
    wanted = (given, compute, compute, torch.int32, torch.int32, given)
    return [None if x is None else dtype for x, dtype in zip(operands, wanted)]


RULES = Rules("conv1d", table=3, first=4, last=5, check=_check, dtypes=_dtypes, problem=Problem)


def _checked(p: Problem) -> Problem:
    """Refuse tables on the CPU that name cells which are not there."""
    same = p.write is p.table
    check_cells("causal_conv1d", table=(p.table, p.l), write=(None if same else p.write, p.m))
    return p


def _forward(p: Problem, backend: str, kind: Kind | None = None) -> tuple[Tensor, Tensor]:
    """y (b, k, m, d) and the last inputs (b, k, d, w - 1), both contiguous and in the dtype of x."""
    if p.x.numel() == 0:
        return p.x.new_zeros(p.y_shape), p.x.new_zeros(p.state_shape)
    run = implementation("conv1d", backend).forward
    return run(p, kind) if backend == "triton" else run(_checked(p))


def _forward_again(kind: Kind, operands: Operands) -> Sequence[Tensor]:
    """As :func:`_forward`, shorter for a kind that was met before."""
    if kind.shortcuts:
        results = implementation("conv1d", "triton").forward_again(kind, operands)
        if results is not None:
            return results
    return _forward(kind.problem(operands), kind.backend, kind)


def _backward(
    p: Problem, grad_y: Tensor | None, grad_last: Tensor | None, backend: str, kind: Kind | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients of OPERANDS, each contiguous and in its operand's shape and dtype; None where there is no operand.

    A gradient that comes as None is zero. ``kind`` is that of the call if the problem is as it was then.
    """
    if p.x.numel() == 0:
        return tuple(None if (x := getattr(p, name)) is None else _like(x).zero_() for name in OPERANDS)
    grad_y = p.x.new_zeros(p.y_shape) if grad_y is None else dense(grad_y)
    run = implementation("conv1d", backend).backward
    if backend == "triton":
        return run(p, grad_y, dense(grad_last), kind)
    return run(p, grad_y, p.x.new_zeros(p.state_shape) if grad_last is None else dense(grad_last))


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: Kind, *operands: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*operands)
        ctx.kind = kind
        ctx.set_materialize_grads(False)  # nobody asks for the last inputs' gradient in training
        y, last_state = _forward_again(kind, operands)
        return y, last_state

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        operands, kind = ctx.saved_tensors, ctx.kind
        # Hooks on saved tensors may bring them back in other layouts.
        same = layouts(operands) == kind.saved_layouts
        grads = None
        if same and kind.shortcuts and grad_y is not None:
            tensors = (*operands, dense(grad_y), dense(grad_last))
            grads = implementation("conv1d", "triton").backward_again(kind, tensors)
        if grads is None:
            p = kind.problem(operands if same else [dense(x) for x in operands])
            grads = _backward(p, grad_y, grad_last, kind.backend, kind if same else None)
        x, weight, bias, initial_state = grads
        return None, x, weight, bias, None, None, initial_state


_apply = recording(_CausalConv1d)


_PROBLEM = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? table, Tensor? write, Tensor? initial_state, "
    "bool silu, bool revisits, str backend"
)


def _real(args: tuple[Any, ...]) -> Problem:
    """The problem as it runs: strides that a compiler foresaw may differ from those that came."""
    problem: list[Any] = [*(dense(x) for x in args[:6]), *args[6:8]]
    return Problem(*problem)


@torch.library.custom_op("vssm::causal_conv1d", mutates_args=(), schema=f"({_PROBLEM}) -> (Tensor, Tensor)")
def _op(*args: Any) -> tuple[Tensor, Tensor]:
    with fleeting():
        return _forward(_real(args), args[-1])


@_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    *problem, _ = args
    p = Problem(*problem)
    return p.x.new_empty(p.y_shape), p.x.new_empty(p.state_shape)


@torch.library.custom_op(
    "vssm::causal_conv1d_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor grad_last, {_PROBLEM}) -> Tensor[]",
)
def _backward_op(grad_y: Tensor, grad_last: Tensor, *args: Any) -> list[Tensor]:
    with fleeting():
        grads = _backward(_real(args), grad_y, grad_last, args[-1])
    return [g for g in grads if g is not None]


@_backward_op.register_fake
def _(grad_y: Tensor, grad_last: Tensor, *args: Any) -> list[Tensor]:
    *problem, _ = args
    p = Problem(*problem)
    return [_like(x) for name in OPERANDS if (x := getattr(p, name)) is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *problem, backend = inputs
    ctx.save_for_backward(*problem[:6])
    ctx.flags, ctx.backend = problem[6:], backend


def _op_backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    present = iter(torch.ops.vssm.causal_conv1d_backward(grad_y, grad_last, *tensors, *ctx.flags, ctx.backend))
    x, weight, bias, initial_state = (None if x is None else next(present) for x in (*tensors[:3], tensors[5]))
    return x, weight, bias, None, None, initial_state, None, None, None


_op.register_autograd(_op_backward, setup_context=_save)
