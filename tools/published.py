"""What docs/models.md says of a family and its published code: what was compared, and what is odd and kept."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType

from pages import ROOT

from vssm.models.variant import families

MARK = "As published"  # how sources mark what is odd and kept


def lines(family: ModuleType) -> list[str]:
    """The paragraphs of a family's section: recorded models with their parameters, then what ours repeats."""
    text = []
    if records := recorded(family.REPOSITORY):
        commits = ", ".join(
            f"[{commit[:7]}](https://github.com/{family.REPOSITORY}/tree/{commit})"
            for commit in dict.fromkeys(commit for commit, _, _ in records)
        )
        names = ", ".join(f"`{name}` {count / 1e6:.2f} M" for _, name, count in records)
        text += [f"Compared with the published code at {commits}, tensor by tensor and output by output; recorded "
                 f"models and their parameters: {names}.", ""]  # fmt: skip
    if kept := oddities(family):
        text += ["Kept as published, where the paper or common sense would say otherwise:", ""]
        text += [f"- `{place}`: {said}" if place else f"- {said}" for place, said in kept] + [""]
    return text


@cache
def golden() -> tuple[tuple[str, str, str, int], ...]:
    """Repository, commit, name and parameters of every recorded model in tests/golden."""
    found = []
    for file in sorted((ROOT / "tests" / "golden").glob("*/*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.get("params"):
            found.append((record["source"]["repo"], record["source"]["commit"], file.stem, record["params"]))
    return tuple(found)


def recorded(repository: str) -> list[tuple[str, str, int]]:
    """Commit, name and parameters of the recorded models of a repository."""
    return [(commit, name, count) for repo, commit, name, count in golden() if repo == repository]


def oddities(family: ModuleType) -> list[tuple[str, str]]:
    """Where and what the sources of a family mark with ``As published``."""
    return [(place, said) for module in sources(family) for place, said in marks(inspect.getsource(module))]


def sources(family: ModuleType) -> list[ModuleType]:
    """The family's module and those below it in ``vssm.models`` and ``vssm.layers`` that are no families."""
    found, others = [family], set(families()) - {family}
    for module in found:
        for name in re.findall(r"^from (vssm\.(?:models|layers)\.\w+) import", inspect.getsource(module), re.MULTILINE):
            if sys.modules[name] not in others and sys.modules[name] not in found:
                found.append(sys.modules[name])
    return found


def marks(source: str) -> Iterator[tuple[str, str]]:
    """The remarks of a source, in comments and docstrings, with the class or function in which they stand.

    >>> list(marks("def f():\\n    # As published: no bias,\\n    # and no norm.\\n    return 0\\n"))
    [('f', 'no bias, and no norm.')]
    """
    rows = source.splitlines()
    scopes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    for number, row in enumerate(rows, 1):
        before, mark, said = row.partition(MARK)
        if not mark:
            continue
        comment = "#" in before
        for following in rows[number:]:
            if comment and not re.match(r"\s*#", following):
                break
            if not comment and re.search(r'\.(\s|"|$)', said):
                break
            said += " " + following.strip().lstrip("# ")
        said = re.sub(r"\s+", " ", said if comment else re.split(r'(?<=\.)(?:\s|"|$)', said)[0]).strip('": ,')
        inside = [node for node in scopes if node.lineno <= number <= (node.end_lineno or 0)]
        place = ".".join(node.name for node in sorted(inside, key=lambda node: node.lineno) if node.name != "__init__")
        if said:
            yield place, said
