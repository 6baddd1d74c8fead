from __future__ import annotations

import pytest

from vssm.scans import registry, tables


@pytest.fixture
def unregister():
    """Orders registered in a test are forgotten after it."""
    before = dict(registry._SCANS)
    yield
    registry._SCANS.clear()
    registry._SCANS.update(before)


@pytest.fixture
def no_tables(monkeypatch):
    """A cache of tensors without any table in it, so that a test makes the first one."""
    monkeypatch.setattr(tables, "_tables", {})
