"""`vssm benchmark`: what runs without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from vssm.cli import _benchmark_cpu, benchmark


def test_the_cpu_suite(tmp_path, monkeypatch, capsys):
    """A line and a record for each case, all in multiples of the yardstick."""
    monkeypatch.setattr(_benchmark_cpu, "SECONDS", 0.01)
    monkeypatch.setattr(benchmark, "share_of_scan", lambda: 0.25)
    monkeypatch.setitem(_benchmark_cpu.CASES, "tiny", (1, 8, 16, 4))
    arguments = ["cpu", "--only", "tiny", "--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")]
    assert benchmark.main(arguments) == 0
    assert "25%" in capsys.readouterr().out
    record = json.loads((tmp_path / "x.json").read_text())
    (row,) = record["rows"]
    assert row["case"] == "tiny"
    assert {"cpu forward x", "cpu both x", "torch forward x", "torch both x"} <= row.keys()
    assert all(value > 0 for name, value in row.items() if name.endswith(" x"))
    assert "threads" in record["machine"]["device"]
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"), [(["cpu", "--only", "none"], "no case named none"), (["gpu"], "invalid choice")]
)
def test_wrong_arguments(arguments, message, capsys):
    """The error names them."""
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim"])
def test_a_model_runs_without_its_core(name):
    """Its scans are the identity then: their parameters get no gradient, all others do."""
    import timm

    model = timm.create_model(name)
    before = model(torch.ones(1, 3, 32, 32)) if name == "test_vmamba" else None
    benchmark._without_core(model)
    y = model(torch.ones(1, 3, *model.default_cfg["input_size"][1:]))
    y.sum().backward()
    missing = {key.split(".")[-1] for key, x in model.named_parameters() if x.grad is None}
    assert "A_log" in missing
    assert missing <= {"x_proj", "dt_weight", "dt_bias", "A_log", "D"}, missing
    assert before is None or before.shape == y.shape
