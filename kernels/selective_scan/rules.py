"""What the selective scan asks of its operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vssm.kernels.checks import match
from vssm.kernels.kinds import Operands, Rules, autocast_dtype
from vssm.kernels.operands import check_kinds
from vssm.kernels.selective_scan.problem import Problem


def dtypes(operands: Operands) -> list[torch.dtype | None]:
    """The dtype in which backends take each operand: autocast's for what lies in cells, float32 for parameters."""
    cast = autocast_dtype(operands[0])
    compute = torch.float64 if operands[0].dtype == torch.float64 else torch.float32
    wanted = (cast, cast, compute, cast, cast, compute, cast, compute, torch.int32, torch.int32, torch.int32, compute)
    return [None if x is None else dtype or x.dtype for x, dtype in zip(operands, wanted)]


def check(operands: Sequence[Any], same: tuple[bool, ...]) -> int:
    """Check all operands, tensors or their Facts, against each other; returns the number of rows.

    ``same`` says whether ``read`` and ``write`` are the table.
    """
    u, delta, A, B, C, D, z, delta_bias, table, read, write, initial_state = operands
    who = "selective_scan"
    sizes = match(who, u=(u, "b k? l d"))
    sizes = match(who, sizes, table=(table, "b? k t"), read=(read, "b? k t"), write=(write, "b? k t"))
    cells = sizes["l"]
    steps = sizes.setdefault("t", cells)
    if table is None and steps != cells:
        raise ValueError(f"{who}: without a table there are as many steps as cells ({cells}), got {steps}")
    if read is None or same[0]:
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


RULES = Rules("selective_scan", table=8, first=9, last=11, check=check, dtypes=dtypes, problem=Problem)
