"""`vssm benchmark`: what runs without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from vssm.cli import _benchmark_cpu, _benchmark_jobs, _benchmark_models, _timing, benchmark


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
    ("arguments", "message"),
    [
        (["cpu", "--only", "none"], "no case named none"),
        (["gpu"], "invalid choice"),
        (["models", "--only", "none"], "no model 'none'"),
        (["models", "--only", "fcos/none"], "no model 'fcos/none'"),
        (["models", "--only", "vim_tiny@big"], "no model 'vim_tiny@big'"),
        (["models", "--jobs", "0"], "must be positive"),
    ],
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
    x = torch.ones(1, 3, *model.default_cfg["input_size"][1:])
    before = model(x)
    _benchmark_models.without_core(model, lambda: model(x))
    y = model(x)
    y.sum().backward()
    missing = {key.split(".")[-1] for key, x in model.named_parameters() if x.grad is None}
    assert "A_log" in missing
    assert missing <= {"x_proj", "dt_weight", "dt_bias", "A_log", "D"}, missing
    assert before.shape == y.shape
    assert not torch.equal(before, y)


def test_blocks_are_compiled_alone_and_share_their_code(monkeypatch):
    import timm

    model = timm.create_model("test_vim", drop_path_rate=0.3).train()
    compile_, graphs = torch.nn.Module.compile, []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(self, backend=counting, **options))
    blocks = _benchmark_models.compile_blocks(model)
    model(torch.ones(1, 3, *model.default_cfg["input_size"][1:])).sum().backward()
    assert blocks == list(model.blocks)
    assert len(graphs) == 2  # the first one has no drop path
    with pytest.raises(ValueError, match="ResNet has no blocks around mixers"):
        _benchmark_models.compile_blocks(timm.create_model("test_resnet"))


def test_blocks_of_many_stages_are_compiled_for_inference_and_training(monkeypatch):
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(self, backend="eager", **options))
    monkeypatch.setattr(_benchmark_models, "DEVICE", "cpu")
    monkeypatch.setattr(_benchmark_models, "setting", lambda name: _benchmark_models.Setting((64, 64), 1, 2))
    monkeypatch.setattr(_benchmark_models, "_timed", lambda step, graphed: (step(), (20.0, 0.5))[1])
    with torch._dynamo.config.patch(recompile_limit=1):  # unless it is raised
        rows = list(_benchmark_jobs.models(["test_vmamba", "test_resnet"], ["blocks"], torch.bfloat16, False, 1, 60))
    assert not rows[0].get("error")
    assert rows[0]["training img/s"] == 100.0
    assert "ResNet has no blocks around mixers" in rows[1]["error"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("test_plainmamba", "got 3 of 3 that are not"), ("test_localvim", "got 3 of 3"), ("test_mamba2d", "got 0 of 0")],
)
def test_a_model_whose_scans_cannot_be_left_out_is_not_timed_without_them(name, message, monkeypatch):
    monkeypatch.setattr(_benchmark_models, "DEVICE", "cpu")
    monkeypatch.setattr(_benchmark_models, "setting", lambda name: _benchmark_models.Setting((32, 32), 1, 1))
    (row,) = _benchmark_jobs.models([name], ["eager"], torch.bfloat16, True, 1, 60)
    assert message in row["error"]
    assert "inference img/s" not in row


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vmamba", (64, 64)),
        ("test_vim@48", (48, 48)),
        ("test_upernet", (64, 64)),
        ("segmamba_nano", (32, 32, 32)),
        ("fcos/test_vmamba", (64, 96)),
        ("mask_rcnn/test_vmamba", (64, 96)),
        ("test_mamba_yolo", (64, 96)),
    ],
)
def test_a_model_of_every_kind_infers_and_trains(name, size, monkeypatch):
    """On the CPU and without a stop-watch: what is timed on a GPU runs."""
    monkeypatch.setattr(_benchmark_models, "DEVICE", "cpu")
    monkeypatch.setattr(_benchmark_models, "setting", lambda name: _benchmark_models.Setting(size, 1, 2))
    seen = []

    def timed(step, graphed):
        step()
        seen.append(step)
        return 20.0 * len(seen), 0.5

    monkeypatch.setattr(_benchmark_models, "_timed", timed)
    rows = list(_benchmark_jobs.models([name], ["eager"], torch.bfloat16, False, 1, 60))
    (row,) = rows
    assert not row.get("error")
    assert (row["inference img/s"], row["training img/s"]) == (50.0, 50.0)
    assert row["size"] == "×".join(map(str, size))
    assert len(seen) == 2


def test_what_fails_stands_in_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(_benchmark_models, "DEVICE", "cpu")

    def timed(step, graphed):
        raise RuntimeError("no graph\nof this")

    monkeypatch.setattr(_benchmark_models, "_timed", timed)
    monkeypatch.setattr(_benchmark_models, "setting", lambda name: _benchmark_models.Setting((64, 64), 1, 1))
    rows = list(_benchmark_jobs.models(["test_vmamba"], ["eager", "graphed"], torch.bfloat16, True, 1, 60))
    assert [row["mode"] for row in rows] == ["eager without core", "graphed without core"]
    assert all(row["error"] == "RuntimeError: no graph of this" for row in rows)
    benchmark.plot(rows, "models", "cpu", tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


def test_models_in_processes_of_their_own(tmp_path, monkeypatch):
    """Rows come from all of them; one that dies or takes too long is reported for what it still owed."""
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/sh
case "$3" in
*'"good"'*) echo '{"model": "good", "mode": "eager", "training img/s": 5.0}'; echo warning
            echo '{"model": "good", "mode": "compiled", "error": "why"}';;
*'"dies"'*) echo '{"model": "dies", "mode": "eager"}'; echo 'out of luck'; exit 3;;
*) sleep 60;;
esac
"""
    )
    python.chmod(0o755)
    monkeypatch.setattr(_benchmark_jobs.sys, "executable", str(python))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    names = ["good", "dies", "sleeps"]
    rows = list(_benchmark_jobs.models(names, ["eager", "compiled"], torch.bfloat16, False, 2, 2.0))
    found = {(row["model"], row["mode"]): row.get("error", "") for row in rows}
    assert found == {
        ("good", "eager"): "",
        ("good", "compiled"): "why",
        ("dies", "eager"): "",
        ("dies", "compiled"): "exit status 3: out of luck",
        ("sleeps", "eager"): "not done after 2 s",
        ("sleeps", "compiled"): "not done after 2 s",
    }


def test_one_process_measures_at_a_time(tmp_path, monkeypatch):
    """The second waits for the lock; cores are given back; compiled models wait for those who compile."""
    import os
    import threading
    import time

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cores = sorted(os.sched_getaffinity(0))
    turns = _benchmark_jobs.SharedTurns(str(tmp_path / "gpu"), cores[:1], cores, time.monotonic() + 30)
    inside, order = threading.Event(), []

    def second(mode):
        inside.wait()
        with turns.alone(mode):
            order.append(mode)

    for first, mode in ((turns.alone("eager"), "eager"), (turns.compiling(), "compiled")):
        inside.clear()
        thread = threading.Thread(target=second, args=(mode,))
        thread.start()
        with first:
            inside.set()
            thread.join(0.4)
            assert os.sched_getaffinity(0) == set(cores[:1] if mode == "eager" else cores)
            order.append("first")
        thread.join()
        assert os.sched_getaffinity(0) == set(cores)
    assert order == ["first", "eager", "first", "compiled"]
    turns.until = 0.0
    with turns.compiling(), turns.alone("compiled"):  # waits no longer
        pass


def test_kernels_are_compared_by_device_time(monkeypatch):
    """Every row has the same columns; a sequence has no other order."""
    from vssm.cli._timing import Timing

    def times(case, order, dtype):
        slow = {"raster": 1.0, "hilbert": 1.05, "random": 1.2}[order]
        return Timing(9.0, 0.5 * slow), Timing(9.0, 2.0 * slow), 7.0

    monkeypatch.setattr(benchmark, "scan_times", times)
    sequence, grid = benchmark.kernels(["vim_t_224", "vmamba_s1"], torch.bfloat16, None)
    assert sequence.keys() == grid.keys()
    assert sequence["both ratio"] == 0.829 / 2
    assert sequence["forward hilbert x"] == ""
    assert [round(grid[f"{what} {order} x"], 2) for what in ("forward", "both") for order in benchmark.ORDERS] == [
        1.05, 1.2, 1.05, 1.2
    ]  # fmt: skip


def test_calls_are_timed_on_the_cpu(monkeypatch):
    """Without gradients, recorded, with backward, and an empty pass; by median and least."""
    shapes = {"u": (1, 12, 8), "delta": (1, 2, 12, 8), "A": (2, 8, 4), "B": (1, 2, 12, 4), "C": (1, 2, 12, 4)}
    shapes["grad"] = shapes["u"]
    scans, passes = [], []

    class Scan(benchmark.Scan):
        def forward(self, call):
            y = super().forward(call)
            scans.append("recorded" if y.requires_grad else "plain")
            y.register_hook(lambda grad: scans.append("backward")) if y.requires_grad else None
            return y

    def measured(calls, *, seconds):
        for name, call in calls.items():
            scans.clear()
            found = call()
            passes.append((name, *scans, type(found[0].grad_fn).__name__ if name == "empty" else ""))
        return dict.fromkeys(calls, (2.0, 1.0))

    monkeypatch.setattr(benchmark, "Scan", Scan)
    monkeypatch.setattr(benchmark, "_inputs", lambda *_: {name: -torch.rand(*shape) for name, shape in shapes.items()})
    monkeypatch.setattr(benchmark, "_table", lambda *_: torch.stack([torch.randperm(12) for _ in range(2)]))
    monkeypatch.setattr(benchmark, "cpu_microseconds", measured)
    monkeypatch.setitem(benchmark.SUITE, "tiny", benchmark.Case(1, 2, 8, (3, 4), 4, True, 1.0, 1.0, 1.0))
    (row,) = benchmark.calls(["tiny"], torch.float32, None)
    assert passes == [
        ("forward", "plain", ""), ("recorded", "recorded", ""), ("both", "recorded", "backward", ""),
        ("empty", "_EmptyBackward"), ("python", ""),
    ]  # fmt: skip
    assert (row["recorded µs"], row["recorded least"]) == (2.0, 1.0)


def test_calls_take_turns_and_start_with_an_empty_queue(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(_timing, "ROUND", 4)
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("empty"))

    def call(name, times):
        def run():
            now[0] += next(times)
            order.append(name)

        return run

    one = call("one", iter([9.0] * 10 + [3e-6] * 4 + [5e-6] * 4 + [1e-6] * 4 + [1.0] * 99))
    other = call("other", iter([0.0] * 10 + [2e-6] * 99))
    found = _timing.cpu_microseconds({"one": one, "other": other}, seconds=3e-5)
    turns = ["empty"] + ["one"] * 4 + ["empty"] + ["other"] * 4
    assert order == ["one"] * 10 + ["other"] * 10 + turns * 2 + ["empty"]
    assert found["one"] == pytest.approx((4.0, 3.0))
    assert found["other"] == pytest.approx((2.0, 2.0))
