"""MambaMIM: Pre-training Mamba with State Space Token Interpolation (Tang et al., 2024, arXiv:2408.08070).

The encoder of ``vssm.models.hymamba`` is pre-trained on images of which it sees some patches; a decoder reconstructs
the others.
Published code: github.com/FengheTan9/MambaMIM (Apache-2.0; weights announced, none linked). Same function; other key
names, see ``pretraining_keys``. What the published code holds and never uses is left out here: one fusion, one
projection and two mask tokens of its decoder.

From pre-training to segmentation: ``segmenter.encoder.load_state_dict(pretrained.encoder.state_dict())``, or
``vssm.checkpoints.load_encoder(segmenter, FILE)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vssm.layers.conv import CONVS, TRANSPOSED
from vssm.layers.layout import to_tokens
from vssm.layers.ssm import ssm_parameters
from vssm.models.hymamba import HybridEncoder, HyMamba, encoder_keys, segmenter_keys, spread
from vssm.models.keys import Rule, drop, rename
from vssm.models.variant import Published, Variant, constructor, nothing_left, twins

REPOSITORY = "FengheTan9/MambaMIM"
BATCH_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class EncoderAlone(nn.Module):
    """What the published pre-training saves: the encoder. Returns its maps.

    Args:
        spatial_dims, in_channels: As in MONAI.
        channels, depths, kernel_size, mlp_ratios, mamba_depth, mixer: Of the encoder.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        *,
        channels: Sequence[int] = (32, 64, 128, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 1),
        kernel_size: int | Sequence[int] = 3,
        mlp_ratios: Sequence[int] = (2, 4, 4, 4),
        mamba_depth: int = 4,
        mixer: str = "scan",
    ):
        super().__init__()
        self.encoder = HybridEncoder(
            spatial_dims, in_channels, channels=channels, depths=depths, kernel_size=kernel_size,
            mlp_ratios=mlp_ratios, mamba_depth=mamba_depth, mixer=mixer,
        )  # fmt: skip

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.encoder(x)


class Reconstruction(NamedTuple):
    """What pre-training returns."""

    loss: Tensor        # scalar: mean of patch_loss over the masked patches of the batch
    image: Tensor       # (B, C, *size): each patch with mean 0 and variance 1, as the loss sees it
    patch_loss: Tensor  # (B, patches)
    visible: Tensor     # (B, 1, *grid): 1 where the encoder saw the patch


class UpStage(nn.Module):
    """Double the grid, two convolutions to half the channels. (B, C, *grid) to (B, C / 2, *2 grid)."""

    def __init__(self, spatial_dims: int, dim: int):
        super().__init__()
        self.up = TRANSPOSED[spatial_dims](dim, dim, 2, stride=2)
        self.convs = two_convs(spatial_dims, dim, dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(self.up(x))


def two_convs(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """Convolution of side 3, batch norm, ReLU, twice."""
    conv, norm = CONVS[spatial_dims], BATCH_NORMS[spatial_dims]
    return nn.Sequential(
        conv(in_channels, out_channels, 3, padding=1), norm(out_channels), nn.ReLU(),
        conv(out_channels, out_channels, 3, padding=1), norm(out_channels), nn.ReLU(),
    )  # fmt: skip


def init_decoder_(module: nn.Module) -> None:
    """Of the published decoder: small weights, transposed convolutions by their fan-out; biases zero."""
    if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class MambaMIM(nn.Module):
    """Pre-training: reconstruct the patches that the encoder does not see.

    Images (B, in_channels, *size), with sides that are multiples of the patch, to a ``Reconstruction``.

    Args:
        spatial_dims, in_channels: As in MONAI.
        mask_ratio: Share of the patches that the encoder does not see.
        decoder_width: Channels of the decoder at the lowest resolution.
        channels, depths, kernel_size, mlp_ratios, mamba_depth, mixer: Of the encoder. A patch is a cell of its last
            map.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        *,
        mask_ratio: float = 0.75,
        decoder_width: int = 768,
        channels: Sequence[int] = (32, 64, 128, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 1),
        kernel_size: int | Sequence[int] = 3,
        mlp_ratios: Sequence[int] = (2, 4, 4, 4),
        mamba_depth: int = 4,
        mixer: str = "scan",
    ):
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"MambaMIM: mask_ratio must lie between 0 and 1, got {mask_ratio}")
        levels = len(channels) - 1
        if decoder_width % 2**levels:
            raise ValueError(f"MambaMIM: decoder_width must be a multiple of {2**levels}, got {decoder_width}")
        self.spatial_dims, self.in_channels, self.mask_ratio = spatial_dims, in_channels, mask_ratio
        self.encoder = HybridEncoder(
            spatial_dims, in_channels, channels=channels, depths=depths, kernel_size=kernel_size,
            mlp_ratios=mlp_ratios, mamba_depth=mamba_depth, mixer=mixer,
        )  # fmt: skip
        self.patch = self.encoder.reduction
        conv, dim = CONVS[spatial_dims], channels[-1]
        widths = [decoder_width // 2**i for i in range(levels + 1)]
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        self.interpolation = nn.Parameter(torch.zeros(1, dim, dim))
        # Of the levels above the lowest, coarse to fine. As published: nothing of full resolution reaches the loss.
        skips = channels[:1:-1]
        self.fills = nn.ParameterList(
            nn.init.trunc_normal_(torch.empty(1, skip, *(1,) * spatial_dims), std=0.02, a=-0.02, b=0.02)
            for skip in skips
        )
        lowest = nn.Identity() if dim == widths[0] else conv(dim, widths[0], 1)
        self.projections = nn.ModuleList(
            [lowest, *(conv(i, o, 3, padding=1) for i, o in zip(skips, widths[1:]))]
        )
        self.fuses = nn.ModuleList(two_convs(spatial_dims, 2 * width, width) for width in widths[1:-1])
        self.stages = nn.ModuleList(UpStage(spatial_dims, width) for width in widths[:-1])
        self.out = conv(widths[-1], in_channels, 1)
        for part in (self.fuses, self.stages, self.out):
            part.apply(init_decoder_)

    def check(self, x: Tensor) -> None:
        """Refuse images that are not made of whole patches, or of too few.

        Raises:
            ValueError: Then; the message says to which size the image must be padded.
        """
        sides = tuple(x.shape[2:])
        if x.ndim != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            layout = f"(B, {self.in_channels}, {'D, H, W' if self.spatial_dims == 3 else 'H, W'})"
            raise ValueError(f"MambaMIM: images must be {layout}, got {tuple(x.shape)}")
        padded = tuple(max(1, -(-side // self.patch)) * self.patch for side in sides)
        if sides != padded:
            raise ValueError(
                f"MambaMIM: each side of an image must be a multiple of {self.patch}, got {sides}; pad it to {padded}"
            )
        cells = prod(side // self.patch for side in sides)
        if not 0 < self.visible_patches(cells) < cells:
            raise ValueError(
                f"MambaMIM: of the {cells} patches of images of {sides} some must be masked and some not, which "
                f"mask_ratio={self.mask_ratio} does not do; take larger images"
            )

    def visible_patches(self, cells: int) -> int:
        return round(cells * (1 - self.mask_ratio))

    def mask(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 1, *grid): 1 at the patches with the smallest ``noise`` (B, patches), by default uniform numbers."""
        grid = [side // self.patch for side in x.shape[2:]]
        cells = prod(grid)
        noise = torch.rand(len(x), cells, device=x.device) if noise is None else noise
        shown = torch.argsort(noise, dim=1, stable=True)[:, : self.visible_patches(cells)]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        visible = torch.zeros(len(x), cells, dtype=dtype, device=x.device).scatter(1, shown, 1.0)
        return visible.unflatten(1, (1, *grid))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Reconstruction:
        self.check(x)
        visible = self.mask(x, noise)
        maps = self.encode(x, visible, first=1)
        image = self.decode(maps, visible)
        patch_loss = self.patch_loss(x, image)
        masked = 1 - visible.flatten(1)
        loss = (patch_loss * masked).sum() / (masked.sum() + 1e-8)
        return Reconstruction(loss, image, patch_loss, visible)

    def encode(self, x: Tensor, visible: Tensor, first: int = 0) -> list[Tensor]:
        """The encoder's maps of the visible patches, from level ``first`` on."""
        maps = self.encoder.convolve(x, visible, first)
        return [*maps[:-1], self.encoder.scan(maps[-1], visible, self.mask_token)]

    def decode(self, maps: Sequence[Tensor], visible: Tensor) -> Tensor:
        """The image, of the maps of all levels but the first (others before them are not looked at)."""
        lowest, *skips = maps[: -len(self.projections) - 1 : -1]
        between = interpolated(lowest, visible, self.interpolation[0])
        y = self.projections[0](torch.where(visible.bool(), lowest, between))
        for i, stage in enumerate(self.stages):
            if i:
                skip = skips[i - 1]
                filled = torch.where(spread(visible, skip).bool(), skip, self.fills[i - 1].to(skip.dtype))
                y = self.fuses[i - 1](torch.cat([y, self.projections[i](filled)], 1))
            y = stage(y)
        return self.out(y)

    def patch_loss(self, x: Tensor, image: Tensor) -> Tensor:
        """(B, patches): the mean square error of each patch, its target having mean 0 and variance 1."""
        target, image = self.patches(x), self.patches(image)
        var, mean = torch.var_mean(target, -1, keepdim=True)
        return (image - (target - mean) / (var + 1e-6).sqrt()).square().mean(-1)

    def patches(self, x: Tensor) -> Tensor:
        """(B, C, *size) to (B, patches, values)."""
        dims = self.spatial_dims
        for axis in range(dims):
            x = x.unflatten(2 + 2 * axis, (-1, self.patch))
        x = x.permute(0, *range(2, 2 + 2 * dims, 2), *range(3, 3 + 2 * dims, 2), 1)
        return x.flatten(dims + 1).flatten(1, dims)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep inputs of the encoder's blocks only and recompute the rest in backward; the output stays the same."""
        self.encoder.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """A_log and D, as the code of Mamba marks them."""
        return set(ssm_parameters(self, "A_log", "D"))


def interpolated(x: Tensor, visible: Tensor, A: Tensor) -> Tensor:
    """Fill masked cells by state-space token interpolation (S6T, section 3.2 of the paper). (B, C, *grid) in and out.

    Tokens are read in row-major order. Anchors are the visible ones, the first and the last. From an anchor a to the
    next one b, n = b - a steps later, the token at a + j is the sum over i <= j of A^(n - 1 - i) times a blend of the
    tokens at a (i = 0) and b (i = n - 1); the last token becomes A times itself.

    Args:
        x: The map, (B, C, *grid).
        visible: (B, 1, *grid), 1 at anchors.
        A: (C, C).
    """
    tokens = to_tokens(x)
    batch, cells, dim = tokens.shape
    cell = torch.arange(cells, device=x.device)
    anchor = visible.flatten(1).bool() | (cell == 0) | (cell == cells - 1)
    start = torch.where(anchor, cell, 0).cummax(1).values                           # the last anchor up to here
    later = torch.where(anchor, cell, cells).flip(1).cummin(1).values.flip(1)       # the first anchor from here on
    end = torch.cat([later[:, 1:], later[:, -1:]], 1).clamp(max=cells - 1)          # the first anchor behind here
    n, j = end - start, cell - start
    blend = (j.to(tokens.dtype) / (n - 1).clamp(min=1))[..., None]
    first, last = (tokens.gather(1, i[..., None].expand(-1, -1, dim)) for i in (start, end))
    states = (1 - blend) * first + blend * last
    power = torch.where(cell == cells - 1, 1, n - 1 - j)[..., None]
    for step in range(int(power.max())):
        states = torch.where(power > step, states @ A.to(states.dtype).T, states)
    same = (start[:, :, None] == start[:, None]) & (cell[:, None] >= cell)          # of one segment, not later
    summed = same.to(states.dtype) @ states
    # As published: the tokens' memory (L, C) is read as a map (C, L), which mixes channels and cells.
    return summed.reshape(batch, dim, cells).view(x.shape)


def pretraining_keys(levels: int = 4) -> list[Rule]:
    """Key rules of the pre-training model."""
    return [
        # Never used, or without effect on the loss.
        drop(rf"^(dense_decoder\.fuse\.0|densify_projs\.{levels}|mask_tokens\.(0|{levels}))(\.|$)"),
        rename(r"^sparse_encoder\.mae\.mask_token$", r"mask_token"),
        *encoder_keys(levels, "sparse_encoder."),
        rename(r"^A_interpolation$", r"interpolation"),
        *(rename(rf"^mask_tokens\.{i + 1}$", f"fills.{i}") for i in range(levels - 1)),
        rename(r"^densify_projs\.", r"projections."),
        *(rename(rf"^dense_decoder\.fuse\.{i + 1}\.conv\.", f"fuses.{i}.") for i in range(levels - 1)),
        rename(r"^dense_decoder\.dec\.(\d+)\.up_sample\.", r"stages.\1.up."),
        rename(r"^dense_decoder\.dec\.(\d+)\.conv\.", r"stages.\1.convs."),
        rename(r"^dense_decoder\.proj\.", r"out."),
    ]


KEYS = segmenter_keys()
ENCODER_KEYS = [drop(r"^mae\.mask_token$"), *encoder_keys()]


def _variant(name: str, model: Any, rules: list[Rule], task: Any, description: str, **kwargs: Any) -> Variant:
    return Variant(
        name, model, kwargs, rules, first_conv="encoder.stem", classifier="out", task=task, description=description
    )


NANO: dict[str, Any] = dict(channels=(8, 16, 24, 32, 48), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2), mamba_depth=2)
TEST: dict[str, Any] = dict(
    spatial_dims=2, in_channels=3, channels=(4, 6, 12), depths=(1, 1), mlp_ratios=(2, 2), mamba_depth=1,
)  # fmt: skip
VARIANTS = [
    _variant("hymamba", HyMamba, KEYS, "segmentation", "MambaMIM's segmentation network, as trained on BTCV"),
    _variant("hymamba_nano", HyMamba, KEYS, "segmentation", "not published: small volumes, demos",
             out_channels=3, **NANO),
    _variant("test_hymamba", HyMamba, segmenter_keys(2), "segmentation", "for tests", out_channels=2, **TEST),
    _variant("mambamim", MambaMIM, pretraining_keys(), "pretraining", "pre-training of hymamba's encoder"),
    _variant("mambamim_encoder", EncoderAlone, ENCODER_KEYS, "pretraining", "what pre-training saves for hymamba"),
    _variant("mambamim_nano", MambaMIM, pretraining_keys(), "pretraining", "not published: small volumes, demos",
             decoder_width=96, **NANO),
    _variant("test_mambamim", MambaMIM, pretraining_keys(2), "pretraining", "for tests", decoder_width=16, **TEST),
]  # fmt: skip
VARIANTS += twins([row for row in VARIANTS if row.name != "mambamim_encoder"])

WRAPPER = {"img_size", "mask_ratio", "decoder_width", "encoder"}
HYBIRD: dict[str, Any] = dict(  # defaults of the published class; build_hybird makes another network of it
    in_channel=3, n_classes=3, channels=(32, 64, 96, 128, 192), depths=(1, 1, 3, 3, 1), exp_r=(2, 4, 4, 4, 2), depth=3,
)  # fmt: skip


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``Hybird``, ``build_hybird`` or ``MambaMIM`` of the published code as our model."""
    name = constructor(entry, "Hybird", "build_hybird", "MambaMIM")
    if name != "MambaMIM":
        given = {**HYBIRD, **kwargs} if name == "Hybird" else kwargs
        model = HyMamba(3, given.get("in_channel", 1), given.get("n_classes", 14), **translate(given))
        return Published(model, segmenter_keys(len(model.encoder.layers)), _run_segmenter)
    nothing_left(kwargs.keys() - WRAPPER - {"densify_norm", "sbn"})     # As published: these two change nothing.
    encoder = kwargs.get("encoder", {})
    pretraining = MambaMIM(
        3, encoder.get("in_channel", 1), mask_ratio=kwargs.get("mask_ratio", 0.6),
        decoder_width=kwargs.get("decoder_width", 768), **translate(encoder),
    )  # fmt: skip
    return Published(pretraining, pretraining_keys(len(pretraining.encoder.layers)), _run_pretraining)


def translate(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``HybridEncoder`` for those of the published one."""
    known = {"in_channel", "n_classes", "img_size", "depth", "channels", "depths", "kernels", "exp_r"}
    nothing_left(kwargs.keys() - known)
    ours = {name: kwargs[key] for key, name in (("channels", "channels"), ("depth", "mamba_depth")) if key in kwargs}
    for key, name in (("depths", "depths"), ("kernels", "kernel_size"), ("exp_r", "mlp_ratios")):
        if key in kwargs:
            ours[name] = kwargs[key][1:]                            # As published: the first entries are not looked at.
    return ours


def _run_segmenter(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    maps = model.encoder.convolve(inputs["x"])
    scanned = model.encoder.scan(maps[-1])
    outputs = {f"emb{i + 1}": x for i, x in enumerate(maps)}
    return {**outputs, "mamba": scanned, "logits": model.decode([*maps[:-1], scanned])}


def _run_pretraining(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"]
    visible = model.mask(x, inputs["rand"])
    maps = model.encode(x, visible)
    loss, image, patch_loss, _ = model(x, inputs["rand"])
    return {f"feat{i + 1}": y for i, y in enumerate(maps)} | {
        "active": visible, "s6t": interpolated(maps[-1], visible, model.interpolation[0]), "rec": image,
        "patch_loss": patch_loss, "loss_and_masked_fraction": torch.stack([loss, 1 - visible.mean()]),
    }  # fmt: skip
