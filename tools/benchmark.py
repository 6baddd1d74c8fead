"""``python tools/benchmark.py kernels`` is ``vssm benchmark kernels``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from vssm.cli.benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
