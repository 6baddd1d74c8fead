"""``python tools/convert.py`` is ``vssm convert``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from vssm.cli.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
