"""The zoo of toys, also in timm: three sizes of one small family."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
from toy import VARIANTS, zoo_of_toys

from vssm.registries.timm import register


@pytest.fixture
def toys() -> Iterator[None]:
    """Inside the test the zoo holds the toys alone."""
    with zoo_of_toys():
        if not timm.is_model("toy_tiny"):
            register(VARIANTS)
        yield
