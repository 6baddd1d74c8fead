"""What the tests of ops share: random operands, values with their gradients, and how both are compared.

Operands lie away from zero and from infinity: no product dwarfs the deviation of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tolerance import error
from torch import Tensor

Op = Callable[..., tuple[Tensor, Tensor]]


def signed(*shape: int) -> Tensor:
    """Float64 numbers of magnitude 0.5 to 1."""
    return uniform(*shape, low=0.5, high=1.0) * (torch.randint(0, 2, shape) * 2 - 1)


def uniform(*shape: int, low: float, high: float) -> Tensor:
    """Float64 numbers."""
    return torch.rand(*shape, dtype=torch.float64) * (high - low) + low


def scan_inputs(b: int, k: int, l: int, d: int, n: int, *, shared: str = "", entries: int | None = None,
                cells: int | None = None) -> dict[str, Tensor]:  # fmt: skip
    """All operands of a selective scan in float64; ``shared`` names those without a row axis, separated by spaces."""

    def rows(name: str) -> tuple[int, ...]:
        return () if name in shared.split() else (k,)

    r, m = entries or l, cells or l
    return {
        "u": signed(b, *rows("u"), l, d),
        "delta": uniform(b, *rows("delta"), r, d, low=-3, high=0.5),
        "A": uniform(*rows("A"), d, n, low=-4, high=-0.1),
        "B": signed(b, *rows("B"), r, n),
        "C": signed(b, *rows("C"), r, n),
        "D": signed(*rows("D"), d),
        "z": signed(b, m, d),
        "delta_bias": uniform(*rows("delta_bias"), d, low=-0.5, high=0.5),
        "initial_state": signed(b, k, d, n),
    }


def conv_inputs(b: int, k: int, l: int, d: int, w: int, *, shared: str = "") -> dict[str, Tensor]:
    """All operands of a causal convolution in float64; ``shared`` names those without a row axis."""

    def rows(name: str) -> tuple[int, ...]:
        return () if name in shared.split() else (k,)

    return {
        "x": signed(b, *rows("x"), l, d),
        "weight": signed(*rows("weight"), d, w),
        "bias": signed(*rows("bias"), d),
        "initial_state": signed(b, k, d, w - 1),
    }


def rounded(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Operands in ``dtype``; those that ops keep in the compute dtype (parameters, states) at least in float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    keep = ("A", "D", "delta_bias", "weight", "bias")
    return {name: x.to(wide if name in keep else dtype) for name, x in inputs.items()}


def value_and_grads(op: Op, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """y, the last state, and the gradient of a fixed weighted sum of both with respect to every operand."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = op(**inputs, **options)
    weights = [_weights(x) for x in outputs]
    grads = torch.autograd.grad(outputs, tuple(inputs.values()), weights, materialize_grads=True)
    for (name, x), grad in zip(inputs.items(), grads):
        assert (grad.dtype, grad.shape) == (x.dtype, x.shape), name
    y, last_state = (x.detach() for x in outputs)
    return {"y": y, "last_state": last_state, **{f"grad of {name}": grad for name, grad in zip(inputs, grads)}}


def defined(op: Op, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """What the definition of ``op`` makes of the operands in float64."""
    wide = {name: x.double() for name, x in inputs.items()}
    return value_and_grads(partial(op, backend="reference"), wide, **options)


def on(op: Op, backend: str, device: torch.device, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """What a backend of ``op`` makes of the operands on a device."""
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    inputs = {name: x.to(device) for name, x in inputs.items()}
    return value_and_grads(partial(op, backend=backend), inputs, **options)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each value within ``tolerance`` of its deviation.

    Results are rounded to their dtype: half a unit in the last place of a value of many deviations is no error.
    """
    for name, value in expected.items():
        rounding = error(value.to(actual[name].dtype), value)
        found = error(actual[name], value)
        assert found < tolerance + rounding, f"{name}: {found:.1e}"


def _weights(x: Tensor) -> Tensor:
    """Numbers in [-1, 1] without a pattern, exact in half precision."""
    steps = torch.arange(x.numel(), device=x.device)
    return (((steps * 7919 + 13) % 257 - 128) / 128).reshape(x.shape).to(x.dtype)
