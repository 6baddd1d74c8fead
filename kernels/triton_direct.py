"""Launching compiled kernels through NVIDIA's driver itself, in a fraction of a microsecond each.

Triton's launcher reads all arguments of a kernel, sixty here, at each launch. Those of a call that is repeated differ
in the addresses of its tensors alone, so they stand in memory once, as the driver reads them: sizes and strides as they
were, addresses in a table that all kernels of the call share. A call then fills the table, and names each kernel. What
is called often and runs several kernels becomes one launch of them all (``triton_graph``).

Profilers that watch the device or the driver see these launches; hooks on Triton's launcher (Proton's) do not.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from vssm.kernels.triton_graph import FUNCTIONS, INVALID_CONTEXT, Chain, Node, room

log = logging.getLogger(__name__)

LEAST = 2  # kernels that a graph is made of, at least
OFTEN = 10  # runs before it is made: making it takes 40 µs, and it saves 3 to 8 a run
Argument = tuple[str, int]  # ("tensor", its number) or ("value", an integer)
WIDTHS = {"i32": "u32", "u32": "u32", "i64": "u64", "u64": "u64"}  # Triton's types and PTX's


class Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


class Launches:
    """Kernels to run one after another on ``count`` tensors, whose addresses come with each call."""

    def __init__(self, device: int, count: int, kernels: Sequence[tuple[Any, int, list[Argument]]]) -> None:
        self.device = device
        self.table = (ctypes.c_uint64 * count)()
        self.fill = struct.Struct(f"={count}Q").pack_into
        self.stream = 0
        self.lock = threading.Lock()  # the table is that of one call at a time
        self.start = _driver()
        self.configs: list[Config] = []
        self.launches: list[tuple[ctypes.c_void_p, ...]] = []
        self.nodes: list[Node] = []  # none if there is to be no chain
        self.chain: Chain | None = None
        self.runs = 0  # one by one, since a chain was last thought of
        self.kept: list[Any] = []  # what addresses point to
        table = ctypes.addressof(self.table)
        for compiled, programs, arguments in kernels:
            grid, block = (programs, 1, 1), (compiled.metadata.num_warps * compiled.metadata.warp_size, 1, 1)
            config = Config(grid, block, compiled.metadata.shared, None, None, 0)
            values = (ctypes.c_int64 * len(arguments))(*(0 if kind == "tensor" else x for kind, x in arguments))
            places = (ctypes.c_void_p * len(arguments))(
                *(
                    table + 8 * x if kind == "tensor" else ctypes.addressof(values) + 8 * i
                    for i, (kind, x) in enumerate(arguments)
                )
            )
            self.configs.append(config)
            self.kept += [compiled, values, places]
            passed = (ctypes.addressof(config), compiled.function, ctypes.addressof(places), None)
            self.launches.append(tuple([ctypes.c_void_p(x) for x in passed]))
            if len(kernels) >= LEAST and _has_graphs():
                self.nodes.append(Node(compiled.function, grid, block, config.shared, ctypes.addressof(places)))

    def run(self, addresses: Sequence[int]) -> None:
        """Run the kernels on the current stream of the device, which is the current one."""
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        # The default stream is never captured.
        captured = stream != 0 and torch.cuda.is_current_stream_capturing()
        start = self.start
        with self.lock:
            self.fill(self.table, 0, *addresses)
            chain = self.chain
            if chain is not None and chain.stream == stream and not captured:
                status = chain.run()
                if not status:
                    return
                if status != INVALID_CONTEXT:
                    self._part(status)
            if stream != self.stream:
                self.stream = stream
                for config in self.configs:
                    config.stream = stream
            for launch in self.launches:
                status = start(*launch)
                if status:
                    _again(self.device, partial(start, *launch), status)
            if self.nodes and not captured:
                self.runs += 1
                if self.runs >= OFTEN:
                    self.runs = 0
                    self._join(stream)

    def _join(self, stream: int) -> None:
        """Make the kernels one launch on ``stream`` from the next call on, if the driver can and there is room."""
        if self.chain is not None:
            self.chain.move(stream)
        elif room():
            self.chain = Chain(_library(), self.nodes, stream)
            if self.chain.status:
                self._part(self.chain.status)

    def _part(self, status: int) -> None:
        """Have no chain any more: the driver refused it."""
        log.info("kernels are launched one by one: a graph of them met CUDA error %d", status)
        self.chain, self.nodes = None, []


def arguments(compiled: Any, args: Sequence[Any], numbers: Callable[[Any], int]) -> list[Argument] | None:
    """What the driver has to be given for ``args``, tensors by their numbers; None if Triton must launch the kernel.

    The parameters that the kernel declares decide: pointers and integers that are not constants, in order, and two
    pointers to memory that Triton provides to kernels that need it, as ours do not.
    """
    about = compiled.metadata
    special = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    if _driver() is None or about.num_ctas != 1 or any(getattr(about, name, 0) for name in special):
        return None
    entry = re.search(r"\.entry\s+\w+\(([^)]*)\)", compiled.asm.get("ptx", ""))
    if entry is None or about.target.backend != "cuda" or about.shared > 227 * 1024:
        return None
    passed: list[Argument] = []
    widths = []
    for x, kind in zip(args, compiled.src.signature.values(), strict=True):
        if kind == "constexpr":
            continue
        if isinstance(x, torch.Tensor) and kind.startswith("*"):
            passed.append(("tensor", numbers(x)))
            widths.append("u64")
        elif type(x) is int and kind in WIDTHS:
            passed.append(("value", x))
            widths.append(WIDTHS[kind])
        else:
            return None
    if re.findall(r"\.param\s+\.(\w+)", entry[1]) != [*widths, "u64", "u64"]:
        return None
    return [*passed, ("value", 0), ("value", 0)]


@cache
def _library() -> Any:
    if torch.version.cuda is None:
        return None
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@cache
def _driver() -> Any:
    """cuLaunchKernelEx(config, function, arguments, extra), of void pointers; None where the driver has none."""
    return getattr(_library(), "cuLaunchKernelEx", None)


@cache
def _has_graphs() -> bool:
    """Whether the driver can make graphs, and nobody asks for launches that wait until it is clear which one failed."""
    waiting = os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0"
    return not waiting and all(hasattr(_library(), name) for name in FUNCTIONS)


def _again(device: int, launch: Callable[[], int], status: int) -> None:
    """Launch again after a refusal where the device's context was not yet that of this thread."""
    library = _library()
    if status == INVALID_CONTEXT:
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        library.cuDeviceGet(ctypes.byref(handle), device)
        library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
        library.cuCtxSetCurrent(context)
        status = launch()
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(text))
        said = (text.value or b"unknown").decode()
        raise RuntimeError(f"CUDA error {status} at the launch of a kernel: {said}")
