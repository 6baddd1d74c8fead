"""The CPU's scans beside ``torch.exp`` of as many float32 values as they have states: a yardstick on any machine."""

from __future__ import annotations

import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

CASES = {"vim_s_224": (8, 384, 197, 16), "long_row": (1, 384, 3136, 16)}  # batch, channels, length, states
BACKENDS = ("cpu", "torch")
SECONDS = 1.0  # of measuring, for each call


def cpu(names: list[str], dtype: torch.dtype, args: object) -> Iterator[dict[str, Any]]:
    """Each case with each backend, in multiples of the yardstick."""
    del dtype, args
    for name in names:
        b, d, l, n = CASES[name]
        values = torch.randn(b * d * l * n)
        out = torch.empty_like(values)
        calls: dict[str, Callable[[], object]] = {"exp": partial(torch.exp, values, out=out)}
        for backend in BACKENDS:
            forward, both = _scan(b, d, l, n, backend)
            calls |= {f"{backend} forward": forward, f"{backend} both": both}
        ms = _together(calls)
        row: dict[str, Any] = {"case": name, "threads": torch.get_num_threads(), "exp ms": ms["exp"]}
        yield row | {f"{call} x": ms[call] / ms["exp"] for call in calls if call != "exp"}


def share_of_scan(model: str = "vmamba_tiny", size: int = 224) -> float:
    """The part of a model's inference on one image that its selective scans take."""
    import vssm
    from vssm.layers import ssm

    network = vssm.create_model(model).eval()
    image = torch.randn(1, 3, size, size)
    scan, spent = ssm.selective_scan, 0.0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        result = scan(*args, **kwargs)
        spent += time.perf_counter() - start
        return result

    with torch.inference_mode(), unittest.mock.patch.object(ssm, "selective_scan", watched):
        network(image)
        spent, start = 0.0, time.perf_counter()
        for _ in range(5):
            network(image)
        return spent / (time.perf_counter() - start)


def _scan(b: int, d: int, l: int, n: int, backend: str) -> tuple[Callable[[], object], Callable[[], object]]:
    from vssm.kernels import selective_scan

    operands = {
        "u": torch.randn(b, l, d),
        "delta": torch.rand(b, l, d) * 0.1,
        "A": -torch.rand(d, n) - 0.5,
        "B": torch.randn(b, l, n),
        "C": torch.randn(b, l, n),
        "D": torch.ones(d),
    }
    trained = {name: x.clone().requires_grad_() for name, x in operands.items()}
    grad = torch.randn(b, l, d)

    def forward(on: dict[str, Tensor] = operands) -> Tensor:
        return selective_scan(**on, merge="sum", backend=backend)[0]  # type: ignore[arg-type]

    def both() -> object:
        return torch.autograd.grad(forward(trained), list(trained.values()), grad)

    return forward, both


def _together(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    stop = time.perf_counter() + SECONDS * len(calls)
    while time.perf_counter() < stop or min(map(len, times.values())) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(taken) for name, taken in times.items()}
