"""tools/speed.py: what was measured, as pages and pictures."""

from __future__ import annotations

import json
from types import SimpleNamespace
from xml.etree import ElementTree

import pages
import pytest
import speed as tool

MACHINE = {"device": "a GPU", "driver": "1.2.3", "torch": "2", "triton": "3", "vssm": "0", "python": "3"}


@pytest.fixture
def speed(tmp_path, monkeypatch):
    """The tool, with results of its own."""
    monkeypatch.setattr(tool, "RESULTS", tmp_path)

    def keep(name, suite, rows):
        (tmp_path / name).write_text(json.dumps({"machine": MACHINE, "suite": suite, "rows": rows}))

    return SimpleNamespace(**vars(tool), keep=keep)


def row(model, mode, inference, training, **more):
    sizes = {"size": "224×224", "batch": "64, 64"}
    figures = {"inference img/s": inference, "inference GB": 1.0, "training img/s": training, "training GB": 2.5}
    return {"model": model, "mode": mode, **sizes, **figures, **more}


def test_pages_are_up_to_date():
    assert tool.main(["--check"]) == 0


def test_a_page_is_written_or_only_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    old = "<!-- list: a -->\nold\n<!-- /list -->\n"
    new = pages.with_block(old, "list", "new")
    assert new == "<!-- list: a -->\nnew\n<!-- /list -->\n"
    (tmp_path / "a.md").write_text(old)
    assert pages.write({"a.md": new}, check=True) == 1
    assert (tmp_path / "a.md").read_text() == old
    assert pages.write({"a.md": new}, check=False) == 0
    assert (tmp_path / "a.md").read_text() == new
    assert pages.write({"a.md": new}, check=True) == 0
    assert capsys.readouterr().out == "a.md is not up to date; run make docs\na.md is written\n"
    with pytest.raises(SystemExit, match="must have <!-- list: … --> and <!-- /list --> once"):
        pages.with_block("", "list", "new")


def test_says_what_is_slower_than_swin(speed):
    speed.keep("a.json", "models", [
        row("vim_tiny", "eager", 1000.0, 300.0), row(speed.YARDSTICK, "eager", 2000.0, 200.0),
        row("vim_small", "eager", 1.0, 1.0, batch="4, 4"), row("convnext_tiny", "eager", 1.0, 1.0),
    ])  # fmt: skip
    assert speed.slower(speed.classifiers()) == "Slower than Swin-T: `vim_tiny` eager inference (0.50 ×)."
    assert "| `vim_tiny` | eager | 64, 64 × 224·224 | 1000 | 1 | 300 | 2.5 | 0.50, 1.50 |" in speed.page()


def test_a_later_file_wins_and_errors_stand_in_their_row(speed):
    speed.keep("a.json", "models", [row("vssd_micro", "eager", 5.0, 5.0)])
    failed = {"model": "vssd_tiny", "mode": "compiled", "error": "RuntimeError: a | b"}
    speed.keep("b.json", "models", [row("vssd_micro", "eager", 7.0, 7.0), failed])
    page = speed.page()
    assert "| `vssd_micro` | eager | 64, 64 × 224·224 | 7 |" in page
    assert "| `vssd_tiny` | compiled | RuntimeError: a / b |" in page
    assert "Detectors" not in page  # nothing measured, no section


def test_pictures_are_xml(speed):
    rows = [{"case": "a", **{f"{what} {key}": 0.5 for what in ("forward", "both") for key in ("ms", "peer", "floor")}}]
    speed.keep("k.json", "kernels", rows)
    for picture in (speed.chart(speed.results("kernels")), speed.algorithm()):
        assert ElementTree.fromstring(picture).tag.endswith("svg")
