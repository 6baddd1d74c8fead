"""Several kernels as one launch, with a driver that only writes down what it is asked for."""

from __future__ import annotations

import ctypes
import gc
import logging
from types import SimpleNamespace

import pytest
import torch

from vssm.kernels import triton_direct, triton_graph
from vssm.kernels.triton_direct import LEAST, OFTEN, Launches
from vssm.kernels.triton_graph import FUNCTIONS, INVALID_CONTEXT, Chain, Node, room

EXECUTABLE = 2


class Driver:
    """NVIDIA's driver; ``failing`` is what does."""

    def __init__(self, failing: str = ""):
        self.log, self.failing, self.context, self.mode, self.nodes = [], failing, 7, 0, 100

    def status(self, name: str, *about) -> int:
        self.log.append((name, *about))
        return 9 if name == self.failing else 0

    def cuCtxGetCurrent(self, context):
        context._obj.value = self.context
        return self.status("context")

    def cuGraphCreate(self, graph, flags):
        graph._obj.value = 1
        return self.status("create")

    def cuGraphAddKernelNode_v2(self, handle, graph, before, count, node):
        self.nodes += 1
        handle._obj.value = self.nodes
        return self.status("add", self.nodes, *before[: count.value])

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):
        executable._obj.value = 0 if self.failing == "instantiate" else EXECUTABLE
        return self.status("instantiate", self.mode)

    def cuGraphExecKernelNodeSetParams_v2(self, executable, handle, node):
        return self.status("update", handle.value)

    def cuGraphLaunch(self, executable, stream):
        return self.status("together", stream.value or 0)

    def cuGraphExecDestroy(self, executable):
        return self.status("destroy", executable.value, self.mode)

    def cuGraphDestroy(self, graph):
        return self.status("destroy", graph.value, self.mode)

    def cuThreadExchangeStreamCaptureMode(self, mode):
        self.mode, mode._obj.value = mode._obj.value, self.mode
        return 0

    def cuLaunchKernelEx(self, config, function, arguments, extra):
        return self.status("alone", function.value)

    def asked(self, *names: str) -> list:
        return [about for about in self.log if about[0] in names]


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    assert {name for name in dir(driver) if name.startswith("cu")} == {*FUNCTIONS, "cuLaunchKernelEx"}
    now = SimpleNamespace(stream=0, capturing=False)
    monkeypatch.setattr(triton_direct, "_library", lambda: driver)
    monkeypatch.setattr(triton_direct, "_driver", lambda: driver.cuLaunchKernelEx)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: now.stream, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    monkeypatch.setattr(triton_graph, "_left", [])
    driver.now = now
    triton_direct._has_graphs.cache_clear()
    yield driver
    triton_direct._has_graphs.cache_clear()
    gc.collect()


def launches(kernels: int = 3) -> Launches:
    metadata = SimpleNamespace(num_warps=4, warp_size=32, shared=0)
    made = [
        (SimpleNamespace(metadata=metadata, function=i + 1), 5, [("tensor", 0), ("value", 8)]) for i in range(kernels)
    ]
    return Launches(0, 1, made)


def run(some: Launches, driver: Driver, times: int = 1) -> list:
    driver.log.clear()
    for _ in range(times):
        some.run([4096])
    return driver.asked("alone", "update", "together")


ALONE, TOGETHER = [("alone", 1), ("alone", 2), ("alone", 3)], [("update", 101), ("update", 102), ("update", 103)]


def test_a_chain_is_in_order_and_told_before_each_launch(driver):
    chain = Chain(driver, [Node(), Node(), Node()], 0)
    assert chain.status == 0
    assert driver.asked("add") == [("add", 101), ("add", 102, 101), ("add", 103, 102)]
    assert driver.asked("instantiate") == [("instantiate", triton_graph.RELAXED)]
    assert driver.mode == 0
    for _ in range(2):
        driver.log.clear()
        assert chain.run() == 0
        assert driver.asked("update", "together") == [*TOGETHER, ("together", 0)]


def test_a_chain_does_not_run_in_another_context(driver):
    chain = Chain(driver, [Node(), Node()], 0)
    driver.log.clear()
    for context in (None, 8):
        driver.context = context
        assert chain.run() == INVALID_CONTEXT
    assert not driver.asked("update", "together")
    assert Chain(Driver(), [Node()], 0).status == 0
    nowhere = Driver()
    nowhere.context = None
    assert Chain(nowhere, [Node()], 0).status == INVALID_CONTEXT


@pytest.mark.parametrize("failing", ["context", "create", "add", "instantiate"])
def test_what_was_made_is_destroyed_later_and_once(failing, driver):
    driver.failing = failing
    chain = Chain(driver, [Node(), Node()], 0)
    assert chain.status == 9
    driver.log.clear()
    del chain
    gc.collect()
    assert not driver.asked("destroy")
    assert room()
    assert room()
    graph = [("destroy", 1, triton_graph.RELAXED)]
    assert driver.asked("destroy") == ([] if failing == "context" else graph)


def test_an_executable_is_destroyed_before_its_graph(driver):
    Chain(driver, [Node()], 0)
    gc.collect()
    assert room()
    assert [about[1] for about in driver.asked("destroy")] == [EXECUTABLE, 1]


def test_kernels_that_run_often_become_one_launch(driver):
    some = launches()
    assert run(some, driver, OFTEN) == ALONE * OFTEN
    assert run(some, driver, 2) == [*TOGETHER, ("together", 0)] * 2
    alone = launches(LEAST - 1)
    assert all(name == "alone" for name, *_ in run(alone, driver, 2 * OFTEN))


def test_launches_follow_the_stream_and_leave_captures_alone(driver):
    some = launches()
    run(some, driver, OFTEN)
    driver.now.stream = 64
    assert run(some, driver, OFTEN) == ALONE * OFTEN
    assert run(some, driver) == [*TOGETHER, ("together", 64)]
    driver.now.capturing = True
    assert run(some, driver, 2 * OFTEN) == ALONE * 2 * OFTEN
    driver.now.capturing = False
    assert run(some, driver) == [*TOGETHER, ("together", 64)]
    driver.now.capturing = True
    fresh = launches()
    run(fresh, driver, 2 * OFTEN)
    assert fresh.chain is None


@pytest.mark.parametrize("failing", ["create", "update", "together"])
def test_what_the_driver_refuses_is_said_once_and_launched_one_by_one(failing, driver, caplog):
    some = launches()
    driver.failing = failing
    with caplog.at_level(logging.INFO):
        run(some, driver, OFTEN)
        assert run(some, driver)[-3:] == ALONE
        assert run(some, driver, 2 * OFTEN) == ALONE * 2 * OFTEN
    assert [record.message for record in caplog.records] == [
        "kernels are launched one by one: a graph of them met CUDA error 9"
    ]


def test_a_thread_without_the_context_launches_one_by_one(driver):
    some = launches()
    run(some, driver, OFTEN)
    driver.context = None
    assert run(some, driver) == ALONE
    driver.context = 7
    assert run(some, driver) == [*TOGETHER, ("together", 0)]


def test_chains_are_few(driver, monkeypatch):
    gc.collect()
    assert room()
    monkeypatch.setattr(triton_graph, "MOST", len(triton_graph._chains) + 1)
    first, second = launches(), launches()
    run(first, driver, OFTEN)
    run(second, driver, OFTEN)
    assert first.chain is not None
    assert second.chain is None
    del first
    gc.collect()
    run(second, driver, OFTEN)
    assert second.chain is not None


def test_who_wants_launches_to_wait_gets_them_one_by_one(driver, monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    some = launches()
    assert run(some, driver, 3 * OFTEN) == ALONE * 3 * OFTEN


def test_nodes_lie_as_in_cuda_h():
    names = ("function", "grid", "block", "shared", "arguments", "extra", "kernel", "context")
    assert [getattr(Node, name).offset for name in names] == [0, 8, 20, 32, 40, 48, 56, 64]
    assert ctypes.sizeof(Node) == 72
