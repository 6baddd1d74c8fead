"""Parts of a model that an argument names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


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
