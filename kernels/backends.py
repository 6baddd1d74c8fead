"""Which implementations of an op can run here, and which one a call gets.

An op is a folder, a backend is a module in it: ``reference`` (the definition), ``torch`` (plain tensor operations, any
device), ``cpu`` (compiled by Numba) and ``triton`` (CUDA, ROCm, XPU). The device decides; ``backend=``,
:func:`use_backend` and the environment variable ``VSSM_BACKEND``, in this order, overrule it (set the variable before
the first call: ops may read it once for operands of a kind).
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

BACKENDS = ("reference", "torch", "cpu", "triton")
PREFERRED = {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch"), "xpu": ("triton", "torch")}  # others: torch
HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

_modes = torch._C._len_torch_dispatch_stack
forced: ContextVar[str | None] = ContextVar("vssm_backend", default=None)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the block on backend ``name``; None gives the choice back to the device.

    Raises:
        ValueError: If there is no backend of that name. An op that it cannot run raises when it is called.
    """
    token = forced.set(_known("use_backend", name) if name is not None else None)
    try:
        yield
    finally:
        forced.reset(token)


def forced_backend() -> str | None:
    """The backend that :func:`use_backend` or ``VSSM_BACKEND`` asks for, or None."""
    return forced.get() or _known("VSSM_BACKEND", os.environ.get("VSSM_BACKEND") or None)


def available_backends(op: str) -> list[str]:
    """Backends of ``op`` that can run on some device of this machine, for some dtype."""
    devices = [torch.device("cpu"), *(torch.device(kind) for kind in ("cuda", "xpu") if _has(kind))]
    return [name for name in BACKENDS if any(why_not(op, name, device) is None for device in devices)]


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``device`` in ``dtype``, with what mends it; None if it can."""
    if not _exists(f"vssm.kernels.{op}.{backend}"):
        return f"{op} has no such backend"
    if backend == "cpu":
        if device.type != "cpu":
            return f"it runs on the CPU, the inputs are on {device.type}; drop backend= or move the inputs"
        if not _exists("numba"):
            return "Numba is not installed; pip install 'vssm[cpu]'"
    if backend == "triton":
        if device.type not in ("cuda", "xpu"):
            return f"it needs a GPU, the inputs are on {device.type}; drop backend= or move the inputs"
        if not _exists("triton"):
            return "Triton is not installed; it comes with PyTorch's GPU wheels for Linux: pip install triton"
        if dtype not in HALF_OR_SINGLE:
            return f"it computes in float32, the inputs are {str(dtype).removeprefix('torch.')}; use backend='torch'"
    return None


def choose(op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> str:
    """The backend for a call of ``op``: the one asked for, or the fastest that can run.

    Raises:
        ValueError: If a backend was asked for, here or by :func:`use_backend` or ``VSSM_BACKEND``, and cannot run.
    """
    asked = _known(op, backend) or forced_backend()
    if asked is not None:
        reason = why_not(op, asked, device, dtype)
        if reason is not None:
            raise ValueError(f"{op}: backend {asked!r} cannot run: {reason}")
        return asked
    return _fastest(op, device, dtype)


@cache
def _fastest(op: str, device: torch.device, dtype: torch.dtype) -> str:
    preferred = PREFERRED.get(device.type, ("torch",))
    reasons = {name: why_not(op, name, device, dtype) for name in preferred}
    usable = next((name for name in preferred if reasons[name] is None), None)
    if usable is None:
        raise ValueError(f"{op}: no backend can run on {device.type} in {dtype}: {reasons}")
    if usable != preferred[0]:
        _announce(op, preferred[0], usable, str(reasons[preferred[0]]))
    return usable


def traced(x: torch.Tensor) -> bool:
    """Whether a call goes through the custom op: a compiler, a tracer, a dispatch mode or the meta device sees it."""
    return watched() or x.is_meta


def watched() -> bool:
    """Whether a compiler, a tracer or a dispatch mode sees what is called."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or _modes() > 0


def launches(op: str, x: torch.Tensor) -> bool:
    """Whether a layer may call the Triton backend of ``op`` itself: ``x`` is on a GPU, and nobody asks for another one.

    Not where compilers, tracers or functorch look on: they see operations.
    """
    if x.device.type not in ("cuda", "xpu") or traced(x) or torch._C._are_functorch_transforms_active():
        return False
    return forced_backend() in (None, "triton") and why_not(op, "triton", x.device, x.dtype) is None


@cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module that holds ``backend`` of ``op``, imported at first use."""
    return importlib.import_module(f"vssm.kernels.{op}.{backend}")


@cache
def _announce(op: str, missing: str, used: str, reason: str) -> None:
    """Say once that a call runs slower than it need."""
    warnings.warn(f"{op}: using the slower backend {used!r}, because {missing!r} cannot run: {reason}", stacklevel=4)


@cache
def _exists(module: str) -> bool:
    return find_spec(module) is not None


@cache
def _has(kind: str) -> bool:
    return getattr(torch, kind).is_available()


def _known(who: str, name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{who}: no backend named {name!r}; there are {', '.join(BACKENDS)}")
    return name
