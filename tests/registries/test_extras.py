"""What is said where an extra of the package is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tree import ROOT

WITHOUT = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Missing())
import {imported}
"""


@pytest.mark.parametrize(("module", "imported", "said"), [
    ("lightning", "vssm.data", "vssm.data: lightning is not installed; run: pip install 'vssm[train]'"),
    ("torchmetrics", "vssm.tasks", "vssm.tasks: torchmetrics is not installed; run: pip install 'vssm[train]'"),
    ("monai", "vssm.registries.monai", "monai is not installed; run: pip install 'vssm[medical]'"),
])  # fmt: skip
def test_an_import_without_its_extra_says_which(module, imported, said):
    """In a process of its own: the modules are imported here already."""
    code = WITHOUT.format(module=module, imported=imported)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert said in run.stderr.splitlines()[-1]
