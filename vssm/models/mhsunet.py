"""MHS-UNet: MHS-VM, Multi-Head Scanning in Parallel Subspaces for Vision Mamba (Ji, 2024, arXiv:2406.05992).

VM-UNet with another mixer: the channels are divided among heads, each head reads the map along routes of its own, and
where its routes disagree its channels count for more.
Published code and weights: github.com/PixDeep/MHS-VM (Apache-2.0, both). Same function; other key names, see KEYS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vssm.layers.conv import ConvMixer, depthwise
from vssm.layers.heads import join_heads
from vssm.layers.layout import over_map
from vssm.layers.parts import chosen
from vssm.layers.ssm import SelectiveSSM
from vssm.models.keys import Rule, drop, rename
from vssm.models.patchunet import PatchUNet, keys, run, translate
from vssm.models.variant import NotCovered, Published, Variant, Weights
from vssm.scans import scan_shape, scan_table

REPOSITORY = "PixDeep/MHS-VM"
ROUTES = 4  # of a head: two, each forwards and backwards


class MultiHeadMixer(nn.Module):
    """Project in, convolve, scan in each head's subspace, join the heads, gate. (B, L, C) tokens in and out.

    There is no projection behind the gate.

    Args:
        dim: Channels C of the tokens.
        heads: Letters of the order ``"routes"``, one a head; each has C / heads channels, rounded down.
        d_state: States of each channel.
        threshold: Of the route attention, see ``vssm.layers.heads.route_attention``.
        join: Normalise the joined heads and project them; without it their channels must make up C.
    """

    def __init__(
        self, dim: int, *, heads: str = "cxsz", d_state: int = 16, threshold: float = 0.0, join: bool = True
    ):
        super().__init__()
        width = dim // len(heads) if heads else 0
        joined = len(heads) * width
        if not width or len(set(heads)) < len(heads):
            raise ValueError(f"MultiHeadMixer: heads must be different letters, at most {dim} of them, got {heads!r}")
        if not join and joined != dim:
            raise ValueError(f"MultiHeadMixer: without join, heads must divide dim={dim}, got {len(heads)} heads")
        self.threshold = threshold
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.conv, self.act = depthwise(dim, 3), nn.SiLU()
        self.divide = nn.Linear(dim, joined, bias=False)
        rank = math.ceil(width / 16)
        self.heads = nn.ModuleDict({head: SelectiveSSM(width, ROUTES, d_state, rank) for head in heads})
        self.join_norm = nn.LayerNorm(joined) if join else nn.Identity()
        self.join = nn.Linear(joined, dim, bias=False) if join else nn.Identity()
        self.out_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.divide(self.act(over_map(self.conv, x, grid)))
        with torch.autocast(x.device.type, enabled=False):  # as published; what the routes disagree in is small
            u = u.to(self.in_proj.weight.dtype).chunk(len(self.heads), -1)
            parts = [self.scan(head, ssm, part, grid) for (head, ssm), part in zip(self.heads.items(), u)]
        y = torch.cat(parts, -1)
        y = self.join(self.join_norm(y))
        return self.out_norm(y) * self.act(z)

    def scan(self, head: str, ssm: nn.Module, u: Tensor, grid: Sequence[int]) -> Tensor:
        table = scan_table("routes", grid, u.device, heads=head)
        return join_heads(ssm(u, table, merge=None, revisits=False), 1, "attention", self.threshold)


class MHSUNet(PatchUNet):
    """MHS-UNet. (B, C, H, W) to logits (B, out_channels, H, W); sides are multiples of 32.

    The published network applies a sigmoid to the logits of a single class; here a loss or a threshold does.

    Args:
        spatial_dims: 2; the routes are those of a plane.
        in_channels, out_channels, depths, decoder_depths, dim, drop_path_rate: See ``PatchUNet``.
        mixer: ``"scan"``, or ``"conv"`` for the twin without Mamba.
        heads: Letters of the order ``"routes"``: ``"cxsz"`` or ``"cxs"``.
        threshold: Of the route attention. It stands in no weight file: trained with 0.5 (ISIC18) and 0 (ISIC17), and
            evaluated with 0.4.
        d_state, join: See ``MultiHeadMixer``.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        dim: int | Sequence[int] = 96,
        mixer: str = "scan",
        heads: str = "cxsz",
        threshold: float = 0.4,
        d_state: int = 16,
        join: bool = True,
        drop_path_rate: float = 0.2,
    ):
        if spatial_dims != 2:
            raise ValueError(f"MHSUNet: spatial_dims must be 2, its routes are those of a plane; got {spatial_dims!r}")
        scan_shape("routes", (8, 8), heads=heads)                 # are there such heads?
        scanning = partial(MultiHeadMixer, heads=heads, d_state=d_state, threshold=threshold, join=join)
        super().__init__(
            chosen("MHSUNet", "mixer", mixer, {"scan": scanning, "conv": ConvMixer}), spatial_dims=spatial_dims,
            in_channels=in_channels, out_channels=out_channels, depths=depths, decoder_depths=decoder_depths, dim=dim,
            drop_path_rate=drop_path_rate,
        )  # fmt: skip


KEYS: list[Rule] = keys([
    drop(r"(^|\.)total_(ops|params)$"),                     # of a FLOP counter
    drop(r"\.mhs\.x_ssproj_W$"),                            # second names of other entries
    drop(r"\.scanning\.seq2seq_engine\."),
    rename(r"\.mhs\.x_ssproj\.", r".divide."),
    rename(r"\.mhs\.cat_norm\.", r".join_norm."),
    rename(r"\.mhs\.y_proj\.", r".join."),
    *(rename(rf"\.mhs\.scanhead_{head.upper()}\.mambaeng\.", f".heads.{head}.") for head in "cxsz"),
])  # fmt: skip


COMMIT = "be64b6fa4970a7f57c2e9677645219ffae6c1da5"


def _weights(heads: int, tag: str, notes: str) -> dict[str, Weights]:
    file = f"best_{heads}h.pth"
    return {
        tag: Weights(
            "apache-2.0", f"https://github.com/{REPOSITORY}", "arXiv:2406.05992",
            url=f"https://github.com/{REPOSITORY}/raw/{COMMIT}/pretrained/{file}", hf_hub_filename=f"mhsunet_{file}",
            num_classes=1, input_size=(3, 256, 256), crop_pct=1.0, interpolation="bilinear", mean=(0.0, 0.0, 0.0),
            std=(1 / 255, 1 / 255, 1 / 255), notes=f"{notes}; each image is stretched to 0 to 255",
        )
    }  # fmt: skip


def _variant(name: str, description: str, weights: Mapping[str, Weights] | None = None, **kwargs: Any) -> Variant:
    return Variant(
        name, MHSUNet, kwargs, KEYS, weights or {}, first_conv="stem.conv1", classifier="head", task="segmentation",
        description=description,
    )  # fmt: skip


VARIANTS = [
    _variant("mhsunet", "four heads, as the published figures were computed",
             _weights(4, "isic18", "trained on ISIC2018; mIoU 80.85 and DSC 89.41 there, as published"),
             threshold=0.4),
    _variant("mhsunet_isic18", "four heads, as trained on ISIC18", threshold=0.5),
    _variant("mhsunet_isic17", "four heads, as trained on ISIC17", threshold=0.0),
    _variant("mhsunet_3h", "three heads",
             _weights(3, "isic", "of which data is not said; the published test takes threshold=0.4"),
             heads="cxs", threshold=0.0),
    _variant("mhsunet_nomamba", "not published: convolutions for mixers", mixer="conv"),
    _variant("test_mhsunet", "for tests", depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1), dim=16, heads="cxs",
             threshold=0.0),
]  # fmt: skip


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``VMUNet`` of the published code as our model."""
    given = {key: value for key, value in kwargs.items() if key != "route_dict_path"}    # routes are drawn here
    options = {"head_num": 3, "with_proj": True, "gfu_t": 0.0, **given.pop("para_dict", {})}
    heads = options.pop("head_num")
    if heads not in (3, 4):
        raise NotCovered(f"head_num={heads!r}")
    ours = {"heads": "cxsz"[:heads], "join": options.pop("with_proj"), "threshold": options.pop("gfu_t")}
    if options:
        raise NotCovered(f"arguments {', '.join(sorted(options))} in para_dict")
    return Published(MHSUNet(**translate(entry, given), **ours), KEYS, run)
