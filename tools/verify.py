"""``python tools/verify.py FILE.json`` is ``vssm verify FILE.json``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from vssm.cli.verify import main

if __name__ == "__main__":
    raise SystemExit(main())
