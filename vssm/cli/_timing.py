"""Timing on a GPU: medians of device time, over inputs that change, with or without the cost of launching; CPU time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import torch

ROUND = 20  # calls of the CPU timed at once


class Timing(NamedTuple):
    """Milliseconds a call, medians: as a user calls it (launches included where the GPU waits for them), and replayed.

    The first is measured by Triton's ``do_bench``, as the published figures are: events around each call, the L2 cache
    flushed before it, no synchronisation between calls. The second is a replay of a CUDA graph.
    """

    called: float
    device: float


def timed(call: Callable[[Any], object], inputs: Sequence[Any], *, seconds: float = 0.4) -> Timing:
    """Time ``call`` over ``inputs`` in turn, so that one call does not find its inputs in the cache."""
    from triton.testing import do_bench

    for x in inputs:  # compiles, and warms the allocator
        call(x)
    turn = cycle(inputs)
    called = do_bench(lambda: call(next(turn)), rep=int(seconds * 1000), return_mode="median")
    graph = captured(lambda: [call(x) for x in inputs])
    replayed = _measure(graph.replay, len(inputs), seconds)
    return Timing(called, statistics.median(replayed))


def cpu_microseconds(calls: Mapping[str, Callable[[], object]], *, seconds: float) -> dict[str, tuple[float, float]]:
    """What calls cost the CPU that only queues work for the GPU: the median of rounds of each, and the least.

    They take turns, since a machine that others use is at times twice as slow for as long as a second.
    """
    for call in calls.values():
        for _ in range(10):
            call()
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        for name, call in calls.items():
            torch.cuda.synchronize()  # the queue, of a thousand launches, never fills
            start = time.perf_counter()
            for _ in range(ROUND):
                call()
            rounds[name].append((time.perf_counter() - start) / ROUND * 1e6)
    torch.cuda.synchronize()
    return {name: (statistics.median(taken), min(taken)) for name, taken in rounds.items()}


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``call`` as a CUDA graph; its launches cost nothing when it is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _measure(call: Callable[[], object], count: int, seconds: float) -> list[float]:
    """Milliseconds of one of ``count`` calls."""
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or (len(times) < 200 and time.perf_counter() < stop):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / count)
    return times


def peak_megabytes(call: Callable[[], object]) -> float:
    """Device memory that ``call`` takes at its peak beyond what is held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 1e6
