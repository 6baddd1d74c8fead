"""MSVM-UNet: Multi-Scale Vision Mamba UNet for Medical Image Segmentation (Chen et al., 2024, arXiv:2408.13735).

A VMamba encoder of the last generation; on the way up, blocks whose MLPs convolve at three scales, and an enlargement
that convolves before it spreads the channels.
Published code: github.com/gndlwch2w/msvm-unet (no licence; no weights). This was written without it, from the paper and
a description of what the code does. Same function; other key names, see KEYS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vssm.layers.block import MixerBlock
from vssm.layers.conv import CONVS, ConvMixer, depthwise
from vssm.layers.downsample import ConvDownsample
from vssm.layers.expand import spread
from vssm.layers.init import linear_like_transformers
from vssm.layers.layout import over_map, over_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.norm import ChannelNorm
from vssm.layers.parts import chosen
from vssm.layers.stem import ConvStem
from vssm.models.base import drop_path_rates, make_stages, widths
from vssm.models.keys import Rule, rename
from vssm.models.names import MIXER, SSM_SHAPES
from vssm.models.segmenter import Blocks, Segmenter
from vssm.models.variant import NotCovered, Published, Variant, constructor, nothing_left

REPOSITORY = "gndlwch2w/msvm-unet"
BATCH_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SCALES = (1, 3, 5)
PATCH = 4
UP_DEPTH = 2  # blocks of a level on the way up


class MultiScaleMlp(nn.Module):
    """An MLP whose hidden map is added to depthwise convolutions of it at three scales. (B, C, *grid) in and out."""

    def __init__(self, dim: int, ratio: float, spatial_dims: int):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.convs = nn.ModuleList(depthwise(hidden, size, spatial_dims, bias=False) for size in SCALES)

    def forward(self, x: Tensor) -> Tensor:
        y = x = self.act(over_tokens(self.fc1, x))
        for conv in self.convs:
            y = y + conv(x)
        return over_tokens(self.fc2, y)


class MultiScaleBlock(MixerBlock):
    """A block whose MLP takes maps."""

    def apply_mlp(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        return over_map(self.mlp, x, grid)


class LargeKernelExpand(nn.Module):
    """Widen, convolve each channel, spread over ``scale`` cells along every axis, norm.

    (B, C, *grid) to (B, out, *(scale · grid)).
    """

    def __init__(self, dim: int, out: int, scale: int, spatial_dims: int):
        super().__init__()
        width = scale**spatial_dims * out
        self.scale, self.spatial_dims = scale, spatial_dims
        self.widen, self.batch_norm = CONVS[spatial_dims](dim, width, 1), BATCH_NORMS[spatial_dims](width)
        self.act, self.conv = nn.ReLU(), depthwise(width, 3, spatial_dims)
        self.norm = ChannelNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.act(self.batch_norm(self.widen(x))))
        return self.norm(spread(x, self.scale, self.spatial_dims))


class Level(nn.Module):
    """Enlarge, put the skip beside it and project, blocks. (B, C, *grid) and (B, C', *2 grid) to the latter's shape."""

    def __init__(self, dim: int, out: int, blocks: Sequence[nn.Module], spatial_dims: int):
        super().__init__()
        self.expand = LargeKernelExpand(dim, out, 2, spatial_dims)
        self.join = nn.Linear(2 * out, out)
        self.blocks = Blocks(*blocks)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.blocks(over_tokens(self.join, torch.cat([self.expand(x), skip], 1)))


class MSVMUNet(Segmenter):
    """MSVM-UNet, also in 3D. (B, C, H, W) to logits (B, out_channels, H, W); sides are multiples of 32.

    Args:
        spatial_dims, in_channels, out_channels: As in MONAI. Images of one channel are repeated to ``in_channels``.
        depths: Blocks of each stage of the encoder.
        dim: Channels of the first stage, which double with every stage; or of all of them.
        mixer: ``"scan"``, or ``"conv"`` for the twin without Mamba.
        d_state, expand, scan, scan_options: Of the mixers, see ``ScanMixer``.
        mlp_ratio: Hidden channels of the MLPs over those of the block.
        drop_path_rate: Stochastic depth of the encoder, rising from 0.
        decoder_drop_path_rate: Stochastic depth of the way up, falling to 0.
    """

    encoders = ("vmamba_tiny_s1l8", "vmamba_small_s1l20")

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 9,
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        dim: int | Sequence[int] = 96,
        mixer: str = "scan",
        d_state: int = 1,
        expand: float = 1.0,
        scan: str = "cross",
        scan_options: Mapping[str, Any] | None = None,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
        decoder_drop_path_rate: float = 0.2,
    ):
        dims = widths("MSVMUNet", dim, depths)
        super().__init__(
            spatial_dims, in_channels, out_channels, multiple=PATCH * 2 ** (len(depths) - 1), repeats=True
        )  # fmt: skip
        scanning = partial(
            ScanMixer, scan=scan, scan_options=scan_options, spatial_dims=spatial_dims, d_state=d_state, expand=expand,
            conv_bias=False, gate="none", out_norm="layer",
        )  # fmt: skip
        convolving = partial(ConvMixer, spatial_dims=spatial_dims)
        make_mixer = chosen("MSVMUNet", "mixer", mixer, {"scan": scanning, "conv": convolving})

        def down_block(i: int, j: int, rate: float) -> nn.Module:
            return MixerBlock(dims[i], make_mixer, lambda width: Mlp(width, int(width * mlp_ratio)), drop_path=rate)

        def up_block(width: int, rate: float) -> nn.Module:
            mlp = partial(MultiScaleMlp, ratio=mlp_ratio, spatial_dims=spatial_dims)
            return MultiScaleBlock(width, make_mixer, mlp, drop_path=rate)

        self.stem = ConvStem(in_channels, dims[0], PATCH, spatial_dims=spatial_dims)
        shrink = partial(ConvDownsample, spatial_dims=spatial_dims)
        self.stages = nn.ModuleList(make_stages(depths, dims, drop_path_rate, down_block, shrink))
        rates = drop_path_rates(decoder_drop_path_rate, UP_DEPTH * (len(dims) - 1))
        self.ups = nn.ModuleList()
        for a, b in zip(dims[:0:-1], dims[-2::-1]):
            self.ups.append(Level(a, b, [up_block(b, rates.pop()) for _ in range(UP_DEPTH)], spatial_dims))
        self.final = LargeKernelExpand(dims[0], dims[0], PATCH, spatial_dims)
        self.head = CONVS[spatial_dims](dims[0], out_channels, 1)
        self.apply(linear_like_transformers)

    def encode(self, x: Tensor) -> list[Tensor]:
        """The map that each stage returns, finest first."""
        self.check(x)
        x, maps = self.stem(x.expand(-1, self.in_channels, *x.shape[2:])), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        *skips, x = maps
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        return self.head(self.final(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def no_weight_decay(self) -> set[str]:
        """None. As published: everything is decayed; norms and biases are left to the optimiser."""
        return set()

    def encoder_entry(self, name: str) -> str | None:
        """The entry of a VMamba classifier that starts our entry ``name``; None for what starts at random."""
        return name if name.startswith(("stem.", "stages.")) else None


EXPAND = ((0, "widen"), (1, "batch_norm"), (3, "conv"))
KEYS: list[Rule] = [
    *SSM_SHAPES,
    rename(r"\.op\.", r".mixer."),
    *MIXER,
    rename(r"(blocks\.\d+)\.norm\.", r"\1.norm1."),
    rename(r"\.mlp\.multiscale_conv\.dw_convs\.", r".mlp.convs."),
    *(rename(rf"^encoder\.layer{i}\.0\.", f"stem.conv{i + 1}.") for i in range(2)),
    *(rename(rf"^encoder\.layer{i}\.2\.", f"stem.norm{i + 1}.") for i in range(2)),
    *(rename(rf"^encoder\.downsamples\.{i}\.1\.", f"stages.{i + 1}.downsample.conv.") for i in range(3)),
    *(rename(rf"^encoder\.downsamples\.{i}\.3\.", f"stages.{i + 1}.downsample.norm.") for i in range(3)),
    rename(r"^encoder\.layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    *(rename(rf"^decoder\.out_layers\.0\.expand\.{i}\.", f"final.{part}.") for i, part in EXPAND),
    rename(r"^decoder\.out_layers\.0\.norm\.", "final.norm."),
    rename(r"^decoder\.out_layers\.0\.out\.", "head."),
    *(rename(rf"^decoder\.layers\.(\d+)\.up\.expand\.{i}\.", rf"ups.\1.expand.{part}.") for i, part in EXPAND),
    rename(r"^decoder\.layers\.(\d+)\.up\.norm\.", r"ups.\1.expand.norm."),
    rename(r"^decoder\.layers\.(\d+)\.concat_layer\.", r"ups.\1.join."),
    rename(r"^decoder\.layers\.(\d+)\.vss_layer\.blocks\.", r"ups.\1.blocks."),
]


def _variant(name: str, description: str, **kwargs: Any) -> Variant:
    return Variant(name, MSVMUNet, kwargs, KEYS, task="segmentation", description=description)


ENCODERS: dict[str, dict[str, Any]] = {  # published name -> depths and drop path
    "tiny_0230s": {"depths": (2, 2, 8, 2), "drop_path_rate": 0.2},
    "small_0229s": {"depths": (2, 2, 20, 2), "drop_path_rate": 0.3},
}

VARIANTS = [
    _variant("msvmunet_synapse", "nine classes, as trained on Synapse", out_channels=9, **ENCODERS["tiny_0230s"]),
    _variant("msvmunet_acdc", "four classes, as trained on ACDC", out_channels=4, **ENCODERS["tiny_0230s"]),
    _variant("msvmunet_small", "nine classes, the deeper encoder", out_channels=9, **ENCODERS["small_0229s"]),
    _variant("msvmunet_nomamba", "not published: msvmunet_synapse with convolutions for mixers", mixer="conv"),
    _variant("test_msvmunet", "for tests", depths=(1, 1, 1, 1), dim=8),
]


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``MSVMUNet`` of the published code as our model."""
    constructor(entry, "MSVMUNet")
    given = dict(kwargs)
    encoder = given.pop("enc_name", "tiny_0230s")
    if encoder not in ENCODERS:
        raise NotCovered(f"enc_name={encoder!r}")
    channels = {"in_channels": given.pop("in_channels", 3), "out_channels": given.pop("num_classes", 9)}
    nothing_left(given)
    return Published(MSVMUNet(**channels, **ENCODERS[encoder]), KEYS, run)


def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    maps = model.encode(inputs["x"])
    return {"logits": model.decode(maps)} | {f"enc{i}": x for i, x in enumerate(maps)}
