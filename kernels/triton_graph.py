"""Several kernels as one launch: a CUDA graph that is told at each call where their arguments stand.

A launch takes the driver 4 to 6 µs. A graph takes it 2 to 4, and 1 more for each kernel that it tells of its arguments;
the device goes from kernel to kernel sooner. What it is told counts for later launches alone, so calls do not wait for
one another. A graph takes 0.12 MB of the device's memory, which PyTorch does not count. Nsight Systems shows kernels of
graphs with ``--cuda-graph-trace=node``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

MOST = 256  # graphs at a time
INVALID_CONTEXT = 201
RELAXED = 2  # mode of capture
FUNCTIONS = (
    "cuCtxGetCurrent",
    "cuGraphAddKernelNode_v2",
    "cuGraphCreate",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphExecKernelNodeSetParams_v2",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuThreadExchangeStreamCaptureMode",
)


class Node(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS of cuda.h, version 2."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


class Chain:
    """A graph of kernels that run one after another, on one stream; not while that is captured.

    Args:
        library: NVIDIA's driver.
        nodes: The kernels, with addresses of arguments that outlive the graph.
        stream: The stream's handle.

    Attributes:
        status: The driver's, 0 if the graph was made.
    """

    def __init__(self, library: Any, nodes: Sequence[Node], stream: int) -> None:
        self.library = library
        self.graph, self.executable = ctypes.c_void_p(), ctypes.c_void_p()
        self.context, self.current = ctypes.c_void_p(), ctypes.c_void_p()
        self.current_at = ctypes.byref(self.current)
        self.update, self.launch = library.cuGraphExecKernelNodeSetParams_v2, library.cuGraphLaunch
        self.updates: list[tuple[Any, ...]] = []
        self.status = 0
        with _relaxed(library):
            self._make(nodes)
        self.move(stream)
        _chains.add(self)

    def _make(self, nodes: Sequence[Node]) -> None:
        def call(name: str, *arguments: Any) -> None:
            self.status = self.status or getattr(self.library, name)(*arguments)

        call("cuCtxGetCurrent", ctypes.byref(self.context))
        if not self.context:
            self.status = self.status or INVALID_CONTEXT
        call("cuGraphCreate", ctypes.byref(self.graph), 0)
        before: list[ctypes.c_void_p] = []
        for node in nodes:
            handle, needed = ctypes.c_void_p(), (ctypes.c_void_p * len(before))(*before)
            count, about = ctypes.c_size_t(len(before)), ctypes.byref(node)
            call("cuGraphAddKernelNode_v2", ctypes.byref(handle), self.graph, needed, count, about)
            self.updates.append((self.executable, handle, about))
            before = [handle]
        call("cuGraphInstantiateWithFlags", ctypes.byref(self.executable), self.graph, ctypes.c_ulonglong(0))

    def move(self, stream: int) -> None:
        """Run on another stream from here on; behind what the graph does on this one."""
        self.stream, self.launched = stream, (self.executable, ctypes.c_void_p(stream))

    def run(self) -> int:
        """Run the kernels on what their arguments are now; the driver's status, 0 if they run, and else none does."""
        self.library.cuCtxGetCurrent(self.current_at)
        if self.current.value != self.context.value:  # the driver would crash
            return INVALID_CONTEXT
        for update in self.updates:
            if status := self.update(*update):
                return int(status)
        return int(self.launch(*self.launched))

    def __del__(self) -> None:  # at any time, in any thread
        _left.append((self.library, self.executable, self.graph))


_chains: WeakSet[Chain] = WeakSet()
_left: list[tuple[Any, ctypes.c_void_p, ctypes.c_void_p]] = []  # of chains that are gone


def room() -> bool:
    """Whether one more graph may be made; destroys what is left of those that are gone."""
    while _left:
        library, executable, graph = _left.pop()
        with _relaxed(library):
            if executable:
                library.cuGraphExecDestroy(executable)
            if graph:
                library.cuGraphDestroy(graph)
    return len(_chains) < MOST


@contextmanager
def _relaxed(library: Any) -> Iterator[None]:
    """Let this thread allocate and destroy while a stream is captured, which would else be spoilt."""
    mode = ctypes.c_int(RELAXED)
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
