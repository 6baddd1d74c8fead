"""Models timed one after another, or several made ready at once, each in a process of its own.

torch.compile takes minutes of a processor where the measurement takes seconds of a GPU. Only one process a GPU measures
at a time, on cores that the others leave alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vssm.cli._benchmark_models import Turns, compiler, measure

QUIET_CORES = 4  # a GPU: of the process that measures


class SharedTurns(Turns):
    """One process of several is timed at a time, on cores that the others leave; all but eager ones when none compiles.

    Args:
        lock: A file for this GPU; a second one beside it is held by those who compile.
        quiet, rest: Cores of the process that is timed, and of the others.
        until: When to stop waiting for the others' compilations, in seconds of ``time.monotonic``.
    """

    def __init__(self, lock: str, quiet: Sequence[int], rest: Sequence[int], until: float):
        self.lock, self.quiet, self.rest, self.until = lock, quiet, rest, until

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        import fcntl

        with open(f"{self.lock}.compiling", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    @contextlib.contextmanager
    def alone(self, mode: str) -> Iterator[None]:
        import fcntl

        torch.cuda.synchronize()
        with open(f"{self.lock}.compiling", "a") as others, open(self.lock, "a") as lock:
            while mode != "eager" and time.monotonic() < self.until:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(others, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    fcntl.flock(others, fcntl.LOCK_UN)
                    break
                time.sleep(0.2)
            fcntl.flock(lock, fcntl.LOCK_EX)
            _move(self.quiet)
            try:
                yield
            finally:
                _move(self.rest)


def models(
    names: Sequence[str], modes: Sequence[str], dtype: torch.dtype, coreless: bool, jobs: int, limit: float
) -> Iterator[dict[str, Any]]:
    """Rows of all models, as they come; ``jobs`` models are made ready at once, each within ``limit`` seconds."""
    if jobs == 1:
        with compiler():
            for name in names:
                yield from measure(name, modes, dtype, coreless, Turns())
        return
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    cores = sorted(os.sched_getaffinity(0))
    rows: queue.Queue[dict[str, Any] | None] = queue.Queue()
    futures = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        for i, name in enumerate(names):
            place = i % len(gpus)
            quiet = cores[place * QUIET_CORES : (place + 1) * QUIET_CORES]
            rest = cores[len(gpus) * QUIET_CORES :]
            job = {
                "name": name,
                "modes": list(modes),
                "dtype": str(dtype).removeprefix("torch."),
                "coreless": coreless,
                "turns": {
                    "lock": str(Path(folder, gpus[place])),
                    "quiet": quiet if rest else cores,
                    "rest": rest or cores,
                    "until": time.monotonic() + 0.75 * limit,
                },
            }
            threads = max(2, len(rest) // min(jobs, len(names)))
            futures.append(pool.submit(_process, job, gpus[place], threads, limit, rows))
        left = len(names)
        while left:
            row = rows.get()
            left -= row is None
            if row is not None:
                yield row
        for future in futures:
            future.result()  # a process that could not be started is an error


def _process(
    job: dict[str, Any], gpu: str, threads: int, limit: float, rows: queue.Queue[dict[str, Any] | None]
) -> None:
    """Run a model's process, which compiles with so many threads, and pass its rows on.

    What it failed to report becomes a row too.
    """
    root = str(Path(__file__).parents[2])
    path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": str(threads)} | os.environ
    environment |= {"CUDA_VISIBLE_DEVICES": gpu, "PYTHONPATH": os.pathsep.join(path)}
    missing, said = list(job["modes"]), ""
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(job)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        late = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        for line in process.stdout or ():
            if line.startswith('{"model"'):
                rows.put(json.loads(line))
                missing.pop(0)
            elif line.strip():
                said = line.strip()
        status = process.wait()
        late.cancel()
        why = f"not done after {limit:.0f} s" if status == -signal.SIGKILL else f"exit status {status}: {said[:300]}"
        for mode in missing:
            rows.put({"model": job["name"], "mode": mode + " without core" * job["coreless"], "error": why})
    finally:
        rows.put(None)


def _move(cores: Sequence[int]) -> None:
    """Every thread of this process, autograd's too."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


def _main(job: dict[str, Any]) -> None:
    turns = SharedTurns(**job["turns"])
    _move(turns.rest)
    with compiler():
        for row in measure(job["name"], job["modes"], getattr(torch, job["dtype"]), job["coreless"], turns):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
