"""The selective scan on GPUs, in Triton: equations and launches; ``plan.py`` lays it on the device.

For one row, with p, q, o the cells of step t, s[t] = delta[q] (after bias and softplus), a[t] = exp(s[t] A) per channel
and state, and zero wherever a cell is padding:

    forward     h[t] = a[t] h[t-1] + s[t] u[p] B[q]              y[o] += (sum_n C[q] h[t] + D u[p]) silu(z[o])
    adjoint     e[t] = a[t+1] e[t+1] + C[q] g[t]                 g[t] = dy[o] silu(z[o]), e[T] = dh[last]
    gradients   dC[q] += sum_d g[t] h[t]                         dB[q] += sum_d e[t] s[t] u[p]
                w[t] = sum_n e[t] B[q]                           x[t] = a[t] e[t] h[t-1]
                du[p] += s[t] w[t] + D g[t]                      ds[t] = u[p] w[t] + sum_n A x[t]
                dA += s[t] x[t]      dD += g[t] u[p]             dbias += ddelta[q] = ds[t] softplus'(delta[q] + bias)
                dz[o] += dy[o] (sum_n C[q] h[t] + D u[p]) silu'(z[o])

Both recurrences are linear, so a row may be cut into chunks that run in parallel: each chunk finds where it ends when
it starts from zero; a pass over the chunks, whose decays are exp(A sum s), turns these ends into starts; each chunk
then runs again from its start. Rows that already fill the device are not cut.

Nothing is added atomically. A program writes to its own cells only, which takes a promise (``revisits=False``) that no
row visits a cell twice; otherwise, and wherever rows are summed, steps leave their parts in step order and
``sum_visits`` adds those of a cell in a fixed order. The sums over channels in dB and dC are parts of each block of
channels too, or, in Gluon with 16 states, passed on from block to block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vssm.kernels.kinds import Kind
from vssm.kernels.selective_scan import triton_backward, triton_forward
from vssm.kernels.selective_scan.plan import RING, Plan, compact, interval, plan
from vssm.kernels.selective_scan.plan import saved as saved  # the op asks each backend for it
from vssm.kernels.selective_scan.problem import Problem
from vssm.kernels.triton_launch import (
    LARGE,
    Visits,
    cdiv,
    clear_unvisited,
    index_strides,
    is_current,
    launch,
    on,
    parameter_grads,
    processors,
    same,
    shorten,
    strides,
    sum_by_cell,
    visits,
)
from vssm.kernels.triton_replay import empty, replayed
from vssm.kernels.triton_shared import zero


class Kernels(NamedTuple):
    """The four kernels of the recurrence, in plain Triton or in Gluon."""

    chunk_ends: Any
    outputs: Any
    chunk_adjoints: Any
    gradients: Any


PLAIN = Kernels(
    triton_forward.chunk_ends, triton_forward.outputs, triton_backward.chunk_adjoints, triton_backward.gradients
)
use_gluon = True  # tests turn it off
FAR = 8 * 2**31  # elements of a row that the kernels in Gluon do not reach: they number vectors of 8


@cache
def _gluon(device: torch.device, n: int) -> Kernels | None:
    """The kernels in Gluon for n states, or None if this Triton or this GPU cannot have them."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from vssm.kernels.selective_scan import (
            gluon_backward,
            gluon_forward,
            gluon_single_backward,
            gluon_single_forward,
        )
    except ImportError:
        return None
    single = gluon_single_forward, gluon_single_backward
    forward, backward = single if n == 1 else (gluon_forward, gluon_backward)
    return Kernels(forward.chunk_ends, forward.outputs, backward.chunk_adjoints, backward.gradients)


def fitting(p: Problem) -> Kernels:
    """Those in Gluon for bfloat16, 1 or 16 states and whole vectors of 16 bytes; else the plain ones.

    What they note of states is bfloat16, too coarse for the gradients of float16 inputs.
    """
    if not use_gluon or not compact(p.n, p.d, _bfloat16(p)):
        return PLAIN
    if not all(aligned(x) for x in (p.u, p.delta, p.z) if x is not None) or max(p.l, p.r, p.m, p.t) * p.d >= FAR:
        return PLAIN
    return _gluon(p.u.device, p.n) or PLAIN


def aligned(x: Tensor) -> bool:
    """Whether rows are whole vectors of 16 bytes, which 32 bits can number."""
    whole = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return whole and x.shape[-2] * x.stride(-2) < FAR


def forward_again(kind: Kind, operands: Sequence[Tensor | None]) -> Sequence[Tensor | None] | None:
    """y, last state and states kept, by the kind's shortcut; None if there is none that fits."""
    shortcut = kind.shortcuts.get((use_gluon, LARGE))
    return None if shortcut is None else shortcut.follow(operands)


def backward_again(kind: Kind, tensors: Sequence[Tensor | None], needed: tuple[bool, ...]) -> Sequence[Any] | None:
    """Gradients, by the kind's shortcut; ``tensors`` are operands, grad_y, grad_last and states."""
    shortcut = kind.shortcuts.get(_name(tensors[12:], needed))
    return None if shortcut is None else shortcut.follow(tensors)


def _name(given: Sequence[Tensor | None], needed: tuple[bool, ...]) -> tuple[Any, ...]:
    return use_gluon, LARGE, needed, *[x if x is None else (x.dtype, x.shape, x.stride()) for x in given]


def forward(p: Problem, save: bool, kind: Kind | None = None) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """y, last state, with ``save`` every ``interval``-th state, and nothing: y before the gate is computed again.

    ``kind`` is that of the call, if it has one.
    """
    if not is_current(p.u.device):
        with on(p.u.device):
            return forward(p, save, kind)
    found = visits(p.write, p.l, p.revisits)
    options = ("forward", save, found.complete, use_gluon, LARGE, p.delta_softplus, p.merge, p.revisits)
    shortcut = None if kind is None else partial(shorten, kind, (use_gluon, LARGE), found)
    y, last, states = replayed(
        lambda: _forward(p, save, found), (*p.distinct, *found.tensors), options, kind, shortcut
    )  # fmt: skip
    return y, last, states, None


def _forward(p: Problem, save: bool, found: Visits) -> list[Tensor | None]:
    b, k, l, r, m, t, d, n = p.b, p.k, p.l, p.r, p.m, p.t, p.d, p.n
    kernels = fitting(p)
    how = plan(b, k, t, d, n, _bfloat16(p), kernels is not PLAIN, processors(p.u.device), False)
    tile = _tile(how, p, p.z)
    new = partial(empty, dtype=torch.float32, device=p.u.device)
    programs = cdiv(d, how.block_d) * k * cdiv(how.chunks, how.parts) * b

    direct = (not p.merge or k == 1) and (p.write is None or not p.revisits)
    # Cells that no step visits are zero: in large outputs they are looked for, small ones are zeroed before.
    visited = found.complete or not direct
    search = not visited and b * k * m * d >= LARGE
    make = partial(empty, dtype=p.u.dtype, device=p.u.device, zero=not (visited or search))
    y = make(p.y_shape if direct else (b, k, t, d))
    shape, dtype = saved(b, k, t, d, n, p.u.dtype)
    states = new(shape, dtype=dtype) if save else None
    last = new((b, k, d, n))
    write, z = (p.write, p.z) if direct else (None, None)
    read_table, write_table = same(p.read, p.table) and r == l, same(write, p.table) and (write is None or m == l)
    A, D, bias = _parameters(p)
    z_b, _, z_m = strides(z)

    initial = p.initial_state
    if how.chunks > 1:
        chunked = new((b, how.chunks, k, n + 2, d))
        launch(
            kernels.chunk_ends, programs,
            (p.u, p.delta, p.A, p.B, p.delta_bias, p.table, p.read, chunked,
             *strides(p.u), *strides(p.delta), *strides(p.B), *A, bias,
             *index_strides(p.table), *index_strides(p.read), k, l, r, t, d, n, how.chunk, how.chunks),
            dict(SOFTPLUS=p.delta_softplus, READ_TABLE=read_table) | tile, how.warps, how.registers,
        )  # fmt: skip
        _pass_states(chunked, p, initial, False)
        initial = chunked
    launch(
        kernels.outputs, programs,
        (p.u, p.delta, p.A, p.B, p.C, p.D, z, p.delta_bias, p.table, p.read, write, initial,
         y, last, states,
         *strides(p.u), *strides(p.delta), *strides(p.B), *strides(p.C), z_b, z_m, *A, D, bias,
         *index_strides(p.table), *index_strides(p.read), *index_strides(write), *strides(p.initial_state),
         k, l, r, m if direct else t, t, d, n, how.chunk, how.chunks, interval(n, d, _bfloat16(p))),
        dict(CHUNKED=how.chunks > 1, SOFTPLUS=p.delta_softplus, READ_TABLE=read_table,
             WRITE_TABLE=write_table) | tile,
        how.warps, how.registers,
    )  # fmt: skip
    if not direct:
        parts, y = y, make(p.y_shape)
        sum_by_cell(parts, found, y, z=p.z)
    elif search:
        clear_unvisited(y, found)
    return [y, last, states]


def backward(
    p: Problem,
    grad_y: Tensor,
    grad_last: Tensor | None,
    states: Tensor,
    kind: Kind | None = None,
    needed: tuple[bool, ...] = (True,) * 12,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state; ``grad_last`` may be None for zero.

    ``kind`` is that of the call if the problem is as it was; ``needed`` says of each operand whether its gradient is:
    others may be None.
    """
    if not is_current(p.u.device):
        with on(p.u.device):
            return backward(p, grad_y, grad_last, states, kind, needed)
    l, r, same_cells = p.l, p.r, p.l == p.r
    by_read = visits(p.read, r, p.revisits)
    by_table = by_read if same_cells and same(p.read, p.table) else visits(p.table, l, p.revisits)
    write = None if p.z is None else p.write
    by_write = by_read if same_cells and same(write, p.read) else visits(write, l, p.revisits)
    parameters, gates = needed[2] or needed[5] or needed[7], needed[3] or needed[4]
    found = (by_read, None if by_table is by_read else by_table, None if by_write is by_read else by_write)
    given = (grad_y, grad_last, states)
    tensors = (*p.distinct, *given, *[x for visited in found if visited for x in visited.tensors])
    flags = (use_gluon, LARGE, p.delta_softplus, p.merge, p.revisits, parameters, gates)
    options = ("backward", *[visited and visited.complete for visited in found], *flags)
    name = _name(given, needed)
    shortcut = None if kind is None else partial(shorten, kind, name, by_read)
    grads = replayed(
        lambda: _backward(p, grad_y, grad_last, states, by_read, by_table, by_write, parameters, gates),
        tensors, options, kind and (kind, name), shortcut,
    )  # fmt: skip
    return tuple(grads)


def _backward(
    p: Problem, grad_y: Tensor, grad_last: Tensor | None, states: Tensor, by_read: Visits, by_table: Visits,
    by_write: Visits, parameters: bool, gates: bool,
) -> list[Tensor | None]:  # fmt: skip
    b, k, l, r, m, t, d, n = p.b, p.k, p.l, p.r, p.m, p.t, p.d, p.n
    kernels = fitting(p)
    how = plan(b, k, t, d, n, _bfloat16(p), kernels is not PLAIN, processors(p.u.device), True)
    if kernels is not PLAIN and not aligned(grad_y):
        grad_y = grad_y.clone(memory_format=torch.contiguous_format)
    tile = _tile(how, p, p.z, grad_y)
    new, blocks = partial(empty, dtype=torch.float32, device=p.u.device), cdiv(d, how.block_d)
    works = blocks * k * cdiv(how.chunks, how.parts) * b
    read_table, write_table, write_read = (
        same(p.read, p.table) and r == l,
        same(p.write, p.table) and m == l,
        same(p.write, p.read) and m == r,
    )
    A, D, bias = _parameters(p)
    z_b, _, z_m = strides(p.z)

    def cells(x: Tensor, found: Visits) -> Tensor | None:
        """The gradient of ``x`` where a row may write straight to its cells; None if steps must be summed."""
        if (x.dim() == 3 and k > 1) or found.first is not None:
            return None
        return empty(x.shape, x.dtype, x.device, zero=not found.complete and x.numel() < LARGE)

    def destination(x: Tensor, found: Visits, parts: torch.dtype) -> tuple[Tensor, bool]:
        """Where a row's gradient of ``x`` goes: into its cells, or in step order to be summed."""
        made = cells(x, found)
        return (empty((b, k, t, d), parts, x.device), False) if made is None else (made, True)

    chunked = new((b, how.chunks, k, n + 2, d))  # of each chunk: what it hands on, what comes in, what parameters get
    if how.chunks > 1:
        launch(
            kernels.chunk_adjoints, works,
            (p.delta, p.A, p.C, p.z, p.delta_bias, p.read, p.write, grad_y, chunked,
             *strides(p.delta), *strides(p.C), z_b, z_m, *strides(grad_y), *A, bias,
             *index_strides(p.read), *index_strides(p.write), k, r, m, t, d, n, how.chunk, how.chunks),
            dict(SOFTPLUS=p.delta_softplus, WRITE_READ=write_read) | tile, how.warps, how.registers,
        )  # fmt: skip
    carried = how.chunks > 1 or grad_last is not None
    if carried:
        _pass_states(chunked, p, grad_last, True)
    du, du_cells = destination(p.u, by_table, p.u.dtype)
    ddelta, ddelta_cells = destination(p.delta, by_read, p.delta.dtype)
    # Rounded, parts of dz would be as coarse as dz itself is allowed to be.
    dz, dz_cells = (None, False) if p.z is None else destination(p.z, by_write, torch.float32)
    dB = dC = dBC = relay = turn = None
    slots = 0
    if kernels is PLAIN or n == 1:
        dBC = new((b, k, t, blocks, 2 * n))
    else:  # each block of channels passes its sums on to the next
        if p.B.dim() == p.C.dim():
            dB, dC = cells(p.B, by_read), cells(p.C, by_read)
        if dB is None:
            dBC = new((b, k, t, 2 * n))
        groups = cdiv(how.chunk, how.steps)
        slots = min(RING, groups) if blocks <= processors(p.u.device) // 4 else groups
        relay, turn = new((b, how.chunks, k, slots, 2, n, how.steps)), empty((1,), torch.int32, p.u.device)
        launch(zero, cdiv(relay.numel(), 4096), (relay, turn, relay.numel()), dict(BLOCK=4096), 4)
    dinitial = None if p.initial_state is None else new((b, k, d, n))
    every, scratch, programs = interval(n, d, _bfloat16(p)), None, works
    if kernels is PLAIN:
        programs = how.programs
        scratch = new((programs * (every // how.steps) * how.block_n * how.block_d,))
    launch(
        kernels.gradients, programs,
        (p.u, p.delta, p.A, p.B, p.C, p.D, p.z, p.delta_bias, p.table, p.read, p.write, grad_y, states,
         du, ddelta, dB, dC, dBC, dz, chunked, dinitial, scratch, relay, turn,
         *strides(p.u), *strides(p.delta), *strides(p.B), *strides(p.C), z_b, z_m, *strides(grad_y), *A, D, bias,
         *index_strides(p.table), *index_strides(p.read), *index_strides(p.write),
         k, l, r, m, t, d, n, how.chunk, how.chunks, works, slots),
        dict(CARRIED=carried, EVERY=every, SOFTPLUS=p.delta_softplus, READ_TABLE=read_table,
             WRITE_TABLE=write_table, DU_CELLS=du_cells, DDELTA_CELLS=ddelta_cells, DZ_CELLS=dz_cells) | tile,
        how.warps, how.registers,
    )  # fmt: skip

    du = _by_cell(du, p.u, by_table, du_cells)
    ddelta = _by_cell(ddelta, p.delta, by_read, ddelta_cells)
    dz = dz if dz is None or p.z is None else _by_cell(dz, p.z, by_write, dz_cells)
    if not gates:
        dB = dC = None
    elif dBC is None:
        dB, dC = _by_cell(dB, p.B, by_read, True), _by_cell(dC, p.C, by_read, True)
    else:
        dB, dC = empty(p.B.shape, p.B.dtype, p.B.device), empty(p.C.shape, p.C.dtype, p.C.device)
        if p.B.dim() == p.C.dim():
            sum_by_cell(dBC, by_read, dB, out_2=dC)
        else:
            sum_by_cell(dBC[..., :n].contiguous(), by_read, dB)
            sum_by_cell(dBC[..., n:].contiguous(), by_read, dC)
    dA, dD, dbias = parameter_grads(chunked, (p.A, p.D, p.delta_bias)) if parameters else (None,) * 3
    return [du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial]


def _by_cell(grad: Tensor, x: Tensor, found: Visits, cells: bool) -> Tensor:
    """The gradient of ``x`` from what steps left: summed, or by cell already and, if large, zeroed where none went."""
    if not cells:
        out = empty(x.shape, x.dtype, x.device)
        sum_by_cell(grad, found, out)
        return out
    if not found.complete and x.numel() >= LARGE:
        clear_unvisited(grad, found)
    return grad


def _pass_states(chunked: Tensor, p: Problem, initial: Tensor | None, reverse: bool) -> None:
    b, chunks, k, rows, d = chunked.shape
    n = rows - 2
    A, _, _ = _parameters(p)
    block_c = 256 if n == 1 and chunks > 128 else 64 if chunks > 128 or (n == 1 and chunks > 32) else 16
    launch(
        triton_forward.pass_states, cdiv(d, 32) * k * n * b,
        (chunked, p.A, initial, *A, *strides(initial), k, d, n, chunks),
        dict(REVERSE=reverse, BLOCK_C=block_c, BLOCK_D=32, EXACT=_exact(p)), block_c // 16,
    )  # fmt: skip


def _tile(how: Plan, p: Problem, *others: Tensor | None) -> dict[str, int | bool]:
    """The constants that all kernels of the recurrence share.

    VEC is the number of neighbouring channels that a thread loads at once: what it holds, if all strides allow it.
    """
    width = how.block_d // 32
    whole = all(
        x is None or (p.d % width == 0 and all(s % width == 0 for s in x.stride()[:-1]))
        for x in (p.u, p.delta, *others)
    )
    return dict(BLOCK_N=how.block_n, BLOCK_D=how.block_d, STEPS=how.steps, VEC=width if whole else 1, EXACT=_exact(p))


def _bfloat16(p: Problem) -> bool:
    return p.u.dtype == torch.bfloat16


def _exact(p: Problem) -> bool:
    """Whether exponentials must be better than the hardware's 2e-7, which adds up over long memories."""
    return p.u.dtype == torch.float32


def _parameters(p: Problem) -> tuple[tuple[int, int, int], int, int]:
    """Strides of A by row (0 if shared), channel and state, and of D and delta_bias by row."""
    A = p.A.stride(0) if p.A.dim() == 3 else 0, p.A.stride(-2), 1
    D, bias = (x.stride(0) if x is not None and x.dim() == 2 else 0 for x in (p.D, p.delta_bias))
    return A, D, bias
