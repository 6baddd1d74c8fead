"""Launching Triton kernels: cheaply, on the right device, and the launches that several ops share.

Triton's own launcher spends tens of microseconds on a kernel of sixty arguments, most of it on finding the compiled
kernel that fits them. ``launch`` remembers it: our kernels take every size and stride unspecialised, so dtypes,
alignments, constants and what is None decide.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vssm.kernels.triton_shared import clear, invert, sum_visits

log = logging.getLogger(__name__)

LARGE = 2**23  # elements of an output: from here on, finding the cells to zero is cheaper than zeroing it all
MOST = 4096  # remembered launchers: one for each kernel, kind of arguments and number of programs

_launchers: dict[tuple[Any, ...], Any] = {}
_announced = False


def launch(
    kernel: Any,
    programs: int,
    args: tuple[Any, ...],
    constants: Mapping[str, Any],
    warps: int,
    registers: int | None = None,
) -> None:
    """Run ``programs`` programs of ``kernel`` on ``args``, then its constants, which come last in its signature.

    ``registers`` bounds what a thread may take on NVIDIA GPUs, so that more programs are resident to hide latency.
    """
    tensors = tuple([None if x is None else (x.dtype, x.data_ptr() & 15) for x in args if type(x) is not int])
    wide = max([x for x in args if type(x) is int]) >= 2**31  # passed as 64 bits: another kernel
    # The kernel by its id: to hash it, Triton looks at its source.
    key = (id(kernel), programs, warps, registers, wide, args[0].device, tensors, *constants.values())
    launcher = _launchers.get(key)
    if launcher is not None and not wide:
        launcher(*args, *constants.values())
        return
    assert list(constants) == kernel.arg_names[len(args) :], f"{kernel}: constants out of order"
    start = time.perf_counter()
    options = {} if registers is None or torch.version.cuda is None else {"maxnreg": registers}
    compiled = kernel[(programs,)](*args, **constants, num_warps=warps, **options)
    _announce(time.perf_counter() - start)
    if compiled is not None:  # None from Triton's interpreter
        if len(_launchers) >= MOST:
            _launchers.clear()
        _launchers[key] = compiled[(programs, 1, 1)]


def _announce(seconds: float) -> None:
    """Say once that kernels are being compiled, if they are: one that comes from Triton's cache takes no time."""
    global _announced
    if seconds > 0.3 and not _announced:
        _announced = True
        log.warning(
            "compiling GPU kernels for shapes and dtypes not met before; Triton keeps them in its cache on disk"
        )


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one, where kernels are launched."""
    if device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def power_of_2(x: int) -> int:
    """The least power of 2 that is not less than ``x``."""
    return 1 << (x - 1).bit_length()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, or what its vendor calls them."""
    if device.type == "cpu":  # Triton's interpreter
        return 4
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.max_compute_units


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of sample, row (0 if shared) and cell; of a state (b, k, d, n) those of sample, row and channel."""
    if x is None:
        return 0, 0, 0
    stride = x.stride()
    return stride[0], stride[1] if len(stride) == 4 else 0, stride[-2]


def index_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of sample (0 if shared) and row of an index tensor (b?, k, t)."""
    if x is None:
        return 0, 0
    stride = x.stride()
    return stride[0] if len(stride) == 3 else 0, stride[-2]


def same(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether two index operands are one tensor, perhaps behind two Python objects."""
    if x is None or y is None:
        return x is y
    return x is y or (x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride())


Visits = tuple["Tensor | None", "Tensor | None"]


def visits(index: Tensor | None, cells: int, revisits: bool) -> Visits:
    """Which steps visit each cell, as ``sum_visits`` takes it: (visit, first)."""
    if index is None:
        return None, None
    if not revisits:
        visit = torch.full((*index.shape[:-1], cells), -1, dtype=torch.int32, device=index.device)
        flat = index.reshape(-1, index.shape[-1])
        blocks = flat.shape[0] * cdiv(flat.shape[1], 1024)
        launch(invert, blocks, (flat, visit, flat.shape[1], cells, flat.stride(0)), {"BLOCK": 1024}, 4)
        return visit, None
    padded = torch.where((index < 0) | (index > cells), cells, index)
    by_cell, visit = torch.sort(padded, dim=-1, stable=True)
    edges = torch.arange(cells + 1, dtype=index.dtype, device=index.device).expand(*index.shape[:-1], -1).contiguous()
    return visit.to(torch.int32), torch.searchsorted(by_cell, edges, out_int32=True)


def clear_unvisited(out: Tensor, found: Visits) -> None:
    """Zero the cells of out, (b, k, cells, columns) or (b, cells, columns), that no step visits."""
    visit, _ = found
    assert visit is not None
    cells, columns = out.shape[-2:]
    k = out.shape[1] if out.dim() == 4 else 1
    unit = min(columns & -columns, 8)
    launch(
        clear, out.shape[0] * k * cdiv(cells, 256),
        (visit, out, *index_strides(visit), k, cells, columns // unit),
        dict(UNIT=unit, BLOCK_C=256, BLOCK_E=32), 4,
    )  # fmt: skip


def sum_by_cell(
    parts: Tensor,
    found: Visits,
    out: Tensor,
    *,
    z: Tensor | None = None,
    ungated: Tensor | None = None,
    out_2: Tensor | None = None,
) -> None:
    """Sum parts, (b, k, t, columns) or (b, k, t, blocks, columns), over the visits of each cell.

    Rows are summed too if ``out`` has none. The sum is kept in ``ungated``, then gated by silu(z), where these are
    given. Columns that ``out`` has no room for go to ``out_2``.
    """
    b, k, t, *blocks, columns = parts.shape
    visit, first = found
    merge, cells = out.dim() == 3, out.shape[-2]
    parts_of_a_step = blocks[0] if blocks else 1
    divisor = columns & -columns
    block_e = min(divisor if divisor >= 32 else power_of_2(columns), 128)
    unit = min(divisor, 8)
    block_j = power_of_2(parts_of_a_step)
    block_c = max(1, 2048 // (block_e * block_j))
    programs = cdiv(columns, block_e) * cdiv(cells, block_c) * b * (1 if merge else k)
    z_b, _, z_m = strides(z)
    launch(
        sum_visits, programs,
        (parts, visit, first, z, ungated, out, out_2, z_b, z_m, *index_strides(visit), *index_strides(first),
         t, parts_of_a_step, columns // unit, cells, out.shape[-1]),
        dict(K=k, MERGE=merge, UNIT=unit, BLOCK_C=block_c, BLOCK_J=block_j, BLOCK_E=block_e), 4,
    )  # fmt: skip


def parameter_grad(summed: Tensor, x: Tensor | None, dims: int) -> Tensor | None:
    """The gradient of a parameter that has ``dims`` axes with its rows, from that of each row.

    It is contiguous and a tensor of its own: outputs of a custom op must not share memory.
    """
    if x is None:
        return None
    return summed.clone(memory_format=torch.contiguous_format) if x.dim() == dims else summed.sum(0).contiguous()
