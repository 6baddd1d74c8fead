"""The selective scan in plain tensor operations, on any device: a loop over steps, blocked so that memory stays small.

What a block of steps needs at all its steps, the decays exp(delta A) and the inputs delta u B, is computed at once; the
loop itself is one fused multiply-add a step. No product of decays is ever divided by: it underflows. The backward pass
recomputes the states of one block at a time from the state before it; the equations stand at the top of ``cpu.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm.kernels.gather import put, take
from vssm.kernels.selective_scan.problem import Problem
from vssm.kernels.selective_scan.rows import gate, operand_grad, ungate

CHUNK = 32  # steps of a block, between saved states
# Elements that the states of a block may have, k * CHUNK * n * d for each sample, before fewer samples run at once:
# what fits a cache, or keeps a GPU busy.
ROOM_ON_CPU, ROOM = 2**20, 2**25


def saved(b: int, k: int, t: int, d: int, n: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """The state before each block, channels innermost; flat, so that exported sizes are not guarded one by one."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (b * k * ((t + CHUNK - 1) // CHUNK) * n * d,), compute


def forward(p: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, the states before each block, and y before its gate (the last two only to be saved)."""
    parts = [_forward(part, save) for part, _ in _parts(p)]
    steps, last_state, states = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*parts))
    rows = put(steps, p.rows("write"), p.m, p.revisits)
    y, ungated = gate(p, rows.sum(1) if p.merge else rows, save)
    return y, _transposed(last_state), states.flatten(), ungated


def backward(
    p: Problem, grad_y: Tensor, grad_last: Tensor, states: Tensor, ungated: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state."""
    grad_rows, grad_z = ungate(p, grad_y, ungated)
    if p.merge:
        grad_rows = grad_rows.unsqueeze(1).expand(-1, p.k, -1, -1)
    states = states.view(p.b, p.k, -1, p.n, p.d)
    parts = [_backward(part, grad_rows[at], grad_last[at], states[at]) for part, at in _parts(p)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]
    for name, index, cells in (("u", "table", p.l), ("delta", "read", p.r), ("B", "read", p.r), ("C", "read", p.r)):
        joined[name] = put(joined[name], p.rows(index), cells, p.revisits)
    grads = {name: operand_grad(p, name, grad) for name, grad in joined.items()} | {"z": grad_z}
    return tuple(grads[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"))


def _parts(p: Problem) -> Iterator[tuple[Problem, slice]]:
    """The problem for some samples at a time, so that the states of a block fit a cache (or some of a GPU's memory)."""
    room = ROOM_ON_CPU if p.u.device.type == "cpu" else ROOM
    size = max(1, room // (p.k * min(p.t, CHUNK) * p.n * p.d))
    for start in range(0, p.b, size):
        at = slice(start, start + size)
        names = ["u", "delta", "B", "C", *(["initial_state"] if p.initial_state is not None else [])]
        names += [name for name in ("table", "read", "write") if (x := getattr(p, name)) is not None and x.dim() == 3]
        yield (p._replace(**{name: getattr(p, name)[at] for name in names}) if size < p.b else p), at


@dataclass
class _Block:
    """The inputs of a block of T steps in the compute dtype, and what the recurrence makes of them."""

    u: Tensor  # (b, k, T, d)
    raw: Tensor  # (b, k, T, d): delta with its bias, before softplus
    B: Tensor  # (b, k, T, n)
    C: Tensor  # (b, k, T, n)
    dt: Tensor  # (b, k, T, d): delta
    decay: Tensor  # (b, k, T, n, d): exp(delta A)
    states: Tensor  # (b, k, T, n, d)


def _block(p: Problem, start: int, A: Tensor, state: Tensor) -> _Block:
    """Run the recurrence over the block of steps from ``start``, given the state (b, k, n, d) before it."""
    kind, steps = p.compute_dtype, slice(start, start + CHUNK)

    def read(name: str, index: str) -> Tensor:
        where = p.rows(index)
        x = p.rows(name)
        return (x[:, :, steps] if where is None else take(x, where[:, :, steps])).to(kind)

    u, raw, B, C = read("u", "table"), read("delta", "read"), read("B", "read"), read("C", "read")
    if p.delta_bias is not None:
        raw = raw + p.rows("delta_bias")[:, None]
    dt = F.softplus(raw) if p.delta_softplus else raw
    decay = (dt.unsqueeze(-2) * A.unsqueeze(1)).exp_()
    states = (dt * u).unsqueeze(-2) * B.unsqueeze(-1)
    for factor, h in zip(decay.unbind(2), states.unbind(2)):
        state = h.addcmul_(factor, state)
    return _Block(u, raw, B, C, dt, decay, states)


def _forward(p: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y by step (b, k, t, d), the last state (b, k, n, d) and the states before each block."""
    A, state = _transposed(p.rows("A")), _first_state(p)
    y = torch.empty(p.b, p.k, p.t, p.d, dtype=p.compute_dtype, device=p.u.device)
    saved = []
    for start in range(0, p.t, CHUNK):
        saved.append(state)
        block = _block(p, start, A, state)
        state = block.states[:, :, -1].clone()
        out = torch.sum(block.states.mul_(block.C.unsqueeze(-1)), -2, out=y[:, :, start : start + CHUNK])
        if p.D is not None:
            out.addcmul_(p.rows("D")[:, None], block.u)
    return y, state, torch.stack(saved, 2) if save else y.new_empty(0)


def _backward(p: Problem, grad_y: Tensor, grad_last: Tensor, states: Tensor) -> dict[str, Tensor]:
    """Gradients by sample and row: of u, delta, B and C at every step, and of the parameters and the first state."""
    A, where, kind = _transposed(p.rows("A")), p.rows("write"), p.compute_dtype
    by_step: dict[str, list[Tensor]] = {name: [] for name in ("u", "delta", "B", "C")}
    carry = _transposed(grad_last)  # the gradient of the state after the block
    totals = {"A": torch.zeros_like(carry)}
    totals |= {name: carry.new_zeros(p.b, p.k, p.d) for name in ("D", "delta_bias")}
    for chunk in reversed(range(states.shape[2])):
        before, start = states[:, :, chunk], chunk * CHUNK
        steps = slice(start, start + CHUNK)
        block = _block(p, start, A, before)
        dy = (grad_y[:, :, steps] if where is None else take(grad_y, where[:, :, steps])).to(kind)
        grad = dy.unsqueeze(-2) * block.C.unsqueeze(-1)  # (b, k, T, n, d), of the states
        by_step["C"].append((dy.unsqueeze(-2) * block.states).sum(-1))
        for g, factor in zip(reversed(grad.unbind(2)), reversed(block.decay.unbind(2))):
            carry = g.add_(carry) * factor
        dx = (grad * block.B.unsqueeze(-1)).sum(-2)
        by_step["B"].append((grad * (block.dt * block.u).unsqueeze(-2)).sum(-1))
        block.decay[:, :, 1:].mul_(block.states[:, :, :-1])
        block.decay[:, :, 0].mul_(before)
        da = grad.mul_(block.decay)
        totals["A"] += (da * block.dt.unsqueeze(-2)).sum(2)
        ddt = (da * A.unsqueeze(1)).sum(-2).addcmul_(dx, block.u)
        if p.delta_softplus:
            ddt *= torch.where(block.raw > 20, 1, torch.sigmoid(block.raw))  # as torch: linear above 20
        du = dx * block.dt
        if p.D is not None:
            du.addcmul_(dy, p.rows("D")[:, None])
        by_step["u"].append(du)
        by_step["delta"].append(ddt)
        totals["D"] += (dy * block.u).sum(2)
        totals["delta_bias"] += ddt.sum(2)
    totals["A"], totals["initial_state"] = _transposed(totals["A"]), _transposed(carry)
    return totals | {name: torch.cat(grads[::-1], 2) for name, grads in by_step.items()}


def _first_state(p: Problem) -> Tensor:
    if p.initial_state is not None:
        return _transposed(p.initial_state)
    return torch.zeros(p.b, p.k, p.n, p.d, dtype=p.compute_dtype, device=p.u.device)


def _transposed(x: Tensor) -> Tensor:
    """States innermost to channels innermost, and back."""
    return x.transpose(-1, -2).contiguous()
