"""SegMamba: Long-range Sequential Modeling Mamba for 3D Medical Image Segmentation (Xing et al., 2024,
arXiv:2401.13560).

A hierarchical encoder, in which each stage gates its map with convolutions and then scans it in three directions, under
the convolutional decoder of UNETR.
Published code: github.com/ge-xing/SegMamba (no licence; no weights). This was written without it, from the paper and a
description of what the code does. Same function; other key names, see KEYS.

As published, and not in the paper: the two branches of the gate are added, not multiplied; skips pass as they are, no
uncertainty is estimated; the MLP is no part of the trunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vssm.layers.conv import CONVS, ConvMixer, halving_conv, same_conv
from vssm.layers.instance_norm import InstanceNorm
from vssm.layers.layout import over_tokens, to_map, to_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.mlp import LeanMlp
from vssm.layers.norm import TokenNorm
from vssm.layers.parts import check_choice
from vssm.layers.ssm import ssm_parameters
from vssm.layers.unetr import ResidualBlock, UpBlock
from vssm.models.keys import Rule, rename, reshape
from vssm.models.mamba_keys import mamba_keys
from vssm.models.segmenter import Segmenter
from vssm.models.variant import Published, Variant, constructor, translated, twins

REPOSITORY = "ge-xing/SegMamba"
SLICES = (64, 32, 16, 8)  # of the published code, which has 128 voxels a side in mind
MIXERS = ("scan", "conv")


class SpatialGate(nn.Module):
    """Two convolutions of side 3 beside one of side 1, added, another one, and a residual. (B, C, *grid) in and out."""

    def __init__(self, dim: int, spatial_dims: int):
        super().__init__()
        conv = CONVS[spatial_dims]
        self.conv1, self.conv2 = same_conv(spatial_dims, dim, dim, 3), same_conv(spatial_dims, dim, dim, 3)
        self.side, self.fuse = conv(dim, dim, 1), conv(dim, dim, 1)
        self.norm_act = InstanceNorm(slope=0)

    def forward(self, x: Tensor) -> Tensor:
        near = self.unit(self.conv2, self.unit(self.conv1, x))
        return self.unit(self.fuse, near + self.unit(self.side, x)) + x

    def unit(self, conv: nn.Module, x: Tensor) -> Tensor:
        return self.norm_act(conv(x))


class MambaBlock(nn.Module):
    """Norm, mixer, add. (B, C, *grid) in and out."""

    def __init__(self, dim: int, mixer: nn.Module):
        super().__init__()
        self.norm, self.mixer = TokenNorm(dim, eps=1e-5), mixer

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        return x + to_map(self.mixer(self.norm(to_tokens(x)), grid), grid)


class Stage(nn.Module):
    """Halve the map, gate it, scan it. Returns the map for the next stage, and a branch of it for the decoder."""

    def __init__(self, downsample: nn.Module, gate: nn.Module, blocks: Sequence[nn.Module], dim: int):
        super().__init__()
        self.downsample, self.gate, self.blocks = downsample, gate, nn.Sequential(*blocks)
        self.norm, self.mlp = InstanceNorm(), LeanMlp(dim, 2 * dim)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.downsample(x)
        for part in (self.gate, *self.blocks):
            x = checkpoint(part, x) if self.grad_checkpointing else part(x)
        return x, checkpoint(self.branch, x) if self.grad_checkpointing else self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        return over_tokens(self.mlp, self.norm(x))


def channels_last(x: Tensor) -> Tensor:
    """``x`` with its channels last in memory, which its convolutions hand on; also if it has one channel."""
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return torch.empty_like(x, memory_format=layout).copy_(x)


class SegMamba(Segmenter):
    """SegMamba in 3D or 2D. The defaults are those of the published constructor.

    (B, in_channels, *size) to logits (B, out_channels, *size), for sizes whose sides are multiples of 16 (with four
    stages) and that leave two cells or more at the lowest resolution.

    Args:
        spatial_dims, in_channels, out_channels: As in MONAI.
        depths: Blocks of each stage.
        features: Channels of each stage; the first is the width at full resolution too.
        hidden_size: Channels at the lowest resolution of the decoder.
        res_block: Residuals in the blocks of the decoder, as in MONAI.
        d_state, expand: States and expansion of the mixers.
        scan, scan_options: A registered order.
        slices: Of the inter-slice order, for each stage; None takes the depth of the stage's map, so that a slice is a
            plane. As published: 64, 32, 16, 8 whatever the size. A map whose cells do not divide into that many
            slices is refused.
        mixer: ``"scan"``, or ``"conv"``: a convolution in its place.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 13,
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        features: Sequence[int] = (48, 96, 192, 384),
        hidden_size: int = 768,
        res_block: bool = True,
        d_state: int = 16,
        expand: float = 2.0,
        scan: str = "interslice",
        scan_options: Mapping[str, Any] | None = None,
        slices: Sequence[int] | None = None,
        mixer: str = "scan",
    ):
        super().__init__(spatial_dims, in_channels, out_channels, multiple=2 ** len(depths))
        check_choice("SegMamba", "mixer", mixer, MIXERS)
        for name, values in (("features", features), ("slices", slices)):
            if values is not None and len(values) != len(depths):
                raise ValueError(f"SegMamba: {name} must have one entry a stage ({len(depths)}), got {tuple(values)}")
        self.slices = None if slices is None or mixer == "conv" else tuple(slices)
        self.grad_checkpointing = False

        def make_mixer(stage: int) -> nn.Module:
            if mixer == "conv":
                return ConvMixer(features[stage], spatial_dims)
            return ScanMixer(
                features[stage], scan=scan, scan_options={"slices": slices[stage]} if slices else scan_options,
                spatial_dims=spatial_dims, conv="sequence", conv_size=4, d_state=d_state, expand=expand,
            )  # fmt: skip

        conv = CONVS[spatial_dims]
        self.stages = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, features, strict=True)):
            shrink = conv(features[i - 1], dim, 2, stride=2) if i else halving_conv(spatial_dims, in_channels, dim, 7)
            downsample = nn.Sequential(InstanceNorm(), shrink) if i else nn.Sequential(shrink)
            blocks = [MambaBlock(dim, make_mixer(i)) for _ in range(depth)]
            self.stages.append(Stage(downsample, SpatialGate(dim, spatial_dims), blocks, dim))
        widths = [*features, hidden_size]
        sources = [in_channels, *features]
        # As published: the block on the first stage's map makes features[1] channels of features[0], and so on.
        block, up = (partial(each, spatial_dims, res_block=res_block) for each in (ResidualBlock, UpBlock))
        self.skips = nn.ModuleList(block(i, o) for i, o in zip(sources, widths))
        self.ups = nn.ModuleList(up(i, o) for o, i in pairwise(widths))
        self.last = block(features[0], features[0])
        self.out = conv(features[0], out_channels, 1)

    def check_sides(self, sides: tuple[int, ...]) -> None:
        for i, stage in enumerate(self.stages):
            grid = tuple(side // 2 ** (i + 1) for side in sides)
            cells = prod(grid)
            if self.slices is not None and stage.blocks and cells % self.slices[i]:
                raise ValueError(
                    f"SegMamba: stage {i} has {self.slices[i]} slices, which must divide its {cells} cells {grid}, got "
                    f"images {sides}; pad each side to a multiple of {2 * self.multiple[0]}, or pass "
                    "slices=None"
                )
        if cells == 1:
            larger = (2 * self.multiple[0], *sides[1:])
            raise ValueError(
                f"SegMamba: the map of the last stage must have two cells or more, got {grid} from images "
                f"{sides}; pad them to {larger}"
            )

    def encode(self, x: Tensor) -> list[Tensor]:
        """The branch of each stage, (B, features[i], *size / 2^(i + 1))."""
        branches = []
        for stage in self.stages:
            x, branch = stage(x)
            branches.append(branch)
        return branches

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if x.is_cuda:
            x = channels_last(x)
        return self.decode(x, self.encode(x))

    def decode(self, x: Tensor, branches: Sequence[Tensor]) -> Tensor:
        """Logits, of the images and what ``encode`` returns."""
        *maps, y = [self.run(skip, source) for skip, source in zip(self.skips, [x, *branches], strict=True)]
        for up, skip in zip(reversed(self.ups), reversed(maps), strict=True):
            y = self.run(up, y, skip)
        return self.out(self.run(self.last, y))

    def run(self, module: nn.Module, *maps: Tensor) -> Tensor:
        return checkpoint(module, *maps) if self.grad_checkpointing else module(*maps)

    def no_weight_decay(self) -> set[str]:
        """A_log and D, as the published code marks them. As published: its optimiser does not look at the marks."""
        return set(ssm_parameters(self, "A_log", "D"))


def keys(stages: int = 4) -> list[Rule]:
    """Key rules for models with so many stages."""
    return [
        *mamba_keys(("", "_b", "_s")),
        rename(r"^vit\.stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        rename(r"^vit\.downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        rename(r"^vit\.gscs\.(\d+)\.proj\.", r"stages.\1.gate.conv1."),
        rename(r"^vit\.gscs\.(\d+)\.proj2\.", r"stages.\1.gate.conv2."),
        rename(r"^vit\.gscs\.(\d+)\.proj3\.", r"stages.\1.gate.side."),
        rename(r"^vit\.gscs\.(\d+)\.proj4\.", r"stages.\1.gate.fuse."),
        rename(r"^vit\.mlps\.(\d+)\.", r"stages.\1.mlp."),
        reshape(r"\.mlp\.fc\d\.weight$", "o i 1 1 1 -> o i"),
        *(rename(rf"^encoder{i + 1}\.layer\.(conv\d)\.conv\.", rf"skips.{i}.\1.") for i in range(stages + 1)),
        *(rename(rf"^decoder{i + 2}\.transp_conv\.conv\.", f"ups.{i}.up.") for i in range(stages)),
        *(rename(rf"^decoder{i + 2}\.conv_block\.(conv\d)\.conv\.", rf"ups.{i}.block.\1.") for i in range(stages)),
        rename(r"^decoder1\.layer\.(conv\d)\.conv\.", r"last.\1."),
        rename(r"^out\.conv\.conv\.", r"out."),
    ]


KEYS = keys()


def _variant(name: str, description: str, **kwargs: Any) -> Variant:
    return Variant(
        name, SegMamba, kwargs, KEYS, first_conv="stages.0.downsample.0", classifier="out",
        task="segmentation", description=description,
    )  # fmt: skip


NANO: dict[str, Any] = dict(out_channels=3, depths=(1, 1, 1, 1), features=(16, 32, 48, 64), hidden_size=96)
TEST: dict[str, Any] = dict(
    spatial_dims=2, in_channels=3, out_channels=2, d_state=4,
    depths=(1, 1, 1, 1), features=(4, 6, 8, 10), hidden_size=12,
)  # fmt: skip
VARIANTS = [
    _variant("segmamba", "as trained on BraTS 2023: four modalities, 128 voxels a side", in_channels=4, out_channels=4),
    _variant("segmamba_nano", "not published: small volumes, demos", **NANO),
    _variant("test_segmamba", "for tests", **TEST),
]
VARIANTS += twins(VARIANTS)

SAME = {"in_chans": "in_channels", "out_chans": "out_channels", "depths": "depths", "feat_size": "features",
        "hidden_size": "hidden_size", "res_block": "res_block"}  # fmt: skip
UNCHANGED = {"norm_name": "instance", "spatial_dims": 3}
INEFFECTIVE = {"drop_path_rate", "layer_scale_init_value", "conv_block"}  # As published: taken, and not looked at.


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """The published ``SegMamba``, with its fixed numbers of slices, as our model."""
    constructor(entry, "SegMamba")
    return Published(SegMamba(slices=SLICES, **translated(kwargs, SAME, UNCHANGED, INEFFECTIVE)), KEYS, _run)


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    branches = model.encode(inputs["x"])
    return {f"vit{i}": x for i, x in enumerate(branches)} | {"logits": model.decode(inputs["x"], branches)}
