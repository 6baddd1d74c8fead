"""Tables as tensors: ``scan_table``, its cache of tensors, and the op ``vssm::scan_table``.

In eager mode a table is a cached tensor. Whatever traces a model gets the op instead, whose shape follows from the
grid alone: a traced tensor must not enter the cache, nor a cached one the graph, and sizes may be symbolic there.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from vssm.scans.registry import Grid, Option, Options, check_grid, check_options, find_scan, scan_array, scan_shape

CACHE_BYTES = 2**28  # of tables; the oldest are dropped and made again when asked for

Key = tuple[str, Grid, torch.device, bool, Options]
_tables: dict[Key, Tensor] = {}  # oldest first
_captured: dict[int, Tensor] = {}  # CUDA graphs hold their addresses: they are never dropped


def scan_table(
    name: str,
    grid: Sequence[int],
    device: torch.device | str | int | None = None,
    *,
    middle_token: bool = False,
    **options: Option,
) -> Tensor:
    """The table of a scan order as an int32 tensor, (K, T): row k reads cell ``table[k, t]`` at step t.

    Cells count row by row from 0; the number after the last cell is padding. The tensor is shared by all callers: do
    not write into it. FX sees a leaf, ``torch.compile`` and ``torch.export`` see the op ``vssm::scan_table``, also when
    sizes are symbolic.

    Args:
        name: One of ``list_scans()``.
        grid: Sizes of the grid, (H, W) or (D, H, W).
        device: Where the table lies, by default the CPU.
        middle_token: Add a token to the L patches, as Vim does. It is cell p = L // 2; patch i is cell i before it and
            cell i + 1 behind it. Rows of the first half of K read it after p steps, the others p steps before their
            end, which keeps a path and its reverse each other's reverse. (p = T // 2 for rows that skip cells.)
        **options: The order's own, such as ``window=7``.

    Raises:
        ValueError: If there is no such order or option, or the order cannot read this grid.

    >>> scan_table("bidirectional", (1, 3))
    tensor([[0, 1, 2],
            [2, 1, 0]], dtype=torch.int32)
    >>> scan_table("bidirectional", (1, 3), middle_token=True)              # the token is cell 1
    tensor([[0, 1, 2, 3],
            [3, 2, 1, 0]], dtype=torch.int32)
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        device = torch.device("cpu" if device is None else device)
        return torch.ops.vssm.scan_table(name, list(grid), device, middle_token, _written(options))
    if (tracer := _fx_tracer(grid, device)) is not None:
        named = {"middle_token": middle_token, **options}
        return tracer.create_proxy("call_function", scan_table, (name, grid, device), named)  # type: ignore[return-value]
    return _cached(name, tuple(grid), torch.device("cpu" if device is None else device), middle_token, options)


def _fx_tracer(grid: Sequence[int], device: object) -> torch.fx.proxy.TracerBase | None:
    """The tracer of ``torch.fx.symbolic_trace``, if the grid or the device is one of its proxies or holds one."""
    for value in (grid, device) if isinstance(grid, torch.fx.Proxy) else (*grid, device):
        if isinstance(value, torch.fx.Proxy):
            return value.tracer
    return None


def _cached(name: str, grid: Grid, device: torch.device, middle_token: bool, options: dict[str, Option]) -> Tensor:
    scan = find_scan(name)
    chosen = check_options(scan, options)
    table = _tables.get((name, grid, device, middle_token, chosen))
    if table is None:
        device = torch.empty(0, device=device).device  # "cuda" is now cuda:0
        key = (name, check_grid(scan, grid), device, bool(middle_token), chosen)
        table = _tables.get(key)
        if table is None:
            table = _make(key)
    if table.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[id(table)] = table
    return table


def _make(key: Key) -> Tensor:
    """Make a table and keep it, dropping the oldest ones where there are too many."""
    name, grid, device, middle_token, options = key
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"scan_table: the first table of {name!r} for {grid} cannot be copied to the device while a CUDA graph is "
            "captured; run the model once on this size before"
        )
    array = scan_array(name, grid, **dict(options))
    array = _with_middle_token(array, math.prod(grid)) if middle_token else array.copy()
    # A fresh thread has none of the caller's modes (inference, fake, functorch, default device, memory pool of a CUDA
    # graph), each of which would leave its mark on a tensor that outlives it.
    with ThreadPoolExecutor(max_workers=1) as thread:
        table = thread.submit(lambda: torch.from_numpy(array).to(device)).result()
    table = _tables.setdefault(key, table)  # another thread may have been faster
    _drop_oldest()
    return table


def _drop_oldest() -> None:
    """Keep the cache within ``CACHE_BYTES``, as an image of any size brings its own tables."""
    kept = [(key, table.nbytes) for key, table in list(_tables.items())]
    excess = sum(size for _, size in kept) - CACHE_BYTES
    for key, size in kept[:-1]:
        if excess <= 0:
            return
        if key[2].type not in ("cpu", "meta"):
            torch.accelerator.synchronize(key[2])  # another stream may still be reading it
        _tables.pop(key, None)
        excess -= size


def _with_middle_token(array: np.ndarray, cells: int) -> np.ndarray:
    k, t = array.shape
    token, step = cells // 2, min(cells, t) // 2  # rows that skip cells have their own middle
    shifted = array + (array >= token).astype(np.int32)
    rows = [np.insert(row, step if 2 * i < k else t - step, token) for i, row in enumerate(shifted)]
    return np.stack(rows)


def _written(options: dict[str, Option]) -> str:
    """Options as the op takes them: one string."""
    return repr(sorted(options.items()))


@torch.library.custom_op(
    "vssm::scan_table",
    mutates_args=(),
    schema="(str name, SymInt[] grid, Device device, bool middle_token, str options) -> Tensor",
)
def _scan_table_op(name: str, grid: Sequence[int], device: torch.device, middle_token: bool, options: str) -> Tensor:
    # A copy: a compiler may reuse the memory of what an op returns.
    return _cached(name, tuple(grid), device, middle_token, dict(ast.literal_eval(options))).clone()


@_scan_table_op.register_fake
def _(name: str, grid: Sequence[int], device: torch.device, middle_token: bool, options: str) -> Tensor:
    shape = scan_shape(name, grid, middle_token=middle_token, **dict(ast.literal_eval(options)))
    return torch.empty(shape, dtype=torch.int32, device=device)
