"""Our orders are the published ones, cell by cell."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vssm.scans.published import ROWS, NotCovered, published_directions, published_row

GOLDEN = Path(__file__).parent.parent / "golden" / "scans"
FILES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(GOLDEN.glob("*.json"))}


def rows(part: str):
    """(file, size, row name) of everything listed in this part of each file."""
    for file, golden in FILES.items():
        for size, table in golden.get(part, {}).items():
            yield from (pytest.param(file, size, row, id=f"{file}-{size}-{row}") for row in table)


def grid_of(size: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", size)))


def test_every_covered_file_is_here():
    assert set(FILES) == set(ROWS)


@pytest.mark.parametrize(("file", "size", "row"), list(rows("tables")))
def test_row_is_the_published_one(file, size, row):
    assert published_row(file, row, grid_of(size)).tolist() == FILES[file]["tables"][size][row]


@pytest.mark.parametrize(("file", "size", "row"), list(rows("directions")))
def test_directions_are_the_published_ones(file, size, row):
    assert published_directions(file, row, grid_of(size)).tolist() == FILES[file]["directions"][size][row]


def test_a_file_may_be_named_by_its_path():
    assert published_row("golden/scans/cross_scan.json", "k1", (2, 2)).tolist() == [0, 2, 1, 3]


def test_what_is_not_covered_says_so():
    with pytest.raises(NotCovered, match="no order of ours draws 'peano' yet"):
        published_row("peano", "cw_in", (4, 4))
    with pytest.raises(NotCovered, match="no order of ours draws 'k7' of 'atrous' yet"):
        published_row("atrous", "k7", (4, 4))
    with pytest.raises(NotCovered, match="atrous has no direction codes"):
        published_directions("atrous", "k0", (4, 4))
