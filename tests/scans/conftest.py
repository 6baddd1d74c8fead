from __future__ import annotations

import pytest

from vssm.scans import tables


@pytest.fixture
def no_tables(monkeypatch):
    """A cache of tensors without any table in it, so that a test makes the first one."""
    monkeypatch.setattr(tables, "_tables", {})
