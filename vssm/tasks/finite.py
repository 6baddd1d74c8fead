"""Stop at the first non-finite loss, and say where it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteLoss(RuntimeError):
    """The loss of a training step is NaN or infinite; the message names the module and the saved batch."""


def first_nonfinite_module(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Run ``forward`` and name the first module of ``model`` that got finite inputs and returned something non-finite.

    A module's children finish before it, so the innermost culprit is found first; a module that only passes on a
    non-finite input is not one.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> _ = nn.init.constant_(net[2].weight, torch.inf)
    >>> first_nonfinite_module(net, lambda: net(torch.ones(1, 2)))
    '2 (Linear; its parameter weight is not finite)'
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []

    def check(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not found and not all_finite(output) and all_finite((args, kwargs)):
            found.append(_describe(names[module], module))

    hooks = [module.register_forward_hook(check, with_kwargs=True) for module in names]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def all_finite(value: Any) -> bool:
    """Whether every floating-point tensor in a nest of tuples, lists and dicts is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _describe(name: str, module: nn.Module) -> str:
    broken = [key for key, parameter in module.named_parameters(recurse=False) if not all_finite(parameter)]
    state = f"; its parameter {broken[0]} is not finite" if broken else ""
    return f"{name or 'the model itself'} ({type(module).__name__}{state})"
