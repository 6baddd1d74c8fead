"""Fixtures of the whole suite: a seed, threads, where a kernel backend runs, a zoo of toys, scan orders."""

from __future__ import annotations

import random
from collections.abc import Iterator

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Processes that are killed and those that resume must cut their sums alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toys() -> Iterator[None]:
    """Inside the test the zoo, also in timm, holds the toys alone: three sizes of one small family."""
    import timm
    from toy import VARIANTS, zoo_of_toys

    from vssm.registries.timm import register

    with zoo_of_toys():
        if not timm.is_model("toy_tiny"):
            register(VARIANTS)
        yield


@pytest.fixture
def unregister() -> Iterator[None]:
    """Scan orders that a test registers are forgotten after it."""
    from vssm.scans import registry

    before = dict(registry._SCANS)
    yield
    registry._SCANS.clear()
    registry._SCANS.update(before)
