"""Repeating what a call launched, without deciding it again.

Between the arguments of an op and its launches stand a few hundred lines of Python: sizes, strides, plans. They depend
on the kinds of the tensors alone (shapes, strides, dtypes, alignment), so the first call with tensors of a kind notes
which buffers it made and which kernels it ran on what; later calls make such buffers, those that are not results in one
piece, and run these kernels on their own tensors. A call that does more than that is simply made each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vssm.kernels import triton_direct

MOST = 1024  # remembered recipes

UNKNOWN: Any = object()
_recipes: dict[tuple[Any, ...], Recipe | None] = {}
_thread = threading.local()


class Launch(NamedTuple):
    """A kernel, and its arguments, with the places that tensors take: (place, number of the tensor)."""

    compiled: Any
    programs: int
    args: list[Any]
    tensors: list[tuple[int, int]]


Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # size, stride and dtype of a tensor to make


class Recipe(NamedTuple):
    """Results to make, and which of them are zero; a scratch, if any, and where buffers lie in it; launches.

    Tensors are numbered: first those given, then the results that there are, then the buffers in the scratch.
    """

    device: torch.device
    make: Callable[..., Tensor]  # of a layout
    results: list[Layout | None]
    zeroed: list[int]
    scratch: Layout | None
    offsets: list[int]
    direct: triton_direct.Launches | None
    launches: list[Launch]


class Notes:
    """What the call that is being noted has made and launched."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, bool]] = []
        self.launches: list[tuple[Any, int, Sequence[Any]]] = []
        self.whole = True  # nothing was launched that cannot be repeated


def empty(size: Sequence[int], dtype: torch.dtype, device: torch.device, *, zero: bool = False) -> Tensor:
    """A buffer, which a note is taken of."""
    made = (torch.zeros if zero else torch.empty)(size, dtype=dtype, device=device)
    notes = getattr(_thread, "notes", None)
    if notes is not None:
        notes.buffers.append((made, zero))
    return made


def note(compiled: Any, programs: int, args: Sequence[Any]) -> None:
    """Take a note of a launch; None for a kernel that cannot be repeated."""
    notes = getattr(_thread, "notes", None)
    if notes is not None:
        notes.whole &= compiled is not None
        notes.launches.append((compiled, programs, args))


def replayed(
    call: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    options: tuple[Any, ...],
    kind: Hashable = None,
    shortcut: Callable[[Recipe, tuple[int, ...] | None], None] | None = None,
) -> Sequence[Tensor | None]:
    """The results of ``call()``, which takes ``tensors`` and makes buffers by :func:`empty`; by its recipe if known.

    ``options`` are hashable and decide, with the kinds of the tensors, what ``call`` does. ``kind`` stands for these
    kinds where the caller knows them. The device of the tensors is the current one. ``shortcut`` is given the recipe
    that was followed, and the alignment of the tensors, if these are all different.
    """
    present = [x for x in tensors if x is not None]
    addresses = [x.data_ptr() for x in present]
    if kind is None:
        kind = tuple([None if x is None else (x.dtype, x.shape, x.stride(), x.device) for x in tensors])
    # How tensors are aligned, and which are one and the same, decide too.
    aligned = alignment(addresses)
    places = None if len({*addresses}) == len(addresses) else tuple([addresses.index(x) for x in addresses])
    key = (kind, options, aligned, places)
    recipe = _recipes.get(key, UNKNOWN)
    if recipe is None:
        return call()
    if recipe is not UNKNOWN:
        if shortcut is not None and places is None and recipe.direct is not None:
            shortcut(recipe, aligned)
        return follow(recipe, addresses)
    notes = _thread.notes = Notes()
    try:
        results = call()
    finally:
        _thread.notes = None
    if len(_recipes) >= MOST:
        _recipes.clear()
    _recipes[key] = _recipe(notes, present, results)
    return results


def alignment(addresses: Sequence[int]) -> tuple[int, ...] | None:
    """What remains of addresses after multiples of 16; None if nothing does."""
    return None if reduce(or_, addresses) & 15 == 0 else tuple([x & 15 for x in addresses])


def _recipe(notes: Notes, present: Sequence[Tensor], results: Sequence[Tensor | None]) -> Recipe | None:
    """The recipe of a call; None if it cannot be repeated, as it used tensors that were neither given nor noted."""
    zeroed = {id(x): zero for x, zero in notes.buffers}
    returned = [x for x in results if x is not None]
    others = [x for x, _ in notes.buffers if not any(x is y for y in returned)]
    numbers = {id(x): i for i, x in reversed(list(enumerate([*present, *returned, *others])))}
    used = [x for _, _, args in notes.launches for x in args if isinstance(x, Tensor)]
    if not notes.whole or any(id(x) not in zeroed for x in returned) or any(id(x) not in numbers for x in used):
        return None
    if any(zeroed[id(x)] for x in others):
        return None
    offsets, scratch = [], 0
    for x in others:
        offsets.append(scratch)
        scratch += -(-x.numel() * x.element_size() // 256) * 256  # aligned
    launches, kernels = [], []
    for compiled, programs, args in notes.launches:
        places = [(i, numbers[id(x)]) for i, x in enumerate(args) if isinstance(x, Tensor)]
        launches.append(Launch(compiled, programs, [None if isinstance(x, Tensor) else x for x in args], places))
        kernels.append((compiled, programs, triton_direct.arguments(compiled, args, lambda x: numbers[id(x)])))
    device, direct = present[0].device, None
    if device.type == "cuda" and all(arguments is not None for _, _, arguments in kernels):
        count = len(present) + len(returned) + len(others)
        direct = triton_direct.Launches(device.index, count, kernels)
    return Recipe(
        device,
        _maker(device),
        [None if x is None else (tuple(x.shape), x.stride(), x.dtype) for x in results],
        [i for i, x in enumerate(results) if x is not None and zeroed[id(x)]],
        ((scratch,), (1,), torch.uint8) if scratch else None,
        offsets,
        direct,
        launches,
    )


def follow(recipe: Recipe, addresses: list[int]) -> list[Tensor | None]:
    """Make the results and run the kernels, on tensors at ``addresses``."""
    _, make, layouts, zeroed, layout, offsets, direct, launches = recipe
    results = [None if x is None else make(*x) for x in layouts]
    for i in zeroed:
        results[i].zero_()
    addresses += [x.data_ptr() for x in results if x is not None]
    if layout is not None:
        scratch = make(*layout)
        base = scratch.data_ptr()
        addresses += [base + offset for offset in offsets]
    if direct is not None:
        direct.run(addresses)
        return results
    for compiled, programs, args, tensors in launches:
        args = args.copy()
        for place, number in tensors:
            args[place] = addresses[number]
        compiled[programs, 1, 1](*args)
    return results


def _maker(device: torch.device) -> Callable[..., Tensor]:
    # What compiled graphs allocate with on the current device: a third of the time that torch.empty takes.
    quick: Callable[..., Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if device.type == "cuda" and quick is not None:
        return quick
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)
