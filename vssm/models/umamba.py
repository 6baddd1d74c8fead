"""U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation (Ma et al., 2024, arXiv:2401.04722).

nnU-Net's residual U-Net with Mamba layers: one at the bottleneck (Bot), or in the stages of the encoder (Enc); 2D, 3D.
Published code: github.com/bowang-lab/U-Mamba (Apache-2.0), a fork of nnU-Net; no weights. Same function; other key
names, see ``keys``.

A Mamba layer stands in the stream, not beside it: its output replaces the map. Where a map of Enc has no more cells
than channels, the channels are the tokens and the cells their width, so that its weights are those of one image size.
nnU-Net makes strides, kernels and features for each dataset: take them from the plans beside a checkpoint
(``from_plan``). The rows here follow patch sizes recalled from the paper, no proof of what the authors trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vssm.layers.conv import CONVS, ConvMixer
from vssm.layers.layout import to_map, to_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.parts import check_choice
from vssm.layers.ssm import ssm_parameters
from vssm.models.keys import Rule, drop, rename
from vssm.models.mamba_keys import mamba_keys
from vssm.models.segmenter import Blocks, Segmenter
from vssm.models.variant import NotCovered, Published, Variant, nothing_left, twins

REPOSITORY = "bowang-lab/U-Mamba"
SLOPE = 0.01
NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
PLACES = ("bottleneck", "encoder")
MIXERS = ("scan", "conv")
Size = tuple[int, ...]
_mixer = partial(ScanMixer, conv="sequence", conv_size=4)


class ConvBlock(nn.Module):
    """Two convolutions under instance norms, and a residual. (B, C, *grid) to (B, C', *grid / stride).

    The residual is a convolution of side 1 (``project``), or the input.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Size, stride: Size, project: bool):
        super().__init__()
        conv: Any = CONVS[len(kernel)]
        norm, around = NORMS[len(kernel)], tuple(n // 2 for n in kernel)
        self.conv1 = conv(in_channels, out_channels, kernel, stride, around)
        self.conv2 = conv(out_channels, out_channels, kernel, 1, around)
        self.norm1, self.norm2 = norm(out_channels, affine=True), norm(out_channels, affine=True)
        self.conv3 = conv(in_channels, out_channels, 1) if project else None
        self.act, self.stride = nn.LeakyReLU(SLOPE, inplace=True), stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(y + (x if self.conv3 is None else self.conv3(self.strided(x))))

    def strided(self, x: Tensor) -> Tensor:
        """Every stride-th cell. A strided convolution of side 1 is the same, and crashes in oneDNN on few channels."""
        steps: list[Any] = [slice(None, None, step) for step in self.stride]
        return x[(..., *steps)]


def conv_blocks(in_channels: int, out_channels: int, kernel: Size, stride: Size, depth: int) -> Blocks:
    """A block to other channels and another size, and ``depth - 1`` that change neither."""
    same = (1,) * len(kernel)
    first = ConvBlock(in_channels, out_channels, kernel, stride, project=True)
    return Blocks(first, *(ConvBlock(out_channels, out_channels, kernel, same, False) for _ in range(depth - 1)))


class MambaLayer(nn.Module):
    """Norm and mixer. (B, C, *grid) in and out.

    Computed in the precision of its weights also under autocast: in half precision the layer is where the published
    networks became NaN.

    Args:
        dim: Channels of a token.
        mixer: Of tokens.
        channel_tokens: The channels are the tokens, and the cells their channels.
    """

    def __init__(self, dim: int, mixer: nn.Module, channel_tokens: bool = False):
        super().__init__()
        self.norm, self.mixer, self.channel_tokens = nn.LayerNorm(dim), mixer, channel_tokens
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.mix(x.to(self.norm.weight.dtype)).to(x.dtype)
        return self.mix(x)

    def mix(self, x: Tensor) -> Tensor:
        return checkpoint(self.mixed, x) if self.grad_checkpointing else self.mixed(x)

    def mixed(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        if self.channel_tokens:
            return self.mixer(self.norm(x.flatten(2)), (1, x.shape[1])).view(x.shape)
        return to_map(self.mixer(self.norm(to_tokens(x)), grid), grid)


class UMamba(Segmenter):
    """U-Mamba in 2D or 3D. The defaults are U-Mamba Bot in 3D with four isotropic stages.

    (B, in_channels, *size) to logits (B, out_channels, *size), for sizes whose sides are multiples of the product of
    the strides. In training with ``deep_supervision``: a list of logits, the finest first, one for each stage but the
    lowest.

    Args:
        spatial_dims, in_channels, out_channels: As in MONAI.
        mamba: ``"bottleneck"`` or ``"encoder"``: where the Mamba layers are. As published, an encoder in 2D has them in
            every second stage, the last one included.
        features: Channels of each stage.
        strides: Of the first convolution of each stage, a number or one for each axis; 1 for the first stage.
        kernel_size: Of the convolutions of each stage, a number or one for each axis; or one number for all.
        depths: Blocks of each stage of the encoder. The stem, at full resolution before the first stage, has as many
            as that.
        decoder_depths: Blocks of each stage of the decoder, the lowest resolution first.
        deep_supervision: See above; nothing else depends on it.
        img_size: Size of the images, one number or one a side. An encoder's Mamba layer then takes channels as tokens
            where its map has no more cells than channels, as published, and reads images of this size only. None: cells
            are always the tokens, and images may have any size.
        scan, scan_options: A registered order, where cells are the tokens.
        mixer: ``"scan"``, or ``"conv"``: a convolution in its place, which reads any size.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        mamba: str = "bottleneck",
        features: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2),
        kernel_size: int | Sequence[int | Sequence[int]] = 3,
        depths: Sequence[int] = (2, 2, 1, 1),
        decoder_depths: Sequence[int] = (2, 2, 1),
        deep_supervision: bool = False,
        img_size: int | Sequence[int] | None = None,
        scan: str = "raster",
        scan_options: Mapping[str, Any] | None = None,
        mixer: str = "scan",
    ):
        stages = len(features)
        kernel_size = [kernel_size] * stages if isinstance(kernel_size, int) else kernel_size
        for name, values, count in (
            ("strides", strides, stages), ("kernel_size", kernel_size, stages), ("depths", depths, stages),
            ("decoder_depths", decoder_depths, stages - 1),
        ):  # fmt: skip
            if len(values) != count:
                raise ValueError(f"UMamba: {name} must have {count} entries for {stages} features, got {tuple(values)}")
        check_choice("UMamba", "mamba", mamba, PLACES)
        check_choice("UMamba", "mixer", mixer, MIXERS)
        steps = [_axes("strides", step, spatial_dims) for step in strides]
        kernels = [_axes("kernel_size", size, spatial_dims) for size in kernel_size]
        if set(steps[0]) != {1}:
            raise ValueError(f"UMamba: strides[0] must be 1, as the first stage keeps the image's size; got {steps[0]}")
        if any(size % 2 == 0 for kernel in kernels for size in kernel):
            raise ValueError(f"UMamba: kernel_size must be odd, so that sizes follow the strides, got {kernels}")
        reductions = [tuple(map(prod, zip(*steps[: i + 1]))) for i in range(stages)]
        super().__init__(spatial_dims, in_channels, out_channels, multiple=reductions[-1])
        self.deep_supervision, self.reductions = deep_supervision, reductions
        img_size = (img_size,) * spatial_dims if isinstance(img_size, int) else img_size
        self.img_size = tuple(img_size) if img_size else None
        whole = not self.img_size or not any(side % n for side, n in zip(self.img_size, self.multiple))
        if self.img_size and (len(self.img_size) != spatial_dims or not whole):
            raise ValueError(
                f"UMamba: img_size must have {spatial_dims} sides, multiples of {self.multiple}, got {self.img_size}"
            )

        conv = CONVS[spatial_dims]
        self.stem = conv_blocks(in_channels, features[0], kernels[0], steps[0], depths[0])
        sources = [features[0], *features[:-1]]
        self.stages = nn.ModuleList(map(conv_blocks, sources, features, kernels, steps, depths))
        self.mambas = nn.ModuleDict()
        for i in _mamba_stages(mamba, stages, spatial_dims):
            cells = prod(side // n for side, n in zip(img_size, reductions[i])) if img_size else None
            if mixer == "conv":
                layer = MambaLayer(features[i], ConvMixer(features[i], spatial_dims))
            elif mamba == "encoder" and cells is not None and cells <= features[i]:
                layer = MambaLayer(cells, _mixer(cells, scan="raster", spatial_dims=2), channel_tokens=True)
            else:
                cell_mixer = _mixer(features[i], scan=scan, scan_options=scan_options, spatial_dims=spatial_dims)
                layer = MambaLayer(features[i], cell_mixer)
            self.mambas[str(i)] = layer

        levels = list(range(stages - 1))[::-1]                              # of the decoder's stages, lowest first
        self.factors = [steps[i + 1] for i in levels]
        self.ups = nn.ModuleList(conv(features[i + 1], features[i], 1) for i in levels)
        # As published: in 2D the decoder does not read the skip of full resolution.
        self.skipped = [spatial_dims == 2 and i == 0 for i in levels]
        self.up_stages = nn.ModuleList(
            conv_blocks(features[i] * (1 if skipped else 2), features[i], kernels[i], steps[0], depth)
            for i, skipped, depth in zip(levels, self.skipped, decoder_depths, strict=True)
        )
        self.heads = nn.ModuleList(conv(features[i], out_channels, 1) for i in levels)
        self.apply(_init_conv)

    def check_sides(self, sides: tuple[int, ...]) -> None:
        for i, layer in self.mambas.items():
            grid = tuple(side // n for side, n in zip(sides, self.reductions[int(i)]))
            width = layer.norm.normalized_shape[0]
            if layer.channel_tokens and prod(grid) != width:
                raise ValueError(
                    f"UMamba: the weights of stage {i} are those of {width} cells, images of {self.img_size}; got "
                    f"{prod(grid)} cells, images of {sides}; pad or cut them, or build the model with their img_size"
                )
        if prod(sides) == prod(self.multiple):
            larger = (2 * self.multiple[0], *sides[1:])
            raise ValueError(
                f"UMamba: the lowest map must have two cells or more, got one of images {sides}; pad them to {larger}"
            )

    def encode(self, x: Tensor) -> list[Tensor]:
        """The map of each stage, behind its Mamba layer if it has one."""
        x, maps = self.stem(x), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if str(i) in self.mambas:
                x = self.mambas[str(i)](x)
            maps.append(x)
        return maps

    def decode(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The decoder's maps, finest first, of those of the encoder."""
        *skips, x = maps
        decoded: list[Tensor] = []
        parts = zip(reversed(skips), self.ups, self.factors, self.skipped, self.up_stages, strict=True)
        for skip, up, factors, skipped, stage in parts:
            # As published, but for the order: a convolution of side 1 and a repetition of cells commute.
            x = nn.functional.interpolate(up(x), scale_factor=tuple(map(float, factors)), mode="nearest")
            x = stage(x if skipped else torch.cat([x, skip], 1))
            decoded.insert(0, x)
        return decoded

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self.check(x)
        decoded = self.decode(self.encode(x))
        if self.training and self.deep_supervision:
            return self.all_logits(decoded)
        return self.heads[-1](decoded[0])

    def all_logits(self, decoded: Sequence[Tensor]) -> list[Tensor]:
        """Logits of each of the decoder's maps."""
        return [head(x) for head, x in zip(reversed(self.heads), decoded, strict=True)]

    def no_weight_decay(self) -> set[str]:
        """A_log and D, as the code of Mamba marks them. As published: nnU-Net's optimiser ignores the marks."""
        return set(ssm_parameters(self, "A_log", "D"))


def _axes(name: str, value: int | Sequence[int], spatial_dims: int) -> Size:
    axes = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(axes) != spatial_dims or any(not isinstance(n, int) or n < 1 for n in axes):
        raise ValueError(f"UMamba: {name} must be whole numbers from 1, {spatial_dims} of them or one, got {value!r}")
    return axes


def _mamba_stages(place: str, stages: int, spatial_dims: int) -> list[int]:
    if place == "bottleneck":
        return [stages - 1]
    return list(range(stages)) if spatial_dims == 3 else [i for i in range(stages) if i % 2 != stages % 2]


def _init_conv(module: nn.Module) -> None:
    """As nnU-Net: He's normal distribution for leaky ReLUs, no bias."""
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        nn.init.zeros_(module.bias)


def fewer_blocks(depths: Sequence[int], decoder_depths: Sequence[int]) -> tuple[list[int], list[int]]:
    """The numbers of blocks that U-Mamba makes of a plan's.

    As published: the lower half of the encoder and the upper half of the decoder have one block a stage.

    >>> fewer_blocks([2] * 6, [2] * 5)
    ([2, 2, 2, 1, 1, 1], [2, 2, 2, 1, 1])
    """
    first, first_up = math.ceil(len(depths) / 2), math.ceil((len(depths) - 1) / 2 + 0.5)
    return (
        [1 if i >= first else depth for i, depth in enumerate(depths)],
        [1 if i >= first_up else depth for i, depth in enumerate(decoder_depths)],
    )


def from_plan(configuration: Mapping[str, Any], *, mamba: str = "bottleneck") -> dict[str, Any]:
    """Arguments of ``UMamba`` for a configuration of an nnU-Net plan (``plans["configurations"]["3d_fullres"]``).

    Both layouts are read: of nnU-Net 2.0 and 2.1, with which U-Mamba was published, and of 2.2 and later.

    Raises:
        ValueError: If the configuration lacks an entry; the message names it.
    """
    architecture = configuration.get("architecture")
    source = configuration if architecture is None else architecture.get("arch_kwargs", {})
    names = ("pool_op_kernel_sizes", "conv_kernel_sizes", "n_conv_per_stage_encoder", "n_conv_per_stage_decoder")
    if architecture is not None:
        count = "n_conv_per_stage" if "n_conv_per_stage" in source else "n_blocks_per_stage"
        names = ("strides", "kernel_sizes", count, "n_conv_per_stage_decoder")
    size = configuration.get("patch_size")
    wanted = [name for name in names if name not in source] + (["patch_size"] if size is None else [])
    if wanted:
        raise ValueError(f"from_plan: the configuration must have {', '.join(wanted)}; got {', '.join(configuration)}")
    strides, kernels, depths, decoder_depths = (source[name] for name in names)
    stages = len(strides)
    features = source.get("features_per_stage")
    if features is None:
        base, most = source.get("UNet_base_num_features", 32), source.get("unet_max_num_features")
        features = [min(base * 2**i, most or (512 if len(size) == 2 else 320)) for i in range(stages)]
    depths = [depths] * stages if isinstance(depths, int) else depths
    decoder_depths = [decoder_depths] * (stages - 1) if isinstance(decoder_depths, int) else decoder_depths
    fewer, fewer_up = fewer_blocks(depths, decoder_depths)
    return dict(
        spatial_dims=len(size), mamba=mamba, features=list(features), strides=strides, kernel_size=kernels,
        depths=fewer, decoder_depths=fewer_up, img_size=list(size) if mamba == "encoder" else None,
    )  # fmt: skip


def keys(mamba: str, stages: int) -> list[Rule]:
    """Key rules for models with Mamba layers there and so many stages."""
    layer = {
        "bottleneck": rename(r"^mamba_layer\.", f"mambas.{stages - 1}."),
        "encoder": rename(r"^encoder\.mamba_layers\.(\d+)\.", r"mambas.\1."),
    }
    return [
        drop(r"^decoder\.encoder\."),                       # the published decoder holds the encoder a second time,
        drop(r"\.all_modules\.[01]\."),                     # and some blocks their parts
        *mamba_keys(),
        layer[mamba],
        rename(r"\.([1-9]\d*)\.conv(\d)\.norm\.", r".\1.norm\2."),
        rename(r"\.([1-9]\d*)\.(conv\d)\.conv\.", r".\1.\2."),
        rename(r"^encoder\.(stem|stages)\.", r"\1."),
        rename(r"^decoder\.stages\.", r"up_stages."),
        rename(r"^decoder\.upsample_layers\.(\d+)\.conv\.", r"ups.\1."),
        rename(r"^decoder\.seg_layers\.", r"heads."),
    ]


KEYS = keys("bottleneck", 4)


def _plan(spatial_dims: int, stages: int, widest: int, flat: Sequence[int] = ()) -> dict[str, Any]:
    """Arguments as nnU-Net's rules make them; ``flat``: stages that do not halve the first axis."""
    depths, decoder_depths = fewer_blocks([2] * stages, [2] * (stages - 1))
    plane = (2,) * (spatial_dims - 1)
    return dict(
        spatial_dims=spatial_dims, features=[min(32 * 2**i, widest) for i in range(stages)],
        strides=[1, *((1, *plane) if i in flat else (2, *plane) for i in range(1, stages))],
        kernel_size=[(1, 3, 3) if flat and i == 0 else 3 for i in range(stages)],
        depths=depths, decoder_depths=decoder_depths,
    )  # fmt: skip


def _variant(name: str, description: str, **kwargs: Any) -> Variant:
    rules = keys(kwargs.get("mamba", "bottleneck"), len(kwargs["features"]))
    return Variant(
        name, UMamba, kwargs, rules, first_conv="stem.0.conv1", classifier="heads", task="segmentation",
        description=description,
    )  # fmt: skip


VOLUME = dict(_plan(3, 6, 320, flat=(1, 5)), out_channels=14, deep_supervision=True)
IMAGE = dict(_plan(2, 7, 512), out_channels=14, deep_supervision=True)
CELL = dict(_plan(2, 8, 512), in_channels=3, out_channels=3, deep_supervision=True)
NANO: dict[str, Any] = dict(features=(12, 24, 48, 64), out_channels=3)
TEST: dict[str, Any] = dict(
    spatial_dims=2, in_channels=3, deep_supervision=True, features=(4, 6, 8), strides=(1, 2, 2), depths=(2, 1, 1),
    decoder_depths=(2, 1),
)  # fmt: skip
VARIANTS = [
    _variant("umamba_bot_3d", "the plan of AbdomenCT", **VOLUME),
    _variant("umamba_enc_3d", "the plan of AbdomenCT", mamba="encoder", img_size=(40, 224, 192), **VOLUME),
    _variant("umamba_enc_3d_mr", "the plan of AbdomenMR", mamba="encoder", img_size=(48, 160, 224), **VOLUME),
    _variant("umamba_bot_2d", "the plan of AbdomenMR", **IMAGE),
    _variant("umamba_enc_2d", "the plan of AbdomenMR", mamba="encoder", img_size=(320, 320), **IMAGE),
    _variant("umamba_enc_2d_endovis", "the plan of Endovis17", mamba="encoder", img_size=(384, 640),
             **{**IMAGE, "in_channels": 3, "out_channels": 8}),
    _variant("umamba_enc_2d_cell", "the plan of NeurIPSCell", mamba="encoder", img_size=(512, 512), **CELL),
    _variant("umamba_nano", "not published: small volumes, demos", **NANO),
    _variant("test_umamba", "for tests", **TEST),
    _variant("test_umamba_enc", "for tests", mamba="encoder", **TEST),
]  # fmt: skip
VARIANTS += twins(VARIANTS)

SAME = {"input_channels": "in_channels", "num_classes": "out_channels", "strides": "strides",
        "kernel_sizes": "kernel_size", "deep_supervision": "deep_supervision"}  # fmt: skip
UNCHANGED: dict[str, Any] = {
    "conv_bias": True, "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin_kwargs": {"inplace": True},
}  # fmt: skip
# As published: dropout and another stem are taken as arguments, and not made.
INEFFECTIVE = {"dropout_op", "dropout_op_kwargs", "stem_channels"}


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``UMambaBot`` or ``UMambaEnc`` of the published code, from the file for 2D or for 3D, as our model."""
    found = re.search(r"(UMambaBot|UMambaEnc)_([23])d\.py:\1$", entry)
    if not found:
        raise NotCovered(f"entry {entry!r} is no model of this family")
    given = {key: value for key, value in kwargs.items() if key not in INEFFECTIVE}
    for key, value in UNCHANGED.items():
        if given.pop(key, value) != value:
            raise NotCovered(f"{key}={kwargs[key]!r}")
    mamba = "bottleneck" if found[1] == "UMambaBot" else "encoder"
    stages, features = given.pop("n_stages"), given.pop("features_per_stage")
    depths, decoder_depths = given.pop("n_conv_per_stage"), given.pop("n_conv_per_stage_decoder")
    img_size = given.pop("input_size", None)
    if mamba == "encoder" and img_size is None:
        raise NotCovered("no input_size among the arguments")
    ours = {name: given.pop(key) for key, name in SAME.items() if key in given}
    nothing_left(given)
    fewer, fewer_up = fewer_blocks(_listed(depths, stages), _listed(decoder_depths, stages - 1))
    model = UMamba(
        int(found[2]), mamba=mamba, features=_listed(features, stages), depths=fewer, decoder_depths=fewer_up,
        img_size=img_size if mamba == "encoder" else None, **ours,
    )  # fmt: skip
    # Where Mamba's outputs replace a map and are normalised, rounding grows.
    return Published(model, keys(mamba, stages), _run, float32_bounds={"": 1e-3} if mamba == "encoder" else {})


def _listed(value: int | Sequence[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    decoded = model.decode(model.encode(inputs["x"]))
    if not model.deep_supervision:
        return {"seg0": model.heads[-1](decoded[0])}
    return {f"seg{i}": y for i, y in enumerate(model.all_logits(decoded))}
