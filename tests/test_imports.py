"""Imports point one way, the two linked packages have one name, and ``import vssm`` stays light."""

from __future__ import annotations

import ast

import pytest
from tree import ROOT, run_python, sources

SOURCES = sources("scans", "kernels", "vssm", "tools")
ORDER = "scans kernels layers models checkpoints registries data tasks cli tools".split()
TOP = {"vssm/__init__.py", "vssm/__main__.py", "vssm/_layout.py"}  # they speak for the whole package
HEAVY = {"albumentations", "jsonargparse", "lightning", "llvmlite", "matplotlib", "mlxtend", "mmcv", "mmengine",
         "mmseg", "monai", "numba", "pytorch_lightning", "rich", "tensorboard", "torchmetrics", "triton"}


def part_of(path: str) -> str:
    """'vssm/layers/mixer.py' and 'vssm.layers.mixer' -> 'layers'; 'tools/train.py' -> 'tools'; 'vssm' -> 'vssm'."""
    names = path.removesuffix(".py").replace(".", "/").split("/")
    return names[1] if names[0] == "vssm" and len(names) > 1 else names[0]


def imports_of(path: str) -> set[str]:
    """Full names of what a file imports anywhere in it, relative imports resolved."""
    package = path.removesuffix(".py").split("/")[:-1]
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def modules_after(statement: str) -> set[str]:
    """Top-level names in ``sys.modules`` after ``statement`` in a fresh interpreter."""
    printed = run_python(f"{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})")
    return set(printed.splitlines()[-1].split())


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in TOP])
def test_imports_point_one_way(path):
    """A part imports itself and the parts before it; ``from vssm import …`` is for the command line alone."""
    for name in imports_of(path):
        if name.split(".")[0] != "vssm":
            continue
        part = part_of(name)
        if part in ORDER:
            assert ORDER.index(part) <= ORDER.index(part_of(path)), f"{path} reaches up to {name}"
        else:
            assert part_of(path) in ("cli", "tools"), f"{path} imports {name} from the package's top"


@pytest.mark.parametrize("path", SOURCES)
def test_the_linked_packages_have_one_name(path):
    """``import scans`` would make a second registry, and ``kernels`` is another project's import name."""
    assert not {name.split(".")[0] for name in imports_of(path)} & {"scans", "kernels"}


def test_every_part_is_in_the_order():
    """A new folder or module under ``vssm`` gets its place in ORDER."""
    parts = {part_of(path) for path in SOURCES if path not in TOP}
    assert parts <= set(ORDER)


def test_import_vssm_loads_nothing_heavy():
    """Beside what a bare ``import timm`` loads, ``import vssm`` adds none of the optional packages, Triton included.

    Nor does it make a second module of the linked packages.
    """
    extra = modules_after("import vssm") - modules_after("import timm")
    assert "vssm" in extra
    assert not extra & (HEAVY | {"scans", "kernels"})


def test_help_loads_no_command():
    """``vssm --help`` reads the summaries from the sources."""
    code = "from vssm.cli import main\nmain(['--help'])\nprint(*[name for name in sys.modules if 'vssm.cli.' in name])"
    printed = run_python(code)
    assert "  doctor " in printed
    assert printed.endswith("\n\n")


def test_tasks_and_data_name_what_needs_monai_without_loading_it():
    from vssm import data, tasks
    from vssm.data.volume_sources import MNI152
    from vssm.tasks.segmentation import Segmentation

    assert "monai" not in modules_after("import vssm.data, vssm.tasks")
    assert tasks.Segmentation is Segmentation
    assert all(hasattr(data, name) for name in data.WITH_MONAI)
    assert data.MNI152 is MNI152
    assert not hasattr(data, "MNI153")
