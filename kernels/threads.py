"""A thread pool for compiled kernels that release the GIL.

Threads are Python's own, so that the pool survives what OpenMP does not: a fork (the child starts a pool of its own),
calls from several threads at once, and DataLoader workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch

GRAIN = 32768  # elements that take a thread about as long as it takes to wake it

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def run(kernel: Callable[..., None], jobs: int, *args: Any, work: int | None = None) -> None:
    """Call ``kernel(start, stop, *args)`` over parts of ``range(jobs)``, one for each of ``torch.get_num_threads()``.

    The kernel must write the results of different jobs to different places: then they do not depend on the split.
    ``work`` says how many elements the jobs compute, if these may be too few to be worth another thread.
    """
    parts = min(torch.get_num_threads(), jobs, jobs if work is None else 1 + work // GRAIN)
    if parts <= 1:
        kernel(0, jobs, *args)
        return
    bounds = [jobs * part // parts for part in range(parts + 1)]
    submit = _executor(parts - 1).submit
    pending = [submit(kernel, start, stop, *args) for start, stop in pairwise(bounds[1:])]
    try:
        kernel(bounds[0], bounds[1], *args)
    finally:  # nobody may free the arguments while a thread still writes to them
        for future in pending:
            future.exception()
    for future in pending:
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
