"""Launching Triton kernels: cheaply, on the right device, and the launches that several ops share.

Triton's own launcher spends tens of microseconds on a kernel of sixty arguments, most of it on finding the compiled
kernel that fits them. ``launch`` remembers it: our kernels take every size and stride unspecialised, so dtypes,
alignments, constants and what is None decide.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vssm.kernels.kinds import Kind
from vssm.kernels.operands import is_fleeting
from vssm.kernels.triton_replay import Recipe, alignment, empty, follow, note
from vssm.kernels.triton_shared import clear, invert, sum_parameters, sum_visits

log = logging.getLogger(__name__)

LARGE = 2**23  # elements of an output: from here on, finding the cells to zero is cheaper than zeroing it all
MOST = 4096  # remembered kernels: one for each kind of arguments
TABLES = 64  # tables whose inverse is remembered

_compiled: dict[tuple[Any, ...], Any] = {}
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
    # The kernel by its id: to hash it, Triton looks at its source. Tensors are passed as addresses: Triton would ask
    # the driver about each of them.
    key: list[Any] = [id(kernel), warps, registers, args[0].device, *constants.values()]
    plain: list[Any] = []
    wide = False
    for x in args:
        if type(x) is int:
            wide |= x >= 2**31  # passed as 64 bits: another kernel
        elif x is None:
            key.append(None)
        else:
            key.append(x.dtype)
            x = x.data_ptr()
            key.append(x & 15)
        plain.append(x)
    known = tuple(key)
    compiled = None if wide else _compiled.get(known)
    if compiled is not None:
        note(compiled, programs, (*args, *constants.values()))
        compiled[programs, 1, 1](*plain, *constants.values())
        return
    assert list(constants) == kernel.arg_names[len(args) :], f"{kernel}: constants out of order"
    start = time.perf_counter()
    options = {} if registers is None or torch.version.cuda is None else {"maxnreg": registers}
    compiled = kernel[(programs,)](*args, **constants, num_warps=warps, **options)
    _announce(time.perf_counter() - start)
    note(None if wide else compiled, programs, (*args, *constants.values()))
    if compiled is not None and not wide:  # None from Triton's interpreter
        if len(_compiled) >= MOST:
            _compiled.clear()
        _compiled[known] = compiled


def _announce(seconds: float) -> None:
    """Say once that kernels are being compiled, if they are: one that comes from Triton's cache takes no time."""
    global _announced
    if seconds > 0.3 and not _announced:
        _announced = True
        log.warning(
            "compiling GPU kernels for shapes and dtypes not met before; Triton keeps them in its cache on disk"
        )


def is_current(device: torch.device) -> bool:
    """Whether kernels are launched on ``device`` as it is."""
    if device.type == "cuda":
        return torch.cuda.current_device() == device.index
    # The CPU stands for Triton's interpreter.
    return device.type == "cpu" or torch.get_device_module(device).current_device() == device.index


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one, where kernels are launched."""
    return nullcontext() if is_current(device) else torch.get_device_module(device).device(device)


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


class Visits:
    """Which steps visit each cell, as ``sum_visits`` takes it; of a table at ``address`` in ``version``, if remembered.

    Attributes:
        visit: The step that visits each cell, or, with ``first``, all steps ordered by cell; None: step t cell t.
        first: Where the steps of each cell begin.
        complete: Every row is known to visit every cell.
        tensors: ``visit`` and ``first``.
        addresses: Of those that are not None.
    """

    __slots__ = ("__weakref__", "address", "addresses", "complete", "first", "tensors", "version", "visit")

    def __init__(self, visit: Tensor | None, first: Tensor | None, complete: bool) -> None:
        self.visit, self.first, self.complete = visit, first, complete
        self.tensors = visit, first
        self.addresses = [x.data_ptr() for x in self.tensors if x is not None]
        self.address, self.version = 0, -1


WHOLE, UNKNOWN = Visits(None, None, True), Visits(None, None, False)
_inverses: OrderedDict[tuple[Any, ...], tuple[Tensor, Visits]] = OrderedDict()
_captured: dict[int, Visits] = {}  # CUDA graphs read these as long as they live, which nobody can know


def visits(index: Tensor | None, cells: int, revisits: bool) -> Visits:
    """The inverse of a table; remembered, with its table, if that is shared by the samples."""
    if index is None:
        return WHOLE
    if is_fleeting() or index.dim() == 3 or index.is_inference() or index.device.type == "cpu":
        return _inverse(index, cells, revisits)
    # Its address is not another's as long as the table is kept.
    key = (index.data_ptr(), index.shape, index.stride(), cells, revisits)
    _, found = _inverses.get(key, (None, None))
    capturing = index.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if found is not None and found.version == index._version:
        if capturing:
            _captured[id(found)] = found
        return found
    inverse = _inverse(index, cells, revisits)
    if capturing:
        return inverse  # it lies in the graph's memory
    if inverse.visit is not None and inverse.first is None:  # waits for the device, as other streams may use it
        inverse.complete = bool((inverse.visit >= 0).all())
    elif inverse.first is not None:
        inverse.first[..., :1].tolist()
    inverse.address, inverse.version = index.data_ptr(), index._version
    _inverses[key] = index, inverse
    if len(_inverses) > TABLES:
        _inverses.popitem(last=False)
    return inverse


class Shortcut(NamedTuple):
    """The recipe of calls of one kind whose tensors are aligned alike, and what to find before it is followed."""

    recipe: Recipe
    aligned: tuple[int, ...] | None
    table: int  # its place among the tensors
    found: weakref.ref[Visits] | None  # its inverse, remembered

    def follow(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """The results for ``tensors``, operands first; None if they must be found the long way."""
        addresses = [x.data_ptr() for x in tensors if x is not None]
        device = self.recipe.device.index
        if torch._C._cuda_getDevice() != device:
            return None
        if self.found is not None:
            found, table = self.found(), tensors[self.table]
            if found is None or table is None or table.data_ptr() != found.address or table._version != found.version:
                return None
            addresses += found.addresses
            # No graph is captured on the default stream.
            if torch._C._cuda_getCurrentRawStream(device) and torch.cuda.is_current_stream_capturing():
                _captured[id(found)] = found
        return follow(self.recipe, addresses) if alignment(addresses) == self.aligned else None


def shorten(kind: Kind, name: Hashable, found: Visits, recipe: Recipe, aligned: tuple[int, ...] | None) -> None:
    """Make the shortcut of a kind whose cells are named by one table, if that is remembered, or by none."""
    if kind.one_table and (found is WHOLE or found.version >= 0):
        at = None if found is WHOLE else weakref.ref(found)
        kind.shortcuts[name] = Shortcut(recipe, aligned, kind.rules.table, at)


def _inverse(index: Tensor, cells: int, revisits: bool) -> Visits:
    if not revisits:
        visit = torch.full((*index.shape[:-1], cells), -1, dtype=torch.int32, device=index.device)
        flat = index.reshape(-1, index.shape[-1])
        blocks = flat.shape[0] * cdiv(flat.shape[1], 1024)
        launch(invert, blocks, (flat, visit, flat.shape[1], cells, flat.stride(0)), {"BLOCK": 1024}, 4)
        return Visits(visit, None, False)
    padded = torch.where((index < 0) | (index > cells), cells, index)
    by_cell, visit = torch.sort(padded, dim=-1, stable=True)
    edges = torch.arange(cells + 1, dtype=index.dtype, device=index.device).expand(*index.shape[:-1], -1).contiguous()
    return Visits(visit.to(torch.int32), torch.searchsorted(by_cell, edges, out_int32=True), False)


def clear_unvisited(out: Tensor, found: Visits) -> None:
    """Zero the cells of out, (b, k, cells, columns) or (b, cells, columns), that no step visits."""
    visit = found.visit
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
    out_2: Tensor | None = None,
) -> None:
    """Sum parts, (b, k, t, columns) or (b, k, t, blocks, columns), over the visits of each cell.

    Rows are summed too if ``out`` has none. The sum is gated by silu(z), if given. Columns that ``out`` has no room for
    go to ``out_2``.
    """
    b, k, t, *blocks, columns = parts.shape
    visit, first = found.tensors
    merge, cells = out.dim() == 3, out.shape[-2]
    parts_of_a_step = blocks[0] if blocks else 1
    divisor = columns & -columns
    block_e = min(power_of_2(columns) if columns <= 128 or divisor < 32 else divisor, 128)
    unit = min(divisor, 8)
    block_j = power_of_2(parts_of_a_step)
    block_c = max(1, 2048 // (block_e * block_j))
    programs = cdiv(columns, block_e) * cdiv(cells, block_c) * b * (1 if merge else k)
    z_b, _, z_m = strides(z)
    launch(
        sum_visits, programs,
        (parts, visit, first, z, out, out_2, z_b, z_m, *index_strides(visit), *index_strides(first),
         t, parts_of_a_step, columns // unit, cells, out.shape[-1]),
        dict(K=k, MERGE=merge, UNIT=unit, BLOCK_C=block_c, BLOCK_J=block_j, BLOCK_E=block_e), 4,
    )  # fmt: skip


def parameter_grads(parts: Tensor, parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of A (k?, d, n), D and delta_bias (k?, d), from their parts, (…, k, n + 2, d), in this order."""
    *pieces, k, rows, d = parts.shape
    grads = [None if x is None else empty(x.shape, x.dtype, x.device) for x in parameters]
    shared = [x is not None and x.dim() == dims for x, dims in zip(parameters, (2, 1, 1))]
    block_s = 512 if prod(pieces) > 128 else 64
    launch(sum_parameters, cdiv(d, 32) * k * rows, (parts, *grads, prod(pieces), k, d, rows - 2),
           dict(A_SHARED=shared[0], D_SHARED=shared[1], BIAS_SHARED=shared[2], BLOCK_S=block_s, BLOCK_D=32),
           block_s // 32 if block_s > 64 else 4)  # fmt: skip
    return grads
