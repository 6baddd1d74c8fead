"""What the generated pages share: tables, blocks of README.md, and files that are written or only compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *rows))


def with_block(readme: str, name: str, block: str) -> str:
    """README with the lines between its two comments ``<!-- NAME: … -->`` and ``<!-- /NAME -->`` replaced."""
    replaced, count = re.subn(
        rf"(?s)(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)", lambda found: f"{found[1]}{block}\n{found[2]}", readme
    )
    if count != 1:
        raise SystemExit(f"tools: README.md must have <!-- {name}: … --> and <!-- /{name} --> once")
    return replaced


def write(pages: Mapping[str, str], check: bool) -> int:
    """Write the pages that are not up to date, or only name them; the status to exit with."""
    status = 0
    for name, new in pages.items():
        path = ROOT / name
        if path.exists() and path.read_text(encoding="utf-8") == new:
            continue
        status = int(check)
        if not check:
            path.write_text(new, encoding="utf-8")
        print(f"{name} {'is not up to date; run make docs' if check else 'is written'}")
    return status
