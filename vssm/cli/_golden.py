"""Golden files: outputs of published code for weights and inputs that a formula gives, so that none is shipped.

A file lists the entries of a published state dict, the inputs of each case, and a summary of each output: moments, and
values at some flat indices. Every number comes from a NumPy stream that the entry's name alone seeds.
"""

from __future__ import annotations

import ast
import hashlib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Rules that some files put in the place of the formula; n: standard normal numbers, f: product of shape[1:].
OVERRIDES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "0.1*n": lambda n, f: 0.1 * n,
    "1+0.1*n": lambda n, f: 1 + 0.1 * n,
    "0.25*n/np.sqrt(f)": lambda n, f: 0.25 * n / math.sqrt(f),
    "n/np.sqrt(n.shape[-2])": lambda n, f: n / math.sqrt(n.shape[-2]),
}
ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}  # fmt: skip
FUNCTIONS = ("abs", "exp", "expm1", "log", "log1p", "sign", "sqrt", "square", "tanh")


def weight(key: str, shape: Sequence[int], overrides: Sequence[tuple[str, str]] = ()) -> np.ndarray:
    """The formula's float64 value of the published entry ``key``; the last matching override wins."""
    shape = tuple(shape)
    fan_in = math.prod(shape[1:]) or 1
    normal = _stream(f"weight:{key}").standard_normal(shape) if shape else np.array(0.0)
    for pattern, rule in reversed(overrides):
        if re.search(pattern, key):
            return OVERRIDES[rule](normal, fan_in)
    leaf = key.rpartition(".")[2]
    lower = leaf.lower()
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(normal)
    if leaf == "running_mean":
        return 0.1 * normal
    if lower.startswith("a_") and "log" in lower:
        return (np.log(np.arange(1.0, shape[-1] + 1)) if len(shape) > 1 else 0.0) + 0.1 * normal
    if lower in ("d", "ds", "d_b", "skip_scale", "gamma", "gamma_1", "gamma_2"):
        return 1 + 0.1 * normal
    if "dt_" in key and lower.endswith("bias"):
        return -3 + 0.5 * normal
    if len(shape) < 2:
        return float(lower == "weight") + 0.1 * normal
    return normal / math.sqrt(fan_in)


def inputs(spec: Mapping[str, Any], case: int) -> dict[str, np.ndarray]:
    """The formula's float64 inputs of case number ``case``."""
    made = {}
    for name, entry in spec.items():
        stream, shape = _stream(f"input:{case}:{name}"), tuple(entry["shape"])
        made[name] = (
            stream.random_sample(shape) if entry.get("kind") == "uniform" else stream.standard_normal(shape)
        )
        if "transform" in entry:
            made[name] = np.asarray(_transformed(ast.parse(entry["transform"], mode="eval").body, made[name]))
    return made


def _transformed(formula: ast.expr, x: np.ndarray) -> Any:
    """What operator files do to their numbers: arithmetic in ``x`` with functions of ``np``."""
    match formula:
        case ast.Name(id="x"):
            return x
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left=a, op=operation, right=b) if type(operation) in ARITHMETIC:
            return ARITHMETIC[type(operation)](_transformed(a, x), _transformed(b, x))
        case ast.UnaryOp(op=ast.USub(), operand=a):
            return -_transformed(a, x)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="np"), attr=name), args=[a], keywords=[]) if (
            name in FUNCTIONS
        ):
            return getattr(np, name)(_transformed(a, x))
    known = ", ".join(f"np.{name}" for name in FUNCTIONS)
    raise ValueError(f"a transform must be arithmetic in x, with {known}; got {ast.unparse(formula)}")


def mismatch(array: np.ndarray, summary: Mapping[str, Any]) -> float:
    """Largest error against an output's summary, in standard deviations of that output; inf if shapes differ.

    The values are recorded to nine digits; what their rounding explains is not counted.
    """
    array = np.asarray(array, dtype=np.float64)
    if list(array.shape) != list(summary["shape"]) or not np.isfinite(array).all():
        return math.inf
    values = np.asarray(summary["value"])
    sampled = np.abs(array.ravel()[summary["index"]] - values) - 5e-9 * np.abs(values)
    moments = abs(array.mean() - summary["mean"]), abs(array.std() - summary["std"])
    return float(max(0.0, sampled.max(), *moments) / max(summary["std"], 1e-12))


def relative_error(array: np.ndarray, expected: Any) -> float:
    """Largest error against a full array, relative to its largest entry; inf if shapes differ."""
    array, expected = np.asarray(array, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if array.shape != expected.shape or not np.isfinite(array).all():
        return math.inf
    return float(np.abs(array - expected).max(initial=0.0) / (np.abs(expected).max(initial=0.0) or 1.0))


def _stream(name: str) -> np.random.RandomState:
    """NumPy's legacy stream, which never changes, seeded by a name."""
    return np.random.RandomState(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
