"""Several kernels as one launch: a CUDA graph that is told at each call where their arguments stand.

A launch takes the driver 4 to 6 µs. A graph takes it 2 to 4, and 1 more for each kernel that it tells of its arguments;
the device goes from kernel to kernel sooner. What it is told counts for later launches alone, so calls do not wait for
one another.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

INVALID_CONTEXT = 201
FUNCTIONS = (
    "cuCtxGetCurrent",
    "cuGraphCreate",
    "cuGraphAddKernelNode_v2",
    "cuGraphInstantiateWithFlags",
    "cuGraphExecKernelNodeSetParams_v2",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
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
    """

    def __init__(self, library: Any, nodes: Sequence[Node], stream: int) -> None:
        self.library, self.stream = library, stream
        self.graph, self.executable = ctypes.c_void_p(), ctypes.c_void_p()
        self.status = library.cuGraphCreate(ctypes.byref(self.graph), 0)
        handles: list[ctypes.c_void_p] = []
        for node in nodes:
            before, handle = (ctypes.c_void_p * 1)(handles[-1] if handles else None), ctypes.c_void_p()
            self.status = self.status or library.cuGraphAddKernelNode_v2(
                ctypes.byref(handle), self.graph, before, ctypes.c_size_t(len(handles[-1:])), ctypes.byref(node)
            )
            handles.append(handle)
        self.status = self.status or library.cuGraphInstantiateWithFlags(
            ctypes.byref(self.executable), self.graph, ctypes.c_ulonglong(0)
        )
        self.nodes = nodes
        self.context, self.seen = ctypes.c_void_p(), ctypes.c_void_p()
        library.cuCtxGetCurrent(ctypes.byref(self.context))
        self.current, self.where = library.cuCtxGetCurrent, ctypes.byref(self.seen)
        self.tell, self.start = library.cuGraphExecKernelNodeSetParams_v2, library.cuGraphLaunch
        self.told = [(self.executable, handle, ctypes.byref(node)) for handle, node in zip(handles, nodes)]
        self.started = (self.executable, ctypes.c_void_p(stream))

    def run(self) -> int:
        """Run the kernels on what their arguments are now; the driver's status, 0 if they run."""
        self.current(self.where)
        if self.seen.value != self.context.value:  # where the driver would crash
            return INVALID_CONTEXT
        for told in self.told:
            if status := self.tell(*told):
                return int(status)
        return int(self.start(*self.started))

    def __del__(self) -> None:
        if self.executable:
            self.library.cuGraphExecDestroy(self.executable)
        if self.graph:
            self.library.cuGraphDestroy(self.graph)
