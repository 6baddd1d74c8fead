"""``python -m vssm COMMAND …`` is ``vssm COMMAND …``."""

from vssm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
