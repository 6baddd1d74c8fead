"""Vivim: a Video Vision Mamba for Medical Video Segmentation (Yang et al., 2024, arXiv:2401.14168).

SegFormer's stages, each followed by layers that scan the clip in three directions: forwards, backwards, and through the
frames at one place before the next place. SegFormer's head of linear layers reads the maps of all frames.
Published code: github.com/scott-yjyang/Vivim (CC BY-NC 4.0, non-commercial; no weights). This was written without it,
from the paper and a description of what the code does. Same function; other key names, see KEYS. The published
backbone starts from NVIDIA's SegFormer-B3 (arXiv:2105.15203; weights under a non-commercial licence of their own).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vssm.layers.conv import ConvMixer
from vssm.layers.init import linear_like_transformers, ssm_like_transformers
from vssm.layers.layout import over_map, over_tokens, to_map, to_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.mlp import ConvMlp
from vssm.layers.parts import chosen
from vssm.layers.ssm import ssm_parameters
from vssm.models.base import drop_path_rates
from vssm.models.keys import Rule, also, drop, rename
from vssm.models.mamba_keys import mamba_keys
from vssm.models.segmenter import Segmenter, traced
from vssm.models.variant import NotCovered, Published, Variant, constructor, nothing_left

REPOSITORY = "scott-yjyang/Vivim"
PATCHES = (7, 3, 3, 3)
STRIDES = (4, 2, 2, 2)


class PatchEmbed(nn.Module):
    """Overlapping patches. Frames (N, C, H, W) to tokens (N, L, C') and their grid, sizes rounded up."""

    def __init__(self, in_channels: int, dim: int, patch: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, stride, padding=patch // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        x = self.proj(x)
        return self.norm(to_tokens(x)), x.shape[2:]


class ReducedAttention(nn.Module):
    """Attention whose keys and values come from a map reduced by ``reduction``. (N, L, C) tokens in and out."""

    def __init__(self, dim: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        source = x if self.reduce is None else self.norm(over_map(self.reduce, x, grid))
        q, k, v = self.query(x), self.key(source), self.value(source)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class MixerLayer(nn.Module):
    """Norm, mix, add; norm, MLP, add. (N, L, C) tokens in and out; mixer and MLP know the grid."""

    def __init__(self, dim: int, mixer: nn.Module, spatial_dims: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim), mixer
        self.norm2, self.mlp = nn.LayerNorm(dim), ConvMlp(dim, 4 * dim, spatial_dims)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class VideoStage(nn.Module):
    """Patches, layers that see one frame, layers that see the clip. (B T, C, H, W) to (B T, C', h, w)."""

    def __init__(self, embed: nn.Module, frame_layers: Sequence[nn.Module], clip_layers: Sequence[nn.Module]):
        super().__init__()
        self.embed = embed
        self.frame_layers, self.clip_layers = nn.ModuleList(frame_layers), nn.ModuleList(clip_layers)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, frames: int) -> Tensor:
        x, grid = self.embed(x)
        for layer in self.frame_layers:
            x = self.run(layer, x, grid)
        x = x.unflatten(0, (-1, frames)).flatten(1, 2)
        for layer in self.clip_layers:
            x = self.run(layer, x, (frames, *grid))
        return to_map(x.unflatten(1, (frames, -1)).flatten(0, 1), grid)

    def run(self, layer: nn.Module, x: Tensor, grid: Sequence[int]) -> Tensor:
        return checkpoint(layer, x, grid) if self.grad_checkpointing else layer(x, grid)


class LinearHead(nn.Module):
    """SegFormer's head: project each map, resize it to the finest, fuse. Maps, finest first, to (N, C, h, w)."""

    def __init__(self, dims: Sequence[int], width: int, drop_rate: float = 0.1):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        self.fuse = nn.Conv2d(len(dims) * width, width, 1, bias=False)
        self.norm, self.act, self.drop = nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(drop_rate)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        parts = [resized(over_tokens(project, x), size) for project, x in zip(self.projections, maps, strict=True)]
        return self.drop(self.act(self.norm(self.fuse(torch.cat(parts[::-1], 1)))))


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return nn.functional.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class Vivim(Segmenter):
    """Vivim: video clips (B, T, C, H, W) to logits (B, T, out_channels, H, W).

    With ``edge`` it returns a pair, the second logits of the boundary (B, T, 1, H, W). Sides are 29 or more.

    The published code returns frames folded into the batch, (B T, out_channels, H, W).

    Args:
        spatial_dims: 2; a frame is an image.
        in_channels, out_channels: As in MONAI, of a frame.
        slices: Equal pieces of the clip's tokens, which the third direction reads in parallel. As published 5, for
            clips of five frames; a clip whose tokens do not divide into that many is refused. None: one a frame.
        depths, dims, num_heads, reductions: Of SegFormer's stages: layers, channels, heads of attention, and how much
            smaller the map of its keys is.
        clip_depth: Layers of a stage that see the clip.
        decoder_dim: Channels of the head.
        edge: Have a boundary branch, on the first stage's map.
        mixer: ``"scan"``, or ``"conv"`` for the twin without Mamba.
        d_state: States of each channel.
        drop_path_rate: Stochastic depth of the layers that see a frame, rising from 0.
    """

    frames = 5  # of a clip, as published

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        *,
        slices: int | None = 5,
        depths: Sequence[int] = (3, 4, 18, 3),
        dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        reductions: Sequence[int] = (8, 4, 2, 1),
        clip_depth: int = 2,
        decoder_dim: int = 768,
        edge: bool = False,
        mixer: str = "scan",
        d_state: int = 16,
        drop_path_rate: float = 0.1,
    ):
        if spatial_dims != 2:
            raise ValueError(f"Vivim: spatial_dims must be 2, a frame is an image; got {spatial_dims!r}")
        super().__init__(spatial_dims, in_channels, out_channels)
        for name, values in (("depths", depths), ("dims", dims), ("num_heads", num_heads), ("reductions", reductions)):
            if len(values) != len(STRIDES):
                raise ValueError(f"Vivim: {name} must have one entry a stage ({len(STRIDES)}), got {tuple(values)}")
        scanning = partial(
            ScanMixer, scan="interslice", scan_options={"slices": slices}, spatial_dims=3, conv="sequence", conv_size=4,
            d_state=d_state, merge="mean",
        )  # fmt: skip
        make_mixer = chosen("Vivim", "mixer", mixer, {"scan": scanning, "conv": partial(ConvMixer, spatial_dims=3)})
        self.slices, self.reductions = slices, tuple(reductions)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            attention = partial(ReducedAttention, dim, num_heads[i], reductions[i])
            self.stages.append(
                VideoStage(
                    PatchEmbed(dims[i - 1] if i else in_channels, dim, PATCHES[i], STRIDES[i]),
                    [MixerLayer(dim, attention(), 2, next(rates)) for _ in range(depth)],
                    [MixerLayer(dim, make_mixer(dim), 3) for _ in range(clip_depth)],
                )
            )
        self.head = LinearHead(dims, decoder_dim)
        self.out = nn.Conv2d(decoder_dim, out_channels, 1)
        self.edge = nn.Conv2d(dims[0], 1, 1) if edge else None
        self.stages.apply(linear_like_transformers)
        # As published: the rule for linear layers comes last and overwrites Mamba's step sizes.
        self.stages.apply(ssm_like_transformers)

    def check(self, x: Tensor) -> None:
        """Refuse clips that the network cannot read.

        Raises:
            ValueError: If a clip has other dimensions or channels, is too small, or does not divide into ``slices``.
        """
        if traced(x):
            return
        if x.ndim != 5:
            raise ValueError(f"Vivim: clips must be (B, T, C, H, W), got {tuple(x.shape)}")
        shape, channels = tuple(x.shape), x.shape[2]
        if channels != self.in_channels:
            raise ValueError(f"Vivim: frames must have {self.in_channels} channels, got {channels} in {shape}")
        frames, sides = x.shape[1], tuple(x.shape[3:])
        strides = [math.prod(STRIDES[: i + 1]) for i in range(len(STRIDES))]
        least = max((reduction - 1) * stride + 1 for reduction, stride in zip(self.reductions, strides))
        if min(sides) < least:
            padded = tuple(max(side, least) for side in sides)
            raise ValueError(f"Vivim: each side of a frame must be {least} or more, got {sides}; pad it to {padded}")
        for i, stride in enumerate(strides):
            tokens = frames * math.prod(-(-side // stride) for side in sides)
            if self.slices is not None and tokens % self.slices:
                raise ValueError(
                    f"Vivim: stage {i} has {tokens} tokens for {frames} frames of {sides}, which do not divide into "
                    f"{self.slices} slices; give clips of a multiple of {self.slices} frames, or pass slices=None"
                )

    def encode(self, x: Tensor) -> list[Tensor]:
        """The map of each stage, (B T, C, h, w), finest first."""
        self.check(x)
        frames, maps = x.shape[1], []
        x = x.flatten(0, 1)
        for stage in self.stages:
            x = stage(x, frames)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps = self.encode(x)
        frames, size = x.shape[:2], x.shape[3:]
        logits = resized(self.out(self.head(maps)), size).unflatten(0, frames)
        if self.edge is None:
            return logits
        return logits, resized(self.edge(maps[0]), size).unflatten(0, frames)

    def no_weight_decay(self) -> set[str]:
        """A_log and D, as the published mixer marks them. As published: its recipe decays nothing at all."""
        return set(ssm_parameters(self, "A_log", "D"))


KEYS: list[Rule] = [
    also(rename(r"^segformer\.encoder\.", "encoder.downsample_layers.")),           # a SegFormer of transformers
    also(rename(r"^decode_head\.", "decoder.")),
    drop(r"^decoder\.classifier\."),                        # unused, as published
    drop(r"^encoder\.downsample_layers\.layer_norm\.\d\."),
    *mamba_keys(("", "_b", "_s")),
    rename(r"^encoder\.downsample_layers\.patch_embeddings\.(\d)\.layer_norm\.", r"stages.\1.embed.norm."),
    rename(r"^encoder\.downsample_layers\.patch_embeddings\.(\d)\.proj\.", r"stages.\1.embed.proj."),
    rename(r"^encoder\.downsample_layers\.block\.(\d)\.", r"stages.\1.frame_layers."),
    rename(r"^encoder\.stages\.(\d)\.(\d)\.0\.", r"stages.\1.clip_layers.\2."),
    rename(r"\.attention\.self\.layer_norm\.", ".mixer.norm."),
    rename(r"\.attention\.self\.sr\.", ".mixer.reduce."),
    rename(r"\.attention\.self\.(query|key|value)\.", r".mixer.\1."),
    rename(r"\.attention\.output\.dense\.", ".mixer.proj."),
    rename(r"\.frame_layers\.(\d+)\.layer_norm_(\d)\.", r".frame_layers.\1.norm\2."),
    rename(r"\.frame_layers\.(\d+)\.mlp\.dense(\d)\.", r".frame_layers.\1.mlp.fc\2."),
    rename(r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
    rename(r"^decoder\.linear_c\.(\d)\.proj\.", r"head.projections.\1."),
    rename(r"^decoder\.linear_fuse\.", "head.fuse."),
    rename(r"^decoder\.batch_norm\.", "head.norm."),
    rename(r"^edgeocr_cls_head\.", "edge."),
]


def _variant(name: str, description: str, **kwargs: Any) -> Variant:
    return Variant(name, Vivim, kwargs, KEYS, task="segmentation", description=description)


NARROW = dict(
    depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(1, 2, 2, 4), clip_depth=1, decoder_dim=16
)
VARIANTS = [
    _variant("vivim_b3", "one class, on SegFormer-B3"),
    _variant("vivim_b3_edge", "with the boundary branch", edge=True),
    _variant("vivim_nomamba", "not published: 3D convolutions for mixers", mixer="conv"),
    _variant("test_vivim", "for tests", edge=True, **NARROW),
]


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``Vivim`` of the published code as our model; ``segformer_config`` stands for the backbone it downloads."""
    constructor(entry, "Vivim")
    given = {key: value for key, value in kwargs.items() if key not in INEFFECTIVE}
    config = {**SEGFORMER_B3, **given.pop("segformer_config", {})}
    for key, value in UNCHANGED.items():
        if config.pop(key, value) != value:
            raise NotCovered(f"{key}={kwargs['segformer_config'][key]!r} in segformer_config")
    config.pop("num_labels")                                # of the classifier that is not used
    ours = {SEGFORMER[key]: config.pop(key) for key in list(config) if key in SEGFORMER}
    if given.pop("in_chans", 3) != 3:
        raise NotCovered(f"in_chans={kwargs['in_chans']!r}: the published backbone reads three channels")
    if list(given.pop("feat_size", ours["dims"])) != list(ours["dims"]):
        raise NotCovered(f"feat_size={kwargs['feat_size']!r}, other than the backbone's")
    ours |= {"out_channels": given.pop("out_chans", 1), "edge": given.pop("with_edge", False)}
    nothing_left({**given, **config})
    return Published(Vivim(**ours), KEYS, _run)


# As published: depths does not reach the clip layers, of which there are always two.
INEFFECTIVE = {"depths", "drop_path_rate", "layer_scale_init_value", "hidden_size", "norm_name", "conv_block",
               "res_block", "spatial_dims"}  # fmt: skip
SEGFORMER = {"depths": "depths", "hidden_sizes": "dims", "num_attention_heads": "num_heads",
             "sr_ratios": "reductions", "decoder_hidden_size": "decoder_dim"}  # fmt: skip
SEGFORMER_B3 = {"depths": (3, 4, 18, 3), "hidden_sizes": (64, 128, 320, 512), "num_attention_heads": (1, 2, 5, 8),
                "sr_ratios": (8, 4, 2, 1), "decoder_hidden_size": 768, "num_labels": 150}  # fmt: skip
UNCHANGED = {"mlp_ratios": [4, 4, 4, 4], "patch_sizes": list(PATCHES), "strides": list(STRIDES),
             "reshape_last_stage": True}  # fmt: skip


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"]
    found = {f"enc{i}": y for i, y in enumerate(model.encode(x))}
    outputs = model(x)
    names = ("logits", "edge") if isinstance(outputs, tuple) else ("logits",)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return found | {name: y.flatten(0, 1) for name, y in zip(names, outputs, strict=True)}
