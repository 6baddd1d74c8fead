"""How the CPU kernels are compiled by Numba, and the elementary functions they share.

Numba's on-disk cache of a kernel looks at the kernel's own file only: after a change here, delete ``__pycache__``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import event
from numba.extending import overload

log = logging.getLogger(__name__)

# NaN and infinity keep their meaning: neither "nnan" nor "ninf". "reassoc" lets sums run in vector lanes.
OPTIONS = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy", "no_cfunc_wrapper": True}
INNER = OPTIONS | {"no_cpython_wrapper": True}  # called by kernels alone: compiles faster


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a kernel at its first call for each type; it runs without the GIL, and is cached on disk if possible."""
    try:
        return njit(cache=True, **OPTIONS)(function)
    except RuntimeError as error:  # Numba found no directory to write to
        log.info("%s; the CPU kernels are compiled again in each process", error)
        return njit(**OPTIONS)(function)


def part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a part of kernels that is called once in many steps."""
    return njit(**INNER)(function)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a part of kernels into its callers. A call costs as much as a step: nine words an array, on the stack."""
    return njit(forceinline=True, **INNER)(function)


class _Announcer(event.Listener):
    """Say that kernels are compiled, which takes seconds, when the first of ours is (and not when it is cached)."""

    def on_start(self, event: event.Event) -> None:
        if event.data["dispatcher"].py_func.__module__.startswith("vssm."):
            _announce()

    def on_end(self, event: event.Event) -> None:
        pass


@cache
def _announce() -> None:
    log.warning("compiling the CPU kernels, which takes some seconds (once, if Numba's cache can be written)")


event.register("numba:compile", _Announcer())


# Elementary functions: as they stand in float64; in float32 compiled code they are the polynomials below.


def exp(x):
    """exp(x); in float32 to 3e-7, and 1e-38 for what is less."""
    return math.exp(x)


def softplus(x, w):
    """log(1 + exp(x)), given w = exp(-|x|); x itself above 20, as in torch."""
    return x if x > 20 else max(x, 0.0) + math.log1p(w)


def softplus_slope(x, w):
    """The derivative of softplus, given w = exp(-|x|)."""
    return 1.0 if x > 20 else (1.0 if x > 0 else w) / (1.0 + w)


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + exp(-x))


def silu_slope(x):
    """The derivative of x sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


# exp(x) = 2**m exp(f), m the nearest integer to x / log(2): adding SHIFT leaves it in the low bits. exp(f), |f| < 0.35,
# is 1 + f + f² P(f), P a minimax polynomial: slow decays, near x = 0, are right to the last bit.
LOW, HIGH, SHIFT = (np.float32(x) for x in (-87.33654, 88.72284, 12582912.0))
LOG2E, LOG2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
P = tuple(np.float32(x) for x in (0.0013814613, 0.00836871, 0.04166839, 0.16666521, 0.49999994))
# log1p(w) = s Q(s²) with s = w / (2 + w), on [0, 1]
Q = tuple(np.float32(2 * x) for x in (0.14089167, 0.139803, 0.20012455, 0.33333158, 1.0))
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
# Without reassociation, by which (x + SHIFT) - SHIFT would be x.
EXACT = {"fastmath": {"contract"}, "error_model": "numpy", "forceinline": True}


def _exp_single(x):
    x = LOW if x < LOW else x  # in this form a NaN stays
    x = HIGH if x > HIGH else x
    shifted = x * LOG2E + SHIFT
    f = x - (shifted - SHIFT) * LOG2
    power = np.int32((np.float32(shifted).view(np.int32) + 127) << 23).view(np.float32)
    return power * (((((((P[0] * f + P[1]) * f + P[2]) * f + P[3]) * f + P[4]) * f) * f + f) + ONE)


def _softplus_single(x, w):
    s = w / (TWO + w)
    v = s * s
    return (x if x > 0 else ZERO) + s * ((((Q[0] * v + Q[1]) * v + Q[2]) * v + Q[3]) * v + Q[4])


def _softplus_slope_single(x, w):
    return (ONE if x > 0 else w) / (ONE + w)


def _sigmoid_single(x):
    return ONE / (ONE + exp(-x))


def _silu_slope_single(x):
    s = sigmoid(x)
    return s * (ONE + x * (ONE - s))


@overload(exp, jit_options=EXACT)
def _(x):
    return _exp_single if x == types.float32 else exp


@overload(softplus, jit_options=EXACT)
def _(x, w):
    return _softplus_single if x == types.float32 else softplus


@overload(softplus_slope, jit_options=EXACT)
def _(x, w):
    return _softplus_slope_single if x == types.float32 else softplus_slope


@overload(sigmoid, jit_options=EXACT)
def _(x):
    return _sigmoid_single if x == types.float32 else sigmoid


@overload(silu_slope, jit_options=EXACT)
def _(x):
    return _silu_slope_single if x == types.float32 else silu_slope
