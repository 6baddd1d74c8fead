"""PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition (Yang et al., BMVC 2024, arXiv:2403.17695).

A convolutional stem, then blocks of norm and mixer over one grid, with no MLP and no class token. A mixer has one set
of parameters for four continuous zigzag paths, and adds to B what the direction of the last step says.
Published code and weights: github.com/ChenhongyiYang/PlainMamba (Apache-2.0, both). Same function; other key names,
see KEYS.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from timm.layers import DropPath, LayerNorm, LayerScale, register_notrace_function, to_2tuple
from torch import Tensor, nn

from vssm.kernels import selective_scan
from vssm.layers.conv import depthwise
from vssm.layers.init import linear_like_transformers, ssm_like_transformers
from vssm.layers.layout import over_map, to_map, to_tokens
from vssm.layers.norm import TOKEN_NORMS
from vssm.layers.parts import check_choice
from vssm.layers.position import positions
from vssm.layers.ssm import SelectiveSSM, decay, ssm_parameters
from vssm.models.backbone import TrunkMaps, run_features
from vssm.models.base import Isotropic, drop_path_rates, linear_head
from vssm.models.keys import Rule, drop, rename, stack
from vssm.models.variant import NotCovered, Published, Variant, Weights, nothing_left, translated
from vssm.scans import scan_shape, scan_table, to_sequences, visits_once
from vssm.scans.registry import find_scan

REPOSITORY = "ChenhongyiYang/PlainMamba"
MOVES = 5  # into a cell: none (the first), right, left, up, down
POOLS = ("avg", "")

register_notrace_function(to_sequences)
torch.fx.wrap("positions")


class PatchStem(nn.Module):
    """Convolutions at half the size, then patches of what they leave. (B, 3, H, W) to (B, C, H / p, W / p), rounded up.

    Args:
        in_chans, dim: Channels in and out.
        patch_size: Pixels p of the image to one cell, each way; even.
        convs: Convolutions behind the first one.
        width: Their channels.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, convs: int, width: int = 64):
        super().__init__()
        self.patch = patch_size // 2
        self.stem = nn.Sequential(*_conv(in_chans, width, 7, stride=2))
        self.convs = nn.Sequential(*(layer for _ in range(convs) for layer in _conv(width, width, 3)))
        self.projection = nn.Conv2d(width, dim, self.patch, stride=self.patch)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Cells (h, w) of the table for images of this size. As published: half of an odd side is rounded down."""
        h, w = (-(-(size // 2) // self.patch) for size in (height, width))
        return h, w

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(self.stem(x))
        # Not -size % p: torch.compile has no such remainder of symbols.
        bottom, right = (self.patch - 1 - (size - 1) % self.patch for size in (x.shape[2], x.shape[3]))
        x = nn.functional.pad(x, (0, right, 0, bottom))
        return self.projection(x)


def _conv(dim: int, out: int, size: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(dim, out, size, stride=stride, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU()]


class DirectedMixer(nn.Module):
    """A gated mixer whose paths share all parameters, and whose B knows the last step's direction. (B, L, C) tokens.

    Args:
        dim: Channels C of the tokens.
        d_state: States of each channel.
        expand: Channels of the scan over C.
        dt_rank: Rank of the step-size projection, C / 16 rounded up if None.
        conv_size, conv_bias: Of the depthwise convolution over the grid.
        bias: Of the projections in and out.
        scan, scan_options: A registered order; its rows are the paths.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        expand: float = 2.0,
        dt_rank: int | None = None,
        conv_size: int = 7,
        conv_bias: bool = True,
        bias: bool = True,
        scan: str = "snake",
        scan_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.scan, self.scan_options, self.revisits = scan, dict(scan_options or {}), not visits_once(scan)
        scan_shape(scan, (8, 8), **self.scan_options)  # complains about orders and options that are not there
        self.permutes = find_scan(scan).permutation
        width = int(expand * dim)
        self.in_proj, self.act = nn.Linear(dim, 2 * width, bias=bias), nn.SiLU()
        self.conv = depthwise(width, conv_size, bias=conv_bias)
        self.ssm = SelectiveSSM(width, 1, d_state, dt_rank or math.ceil(dim / 16))
        self.direction_B = nn.Parameter(torch.empty(MOVES, d_state))
        self.out_proj = nn.Linear(width, dim, bias=bias)
        nn.init.trunc_normal_(self.direction_B, std=0.02)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``grid``: sizes of the grid whose cells the tokens are."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u, ssm = self.act(over_map(self.conv, x, grid)), self.ssm
        table = scan_table(self.scan, grid, x.device, **self.scan_options)
        low = nn.functional.linear(u, ssm.x_proj[0])
        if not self.permutes:
            low = to_sequences(low, table)
        # As published: along a permutation the input is read, but delta, B and C of step t are those of cell t.
        dt, B, C = low.split(ssm.splits, -1)  # each (b, l, ·), or (b, k, t, ·) if no permutation
        directed = entering_moves(table, grid[1]).to(self.direction_B.dtype) @ self.direction_B  # (k, t, n)
        B = (B[:, None] if self.permutes else B) + directed
        y, _ = selective_scan(
            u, dt @ ssm.dt_weight[0].mT, decay(ssm.A_log[0]), B, C, ssm.D[0], z,
            2 * ssm.dt_bias[0],  # As published: the projection adds the bias, then the scan does.
            delta_softplus=True, table=table, read="steps", merge="sum", revisits=self.revisits,
        )  # fmt: skip
        return self.out_proj(y)


@register_notrace_function
def entering_moves(table: Tensor, width: int) -> Tensor:
    """Which moves lead into each step's cell, on a grid of ``width`` columns: (k, t) to (k, t, 5) booleans.

    They are none (the first step), right, left, up, down; a step to no neighbour can be two of them.

    >>> entering_moves(torch.tensor([[0, 1, 3, 2]]), 2).int().argmax(-1).tolist()
    [[0, 1, 4, 2]]
    """
    row, column = table // width, table % width
    right, down = column.diff(dim=1), row.diff(dim=1)
    moves = torch.stack([torch.zeros_like(right), right, -right, -down, down], -1) > 0
    start = torch.arange(MOVES, device=table.device).eq(0).expand(table.shape[0], 1, MOVES)
    return torch.cat([start, moves], 1)


class PlainMambaBlock(nn.Module):
    """Norm, mix, scale, add; then a convolution of the sum, if ``conv``. (B, L, C) tokens in and out."""

    def __init__(
        self,
        mixer: nn.Module,
        dim: int,
        conv: bool = False,
        drop_path: float = 0.0,
        *,
        norm: str = "layer",
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.norm: nn.Module = TOKEN_NORMS[norm](dim, eps=1e-5)
        self.mixer = mixer
        self.layer_scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.conv = None
        if conv:
            self.conv = nn.Sequential(depthwise(dim, 3, bias=False), nn.BatchNorm2d(dim), nn.GELU())
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        x = x + self.drop_path(self.layer_scale(self.mixer(self.norm(x), grid)))
        # As published: nothing is added to what the convolution returns.
        return x if self.conv is None else over_map(self.conv, x, grid)


class PlainMamba(Isotropic):
    """PlainMamba classifier for images of any size. The defaults are ``plainmamba_l1``.

    Args:
        img_size: Size of the images that the position table is for, one number or (H, W); for others it is resized.
        in_chans, num_classes, drop_rate, drop_path_rate: As in timm.
        global_pool: ``"avg"``, the mean of the tokens, or ``""`` for none: the head then sees every token.
        patch_size: Pixels of the image to one cell, each way.
        embed_dim, depth: Channels and blocks.
        stem_convs: Convolutions in the stem behind the first one.
        conv_blocks: Blocks that end with a convolution.
        d_state, expand, dt_rank, conv_size, conv_bias, bias: Of the mixers, see ``DirectedMixer``.
        norm: Of the blocks, ``"layer"`` or ``"rms"``.
        layer_scale: Initial factor of what a block adds, learned by channel; None for no factor.
        scan, scan_options: Of the mixers: a registered order. delta, B and C are those of the cell that is read if the
            order is no permutation of the cells, else as published, see ``DirectedMixer``.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 24,
        stem_convs: int = 1,
        conv_blocks: Collection[int] = (0,),
        d_state: int = 16,
        expand: float = 2.0,
        dt_rank: int | None = None,
        conv_size: int = 7,
        conv_bias: bool = True,
        bias: bool = True,
        norm: str = "layer",
        layer_scale: float | None = None,
        scan: str = "snake",
        scan_options: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        check_choice("PlainMamba", "global_pool", global_pool, POOLS)
        check_choice("PlainMamba", "norm", norm, TOKEN_NORMS)
        if min(to_2tuple(img_size)) < 2:
            raise ValueError(f"PlainMamba: img_size must be 2 or more each way, got {img_size}")
        self.patch_embed = PatchStem(in_chans, embed_dim, patch_size, stem_convs)
        self.grid = self.patch_embed.grid(*to_2tuple(img_size))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), embed_dim))
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
            mixer = DirectedMixer(
                embed_dim, d_state, expand, dt_rank, conv_size, conv_bias, bias, scan, scan_options,
            )  # fmt: skip
            block = PlainMambaBlock(mixer, embed_dim, i in conv_blocks, rate, norm=norm, layer_scale=layer_scale)
            self.blocks.append(block)
        self.norm = LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = linear_head(embed_dim, num_classes)
        self.describe(embed_dim, patch_size, num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(linear_like_transformers)
        # As published: the rule for linear layers comes last and overwrites Mamba's step sizes.
        self.apply(ssm_like_transformers)

    def embed(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        x = self.patch_embed(x)
        grid = x.shape[2:]
        return to_tokens(x) + positions(self.pos_embed, self.grid, grid), grid

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(1) if self.global_pool == "avg" else x

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            check_choice("PlainMamba", "global_pool", global_pool, POOLS)
        super().reset_classifier(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows them)."""
        directions = (f"blocks.{i}.mixer.direction_B" for i in range(len(self.blocks)))
        return {"pos_embed", *ssm_parameters(self), *directions}


class PlainMambaBackbone(TrunkMaps):
    """Maps of one stride from several depths, as published for segmentation.

    Each has a norm of its own, except the last block's, which has the classifier's.

    Args:
        trunk: A classifier, which loses its head.
        out_indices: Blocks; a negative one counts from the end.
    """

    def __init__(self, trunk: PlainMamba, out_indices: Sequence[int] = (-1,)):
        super().__init__(trunk)
        depth = len(trunk.blocks)
        if not all(-depth <= i < depth for i in out_indices):
            raise ValueError(f"PlainMambaBackbone: out_indices must name {depth} blocks, got {tuple(out_indices)}")
        self.out_indices = tuple(i % depth for i in out_indices)
        trunk.reset_classifier(0)
        self.out_norms = nn.ModuleDict(
            {str(i): LayerNorm(trunk.embed_dim, eps=1e-6) for i in self.out_indices if i < depth - 1}
        )
        self.feature_info = [trunk.feature_info[i] for i in self.out_indices]

    def forward(self, x: Tensor) -> list[Tensor]:
        x, grid = self.trunk.embed(x)
        maps = {}
        for i in range(max(self.out_indices) + 1):
            x = self.trunk.run_block(i, x, grid)
            if i in self.out_indices:
                norm = self.trunk.norm if i == len(self.trunk.blocks) - 1 else self.out_norms[str(i)]
                maps[i] = to_map(norm(x), grid)
        return [maps[i] for i in self.out_indices]


KEYS: list[Rule] = [
    drop(r"^ema_"),  # weights of the last step, beside their average under the plain names
    rename(r"^backbone\.(pos_embed|patch_embed|layers|ln1|norm_layer)", r"\1"),
    rename(r"^head\.fc\.", r"head."),
    rename(r"^layers\.(\d+)\.", r"blocks.\1."),
    rename(r"^(blocks\.\d+)\.dw\.", r"\1.conv."),
    rename(r"\.mamba\.", r".mixer."),
    rename(r"\.mixer\.gamma$", r".layer_scale.gamma"),
    rename(r"\.mixer\.conv2d\.", r".mixer.conv."),
    rename(r"\.mixer\.direction_Bs$", r".mixer.direction_B"),
    stack(("A_log",), "ssm.A_log"),
    stack(("D",), "ssm.D"),
    stack(("x_proj.weight",), "ssm.x_proj"),
    stack(("dt_proj.weight",), "ssm.dt_weight"),
    stack(("dt_proj.bias",), "ssm.dt_bias"),
    rename(r"^ln1\.", r"norm."),
]
BACKBONE_KEYS: list[Rule] = [
    *KEYS,
    rename(r"^norm_layer(\d+)\.", r"out_norms.\1."),
    rename(r"^(pos_embed|patch_embed|blocks|norm)", r"trunk.\1"),
]

ARCHITECTURES: dict[str, dict[str, Any]] = {  # by their published names
    "L1": dict(embed_dim=192, depth=24, stem_convs=1, conv_blocks=(0,)),
    "L2": dict(embed_dim=384, depth=24, stem_convs=2, conv_blocks=()),
    "L3": dict(embed_dim=448, depth=36, stem_convs=2, conv_blocks=()),
}


def _variant(size: str, top1: float, top5: float, drop_path_rate: float) -> Variant:
    weights = Weights(
        "apache-2.0", f"https://github.com/{REPOSITORY}", "arXiv:2403.17695", key="state_dict",
        hf_hub_id=REPOSITORY, hf_hub_filename=f"{size.lower()}.pth", top1=top1, top5=top5,
    )  # fmt: skip
    kwargs = {**ARCHITECTURES[size], "drop_path_rate": drop_path_rate}
    return Variant(
        f"plainmamba_{size.lower()}", PlainMamba, kwargs, KEYS, {"in1k": weights}, first_conv="patch_embed.stem.0"
    )  # fmt: skip


VARIANTS = [
    _variant("L1", 77.9, 94.0, 0.2),
    _variant("L2", 81.6, 95.6, 0.2),
    _variant("L3", 82.3, 95.9, 0.4),
    Variant(
        "test_plainmamba", PlainMamba, dict(img_size=32, patch_size=8, embed_dim=16, depth=3), KEYS,
        first_conv="patch_embed.stem.0", description="for tests",
    ),
]  # fmt: skip


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """The published classifier (backbone, pooling, head), or the backbone ``PlainMambaSeg``, as our model."""
    name = entry.rpartition(":")[2]
    given = dict(kwargs)
    if name == "PlainMambaSeg":
        indices = given.pop("out_indices", -1)
        model = PlainMambaBackbone(_trunk(given, 0), [indices] if isinstance(indices, int) else indices)
        model.out_indices = tuple(sorted(model.out_indices))  # As published: maps come in the order of the blocks.
        return Published(model, BACKBONE_KEYS, run_features)
    if "ImageClassifier" not in name:
        raise NotCovered(f"entry {entry!r} is no model of this family")
    model = _trunk(given.pop("backbone", {}), given.pop("num_classes", 1000))
    nothing_left(given)
    return Published(model, KEYS, _run_classifier)


def _trunk(kwargs: Mapping[str, Any], num_classes: int) -> PlainMamba:
    """A published backbone with a classifier."""
    given = dict(kwargs)
    final_norm = given.pop("final_norm", True)
    model = PlainMamba(**translate(given), num_classes=num_classes)
    if not final_norm:
        model.norm = nn.Identity()
    return model


SAME = {"img_size": "img_size", "in_channels": "in_chans"}
PARTS = {"patch_size": "patch_size", "embed_dims": "embed_dim", "num_layers": "depth",
         "num_convs_patch_embed": "stem_convs", "layers_with_dwconv": "conv_blocks"}  # fmt: skip
UNCHANGED = {"norm_cfg": {"type": "LN", "eps": 1e-6}, "interpolate_mode": "bicubic", "with_pos_embed": True}
INEFFECTIVE = {  # in training only
    "drop_rate", "drop_path_rate", "init_cfg", "test_cfg", "convert_syncbn", "freeze_patch_embed", "type",
}  # fmt: skip
MIXER = {"d_state": "d_state", "expand": "expand", "conv_size": "conv_size", "conv_bias": "conv_bias", "bias": "bias",
         "init_layer_scale": "layer_scale"}  # fmt: skip
START = {"dt_init", "dt_min", "dt_max", "dt_scale", "dt_init_floor", "default_hw_shape"}  # or what a cache holds


def translate(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``PlainMamba`` for those of the published backbone."""
    given = dict(kwargs)
    arch, layer = given.pop("arch", None), given.pop("layer_cfgs", {})
    if arch is None:
        parts = {"depth": 20, "conv_blocks": ()} | translated(given, SAME | PARTS, UNCHANGED, INEFFECTIVE)
        return parts | _translate_layer(layer)
    if arch not in ARCHITECTURES or not isinstance(layer, Mapping):
        raise NotCovered(f"arch={arch!r}, layer_cfgs={layer!r}")
    # As published: an architecture has its parts, whatever arguments say.
    return ARCHITECTURES[arch] | translated(given, SAME, UNCHANGED, INEFFECTIVE | PARTS.keys())


def _translate_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``PlainMamba`` for a published ``layer_cfgs``."""
    mixer = dict(layer.get("mamba_cfg", {}))
    nothing_left(layer.keys() - {"use_rms_norm", "mamba_cfg"})
    rank = mixer.pop("dt_rank", "auto")
    return {
        "norm": "rms" if layer.get("use_rms_norm", False) else "layer",
        "dt_rank": None if rank == "auto" else rank,
        "bias": False,  # the published default
        **translated(mixer, MIXER, ineffective=START),
    }


def _run_classifier(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {"patch_embed": to_tokens(model.patch_embed(inputs["x"]))}
    x, grid = model.embed(inputs["x"])
    for i, block in enumerate(model.blocks):
        x = out[f"layers.{i}"] = block(x, grid)
    x = model.norm(x)
    pooled = model.forward_head(x, pre_logits=True)
    return out | {"feat0": to_map(x, grid), "pooled": pooled, "logits": model.forward_head(x)}
