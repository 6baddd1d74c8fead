"""Kernel tests see uninitialised memory as NaN, so that what nobody wrote shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # which also fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)
