"""Find ``vssm.scans`` and ``vssm.kernels`` in a checkout whose links git did not make (Windows by default).

In a wheel, and wherever the links ``vssm/scans`` and ``vssm/kernels`` work, this does nothing.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_OUTSIDE = {f"vssm.{name}": _PACKAGE.parent / name for name in ("scans", "kernels")}


class _CheckoutFinder:
    """Meta path finder for the two packages that lie beside ``vssm`` in a checkout."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        folder = _OUTSIDE.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def ensure_checkout_packages() -> None:
    """Install the finder if this is a checkout without links; ``vssm/__init__.py`` calls this first."""
    linked = all((_PACKAGE / name).is_dir() for name in ("scans", "kernels"))
    checkout = (_PACKAGE.parent / "pyproject.toml").is_file()
    if checkout and not linked and _CheckoutFinder not in sys.meta_path:
        sys.meta_path.insert(0, _CheckoutFinder)  # before the finder of an editable install of another checkout
