"""Count what a model computes: FLOPs, multiply-adds as papers count them, parameters; without memory or weights."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vssm.cli._tables import text_table
from vssm.models.variant import Variant
from vssm.registries.zoo import find, parameters

__all__ = ["PUBLISHED", "Flops", "Uncounted", "count", "flops_of", "input_shape", "input_size", "main"]

SCANS = ("vssm.selective_scan", "vssm.scan2d")  # ops that papers do not count by multiply-adds
SIDES = {"classification": 224, "detection": 640, "segmentation": 256, "pretraining": 96}
SIDE_3D = 96

# Published GFLOPs at 224². The first group counts as we do and agrees within 2 %. In the second MSVMamba and VSSD
# differ by up to 4 %; Vim's and LocalVim's figures lie between ours with the scan and ours without it.
PUBLISHED = {
    "vanilla_vmamba_tiny": 5.6, "vanilla_vmamba_small": 11.2, "vanilla_vmamba_base": 18.0,
    "vmamba_tiny_s2l5": 4.9, "vmamba_small_s2l15": 8.7, "vmamba_base_s2l15": 15.4,
    "vmamba_tiny_s1l8": 4.9, "vmamba_small_s1l20": 8.6, "vmamba_base_s1l20": 15.2,
    "vmamba_tiny": 4.9, "vmamba_small": 8.6, "vmamba_base": 15.2,
    "plainmamba_l1": 3.0, "plainmamba_l2": 8.1, "plainmamba_l3": 14.4,
    "spatialmamba_tiny": 4.5, "spatialmamba_small": 7.1, "spatialmamba_base": 15.8,
    "localvmamba_tiny": 5.7, "localvmamba_small": 11.4,

    "vim_tiny": 1.5, "vim_small": 5.1, "localvim_tiny": 1.5, "localvim_tiny_cls": 1.5, "localvim_small": 4.8,
    "msvmamba_nano": 0.88, "msvmamba_micro": 1.53, "msvmamba_tiny": 4.61,
    "msvmambav3_tiny": 5.0, "msvmambav3_small": 8.8, "msvmambav3_base": 16.3,
    "vssd_micro": 2.3, "vssd_tiny": 4.5, "vssd_small": 7.4, "vssd_base": 16.1,
}  # fmt: skip


class Uncounted(ValueError):
    """What a model computes does not follow from the size of its input."""


@dataclass(frozen=True)
class Flops:
    """What one call of a model costs.

    ``modules`` holds the FLOPs of each operation in each module, by the module's name in the model ("" is the model).
    """

    modules: Mapping[str, Mapping[str, int]]

    @property
    def operations(self) -> Mapping[str, int]:
        """FLOPs by operation. A multiply-add is two; norms, activations and additions are not counted."""
        return self.modules[""]

    @property
    def total(self) -> int:
        return sum(self.operations.values())

    @property
    def as_papers_count(self) -> float:
        """Multiply-adds, and for a scan 9 for each step, channel and state: what papers on vision Mamba call FLOPs."""
        return sum(value if name in SCANS else value / 2 for name, value in self.operations.items())


def count(model: nn.Module, *inputs: Tensor, backward: bool = False) -> Flops:
    """Call the model and count; of tensors on the meta device, or fake ones, nothing is computed.

    Args:
        model: Any module.
        inputs: What it is called with.
        backward: Count the backward pass of the sum of its outputs as well.
    """
    # Attention as two matrix products: the counter knows no formula for the CPU's fused one.
    exact = sdpa_kernel(SDPBackend.MATH)
    with torch.set_grad_enabled(backward), exact, FlopCounterMode(display=False) as counter:
        outputs = model(*inputs)
        if backward:
            torch.stack([y.float().sum() for y in _tensors(outputs)]).sum().backward()
    counts, root = counter.get_flop_counts(), type(model).__name__
    found = {name: counts.get(f"{root}.{name}" if name else "Global", {}) for name, _ in model.named_modules()}
    return Flops({
        name: {str(operation): value for operation, value in operations.items()}
        for name, operations in found.items()
        if operations or not name
    })  # fmt: skip


def flops_of(name: str, size: Sequence[int] | None = None, *, batch: int = 1, backward: bool = False) -> Flops:
    """Count one call of a model of the zoo on images (or volumes) of ``size``, by default its own.

    Raises:
        Uncounted: If its cost depends on more than the size of its input.
        ValueError: If there is no such model, or it does not take this size.

    >>> round(flops_of("vmamba_tiny").as_papers_count / 1e9, 2)        # published: 4.9
    4.88
    """
    row = find(name, "flops")
    shape = input_shape(row, size, batch)
    fits = {"img_size": shape[2:]} if row.fixed_input_size and size is not None else {}
    with torch.device("meta"):
        model = row.build(**fits).train(backward)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):     # as on the CPU, but nothing is stored or computed
            return count(model.to_empty(device="cpu"), torch.empty(shape), backward=backward)
    except DataDependentOutputException as error:
        raise Uncounted(f"flops: what {name} computes depends on the values of its input, not its size") from error


def input_shape(row: Variant, size: Sequence[int] | None = None, batch: int = 1) -> tuple[int, ...]:
    """(batch, channels, *size) of a model's input, (batch, frames, channels, *size) of clips; ``size`` may be one side.

    Without ``size`` it is what the published weights take, or what is usual for the task.

    >>> input_shape(find("vim_tiny")), input_shape(find("vim_nano"), [64, 96], batch=2)
    ((1, 3, 224, 224), (2, 3, 64, 96))
    """
    dims = _argument(row, "spatial_dims", 2)
    channels = _argument(row, "in_channels", _argument(row, "in_chans", 3))
    frames = getattr(row.model, "frames", None)
    lead = (batch, channels) if frames is None else (batch, frames, channels)
    if size is None and row.weights:
        return (*lead, *next(iter(row.weights.values())).input_size[1:])
    if size is None:
        size = [_argument(row, "img_size", SIDES[row.task] if dims == 2 else SIDE_3D)]
        size = size[0] if isinstance(size[0], tuple | list) else size
    if len(size) not in (1, dims) or min(size) < 1:
        raise ValueError(f"flops: {row.name} takes {dims} sizes from 1, or one for all sides, got {list(size)}")
    return (*lead, *(size if len(size) == dims else list(size) * dims))


def input_size(row: Variant) -> tuple[int, ...]:
    """Sizes of a model's own input: (H, W), (D, H, W), or (T, H, W) of a clip."""
    shape, dims = input_shape(row), _argument(row, "spatial_dims", 2)
    return (*shape[1 : len(shape) - dims - 1], *shape[-dims:])


def _argument(row: Variant, name: str, default: Any) -> Any:
    """What a model is built with under this name; ``default`` where its class has no such argument."""
    known = inspect.signature(row.model).parameters.get(name)
    found = row.kwargs.get(name, None if known is None else known.default)
    return default if found in (None, inspect.Parameter.empty) else found


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [tensor for value in values for tensor in _tensors(value)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vssm flops", description=__doc__)
    parser.add_argument("name", help="a model of 'vssm models'")
    parser.add_argument("--size", type=int, nargs="+", help="side, or height and width (depth, height and width)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--backward", action="store_true", help="a training step's backward pass, too")
    parser.add_argument("--by-module", action="store_true", help="what each module costs")
    parser.add_argument("--depth", type=int, default=2, help="of the modules shown, 2 by default")
    args = parser.parse_args(argv)
    try:
        row = find(args.name, "flops")
        shape = input_shape(row, args.size, args.batch)
        found = flops_of(args.name, args.size, batch=args.batch, backward=args.backward)
    except ValueError as error:
        print(f"vssm flops: {str(error).removeprefix('flops: ')}", file=sys.stderr)
        return 2
    print(f"{row.name}, input {'×'.join(map(str, shape))}, {parameters(row.name) / 1e6:.2f} M parameters")
    print(text_table([("operation", "GFLOPs", ""), *_lines(found.operations, found.total)]))
    if args.by_module:
        costs = {name: sum(operations.values()) for name, operations in found.modules.items()}
        shown = {name: cost for name, cost in costs.items() if name and name.count(".") < args.depth}
        print("\n" + text_table([("module", "GFLOPs", ""), *_lines(shown, found.total, total_line=False)]))
    if not args.backward:
        published = PUBLISHED.get(row.name) if shape == (1, 3, 224, 224) else None
        also = "" if published is None else f", published {published}"
        print(f"\nas papers count: {found.as_papers_count / 1e9:.2f} G{also}")
        print("(multiply-adds, and 9 for each step, channel and state of a scan; above, a multiply-add is two FLOPs)")
    return 0


def _lines(costs: Mapping[str, int], total: int, *, total_line: bool = True) -> list[tuple[str, str, str]]:
    lines = [(name, f"{cost / 1e9:.3f}", f"{cost / max(total, 1):.1%}") for name, cost in costs.items()]
    return [*lines, ("total", f"{total / 1e9:.3f}", "")] if total_line else lines
