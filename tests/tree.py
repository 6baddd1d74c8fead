"""Where the sources are, for the tests that read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import gettempdir

ROOT = Path(__file__).resolve().parent.parent


def sources(*tops: str) -> list[str]:
    """Python files under these folders, once each, by installed name: scans/snake.py is 'vssm/scans/snake.py'."""
    found = []
    for top in tops:  # rglob follows no links
        below = Path("vssm", top) if top in ("scans", "kernels") else Path(top)
        found += [(below / path.relative_to(ROOT / top)).as_posix() for path in (ROOT / top).rglob("*.py")]
    return sorted(found)


def run_python(code: str, path: Path = ROOT) -> str:
    """What ``code`` prints in a fresh interpreter that starts outside the checkout and finds vssm under ``path``."""
    code = f"import sys\nsys.path.insert(0, {str(path)!r})\n{code}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=gettempdir(), check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout
