"""What every segmenter has: MONAI's vocabulary, a check of its input, activation checkpointing.

Images are (B, C, H, W) or (B, C, D, H, W); logits have the size of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn


class Blocks(nn.Sequential):
    """Blocks one after the other; with ``grad_checkpointing`` only their inputs are kept for backward."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_seq(self, x) if self.grad_checkpointing else super().forward(x)


def traced(x: Tensor) -> bool:
    """Whether a compiler or tracer runs the model: sizes are symbols then, of which nothing can be demanded."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)


class Segmenter(nn.Module):
    """A network from images to logits of the same size.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the images.
        out_channels: Channels of the logits.
        multiple: What each side of an image must be a multiple of; one number, or one for each axis.
        repeats: Images of one channel are taken too, repeated to ``in_channels``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        multiple: int | Sequence[int] = 1,
        repeats: bool = False,
    ):
        super().__init__()
        name = type(self).__name__
        if spatial_dims not in (2, 3):
            raise ValueError(f"{name}: spatial_dims must be 2 or 3, got {spatial_dims!r}")
        for argument, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {argument} must be a whole number from 1, got {value!r}")
        self.spatial_dims, self.in_channels, self.out_channels = spatial_dims, in_channels, out_channels
        self.multiple = (multiple,) * spatial_dims if isinstance(multiple, int) else tuple(multiple)
        self.repeats = repeats

    def check(self, x: Tensor) -> None:
        """Refuse images that the network cannot read.

        Raises:
            ValueError: If the image has other dimensions or channels, or a side that cannot be halved often enough; the
                message then says to which size it must be padded.
        """
        if traced(x):
            return
        name, layout = type(self).__name__, "(B, C, H, W)" if self.spatial_dims == 2 else "(B, C, D, H, W)"
        if x.ndim != self.spatial_dims + 2:
            raise ValueError(f"{name}: images must be {layout}, got {tuple(x.shape)}")
        channels = {self.in_channels, 1} if self.repeats else {self.in_channels}
        if x.shape[1] not in channels:
            wanted = " or ".join(map(str, sorted(channels, reverse=True)))
            raise ValueError(f"{name}: images must have {wanted} channels, got {x.shape[1]} in {tuple(x.shape)}")
        sides = tuple(x.shape[2:])
        padded = tuple(max(1, -(-side // n)) * n for side, n in zip(sides, self.multiple))
        if sides != padded:
            each = self.multiple[0] if len(set(self.multiple)) == 1 else self.multiple
            raise ValueError(
                f"{name}: each side of an image must be a multiple of {each}, got {sides}; pad it to {padded}"
            )
        self.check_sides(sides)

    def check_sides(self, sides: tuple[int, ...]) -> None:
        """What a network demands of the sizes of images beside the multiple; ``check`` asks."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep block inputs only and recompute the rest in backward; the output stays the same."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable
