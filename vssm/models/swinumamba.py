"""Swin-UMamba: Mamba-Based UNet with ImageNet-Based Pretraining (Liu et al., 2024, arXiv:2402.03302).

An encoder of VMamba's first generation under one of two decoders: the convolutions of UNETR (Swin-UMamba), or patch
expanding and the same Mamba blocks (Swin-UMamba-D, the paper's dagger).
Published code: github.com/JiarunLiu/Swin-UMamba (Apache-2.0); trained nnU-Net checkpoints lie on a drive that has to be
browsed, so no row names them; ``load_weights`` reads them. Same function; other key names, see KEYS and KEYS_D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vssm.layers.block import MixerBlock
from vssm.layers.conv import CONVS, ConvMixer
from vssm.layers.downsample import PatchMerging
from vssm.layers.expand import PatchExpand
from vssm.layers.init import linear_like_transformers
from vssm.layers.layout import over_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.parts import chosen
from vssm.layers.stem import PatchStem
from vssm.layers.unetr import ResidualBlock, UpBlock
from vssm.models.base import drop_path_rates, make_stages, widths
from vssm.models.keys import Rule, also, rename
from vssm.models.names import MIXER, SSM_SHAPES
from vssm.models.segmenter import Blocks, Segmenter
from vssm.models.variant import NotCovered, Published, Variant, constructor, nothing_left, translated

REPOSITORY = "JiarunLiu/Swin-UMamba"
INSTANCE_NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
VMAMBA = ("vanilla_vmamba_tiny",)  # what the published networks start from
UP_DEPTH = 2  # blocks of a level of Swin-UMamba-D's decoder


class Encoder(nn.Module):
    """The stages of a VMamba of the first generation. (B, C, *grid) to the map of each stage, finest first."""

    def __init__(
        self,
        in_channels: int,
        dims: Sequence[int],
        depths: Sequence[int],
        patch_size: int,
        make_mixer: Callable[[int], nn.Module],
        drop_path_rate: float,
        spatial_dims: int,
    ):
        super().__init__()
        self.stem = PatchStem(in_channels, dims[0], patch_size, spatial_dims=spatial_dims)
        self.stages = nn.ModuleList(
            make_stages(
                depths, dims, drop_path_rate, lambda i, j, rate: MixerBlock(dims[i], make_mixer, drop_path=rate),
                partial(PatchMerging, spatial_dims=spatial_dims),
            )
        )  # fmt: skip
        self.apply(linear_like_transformers)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class _Supervised(Segmenter):
    """Logits at several sizes in training, if asked for; the last levels' alone otherwise."""

    deep_supervision: bool

    def outputs(self, maps: Sequence[Tensor], x: Tensor, every: bool) -> list[Tensor]:
        """Logits of the encoder's maps and the images, finest first; ``every`` size or the first alone."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self.check(x)
        every = self.deep_supervision and self.training
        logits = self.outputs(self.encode(x), x, every)
        return logits if every else logits[0]

    def encode(self, x: Tensor) -> list[Tensor]:
        """The map of each stage, finest first."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """None. As published: everything is decayed; norms and biases are left to the optimiser."""
        return set()


def mixers(spatial_dims: int, scan: str, scan_options: Mapping[str, Any] | None, d_state: int) -> dict[str, Callable]:
    """What a block can mix with, by name."""
    scanning = partial(
        ScanMixer, scan=scan, scan_options=scan_options, spatial_dims=spatial_dims, d_state=d_state, out_norm="layer"
    )
    return {"scan": scanning, "conv": partial(ConvMixer, spatial_dims=spatial_dims)}


class SwinUMamba(_Supervised):
    """Swin-UMamba, also in 3D. (B, C, H, W) to logits (B, out_channels, H, W); sides are multiples of 32.

    With ``deep_supervision`` it returns, in training mode, a list of logits at 1, 1/2, 1/4 and 1/8 of the size. All
    heads exist in any case, as published; without it only the first learns.

    Args:
        spatial_dims, in_channels, out_channels: As in MONAI.
        depths: Blocks of each stage of the encoder.
        features: Channels at full resolution, then those of each stage.
        res_block: Residuals in the blocks of the decoder, as in MONAI.
        deep_supervision: Return logits of several sizes in training.
        mixer: ``"scan"``, or ``"conv"`` for the twin without Mamba.
        d_state, scan, scan_options: Of the mixers, see ``ScanMixer``.
        drop_path_rate: Stochastic depth of the encoder, rising from 0. As published it is 0.2, whatever is asked for.
    """

    encoders = VMAMBA

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 14,
        *,
        depths: Sequence[int] = (2, 2, 9, 2),
        features: Sequence[int] = (48, 96, 192, 384, 768),
        res_block: bool = True,
        deep_supervision: bool = False,
        mixer: str = "scan",
        d_state: int = 16,
        scan: str = "cross",
        scan_options: Mapping[str, Any] | None = None,
        drop_path_rate: float = 0.2,
    ):
        super().__init__(spatial_dims, in_channels, out_channels, multiple=2 ** (len(depths) + 1))
        if len(features) != len(depths) + 1:
            raise ValueError(f"SwinUMamba: features must have {len(depths) + 1} entries, got {tuple(features)}")
        make_mixer = chosen("SwinUMamba", "mixer", mixer, mixers(spatial_dims, scan, scan_options, d_state))
        self.deep_supervision = deep_supervision
        first, *dims = features
        self.stem = nn.Sequential(
            CONVS[spatial_dims](in_channels, first, 7, stride=2, padding=3),
            INSTANCE_NORMS[spatial_dims](first, affine=True),
        )
        self.encoder = Encoder(first, dims, depths, 2, make_mixer, drop_path_rate, spatial_dims)
        block, up = (partial(each, spatial_dims, res_block=res_block) for each in (ResidualBlock, UpBlock))
        # As published: a skip has the channels of the next stage, up to the last but one.
        self.skips = nn.ModuleList(block(i, o) for i, o in zip([in_channels, *features], features))
        self.ups = nn.ModuleList(up(i, o) for i, o in zip([*dims, dims[-1]], features))
        self.last = block(first, first)
        self.heads = nn.ModuleList(CONVS[spatial_dims](dim, out_channels, 1) for dim in features[:-1])

    def encode(self, x: Tensor) -> list[Tensor]:
        """The map at half the size, and that of each stage."""
        x = self.stem(x)
        return [x, *self.encoder(x)]

    def outputs(self, maps: Sequence[Tensor], x: Tensor, every: bool) -> list[Tensor]:
        *shallow, y = maps
        skips = [skip(source) for skip, source in zip(self.skips, [x, *shallow], strict=True)]
        levels = []
        for up, skip in zip(reversed(self.ups), reversed(skips), strict=True):
            y = up(y, skip)
            levels.append(y)
        levels = [self.last(y), *levels[-2:0:-1]]
        return [head(level) for head, level in zip(self.heads, levels if every else levels[:1])]

    def encoder_entry(self, name: str) -> str | None:
        """The entry of a VMamba classifier that starts our entry ``name``; None for what starts at random.

        As published: of the patch embedding, which reads other channels, the norm's bias alone is taken.
        """
        entry = name.removeprefix("encoder.")
        if entry == name or (entry.startswith("stem.") and entry != "stem.norm1.bias"):
            return None
        return entry


class SwinUMambaD(_Supervised):
    """Swin-UMamba-D, also in 3D. (B, C, H, W) to logits (B, out_channels, H, W); sides are multiples of 32.

    With ``deep_supervision`` it returns, in training mode, a list of logits at 1, 1/4, 1/8 and 1/16 of the size. All
    heads exist in any case, as published; without it only the last learns.

    Args:
        spatial_dims, in_channels, out_channels: As in MONAI.
        depths: Blocks of each stage of the encoder.
        dim: Channels of the first stage, which double with every stage; or of all of them.
        patch_size: Pixels to one cell of the first stage.
        deep_supervision: Return logits of several sizes in training.
        mixer: ``"scan"``, or ``"conv"`` for the twin without Mamba.
        d_state, scan, scan_options: Of the mixers, see ``ScanMixer``.
        decoder_d_state: States of the decoder's mixers, by default those of the encoder's.
        drop_path_rate, decoder_drop_path_rate: Stochastic depth, rising in the encoder and falling in the decoder.
    """

    encoders = VMAMBA

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 14,
        *,
        depths: Sequence[int] = (2, 2, 9, 2),
        dim: int | Sequence[int] = 96,
        patch_size: int = 4,
        deep_supervision: bool = False,
        mixer: str = "scan",
        d_state: int = 16,
        decoder_d_state: int | None = None,
        scan: str = "cross",
        scan_options: Mapping[str, Any] | None = None,
        drop_path_rate: float = 0.2,
        decoder_drop_path_rate: float = 0.2,
    ):
        dims = widths("SwinUMambaD", dim, depths)
        super().__init__(spatial_dims, in_channels, out_channels, multiple=patch_size * 2 ** (len(depths) - 1))
        make_mixer, make_up_mixer = (
            chosen("SwinUMambaD", "mixer", mixer, mixers(spatial_dims, scan, scan_options, states))
            for states in (d_state, decoder_d_state or d_state)
        )
        self.deep_supervision = deep_supervision
        self.encoder = Encoder(in_channels, dims, depths, patch_size, make_mixer, drop_path_rate, spatial_dims)
        rates = drop_path_rates(decoder_drop_path_rate, UP_DEPTH * (len(dims) - 1))
        conv, upwards = CONVS[spatial_dims], dims[-2::-1]
        self.expands, self.joins, self.blocks, self.heads = (nn.ModuleList() for _ in range(4))
        for deep, width in zip(dims[::-1], upwards):
            self.expands.append(PatchExpand(deep, width, spatial_dims=spatial_dims))
            self.joins.append(nn.Linear(2 * width, width))
            blocks = (MixerBlock(width, make_up_mixer, drop_path=rates.pop()) for _ in range(UP_DEPTH))
            self.blocks.append(Blocks(*blocks))
        self.expands.append(PatchExpand(dims[0], dims[0], patch_size, spatial_dims))
        self.heads.extend(conv(width, out_channels, 1) for width in [*upwards, dims[0]])
        self.apply(_kaiming_convolution)                        # linear layers of the decoder start as PyTorch's do

    def encode(self, x: Tensor) -> list[Tensor]:
        return self.encoder(x)

    def outputs(self, maps: Sequence[Tensor], x: Tensor, every: bool) -> list[Tensor]:
        *skips, y = maps
        levels = []
        for expand, join, blocks, skip in zip(self.expands, self.joins, self.blocks, reversed(skips)):
            y = blocks(over_tokens(join, torch.cat([expand(y), skip], 1)))
            levels.append(y)
        levels.append(self.expands[-1](y))
        heads = list(zip(self.heads, levels, strict=True))[::-1]
        return [head(level) for head, level in (heads if every else heads[:1])]

    def encoder_entry(self, name: str) -> str | None:
        """The entry of a VMamba classifier that starts our entry ``name``; None for what starts at random.

        As published: the patch embedding starts at random unless the images have three channels.
        """
        entry = name.removeprefix("encoder.")
        if entry == name or (entry.startswith("stem.") and self.in_channels != 3):
            return None
        return entry


def _kaiming_convolution(module: nn.Module) -> None:
    """As the published network starts: convolutions, depthwise and patch embedding included, without bias."""
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


ENCODER: list[Rule] = [
    also(rename(r"^module\.", "")),
    *SSM_SHAPES,
    rename(r"\.self_attention\.", ".mixer."),
    *MIXER,
    rename(r"\.ln_1\.", ".norm1."),
    rename(r"^vssm_encoder\.patch_embed\.proj\.", "encoder.stem.conv1."),
    rename(r"^vssm_encoder\.patch_embed\.norm\.", "encoder.stem.norm1."),
    *(rename(rf"^vssm_encoder\.downsamples\.{i}\.", f"encoder.stages.{i + 1}.downsample.") for i in range(7)),
    rename(r"^vssm_encoder\.layers\.(\d+)\.blocks\.", r"encoder.stages.\1.blocks."),
]
KEYS: list[Rule] = [
    rename(r"\.(conv\d)\.conv\.weight$", r".\1.weight"),   # before there is a stem.conv1
    *ENCODER,
    *(rename(rf"^encoder{i + 1}\.layer\.", f"skips.{i}.") for i in range(5)),
    *(rename(rf"^decoder{i + 2}\.conv_block\.", f"ups.{i}.block.") for i in range(5)),
    *(rename(rf"^decoder{i + 2}\.transp_conv\.conv\.", f"ups.{i}.up.") for i in range(5)),
    rename(r"^decoder1\.layer\.", "last."),
    rename(r"^out_layers\.(\d+)\.conv\.conv\.", r"heads.\1."),
]
KEYS_D: list[Rule] = [
    *ENCODER,
    rename(r"^decoder\.expand_layers\.", "expands."),
    rename(r"^decoder\.concat_back_dim\.", "joins."),
    rename(r"^decoder\.stages\.(\d+)\.blocks\.", r"blocks.\1."),
    rename(r"^decoder\.seg_layers\.", "heads."),
]


def _variant(name: str, description: str, **kwargs: Any) -> Variant:
    return Variant(name, SwinUMamba, kwargs, KEYS, task="segmentation", description=description)


def _variant_d(name: str, description: str, **kwargs: Any) -> Variant:
    return Variant(name, SwinUMambaD, kwargs, KEYS_D, task="segmentation", description=description)


DATA = {  # images and classes, as published
    "abdomenmr": ("AbdomenMR", {"in_channels": 1, "out_channels": 14}),
    "endovis17": ("Endovis17", {"in_channels": 3, "out_channels": 8}),
    "neuripscell": ("NeurIPSCell", {"in_channels": 3, "out_channels": 3}),
}
VARIANTS = [
    *(_variant(f"swinumamba_{data}", f"as trained on {name}", deep_supervision=True, **channels)
      for data, (name, channels) in DATA.items()),
    *(_variant_d(f"swinumamba_d_{data}", f"as trained on {name}", deep_supervision=True, **channels)
      for data, (name, channels) in DATA.items()),
    _variant("swinumamba_nomamba", "not published: convolutions for mixers", mixer="conv"),
    _variant_d("swinumamba_d_nomamba", "not published: convolutions for mixers", mixer="conv"),
    _variant("test_swinumamba", "for tests", in_channels=3, depths=(1, 1, 1, 1), features=(4, 8, 8, 16, 16),
             deep_supervision=True),
    _variant_d("test_swinumamba_d", "for tests", in_channels=3, depths=(1, 1, 1, 1), dim=8, deep_supervision=True),
]  # fmt: skip


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``SwinUMamba`` or ``SwinUMambaD`` of the published code as our model."""
    if constructor(entry, "SwinUMamba", "SwinUMambaD") == "SwinUMamba":
        return Published(SwinUMamba(**_translated(kwargs)), KEYS, _run)
    return Published(SwinUMambaD(**_translated_d(kwargs)), KEYS_D, _run)


SAME = {"in_chans": "in_channels", "out_chans": "out_channels", "feat_size": "features", "res_block": "res_block",
        "deep_supervision": "deep_supervision"}  # fmt: skip
WIDTHS = [48, 96, 192, 384, 768]
UNCHANGED = {"hidden_size": WIDTHS[-1], "norm_name": "instance", "spatial_dims": 2}
UNCHANGED_D = {"drop_rate": 0.0, "attn_drop_rate": 0.0, "patch_norm": True}
IGNORED = {"drop_path_rate", "layer_scale_init_value"}  # by the published Swin-UMamba


def _translated(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    ours = {"out_channels": 13, "features": WIDTHS, **translated(kwargs, SAME, UNCHANGED, IGNORED)}
    if list(ours["features"])[1:] != WIDTHS[1:]:
        raise NotCovered(f"feat_size={ours['features']}: the published encoder has its own widths, {WIDTHS[1:]}")
    return ours


def _translated_d(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    encoder, decoder = dict(kwargs.get("vss_args", {})), dict(kwargs.get("decoder_args", {}))
    nothing_left(kwargs.keys() - {"vss_args", "decoder_args"})
    ours = {
        "in_channels": encoder.pop("in_chans", 3), "depths": encoder.pop("depths", (2, 2, 9, 2)),
        "dim": encoder.pop("dims", 96), "drop_path_rate": encoder.pop("drop_path_rate", 0.1),
        "d_state": encoder.pop("d_state", 16), "decoder_d_state": decoder.pop("d_state", 16),
        "out_channels": decoder.pop("num_classes"), "deep_supervision": decoder.pop("deep_supervision", False),
        "decoder_drop_path_rate": decoder.pop("drop_path_rate", 0.2),
    }  # fmt: skip
    if encoder.pop("patch_size", 4) != 4:
        raise NotCovered(f"patch_size={kwargs['vss_args']['patch_size']}: the published decoder ends 4 times as large")
    if None in (ours["d_state"], ours["decoder_d_state"]):
        raise NotCovered("d_state=None: as many states as a width asks for")
    for key, value in UNCHANGED_D.items():
        if encoder.pop(key, value) != value:
            raise NotCovered(f"{key}={kwargs['vss_args'][key]!r} in vss_args")
    encoder.pop("use_checkpoint", None)
    features = list(decoder.pop("features_per_stage"))
    if features != widths("SwinUMambaD", ours["dim"], ours["depths"]):
        raise NotCovered(f"features_per_stage={features}, other than those of the encoder")
    nothing_left({**encoder, **decoder})
    return ours


def _run(model: _Supervised, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"]
    maps = model.encode(x)
    stages = maps if isinstance(model, SwinUMambaD) else maps[1:]
    found = {f"enc{i + 1}": y for i, y in enumerate(stages)}
    return found | {f"seg{i}": y for i, y in enumerate(model.outputs(maps, x, every=True))}
