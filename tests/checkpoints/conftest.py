"""These tests see a zoo of toys: three sizes of one small family."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from toy import zoo_of_toys


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with zoo_of_toys():
        yield
