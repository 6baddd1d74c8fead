"""README's examples and every docstring example run, and the generated tables are up to date."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from importlib import import_module
from importlib.util import find_spec

import published
import pytest
from tree import ROOT, sources

import docs

OPTIONAL = {  # parts that an extra brings
    "vssm.data": "lightning", "vssm.tasks": "lightning", "vssm.cli": "lightning", "vssm.data.volume": "monai",
    "vssm.tasks.segmentation": "monai", "vssm.tasks.sliding": "monai", "vssm.tasks.case_report": "monai",
    "vssm.tasks.losses": "monai", "vssm.tasks.measures": "monai",
    "vssm.cli.predict": "monai", "vssm.registries.monai": "monai", "vssm.registries.mmseg": "mmseg",
    "vssm.registries.nnunet.trainers": "nnunetv2",
}  # fmt: skip

PAGES = ("README.md", "docs/scans.md", "docs/integrations.md", "docs/detection.md")  # whose examples run
DOCS = sorted((ROOT / "docs").glob("*.md"))


def examples(page: str) -> list[tuple[str, str]]:
    """The fenced Python blocks of a page, each with the heading above it."""
    text, found = (ROOT / page).read_text(encoding="utf-8"), []
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        heading = re.findall(r"^#+ (.*)$", text[: block.start()], re.MULTILINE)[-1]
        found.append((f"{page}: {heading}", block.group(1)))
    return found


def modules() -> list[str]:
    """Every module of the package whose extra is installed; Triton's need a GPU build and have no examples."""
    files = [path.removesuffix(".py").removesuffix("/__init__") for path in sources("scans", "kernels", "vssm")]
    names = [path.replace("/", ".") for path in files]
    missing = tuple(part for part, needs in OPTIONAL.items() if not find_spec(needs))
    return [name for name in names if name != "vssm.__main__" and "triton" not in name and not name.startswith(missing)]


@pytest.mark.usefixtures("unregister")
@pytest.mark.parametrize("example", [e for page in PAGES for e in examples(page)], ids=lambda example: example[0])
def test_readme_example(example, tmp_path, monkeypatch):
    """Each block runs by itself in an empty folder and prints what the comments beside its prints say."""
    heading, code = example
    if "matplotlib" in code or "plot(" in code:
        pytest.importorskip("matplotlib").use("agg")
    if "monai" in code:
        pytest.importorskip("monai", reason="needs the extra medical")
    monkeypatch.chdir(tmp_path)
    expected = re.findall(r"^\s*print\(.*\)  # (.*)$", code, re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, heading, "exec"), {"__name__": "__main__"})
    assert printed.getvalue().splitlines() == expected


def test_readme_has_five_examples():
    assert len(examples("README.md")) >= 5


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    """The examples in a module's docstrings hold."""
    result = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


COUNTED = ("vim_tiny", "vmamba_nano", "segmamba_nano")  # the rest is counted again by the slow test


def test_generated_tables_are_up_to_date():
    """README's model table and docs/models.md are what the zoo says; ``make docs`` writes them."""
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/models.md"))
    known = {name: counts for name, counts in docs.known_from(page).items() if name not in COUNTED}
    assert known.keys() | set(COUNTED) == set(docs.names()), "run make docs"
    known |= {name: docs.numbers(name) for name in COUNTED}
    assert docs.readme(readme, known) == readme
    assert docs.page(known) == page


def test_remarks_of_sources_are_quoted_whole():
    """What docs/models.md says is kept as published: comments to their end, docstrings to the end of the sentence."""
    source = '''class Model:
    """A model. As published: in
    float32. Not more.
    """

    def norm(self):
        # As published: no bias,
        # and no norm.
        return 0  # As published: zero.
'''
    assert list(published.marks(source)) == [
        ("Model", "in float32."), ("Model.norm", "no bias, and no norm."), ("Model.norm", "zero.")
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", docs.names())
def test_the_numbers_in_the_tables_hold(name):
    assert docs.known_from((ROOT / "docs/models.md").read_text(encoding="utf-8"))[name] == docs.numbers(name)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in DOCS)])
def test_links_lead_somewhere(page):
    """Links between our pages name files that exist."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
