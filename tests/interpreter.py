"""GPU kernels without a GPU: Triton's interpreter, in a process of its own, since Triton decides at its import."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest
from tree import run_python


def release(package: str) -> tuple[int, ...]:
    """(3, 7) of 3.7.1; none if it is not installed."""
    try:
        return tuple(int(number) for number in version(package).split(".")[:2])
    except PackageNotFoundError:
        return ()


# Triton 3.6 interprets a loop bound as int(array of one element), which NumPy refuses from 2.4 on
works = release("triton") >= (3, 7) or (release("triton") > () and release("numpy") < (2, 4))
needs_interpreter = pytest.mark.skipif(not works, reason="no Triton, or one whose interpreter fails beside this NumPy")


def interpret(code: str) -> str:
    """What ``code`` prints."""
    return run_python(f"import os\nos.environ |= dict(TRITON_INTERPRET='1', OMP_NUM_THREADS='1')\n{code}")
