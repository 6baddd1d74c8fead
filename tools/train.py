"""``python tools/train.py fit --config FILE`` is ``vssm train fit --config FILE``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from vssm.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
