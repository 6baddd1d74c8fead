"""Kinds, devices and layouts of operands, the same for every op that reads tables."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_thread = threading.local()
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class Facts(NamedTuple):
    """What checks look at in a tensor: hashable, so that a check can be remembered."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def index_or_steps(op: str, name: str, value: Tensor | str | None, default: Tensor | None) -> Tensor | None:
    """An index operand: ``default`` for None, None for ``"steps"``, or the table given."""
    if value is None:
        return default
    if isinstance(value, Tensor):
        return value
    if value != "steps":
        raise ValueError(f"{op}: {name} must be None, 'steps' or a table, got {value!r}")
    return None


def check_kinds(op: str, values: dict[str, Tensor | None], indices: dict[str, Tensor | None]) -> None:
    """Values are real floating point, indices are integers, and all are on the device of the first value.

    Looks at dtype and device alone, so it takes whatever has them.
    """
    first, device = next((name, x.device) for name, x in values.items() if x is not None)
    for name, x in (values | indices).items():
        if x is None:
            continue
        if x.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like {first}, got {x.device}")
        if name in values and not x.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be real floating point, got {x.dtype}")
        if name in indices and x.dtype not in INTEGERS:
            raise ValueError(f"{op}: {name} must hold integers, got {x.dtype}")


def dense(x: Tensor | None) -> Tensor | None:
    """Integers as int32, and the last axis contiguous, as backends expect; other strides stay."""
    if x is None:
        return None
    if x.dtype != torch.int32 and not x.is_floating_point():
        x = x.to(torch.int32)
    return x if x.stride(-1) == 1 else x.contiguous()


def check_cells(op: str, **indices: tuple[Tensor | None, int]) -> None:
    """Refuse indices on the CPU that name cells which are not there; on a GPU that would wait for the device."""
    for name, (index, cells) in indices.items():
        if index is not None and index.device.type == "cpu" and index.numel():
            low, high = torch.aminmax(index)
            if low < 0 or high > cells:
                raise ValueError(
                    f"{op}: {name} must name cells 0 to {cells - 1}, or {cells} for padding, "
                    f"got {int(low)} to {int(high)}"
                )


@contextmanager
def fleeting() -> Iterator[None]:
    """Operands inside are those of a compiled graph, which may use their memory again, and what is allocated inside.

    What is derived from them (the inverse of a table) must not be remembered; in a CUDA graph it is overwritten.
    """
    before = is_fleeting()
    _thread.fleeting = True
    try:
        yield
    finally:
        _thread.fleeting = before


def is_fleeting() -> bool:
    return getattr(_thread, "fleeting", False)
