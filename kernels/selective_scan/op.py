"""The public op: kinds, dispatch, gradients.

An eager call finds its :class:`Kind` (checked once), is recorded by ``autograd.Function``, a tenth of a custom op's
cost, and handed to a backend; compilers see the custom op ``vssm::selective_scan``. Both call :func:`_forward` and
:func:`_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from vssm.kernels.backends import implementation, traced
from vssm.kernels.kinds import Kind, Operands, decided, kind_of, layouts, once, recording
from vssm.kernels.operands import check_cells, dense, fleeting, index_or_steps
from vssm.kernels.selective_scan import reference
from vssm.kernels.selective_scan.problem import Problem
from vssm.kernels.selective_scan.rules import RULES

OPERANDS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")  # what has a gradient, in this order


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    table: Tensor | None = None,
    read: Tensor | str | None = None,
    write: Tensor | str | None = None,
    merge: str | None = None,
    initial_state: Tensor | None = None,
    revisits: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the selective state-space recurrence along each row of ``table`` (Mamba, arXiv:2312.00752, Algorithm 2).

        h[t] = exp(delta[q] A) h[t-1] + delta[q] B[q] u[p],    y[o] += C[q] · h[t] + D u[p]
        p = table[k, t],    q = read[k, t],    o = write[k, t]

    Sizes: b batch, k rows (directions, heads, groups), l cells, d channels, n states, t steps. Any operand may come
    without its k axis: it is shared by the rows, never copied, and its gradient is the sum over them. Strides are free
    except that the last axis is contiguous (another layout is copied). Functional: published as ``selective_scan_fn``
    in github.com/state-spaces/mamba (Apache-2.0), whose signature is in :mod:`vssm.kernels.compat`.

    Args:
        u: Input by cell, (b, l, d) or (b, k, l, d), any float dtype.
        delta: Step sizes by cell, (b, l, d) or (b, k, l, d); positive, or anything if ``delta_softplus``.
        A: State decay, negative, (d, n) or (k, d, n).
        B, C: Input and output gates by cell, (b, l, n) or (b, k, l, n).
        D: Skip weights, (d) or (k, d).
        z: Gate of the output, (b, cells of y, d): y is multiplied by silu(z), after the merge.
        delta_bias: Added to delta before the softplus, (d) or (k, d).
        delta_softplus: Pass delta through softplus.
        table: The cell of each step, integers, (k, t), or (b, k, t) if the order depends on the sample; None reads the
            cells as they lie. A row may revisit cells (their outputs add up in step order) or leave some out (their
            output is 0). Entry l is padding: u, B and C read 0 there, delta reads 0 before its bias, y is dropped.
            A CUDA graph keeps the order that it was captured with.
        read: Where delta, B and C are read: None for ``table``, ``"steps"`` for entry t at step t, or a table.
        write: Where y is written: None for ``table``, ``"steps"`` to leave y in step order, or a table.
        merge: ``"sum"`` adds the rows of y.
        initial_state: State before the first step, (b, k, d, n); zero if None.
        revisits: False promises that each row names a cell at most once, in every table given, which saves a GPU the
            ordering of revisits; a broken promise loses contributions there. None or True promises nothing.
        backend: One of ``available_backends("selective_scan")``; by default the fastest for ``u.device``.

    Returns:
        y, (b, k, l, d) or (b, l, d) if merged, in the dtype of ``u`` (t instead of l with ``write="steps"``); and the
        state after the last step, (b, k, d, n). Both have gradients. States and exponentials are float32, float64 if
        ``u`` is. Under autocast u, delta, B, C and z are cast to its dtype, the others left alone.

    Raises:
        ValueError: If shapes or devices disagree, a table names a cell that is not there (found on the CPU only; a GPU
            takes it for padding), or the backend cannot run on ``u.device``.

    >>> x = torch.ones(1, 3, 1)                                    # three cells, one channel
    >>> y, _ = selective_scan(x, x, torch.zeros(1, 1), x, x, table=torch.tensor([[2, 0, 1]]), backend="reference")
    >>> y.flatten().tolist()                                       # a running sum in the order 2, 0, 1
    [2.0, 3.0, 1.0]
    """
    if merge not in (None, "sum"):
        raise ValueError(f"selective_scan: merge must be None or 'sum', got {merge!r}")
    read = table if read is None else index_or_steps("selective_scan", "read", read, table)
    write = table if write is None else index_or_steps("selective_scan", "write", write, table)
    operands: Operands = (u, delta, A, B, C, D, z, delta_bias, table, read, write, initial_state)
    options = (bool(delta_softplus), merge == "sum", revisits is not False)
    same = (read is table, write is table)
    if traced(u):
        return _traced(operands, same, options, backend)
    kind = kind_of(RULES, operands, same, options, backend)
    if not kind.as_given:
        operands = kind.cleaned(operands)
    if kind.save and kind.backend != "reference":
        return _apply(kind, *kind.saved(operands))
    if kind.backend == "reference":
        return reference.selective_scan(_checked(Problem(*[*operands, *options])))
    y, last_state, *_ = _forward_again(kind, kind.saved(operands))
    return y, last_state


def recorded(operands: Operands, options: tuple[bool, bool, bool]) -> tuple[Tensor, Kind, Sequence[Tensor | None]]:
    """y, and what :func:`gradients` wants to know, for who runs the scan within an ``autograd.Function`` of his own.

    Args:
        operands: Those of a :class:`Problem`, not traced.
        options: ``delta_softplus``, ``merge``, ``revisits``.
    """
    table = operands[8]
    same = (operands[9] is table, operands[10] is table)
    kind = kind_of(RULES, operands, same, options, None, save=True)
    saved = kind.saved(operands if kind.as_given else kind.cleaned(operands))
    y, _, states, ungated = _forward_again(kind, saved)
    return y, kind, (*saved, states, ungated)


def _traced(
    operands: Operands, same: tuple[bool, bool], options: tuple[bool, bool, bool], backend: str | None
) -> tuple[Tensor, Tensor]:
    """The call as compilers and tracers see it."""
    k, problem, name = decided(RULES, operands, same, options, backend)
    if name == "reference":
        return reference.selective_scan(_checked(Problem(*problem)))
    # torch.jit.trace keeps it as a constant: what it traces is mostly run without gradients.
    save = torch.is_grad_enabled() and not torch.jit.is_tracing()
    save = save and any(x is not None and x.requires_grad for x in problem[:12])
    y, last_state, _, _ = torch.ops.vssm.selective_scan(*problem, save, name, k)
    return y, last_state


def _checked(p: Problem) -> Problem:
    """Refuse tables on the CPU that name cells which are not there."""
    read = None if p.read is p.table and p.r == p.l else p.read
    write = None if p.write is p.table and p.m == p.l else p.write
    check_cells("selective_scan", table=(p.table, p.l), read=(read, p.r), write=(write, p.m))
    return p


def _forward(
    p: Problem, save: bool, backend: str, kind: Kind | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, last state, and what the backward needs: states inside the sequence, y before the gate."""
    if p.u.numel() == 0:
        return p.u.new_zeros(p.y_shape), p.u.new_zeros(p.state_shape, dtype=p.compute_dtype), None, None
    run = implementation("selective_scan", backend).forward
    return run(p, save, kind) if backend == "triton" else run(_checked(p), save)


def _forward_again(kind: Kind, operands: Operands) -> Sequence[Any]:
    """As :func:`_forward`, shorter for a kind that was met before."""
    if kind.shortcuts:
        results = implementation("selective_scan", "triton").forward_again(kind, operands)
        if results is not None:
            return *results, None
    return _forward(kind.problem(operands), kind.save, kind.backend, kind)


def _backward(
    p: Problem,
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    states: Tensor | None,
    ungated: Tensor | None,
    backend: str,
    kind: Kind | None = None,
    needed: tuple[bool, ...] = (True,) * 12,
) -> tuple[Tensor | None, ...]:
    """Gradients of OPERANDS, each contiguous and in its operand's shape and dtype; None where there is no operand.

    ``kind`` is that of the call if the problem is as it was then. Gradients that are not ``needed`` may be None.
    """
    if p.u.numel() == 0:
        return tuple(None if (x := getattr(p, name)) is None else _like(x).zero_() for name in OPERANDS)
    grad_y = p.u.new_zeros(p.y_shape) if grad_y is None else dense(grad_y)
    run = implementation("selective_scan", backend).backward
    if backend == "triton":  # where zeros for grad_last would cost a launch
        return run(p, grad_y, dense(grad_last), states, kind, needed)
    return run(p, grad_y, p.A.new_zeros(p.state_shape) if grad_last is None else dense(grad_last), states, ungated)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: Kind, *operands: Tensor | None) -> tuple[Tensor, Tensor]:
        y, last_state, states, ungated = _forward_again(kind, operands)
        ctx.save_for_backward(*operands, states, ungated)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return y, last_state

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = gradients(ctx.kind, ctx.saved_tensors, grad_y, grad_last, ctx.needs_input_grad[1:])
        u, delta, A, B, C, D, z, delta_bias, initial_state = grads
        return None, u, delta, A, B, C, D, z, delta_bias, None, None, None, initial_state


def gradients(
    kind: Kind,
    saved: Sequence[Any],
    grad_y: Tensor | None,
    grad_last: Tensor | None = None,
    needed: tuple[bool, ...] = (True,) * 12,
) -> Sequence[Tensor | None]:
    """Gradients of OPERANDS from what was saved: operands as ``kind.saved`` leaves them, states, y before the gate."""
    *operands, states, ungated = saved
    # Hooks on saved tensors may bring them back in other layouts.
    same = layouts(operands) == kind.saved_layouts
    if same and kind.shortcuts and grad_y is not None:
        tensors = (*operands, dense(grad_y), dense(grad_last), states)
        grads = implementation("selective_scan", "triton").backward_again(kind, tensors, needed)
        if grads is not None:
            return grads
    p = kind.problem(operands if same else [dense(x) for x in operands])
    states, ungated = (None if x is None else x.contiguous() for x in (states, ungated))
    return _backward(p, grad_y, grad_last, states, ungated, kind.backend, kind if same else None, needed)


_apply = recording(_SelectiveScan)


_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? table, Tensor? read, Tensor? write, Tensor? initial_state, "
    "bool delta_softplus, bool merge, bool revisits"
)


def _real(problem: list[Any]) -> Problem:
    """The problem as it runs: strides that a compiler foresaw may differ from those that came."""
    arguments: list[Any] = [*(dense(x) for x in problem[:12]), *problem[12:]]
    return Problem(*arguments)


@torch.library.custom_op(
    "vssm::selective_scan",
    mutates_args=(),
    schema=f"({_TENSORS}, bool save, str backend, SymInt k) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _op(*args: Any) -> tuple[Tensor, ...]:
    *problem, save, backend, _ = args
    p = _real(problem)
    with fleeting():
        y, last_state, *saved = _forward(p, save, backend)
    states, ungated = (p.A.new_empty(0) if x is None else x for x in saved)
    return y, last_state, states.flatten(), ungated


@_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    *problem, save, backend, k = args
    p = Problem(*problem)
    empty = p.A.new_empty(0)
    states, ungated = empty, empty
    if save:
        # Flat: the layout of a shape with a symbol that may be 1 would be a guard.
        shape, dtype = implementation("selective_scan", backend).saved(p.b, k, p.t, p.d, p.n, p.u.dtype)
        states = p.A.new_empty(prod(shape), dtype=dtype)
        ungated = empty if p.z is None or backend == "triton" else p.A.new_empty(p.y_shape)
    return p.u.new_empty(p.y_shape), p.A.new_empty(p.state_shape), states, ungated


@torch.library.custom_op(
    "vssm::selective_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor grad_last, {_TENSORS}, Tensor states, Tensor ungated, str backend) -> Tensor[]",
)
def _backward_op(grad_y: Tensor, grad_last: Tensor, *args: Any) -> list[Tensor]:
    *problem, states, ungated, backend = args
    p = _real(problem)
    shape, _ = implementation("selective_scan", backend).saved(p.b, p.k, p.t, p.d, p.n, p.u.dtype)
    with fleeting():
        if states.numel():
            states = states.view(shape)
        elif prod(shape):  # not saved
            _, _, states, ungated = _forward(p, True, backend)
        grads = _backward(p, grad_y, grad_last, states, ungated, backend)
    return [g for g in grads if g is not None]


@_backward_op.register_fake
def _(grad_y: Tensor, grad_last: Tensor, *args: Any) -> list[Tensor]:
    *problem, _, _, _ = args
    p = Problem(*problem)
    return [_like(x) for name in OPERANDS if (x := getattr(p, name)) is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *problem, _, backend, _ = inputs
    ctx.save_for_backward(*problem[:12], *output[2:])
    ctx.flags, ctx.backend = problem[12:], backend


def _op_backward(ctx: Any, grad_y: Tensor, grad_last: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, states, ungated = ctx.saved_tensors
    backward = torch.ops.vssm.selective_scan_backward
    present = iter(backward(grad_y, grad_last, *tensors, *ctx.flags, states, ungated, ctx.backend))
    u, delta, A, B, C, D, z, delta_bias, initial_state = (
        None if x is None else next(present) for x in (*tensors[:8], tensors[11])
    )
    return u, delta, A, B, C, D, z, delta_bias, None, None, None, initial_state, *(None,) * 6


_op.register_autograd(_op_backward, setup_context=_save)
