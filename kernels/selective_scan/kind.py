"""What calls of the selective scan have in common: checks, conversions and the backend, decided once for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vssm.kernels.backends import choose, forced
from vssm.kernels.checks import match
from vssm.kernels.operands import Facts, check_kinds
from vssm.kernels.selective_scan.problem import Problem

MOST = 4096  # remembered kinds

Operands = Sequence[Any]  # the tensors of a Problem, or None, in its order
_kinds: dict[tuple[Any, ...], Kind] = {}


class Kind:
    """Calls whose operands agree in shapes, strides, dtypes, devices and wish for gradients, and whose options agree.

    A model calls with few kinds, again and again: what depends on the kind alone is found once.

    Args:
        operands: Those of the first call of the kind.
        options: delta_softplus, merge and revisits.
        backend: The one asked for by name, or None.

    Raises:
        ValueError: If operands do not fit one another, or the backend cannot run.
    """

    def __init__(self, operands: Operands, options: tuple[bool, bool, bool], backend: str | None) -> None:
        u, table, read, write = operands[0], *operands[8:11]
        check([None if x is None else Facts(x.shape, x.dtype, x.device) for x in operands], read is table)
        self.options = options
        self.dtypes = dtypes(operands)
        self.backend = chosen(u.device, self.dtypes[0] or u.dtype, backend)
        self.save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
        self.one_table = read is table and write is table
        self.shortcuts: dict[Any, Any] = {}  # of the Triton backend, to launches
        with torch.no_grad():
            cleaned = self.cleaned(operands)
        self.as_given = all(x is y for x, y in zip(operands, cleaned))
        self.saved_layouts = layouts(self.saved(cleaned))

    def cleaned(self, operands: Operands) -> Operands:
        """The operands as backends take them: dtypes, and the last axis contiguous."""
        made = [clean(x, dtype) for x, dtype in zip(operands, self.dtypes)]
        for i in (9, 10):
            if operands[i] is operands[8]:
                made[i] = made[8]
        return made

    def saved(self, operands: Operands) -> Operands:
        """The operands as they are saved for the backward: a table that is also read and write once."""
        return (*operands[:9], None, None, operands[11]) if self.one_table else operands

    def problem(self, saved: Operands) -> Problem:
        """The problem of saved operands."""
        u, delta, A, B, C, D, z, delta_bias, table, read, write, initial_state = saved
        if self.one_table:
            read = write = table
        return Problem(u, delta, A, B, C, D, z, delta_bias, table, read, write, initial_state, *self.options)


def kind_of(operands: Operands, options: tuple[bool, bool, bool], backend: str | None) -> Kind:
    """The kind of a call, whose operands are checked if it is new."""
    u, table, read, write = operands[0], *operands[8:11]
    kind = u.device.type
    distinct = (*operands[:9], operands[11]) if read is table and write is table else operands
    key = (
        read is table,
        write is table,
        options,
        backend,
        forced.get(),
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        torch.is_grad_enabled(),
        *[None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in distinct],
    )
    found = _kinds.get(key)
    if found is None:
        found = Kind(operands, options, backend)
        if len(_kinds) >= MOST:
            _kinds.clear()
        _kinds[key] = found
    return found


def layouts(tensors: Operands) -> list[tuple[Any, ...] | None]:
    """Dtypes and strides."""
    return [None if x is None else (x.dtype, x.stride()) for x in tensors]


def dtypes(operands: Operands) -> list[torch.dtype | None]:
    """The dtype in which backends take each operand: autocast's for what lies in cells, float32 for parameters."""
    u = operands[0]
    cast = None
    if not u.is_meta and torch.is_autocast_enabled(u.device.type) and u.dtype != torch.float64:
        cast = torch.get_autocast_dtype(u.device.type)
    compute = torch.float64 if u.dtype == torch.float64 else torch.float32
    wanted = (cast, cast, compute, cast, cast, compute, cast, compute, torch.int32, torch.int32, torch.int32, compute)
    return [None if x is None else dtype or x.dtype for x, dtype in zip(operands, wanted)]


def clean(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """``x`` in ``dtype``, its last axis contiguous."""
    if x is None or dtype is None:
        return x
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.compiler.assume_constant_result
def chosen(device: torch.device, dtype: torch.dtype, backend: str | None) -> str:
    return choose("selective_scan", device, dtype, backend)


def check(operands: Sequence[Any], read_by_table: bool) -> int:
    """Check all operands, tensors or their Facts, against each other; returns the number of rows."""
    u, delta, A, B, C, D, z, delta_bias, table, read, write, initial_state = operands
    who = "selective_scan"
    sizes = match(who, u=(u, "b k? l d"))
    sizes = match(who, sizes, table=(table, "b? k t"), read=(read, "b? k t"), write=(write, "b? k t"))
    cells = sizes["l"]
    steps = sizes.setdefault("t", cells)
    if table is None and steps != cells:
        raise ValueError(f"{who}: without a table there are as many steps as cells ({cells}), got {steps}")
    if read is None or read_by_table:
        sizes["r"] = steps if read is None else cells
    sizes = match(who, sizes, delta=(delta, "b k? r d"), A=(A, "k? d n"), B=(B, "b k? r n"), C=(C, "b k? r n"),
                  D=(D, "k? d"), delta_bias=(delta_bias, "k? d"))  # fmt: skip
    sizes.setdefault("k", 1)
    empty = [axis for axis in "kltn" if sizes[axis] == 0]
    if empty:
        raise ValueError(f"{who}: there must be at least one row, cell, step and state, got {empty[0]}=0")
    sizes["m"] = cells if write is not None else steps
    match(who, sizes, z=(z, "b m d"), initial_state=(initial_state, "b k d n"))
    values = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    check_kinds(who, values, dict(table=table, read=read, write=write))
    return sizes["k"]
