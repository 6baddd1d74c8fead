"""The compiled CPU backend around its arithmetic: threads, forks, workers, caches, and its elementary functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import conv_inputs, scan_inputs, value_and_grads
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vssm.kernels import available_backends, causal_conv1d, selective_scan, threads

pytestmark = pytest.mark.skipif("cpu" not in available_backends("selective_scan"), reason="Numba is not installed")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def three_threads(monkeypatch):
    """Three threads for our pool, one for torch: its OpenMP hangs in a forked child, which is why workers have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    yield
    torch.set_num_threads(before)


def scan() -> Tensor:
    """A scan of enough jobs for all threads, its outputs and gradients in one tensor."""
    torch.manual_seed(0)
    scanned = {name: x.float() for name, x in scan_inputs(2, 2, 70, 100, 3, shared="u delta B D").items()}
    convolved = {name: x.float() for name, x in conv_inputs(2, 2, 70, 100, 3, shared="x bias").items()}
    scans = value_and_grads(selective_scan, scanned, merge="sum", delta_softplus=True, backend="cpu")
    return torch.cat(
        [joined(scans), joined(value_and_grads(causal_conv1d, convolved, activation="silu", backend="cpu"))]
    )


def joined(results: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in results.values()])


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(scan())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_every_job_runs_once_and_errors_come_through(three_threads):
    seen: list[int] = []
    threads.run(lambda start, stop, out: out.extend(range(start, stop)), 7, seen)
    assert sorted(seen) == list(range(7))

    def fail(start: int, stop: int) -> None:
        if start == 5:
            raise ArithmeticError(f"job {start}")

    with pytest.raises(ArithmeticError, match="job 5"):
        threads.run(fail, 6)


def test_two_threads_may_call_at_once(three_threads):
    inputs = {name: x.float() for name, x in scan_inputs(2, 2, 70, 100, 3, shared="u delta B D").items()}
    results: list[Tensor | None] = [None] * 8

    def call(i: int) -> None:
        results[i] = joined(value_and_grads(selective_scan, inputs, merge="sum", delta_softplus=True, backend="cpu"))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(results))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    call(0)
    assert all(torch.equal(result, results[0]) for result in results)


class Scans(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return scan()


def ran_elsewhere(request: pytest.FixtureRequest) -> bool:
    """Run the test in a fresh process without a GPU if there is one: autograd's threads for it forbid a fork."""
    if not torch.cuda.is_available():
        return False
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid]
    environment = {name: x for name, x in os.environ.items() if "XDIST" not in name} | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, cwd=request.config.rootpath, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_worker_starts_a_pool_of_its_own(three_threads, request):
    """After the parent used its threads, which the child does not have."""
    if ran_elsewhere(request):
        return
    expected = scan()
    loader = DataLoader(Scans(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(result, expected) for result in loader)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_parent_and_forked_child_both_go_on(three_threads, request):
    if ran_elsewhere(request):
        return
    expected = scan()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(scan(), expected) else 1)
    assert torch.equal(scan(), expected)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def in_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


SMALL = """
import json, logging, torch
from vssm.kernels import causal_conv1d
x = torch.arange(6.).view(1, 3, 2)
print(json.dumps(causal_conv1d(x, torch.ones(2, 2), backend="cpu")[0].tolist()))
"""


def test_compiling_is_said_once_and_kept_on_disk(tmp_path):
    first, second = (in_python(SMALL, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first.stderr.count("compiling the CPU kernels") == 1, first.stderr
    assert "compiling" not in second.stderr
    assert json.loads(first.stdout) == json.loads(second.stdout) == [[[0, 1], [2, 4], [6, 8]]]


@pytest.mark.slow
def test_runs_where_no_cache_can_be_written():
    """As a package owned by another user, with no home: compiled again in each process."""
    code = "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n" + SMALL
    result = in_python(code)
    assert json.loads(result.stdout) == [[[0, 1], [2, 4], [6, 8]]], result.stderr


def test_elementary_functions_are_accurate_in_float32():
    from vssm.kernels.compiled import compiled, exp, sigmoid, silu_slope, softplus, softplus_slope

    @compiled
    def evaluate(x, out):
        for i in range(x.size):
            out[0, i] = exp(x[i])
            out[1, i] = softplus(x[i], exp(-abs(x[i])))
            out[2, i] = softplus_slope(x[i], exp(-abs(x[i])))
            out[3, i] = sigmoid(x[i])
            out[4, i] = silu_slope(x[i])

    x = np.linspace(-80, 80, 1_000_003).astype(np.float32)
    out, special = np.empty((5, x.size), np.float32), np.empty((5, 5), np.float32)
    evaluate(x, out)
    t = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    s = torch.sigmoid(t)
    expected = torch.stack([t.exp(), torch.logaddexp(t, torch.zeros(())), s, s, s * (1 + t * (1 - s))]).detach().numpy()
    assert (np.abs(out - expected)[:4] / expected[:4]).max() < 5e-7
    assert np.abs(out - expected)[4].max() < 2e-6  # x (1 - s) where s rounds to 1, as in torch
    evaluate(np.array([np.nan, np.inf, -np.inf, 0, -1e30], np.float32), special)
    assert np.isnan(special[:, 0]).all()
    assert special[:4, 1].tolist() == [np.inf, np.inf, 1, 1]
    assert np.abs(special[:4, 2]).max() < 1e-37
    assert special[0, 3] == 1
    assert special[3, 4] == 0
