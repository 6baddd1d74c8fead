"""Parts of a model that an argument names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from timm.layers import get_act_layer
from torch import nn


def check_choice(who: str, argument: str, value: Any, choices: Collection[Any]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: Naming who asks, the argument, its choices and what came.
    """
    if value not in choices:
        raise ValueError(f"{who}: {argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def chosen(who: str, argument: str, value: str, parts: Mapping[str, Any]) -> Any:
    """The part that an argument names; see ``check_choice``."""
    check_choice(who, argument, value, parts)
    return parts[value]


def activation(who: str, argument: str, name: str) -> type[nn.Module]:
    """timm's activation of that name.

    Raises:
        ValueError: If it has none; naming who asks and the argument.
    """
    try:
        return get_act_layer(name)
    except KeyError:
        raise ValueError(f"{who}: {argument} must name an activation of timm, such as 'silu', got {name!r}") from None
