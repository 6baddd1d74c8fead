"""The wheel holds the tree and nothing else, builds without network, and installs beside the torch that is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tree import ROOT, run_python, sources

from vssm import __version__


def build(checkout: Path, into: Path) -> subprocess.CompletedProcess[str]:
    """Build a wheel with the setuptools that is here; nothing is downloaded."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(into)]
    return subprocess.run([*command, str(checkout)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a build reads, links kept as links."""
    copy = tmp_path_factory.mktemp("checkout") / "vssm"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("vssm", "scans", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run = build(checkout, folder)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())


def test_wheel_is_pure_python(wheel):
    """One wheel for every Python and platform: nothing is compiled."""
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_holds_the_tree(wheel):
    """Every source file of ``vssm``, ``scans`` and ``kernels`` is in the wheel under ``vssm``, and nothing else is."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {*sources("scans", "kernels", "vssm"), "vssm/py.typed"}
    assert {"vssm/scans/__init__.py", "vssm/kernels/__init__.py", "vssm/kernels/selective_scan/__init__.py"} <= packed


def test_wheel_runs_outside_the_checkout(wheel, tmp_path):
    """Unpacked alone, it imports, scans and names its version; ``scans`` and ``kernels`` are no modules of it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import vssm, vssm.kernels
from importlib.util import find_spec
from vssm.scans import scan_array
print(vssm.__file__, scan_array("cross", (2, 3)).shape, find_spec("scans"))
"""
    assert run_python(code, tmp_path) == f"{tmp_path / 'vssm' / '__init__.py'} (4, 6) None\n"


def test_core_requirements_have_lower_bounds_only(metadata):
    """So that installing vssm beside a matching torch and torchvision changes neither."""
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    core = [item for item in requirements if item.marker is None]
    assert {item.name for item in core} == {"torch", "torchvision", "timm", "numpy", "safetensors"}
    assert all({bound.operator for bound in item.specifier} == {">="} for item in core)


@pytest.mark.parametrize("versions", [("2.9.0", "0.24.0"), ("2.11.0+cu128", "0.26.0+cu128"), ("3.0", "1.0")], ids=str)
def test_installing_changes_neither_torch_nor_torchvision(versions, wheel, tmp_path):
    """The resolver, offline, in an environment where only the metadata of the requirements is installed."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").rglob("site-packages")
    torch, torchvision = versions
    present = {"torch": torch, "torchvision": torchvision, "timm": "1.0.20", "numpy": "1.26", "safetensors": "0.5"}
    for name, version in present.items():
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    pip = [sys.executable, "-m", "pip", "--isolated", "--python", str(tmp_path / "venv")]
    install = [*pip, "install", "--no-index", "--dry-run", str(wheel)]
    plain = {**os.environ, "PIP_CONFIG_FILE": os.devnull}  # a machine may cap versions
    run = subprocess.run(install, capture_output=True, text=True, env=plain, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if "Would install" in line]
    assert lines == [f"Would install vssm-{__version__}"]


def test_extras(metadata):
    """The extras that README names."""
    extras = {"train", "medical", "bundle", "images", "nnunet", "mmseg", "cpu", "export", "demo", "brain", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_a_checkout_without_links_builds_no_wheel(checkout, tmp_path):
    """Git on Windows writes a link as a text file; the build says so instead of leaving both packages out."""
    copy = shutil.copytree(checkout, tmp_path / "copy", symlinks=True)
    (copy / "vssm" / "scans").unlink()
    (copy / "vssm" / "scans").write_text("../scans")
    run = build(copy, tmp_path / "wheel")
    assert run.returncode != 0
    assert "the build needs the links vssm/scans and vssm/kernels, and scans is not a folder" in run.stdout + run.stderr


def test_a_checkout_without_links_imports(checkout, tmp_path):
    """There ``vssm/_layout.py`` finds the two packages, once, under their one name."""
    copy = shutil.copytree(checkout, tmp_path / "copy", symlinks=True)
    for name in ("scans", "kernels"):
        (copy / "vssm" / name).unlink()
        (copy / "vssm" / name).write_text(f"../{name}")
    printed = run_python("import vssm.kernels.checks, vssm.scans\nprint(vssm.scans.__file__)", copy)
    assert printed.strip() == str(copy / "scans" / "__init__.py")
