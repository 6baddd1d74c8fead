"""The command line: ``vssm COMMAND …``. Each module of this folder is a command, imported only when it is called.

A command module has a docstring, whose first line is its summary, and ``main(argv)`` that returns the exit status.
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from vssm import __version__

__all__ = ["commands", "main"]

EXTRAS = {"predict": "train,medical", "train": "train"}  # commands that need more than the core, and what brings it


def commands() -> dict[str, str]:
    """Name and summary of every command, read from the sources without importing them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem.replace("_", "-")] = docstring.partition("\n")[0].rstrip(".")
    return found


def usage() -> str:
    """The text of ``vssm --help``."""
    found = commands()
    width = max(map(len, found), default=0)
    rows = [f"  {name:{width}}  {summary}" for name, summary in found.items()]
    return "\n".join(["usage: vssm COMMAND [options]", "", "commands:", *rows, "",
                      "vssm COMMAND --help says more; vssm --version prints the version."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names; return its exit status (2 if there is no such command)."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"vssm {__version__}")
        return 0
    found = commands()
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(found)}"
        print(f"vssm: no command named {name!r}; {hint}", file=sys.stderr)
        return 2
    try:
        command = import_module(f"{__name__}.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if name not in EXTRAS or error.name.partition(".")[0] == "vssm":
            raise
        print(f"vssm {name}: {error.name} is not installed; run: pip install 'vssm[{EXTRAS[name]}]'", file=sys.stderr)
        return 1
    return command.main(rest) or 0
