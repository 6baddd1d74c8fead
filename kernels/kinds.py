"""What calls of an op have in common: checks, conversions and the backend, decided once for each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vssm.kernels.backends import choose, forced
from vssm.kernels.operands import Facts

MOST = 4096  # remembered kinds
FEW = 4  # guards to ask before the key of a kind is made

Operands = Sequence[Any]  # the tensors of a problem, or None, in its order
_kinds: dict[tuple[Any, ...], Kind] = {}
_guarded: dict[tuple[Any, ...], tuple[Guarded, ...]] = {}
_guards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)  # compiled graphs are chosen by them


class Rules(NamedTuple):
    """What an op does with its operands. Those from ``first`` to ``last`` are tables too, by default ``table``."""

    op: str
    table: int
    first: int
    last: int
    check: Callable[[Operands, tuple[bool, ...]], Any]  # of Facts, and which tables are the default
    dtypes: Callable[[Operands], list[torch.dtype | None]]  # in which backends take them
    problem: Callable[..., Any]  # of operands and options


class Kind:
    """Calls whose operands agree in shapes, strides, dtypes and devices, whose options agree, and all or none recorded.

    A model calls with few kinds, again and again: what depends on the kind alone is found once.

    Args:
        rules: Those of the op.
        operands: Those of the first call of the kind.
        same: For each further table whether it is the first one.
        options: The rest of the problem.
        backend: The one asked for by name, or None.
        save: Whether a backward pass may follow.

    Raises:
        ValueError: If operands do not fit one another, or the backend cannot run.
    """

    def __init__(
        self,
        rules: Rules,
        operands: Operands,
        same: tuple[bool, ...],
        options: tuple[Any, ...],
        backend: str | None,
        save: bool,
    ) -> None:
        first = operands[0]
        facts = [None if x is None else Facts(x.shape, x.dtype, x.device) for x in operands]
        self.rules, self.same, self.options = rules, same, options
        self.checked = rules.check(facts, same)
        self.dtypes = rules.dtypes(operands)
        self.backend = chosen(rules.op, first.device, self.dtypes[0] or first.dtype, backend)
        self.save = save
        self.one_table = all(same)
        self.no_tables = (None,) * len(same)
        self.shortcuts: dict[Any, Any] = {}  # of the Triton backend, to launches
        with torch.no_grad():
            cleaned = self.cleaned(operands)
        self.as_given = all(x is y for x, y in zip(operands, cleaned))
        self.saved_layouts = layouts(self.saved(cleaned))

    def cleaned(self, operands: Operands) -> Operands:
        """The operands as backends take them: dtypes, and the last axis contiguous."""
        made = [clean(x, dtype) for x, dtype in zip(operands, self.dtypes)]
        for i, same in enumerate(self.same, self.rules.first):
            if same:
                made[i] = made[self.rules.table]
        return made

    def saved(self, operands: Operands) -> Operands:
        """The operands as they are saved for the backward: if there is one table, once."""
        if not self.one_table:
            return operands
        return (*operands[: self.rules.first], *self.no_tables, *operands[self.rules.last :])

    def problem(self, saved: Operands) -> Any:
        """The problem of saved operands."""
        if self.one_table:
            tables = [saved[self.rules.table] for _ in self.same]
            saved = (*saved[: self.rules.first], *tables, *saved[self.rules.last :])
        return self.rules.problem(*saved, *self.options)


class Guarded(NamedTuple):
    """A kind, by what torch compares of tensors in C++, in a quarter of the time that the key takes.

    That is all that the key holds of them, and more: Python's type, ``requires_grad``, and how they are dispatched,
    which autocast changes, if not its dtype. No two operands may be the same object. No tensor is kept.
    """

    guards: Any
    autocast: tuple[str, torch.dtype] | None  # the device's type and the dtype, if it was on
    kind: Kind

    def holds(self, given: Sequence[Tensor]) -> bool:
        if not self.guards.check(*given):
            return False
        return self.autocast is None or torch.get_autocast_dtype(self.autocast[0]) == self.autocast[1]


def guards_of(given: Sequence[Tensor]) -> Any:
    """What tells tensors like these; None if it cannot be had."""
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in given)  # types are compared by address, not kept
    if _guards is None or not plain or len({id(x) for x in given}) < len(given):
        return None
    return _guards(
        *given,
        dynamic_dims_sizes=[list(x.shape) for x in given],  # not dynamic, that is: these sizes
        dynamic_dims_strides=[list(x.stride()) for x in given],
    )


def kind_of(
    rules: Rules,
    operands: Operands,
    same: tuple[bool, ...],
    options: tuple[Any, ...],
    backend: str | None,
    save: bool | None = None,
) -> Kind:
    """The kind of a call, whose operands are checked if it is new; ``save`` is found out if it is None."""
    tables = [x for x, one in zip(operands[rules.first : rules.last], same) if not one] if False in same else ()
    distinct = (*operands[: rules.first], *tables, *operands[rules.last :])
    given = [x for x in distinct if x is not None]
    grad = torch.is_grad_enabled()
    call = (rules.op, same, options, backend, forced.get(), save, grad, given[0].shape, *map(type, distinct))
    known = _guarded.get(call, ())
    for guarded in known:
        if guarded.holds(given):
            return guarded.kind
    device = given[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if save is None:
        save = grad and any(x.requires_grad for x in given)
    key = (
        rules.op,
        same,
        options,
        backend,
        forced.get(),
        autocast,
        save,
        *[None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in distinct],
    )
    found = _kinds.get(key)
    if found is None:
        found = Kind(rules, operands, same, options, backend, save)
        if len(_kinds) >= MOST:
            _kinds.clear()
            _guarded.clear()
        _kinds[key] = found
    elif len(known) < FEW and (guards := guards_of(given)) is not None:  # it was met before
        _guarded[call] = (*known, Guarded(guards, None if autocast is None else (device, autocast), found))
    return found


def decided(
    rules: Rules, operands: Operands, same: tuple[bool, ...], options: tuple[Any, ...], backend: str | None
) -> tuple[Any, list[Any], str]:
    """What the check returns, the values of the problem, and the backend, for a call that compilers or tracers see.

    Sizes may be symbols there, which do not hash: such calls have no kind.
    """
    checked, dtypes = rules.check(operands, same), rules.dtypes(operands)
    first = operands[0]
    name = chosen(rules.op, first.device, dtypes[0] or first.dtype, backend)
    return checked, [*(clean(x, dtype) for x, dtype in zip(operands, dtypes)), *options], name


def layouts(tensors: Operands) -> list[tuple[Any, ...] | None]:
    """Dtypes and strides."""
    return [None if x is None else (x.dtype, x.stride()) for x in tensors]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for, if it is on; float64 is left alone."""
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def clean(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """``x`` in ``dtype``, its last axis contiguous."""
    if x is None or dtype is None:
        return x
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.compiler.assume_constant_result
def chosen(op: str, device: torch.device, dtype: torch.dtype, backend: str | None) -> str:
    return choose(op, device, dtype, backend)


def recording(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, without what it does for functorch where no transform of it is active."""
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def record(*args: Any) -> Any:
        return function.apply(*args) if torch._C._are_functorch_transforms_active() else apply(*args)

    return record


def once(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable``, without what it costs where no graph of the backward pass is recorded."""
    refusing = once_differentiable(gradients)

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return (refusing if torch.is_grad_enabled() else gradients)(ctx, *grads)

    return backward
