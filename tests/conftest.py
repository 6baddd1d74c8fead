"""Fixtures of the whole suite: a seed, and the device that a kernel backend runs on."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's ``backend`` runs: the GPU for triton, else the CPU."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    return torch.device("cuda" if backend == "triton" else "cpu")
