"""The U of VM-UNet, around any mixer: patch merging on the way down, patch expanding on the way up.

VM-UNet (arXiv:2402.02491) and MHS-UNet (arXiv:2406.05992) differ in their mixers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

from torch import Tensor, nn

from vssm.layers.block import Make, MixerBlock
from vssm.layers.conv import CONVS
from vssm.layers.downsample import PatchMerging
from vssm.layers.expand import PatchExpand
from vssm.layers.init import linear_like_transformers
from vssm.layers.stem import PatchStem
from vssm.models.base import drop_path_rates, widths
from vssm.models.keys import Rule, rename, reshape
from vssm.models.segmenter import Blocks, Segmenter
from vssm.models.variant import constructor, translated

PATCH = 4


class PatchUNet(Segmenter):
    """A U of residual mixer blocks without MLP. (B, C, H, W) to logits (B, out_channels, H, W).

    Args:
        make_mixer: Mixer of a block, for its channels.
        spatial_dims, in_channels, out_channels: As in MONAI. Images of one channel are repeated to ``in_channels``.
        depths: Blocks of each level on the way down, finest first.
        decoder_depths: Blocks of each level on the way up, deepest first.
        dim: Channels of the first level, which double with every level; or of all of them.
        drop_path_rate: Stochastic depth of the deepest block, falling to 0 at both ends of the U.
    """

    def __init__(
        self,
        make_mixer: Make,
        *,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        depths: Sequence[int],
        decoder_depths: Sequence[int],
        dim: int | Sequence[int],
        drop_path_rate: float,
    ):
        name, dims = type(self).__name__, widths(type(self).__name__, dim, depths)
        if len(decoder_depths) != len(depths):
            raise ValueError(f"{name}: decoder_depths must name {len(depths)} levels, as depths, got {decoder_depths}")
        super().__init__(
            spatial_dims, in_channels, out_channels, multiple=PATCH * 2 ** (len(depths) - 1), repeats=True
        )  # fmt: skip
        rising = iter(drop_path_rates(drop_path_rate, sum(depths)))
        falling = iter(drop_path_rates(drop_path_rate, sum(decoder_depths))[::-1])

        def blocks(width: int, rates: Sequence[float]) -> Blocks:
            return Blocks(*(MixerBlock(width, make_mixer, drop_path=rate) for rate in rates))

        down, up = list(pairwise(dims)), list(pairwise(dims[::-1]))
        self.stem = PatchStem(in_channels, dims[0], PATCH, spatial_dims=spatial_dims)
        self.encoder = nn.ModuleList(blocks(w, list(islice(rising, n))) for w, n in zip(dims, depths))
        self.merges = nn.ModuleList(PatchMerging(a, b, spatial_dims=spatial_dims) for a, b in down)
        self.decoder = nn.ModuleList(blocks(w, list(islice(falling, n))) for w, n in zip(dims[::-1], decoder_depths))
        self.expands = nn.ModuleList(PatchExpand(a, b, spatial_dims=spatial_dims) for a, b in up)
        self.final = PatchExpand(dims[0], dims[0] // PATCH, PATCH, spatial_dims)
        self.head = CONVS[spatial_dims](dims[0] // PATCH, out_channels, 1)
        self.apply(linear_like_transformers)

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The deepest map, and what enters each level, finest first."""
        self.check(x)
        x = self.stem(x.expand(-1, self.in_channels, *x.shape[2:]))
        entered = []
        for i, blocks in enumerate(self.encoder):
            x = self.merges[i - 1](x) if i else x
            entered.append(x)
            x = blocks(x)
        return x, entered

    def decode(self, x: Tensor, entered: Sequence[Tensor]) -> Tensor:
        """Logits. As published: a map is added before it is enlarged, so the finest one is never used."""
        x = self.decoder[0](x)
        for i, expand in enumerate(self.expands):
            x = self.decoder[i + 1](expand(x + entered[-1 - i]))
        return self.head(self.final(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(*self.encode(x))

    def no_weight_decay(self) -> set[str]:
        """None. As published: everything is decayed; norms and biases are left to the optimiser."""
        return set()


def keys(mixer: Sequence[Rule], levels: int = 4) -> list[Rule]:
    """Key rules; ``mixer`` are those of what the published names call ``self_attention`` and ours ``mixer``."""
    return [
        rename(r"^vmunet\.", ""),
        reshape(r"\.A_logs$", "(k d) n -> k d n"),
        reshape(r"\.Ds$", "(k d) -> k d"),
        rename(r"\.self_attention\.", r".mixer."),
        *mixer,
        rename(r"\.x_proj_weight$", r".x_proj"),
        rename(r"\.dt_projs_weight$", r".dt_weight"),
        rename(r"\.dt_projs_bias$", r".dt_bias"),
        rename(r"\.A_logs$", r".A_log"),
        rename(r"\.Ds$", r".D"),
        rename(r"\.mixer\.conv2d\.", r".mixer.conv."),
        rename(r"\.ln_1\.", r".norm1."),
        rename(r"^patch_embed\.proj\.", r"stem.conv1."),
        rename(r"^patch_embed\.norm\.", r"stem.norm1."),
        rename(r"^layers\.(\d+)\.blocks\.", r"encoder.\1."),
        rename(r"^layers\.(\d+)\.downsample\.", r"merges.\1."),
        rename(r"^layers_up\.(\d+)\.blocks\.", r"decoder.\1."),
        *(rename(rf"^layers_up\.{i + 1}\.upsample\.", f"expands.{i}.") for i in range(levels - 1)),
        rename(r"^final_up\.", r"final."),
        rename(r"^final_conv\.", r"head."),
    ]


SAME = {
    "input_channels": "in_channels", "num_classes": "out_channels", "depths": "depths",
    "depths_decoder": "decoder_depths", "drop_path_rate": "drop_path_rate",
}  # fmt: skip
DEFAULTS = {
    "in_channels": 3, "depths": (2, 2, 9, 2), "decoder_depths": (2, 9, 2, 2), "drop_path_rate": 0.2,
}  # fmt: skip


def translate(entry: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments for those of a published ``VMUNet``, which both families name so."""
    constructor(entry, "VMUNet")
    return {**DEFAULTS, **translated(kwargs, SAME, ineffective=("load_ckpt_path",))}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs under the names of golden files; maps channels last, as published. One class: probabilities are out."""
    deepest, entered = model.encode(inputs["x"])
    logits = model.decode(deepest, entered)
    return {
        "out": logits.sigmoid() if model.out_channels == 1 else logits,
        "logits": logits,
        "bottleneck": deepest.movedim(1, -1),
        **{f"skip{i}": x.movedim(1, -1) for i, x in enumerate(entered)},
    }
