"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of equal width.

    >>> print(text_table([("name", "top-1"), ("vim", "76.1")]))
    name  top-1
    vim   76.1
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip() for line in rows)
