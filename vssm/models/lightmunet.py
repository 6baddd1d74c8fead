"""LightM-UNet: Mamba Assists in Lightweight UNet for Medical Image Segmentation (Liao et al., 2024, arXiv:2403.05246).

MONAI's SegResNet with Mamba layers in the encoder, in 2D and 3D.
Published code: github.com/MrBlankness/LightM-UNet (Apache-2.0; no weights), after its correction of 2024-03-29. Same
function; other key names, see KEYS.

With the published settings the code has 5 M parameters; the paper counts 1.87 M (3D) and 1.09 M (2D). As published: the
blocks hold none of the depthwise convolutions that the paper draws there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vssm.layers.conv import CONVS, ConvMixer
from vssm.layers.layout import to_map, to_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.parts import check_choice
from vssm.layers.ssm import ssm_parameters
from vssm.models.keys import Rule, rename
from vssm.models.mamba_keys import mamba_keys
from vssm.models.segmenter import Blocks, Segmenter
from vssm.models.variant import Published, Variant, constructor, translated, twins

REPOSITORY = "MrBlankness/LightM-UNet"
GROUPS = 8
INTERPOLATIONS = {2: "bilinear", 3: "trilinear"}
POOLS = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
MIXERS = ("scan", "conv")
Make = Callable[[int], nn.Module]  # a mixer, for this many channels


class SeparableConv(nn.Sequential):
    """A depthwise convolution that keeps the grid, and one of side 1. (B, C, *grid) to (B, C', *grid)."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, size: int = 3, bias: bool = False):
        super().__init__()
        conv = CONVS[spatial_dims]
        self.depthwise = conv(in_channels, in_channels, size, padding=size // 2, groups=in_channels, bias=bias)
        self.pointwise = conv(in_channels, out_channels, 1, bias=bias)


class MambaLayer(nn.Module):
    """Norm, mixer, a scaled residual, the same norm again, a projection. (B, C, *grid) to (B, C', *grid)."""

    def __init__(self, dim: int, out: int, make_mixer: Make):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(dim), make_mixer(dim)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        grid, tokens = x.shape[2:], to_tokens(x)
        tokens = self.mixer(self.norm(tokens), grid) + self.skip_scale * tokens
        return to_map(self.proj(self.norm(tokens)), grid)


class ResidualMamba(nn.Module):
    """Norm, ReLU, Mamba layer, twice, and a residual. (B, C, *grid) in and out."""

    def __init__(self, dim: int, make_mixer: Make):
        super().__init__()
        self.norm1, self.mamba1 = nn.GroupNorm(GROUPS, dim), MambaLayer(dim, dim, make_mixer)
        self.norm2, self.mamba2 = nn.GroupNorm(GROUPS, dim), MambaLayer(dim, dim, make_mixer)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mamba1(self.act(self.norm1(x)))
        return self.mamba2(self.act(self.norm2(y))) + x


class ResidualConv(nn.Module):
    """Norm, ReLU, a separable convolution, a scaled residual, norm, ReLU. (B, C, *grid) in and out."""

    def __init__(self, dim: int, spatial_dims: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, dim), nn.GroupNorm(GROUPS, dim)
        self.conv, self.act = SeparableConv(spatial_dims, dim, dim), nn.ReLU()
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.act(self.norm1(x))) + self.skip_scale * x
        return self.act(self.norm2(y))


class LightMUNet(Segmenter):
    """LightM-UNet in 2D or 3D. The defaults are those of the published constructor.

    (B, in_channels, *size) to logits (B, out_channels, *size), for sizes whose sides are multiples of 8 (with four
    stages).

    Args:
        spatial_dims, in_channels, out_channels: As in MONAI.
        init_filters: Channels of the first stage, a multiple of 8; they double with every stage.
        blocks_down: Blocks of each stage of the encoder.
        blocks_up: Blocks of each stage of the decoder, the lowest resolution first.
        scan, scan_options: A registered order.
        mixer: ``"scan"``, or ``"conv"``: a convolution in its place.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        init_filters: int = 8,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: Sequence[int] = (1, 1, 1),
        scan: str = "raster",
        scan_options: Mapping[str, Any] | None = None,
        mixer: str = "scan",
    ):
        stages = len(blocks_down)
        super().__init__(spatial_dims, in_channels, out_channels, multiple=2 ** (stages - 1))
        check_choice("LightMUNet", "mixer", mixer, MIXERS)
        if init_filters < 1 or init_filters % GROUPS:
            raise ValueError(f"LightMUNet: init_filters must be a multiple of its {GROUPS} groups, got {init_filters}")
        if len(blocks_up) != stages - 1:
            raise ValueError(
                f"LightMUNet: blocks_up must have {stages - 1} entries, one less than blocks_down; got {blocks_up}"
            )
        conv, dims = CONVS[spatial_dims], [init_filters * 2**i for i in range(stages)]
        self.stem = SeparableConv(spatial_dims, in_channels, init_filters)
        make_mixer: Make = partial(ConvMixer, spatial_dims=spatial_dims)
        if mixer == "scan":
            make_mixer = partial(
                ScanMixer, scan=scan, scan_options=scan_options, spatial_dims=spatial_dims, conv="sequence", conv_size=4
            )
        self.enters = nn.ModuleList(MambaLayer(i, o, make_mixer) for i, o in pairwise(dims))
        self.pool = POOLS[spatial_dims](2)
        self.stages = nn.ModuleList(
            Blocks(*(ResidualMamba(dim, make_mixer) for _ in range(depth)))
            for dim, depth in zip(dims, blocks_down, strict=True)
        )
        self.ups = nn.ModuleList(conv(2 * dim, dim, 1, bias=False) for dim in dims[-2::-1])
        self.up_stages = nn.ModuleList(
            Blocks(*(ResidualConv(dim, spatial_dims) for _ in range(depth)))
            for dim, depth in zip(dims[-2::-1], blocks_up, strict=True)
        )
        self.norm, self.act = nn.GroupNorm(GROUPS, init_filters), nn.ReLU()
        self.out = SeparableConv(spatial_dims, init_filters, out_channels, size=1, bias=True)

    def encode(self, x: Tensor) -> list[Tensor]:
        """The map of each stage, the finest first."""
        x, maps = self.stem(x), []
        for i, stage in enumerate(self.stages):
            x = stage(self.pool(self.enters[i - 1](x)) if i else x)
            maps.append(x)
        return maps

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits, of what ``encode`` returns."""
        *skips, x = maps
        for up, stage, skip in zip(self.ups, self.up_stages, reversed(skips), strict=True):
            x = nn.functional.interpolate(up(x), scale_factor=2.0, mode=INTERPOLATIONS[self.spatial_dims])
            x = stage(x + skip)
        return self.out(self.act(self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.decode(self.encode(x))

    def no_weight_decay(self) -> set[str]:
        """A_log and D, as the code of Mamba marks them. As published: its optimiser does not look at the marks."""
        return set(ssm_parameters(self, "A_log", "D"))


def keys(most: int = 4) -> list[Rule]:
    """Key rules for models with at most so many blocks a stage."""
    return [
        *mamba_keys(),
        rename(r"^convInit\.0\.conv\.", r"stem.depthwise."),
        rename(r"^convInit\.1\.conv\.", r"stem.pointwise."),
        *(rename(rf"^down_layers\.{i}\.0\.0\.", f"enters.{i - 1}.") for i in range(1, 8)),
        *(rename(rf"^down_layers\.(\d+)\.{j}\.", rf"stages.\1.{j - 1}.") for j in range(1, most + 1)),
        rename(r"^(stages\.\d+\.\d+)\.conv(\d)\.", r"\1.mamba\2."),
        rename(r"^up_samples\.(\d+)\.0\.conv\.", r"ups.\1."),
        rename(r"^up_layers\.", r"up_stages."),
        rename(r"^(up_stages\.\d+\.\d+)\.conv\.0\.conv\.", r"\1.conv.depthwise."),
        rename(r"^(up_stages\.\d+\.\d+)\.conv\.1\.conv\.", r"\1.conv.pointwise."),
        rename(r"^conv_final\.0\.", r"norm."),
        rename(r"^conv_final\.2\.0\.conv\.", r"out.depthwise."),
        rename(r"^conv_final\.2\.1\.conv\.", r"out.pointwise."),
    ]


KEYS = keys()


def _variant(name: str, description: str, **kwargs: Any) -> Variant:
    return Variant(
        name, LightMUNet, kwargs, KEYS, first_conv="stem.depthwise", classifier="out.pointwise", task="segmentation",
        description=description,
    )  # fmt: skip


VARIANTS = [
    _variant("lightmunet_3d", "as trained on LiTS: liver and tumour", out_channels=3, init_filters=32),
    _variant("lightmunet_2d", "as trained on X-rays of lungs", spatial_dims=2, in_channels=3, init_filters=32),
    _variant("lightmunet_nano", "not published: small volumes, demos", out_channels=3, init_filters=16,
             blocks_down=(1, 1, 1, 1)),
    _variant("test_lightmunet", "for tests", spatial_dims=2, in_channels=3, blocks_down=(1, 2), blocks_up=(1,)),
]  # fmt: skip
VARIANTS += twins(VARIANTS)

SAME = {
    name: name for name in ("spatial_dims", "in_channels", "out_channels", "init_filters", "blocks_down", "blocks_up")
}
UNCHANGED = {
    "dropout_prob": None, "act": ["RELU", {"inplace": True}], "norm": ["GROUP", {"num_groups": GROUPS}],
    "norm_name": "", "num_groups": GROUPS, "use_conv_final": True, "upsample_mode": "nontrainable",
}  # fmt: skip


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """The published ``LightMUNet`` as our model."""
    constructor(entry, "LightMUNet")
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}
    model = LightMUNet(**translated(given, SAME, UNCHANGED))
    # The norms of the narrowest map magnify rounding.
    return Published(model, keys(max(map(len, model.stages))), _run, float32_bounds={"down3": 1e-3})


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    maps = model.encode(inputs["x"])
    return {f"down{i}": x for i, x in enumerate(maps)} | {"logits": model.decode(maps)}
