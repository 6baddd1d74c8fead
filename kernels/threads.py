"""A thread pool for compiled kernels that release the GIL.

Threads are Python's own, so that the pool survives what OpenMP does not: a fork (the child starts a pool of its own),
calls from several threads at once, and DataLoader workers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch

GRAIN = 32768  # elements that take a thread about as long as it takes to wake it
PIECES = 4  # for each thread

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def run(kernel: Callable[..., None], jobs: int, *args: Any, work: int | None = None) -> None:
    """Call ``kernel(start, stop, *args)`` over pieces of ``range(jobs)`` on ``torch.get_num_threads()`` threads.

    The kernel must write the results of different jobs to different places: then they do not depend on who runs what.
    Threads take pieces as they come free, because torch's own threads keep cores busy for a while after their work.
    ``work`` says how many elements the jobs compute, if these may be too few to be worth another thread.
    """
    threads = min(torch.get_num_threads(), jobs, jobs if work is None else 1 + work // GRAIN)
    if threads <= 1:
        kernel(0, jobs, *args)
        return
    count = min(jobs, PIECES * threads)
    pieces = deque(pairwise(jobs * piece // count for piece in range(count + 1)))

    def take_pieces() -> None:
        while True:
            try:
                start, stop = pieces.popleft()
            except IndexError:
                return
            kernel(start, stop, *args)

    submit = _executor(threads - 1).submit
    pending = [submit(take_pieces) for _ in range(threads - 1)]
    try:
        take_pieces()
    finally:  # nobody may free the arguments while a thread still writes to them
        running = [future for future in pending if not future.cancel()]
        for future in running:
            future.exception()
    for future in running:
        future.result()


def _executor(threads: int) -> ThreadPoolExecutor:
    """The pool, with at least this many threads."""
    global _pool, _pool_size
    if _pool is None or _pool_size < threads:
        # A smaller pool that another thread still uses finishes its work and goes with its last future.
        _pool, _pool_size = ThreadPoolExecutor(threads, thread_name_prefix="vssm-cpu"), threads
    return _pool


def _forget() -> None:
    """After a fork the child has none of the parent's threads."""
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
