"""Shape checks by named axes, the same for every op."""

from __future__ import annotations

from torch import Tensor


def match(op: str, sizes: dict[str, int] | None = None, **operands: tuple[Tensor | None, str]) -> dict[str, int]:
    """Check that operands agree on the sizes of their named axes, and return the sizes.

    A pattern names the axes, ``"b k? l d"``; an axis with a question mark may be absent. Operands that are None pass.

    >>> import torch
    >>> match("scan", u=(torch.zeros(2, 5, 3), "b k? l d"), B=(torch.zeros(2, 4, 5, 7), "b k? l n"))
    {'b': 2, 'l': 5, 'd': 3, 'k': 4, 'n': 7}

    Raises:
        ValueError: Naming the op, the operand, the shape that it must have and the one that came.
    """
    sizes = dict(sizes or {})
    for name, (x, pattern) in operands.items():
        if x is None:
            continue
        shape = tuple(x.shape)
        axes = _axes(pattern, len(shape))
        if axes is None or any(sizes.get(axis, size) != size for axis, size in zip(axes, shape)):
            wanted = pattern.split() if axes is None else axes
            named = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in wanted)
            raise ValueError(f"{op}: {name} must be ({named}), got {shape}")
        sizes.update(zip(axes, shape))
    return sizes


def _axes(pattern: str, dims: int) -> list[str] | None:
    """Axis names of a tensor with ``dims`` axes; optional ones are dropped from the left until the count fits."""
    axes = pattern.split()
    while len(axes) > dims:
        optional = next((i for i, axis in enumerate(axes) if axis.endswith("?")), None)
        if optional is None:
            return None
        axes = axes[:optional] + axes[optional + 1 :]  # not del: torch.compile cannot see it everywhere
    return [axis.rstrip("?") for axis in axes] if len(axes) == dims else None
