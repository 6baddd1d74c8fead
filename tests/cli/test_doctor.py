"""``vssm doctor``: what runs here, why the rest does not, and what mends it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tree import ROOT

from vssm.cli import doctor
from vssm.kernels import backends


@pytest.fixture
def quick(monkeypatch):
    """Backends are asked, not tried."""
    for op in doctor._OPS:
        monkeypatch.setitem(doctor._OPS, op, lambda backend, device, dtype: None)


@pytest.mark.usefixtures("quick")
def test_versions_devices_and_backends(capsys, monkeypatch):
    """Everything that a bug report needs stands there, and the status is 0."""
    monkeypatch.delenv("VSSM_BACKEND", raising=False)
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for part in ("torch   ", torch.__version__.partition("+")[0], "timm  ", "selective_scan on cpu", "conv1d on cpu",
                 "scan2d on cpu", "float32 ", "bfloat16 ", "not triton: it needs a GPU", "no problems"):  # fmt: skip
        assert part in out, part


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(torch.cuda.is_available(), reason="triton runs here")
@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_backend_that_was_asked_for_and_cannot_run(way, capsys, monkeypatch):
    """Status 1, whichever way it was asked for; a usable one is no problem."""
    monkeypatch.delenv("VSSM_BACKEND", raising=False)
    if way == "environment":
        monkeypatch.setenv("VSSM_BACKEND", "triton")
    assert doctor.main(["--backend", "triton"] if way == "option" else []) == 1
    assert "backend 'triton' was asked for and cannot run selective_scan" in capsys.readouterr().out
    assert doctor.main(["--backend", "torch"]) == 0
    assert doctor.main(["--backend", "gpu"]) == 1
    assert "no backend named 'gpu'" in capsys.readouterr().out


def test_a_backend_that_fails_when_tried(capsys, monkeypatch):
    """What is installed and does not work is told from what works."""

    def broken(backend, device, dtype):
        if backend == "torch":
            raise RuntimeError("illegal instruction\nmore")

    for op in doctor._OPS:
        monkeypatch.setitem(doctor._OPS, op, broken)
    assert doctor.main(["--backend", "torch"]) == 1
    assert "not torch: it fails: RuntimeError: illegal instruction" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_numba_is_explained(capsys, monkeypatch):
    """The reason comes with the command."""
    exists = backends._exists
    monkeypatch.setattr(backends, "_exists", lambda module: module != "numba" and exists(module))
    assert doctor.main([]) == 0
    assert "not cpu: Numba is not installed; pip install 'vssm[cpu]'" in capsys.readouterr().out


@pytest.mark.parametrize("op", doctor._OPS)
def test_the_trial_runs(op):
    """What it calls is the op itself, forward and backward."""
    doctor._OPS[op]("reference", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("torch_version", "expected"),
    [("2.9.0", "0.24.0"), ("2.11.1+cu128", "0.26.1"), ("2.14.1", "0.29.1"), ("2.14.0a0+git1", "0.29.0")],
)
def test_the_torchvision_that_matches(torch_version, expected):
    """2.minor.patch goes with 0.(minor + 15).patch."""
    assert doctor.torchvision_for(torch_version) == expected


def test_without_a_usable_torchvision(tmp_path):
    """``import vssm`` warns and goes on, the models say why they are not there, and doctor says what mends it."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "default"}
    code = (
        "import vssm\nfrom vssm.cli import doctor\n"
        "doctor._OPS.clear()\n"
        "status = doctor.main([])\n"
        "try:\n    vssm.create_model\n"
        "except ImportError as error:\n    print(error)\n"
        "raise SystemExit(status)"
    )
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1, run.stderr
    assert "vssm: timm cannot be imported" in run.stderr
    matching = doctor.torchvision_for(torch.__version__)
    assert f"pip install --force-reinstall --no-deps torchvision=={matching}" in run.stdout
    assert "timm cannot be imported" in run.stdout
    assert "it needs torchvision, see there" in run.stdout
    assert "vssm.create_model needs timm, which cannot be imported; `vssm doctor` says why" in run.stdout
