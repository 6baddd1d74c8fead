"""Mamba2D: A Natively Multi-Dimensional State-Space Model for Vision Tasks (Baty et al., 2024, arXiv:2412.16146).

Two stages whose mixers run a recurrence in both directions of the grid at once, beside a few convolutions, then two
stages of attention. Blocks start in the top left and in the bottom right corner by turns.
Published code and weights: github.com/cocoalex00/Mamba2D (no licence; this is written from the paper and a description
of that code). Same function; other key names, see KEYS.

Two generations were released: ``mamba2d_n``, ``_t`` and ``_s`` are the second (v2); ``mamba2d_t_v1`` is the first,
whose files do not fit the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import (
    DropPath,
    LayerNorm,
    SelectAdaptivePool2d,
    apply_rot_embed,
    register_notrace_function,
)
from torch import Tensor, nn

from vssm.kernels.scan2d import scan2d
from vssm.layers.conv import depthwise
from vssm.layers.layout import over_map, to_map, to_tokens
from vssm.layers.mlp import LeanMlp
from vssm.layers.norm import ChannelNorm, TokenNorm
from vssm.layers.position import axial_angles
from vssm.layers.ssm import decay, dt_bias_
from vssm.models.backbone import run_classifier
from vssm.models.base import Hierarchical, make_stages
from vssm.models.keys import Rule, rename, stack
from vssm.models.variant import NotCovered, Published, Variant, Weights, defaults_unknown, translated

REPOSITORY = "cocoalex00/Mamba2D"
HEAD_DIM = 32

register_notrace_function(scan2d)


class StarReLU(nn.Module):
    """scale · relu(x)² + bias, both learnt."""

    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.relu(x).square() + self.bias


class LocalBranch(nn.Module):
    """Norm, widen, convolve each channel, narrow. (B, L, C) tokens in and out."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.widen, self.act1 = LayerNorm(dim, eps=1e-5), nn.Linear(dim, 2 * dim, bias=False), StarReLU()
        self.conv, self.act2 = depthwise(2 * dim, 3, bias=False), StarReLU()
        self.narrow = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        x = self.act1(self.widen(self.norm(x)))
        return self.narrow(self.act2(over_map(self.conv, x, grid)))


class SSM2d(nn.Module):
    """Projections to two step sizes, two B and C, and the recurrence over the grid. (B, L, d) in and out.

    Args:
        dim: Channels d.
        d_state: States n of each channel.
        dt_rank: Rank of the projections that make the step sizes.
        shared_input: One B for what comes from above and from the left, and a bias in the projection (v1).
        reverse: Start in the bottom right corner.
    """

    def __init__(self, dim: int, d_state: int, dt_rank: int, *, shared_input: bool = False, reverse: bool = False):
        super().__init__()
        self.splits = (dt_rank, dt_rank, *[d_state] * (2 if shared_input else 3))
        self.reverse = reverse
        self.x_proj = nn.Linear(dim, sum(self.splits), bias=shared_input)
        self.dt_weight = nn.Parameter(torch.empty(2, dim, dt_rank))  # from above, from the left; so the others
        self.dt_bias = nn.Parameter(torch.empty(2, dim))
        self.A_log = nn.Parameter(torch.empty(2, dim, d_state))
        self.D = nn.Parameter(torch.ones(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.dt_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.dt_weight, -bound, bound)
        with torch.no_grad():
            self.dt_bias.copy_(dt_bias_(torch.empty_like(self.dt_bias[0])).expand_as(self.dt_bias))
            states = torch.arange(1, self.A_log.shape[-1] + 1, dtype=torch.float32, device=self.A_log.device)
            self.A_log.copy_(states.log().expand_as(self.A_log))

    def forward(self, u: Tensor, grid: Sequence[int]) -> Tensor:
        check_grid(grid)
        parts, A = self.x_proj(u).split(self.splits, -1), decay(self.A_log)
        top, left = (nn.functional.linear(parts[i], self.dt_weight[i], self.dt_bias[i]) for i in range(2))
        return scan2d(
            u, top, left, A[0], A[1], parts[2], parts[-2], parts[-1], self.D,
            grid=(grid[0], grid[1]), delta_softplus=True, reverse=self.reverse,
        )  # fmt: skip


@register_notrace_function
def check_grid(grid: Sequence[int]) -> None:
    """As published: the recurrence is refused on a single row or column, in training and without."""
    if min(grid) < 2:
        raise ValueError(
            f"Mamba2D: a map must have at least two rows and two columns where it is scanned, got {tuple(grid)}; "
            "images must have at least 11 pixels a side"
        )


class ScanMixer2d(nn.Module):
    """Project in, scan the grid, project out, and add the local branch. (B, L, C) tokens in and out.

    Args:
        dim: Channels C of the tokens.
        expand: Channels of the scan over C.
        d_state: States of each channel.
        local: Have the local branch.
        shared_input, reverse: See ``SSM2d``.
    """

    def __init__(
        self, dim: int, expand: int, d_state: int, *, local: bool, shared_input: bool = False, reverse: bool = False
    ):
        super().__init__()
        width = expand * dim
        self.local = LocalBranch(dim) if local else None
        self.in_proj, self.act = nn.Linear(dim, width), nn.GELU()
        self.ssm = SSM2d(width, d_state, math.ceil(dim / 16), shared_input=shared_input, reverse=reverse)
        self.out_proj = nn.Linear(width, dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``grid``: sizes of the grid whose cells the tokens are."""
        y = self.out_proj(self.act(self.ssm(self.act(self.in_proj(x)), grid)))
        return y if self.local is None else y + self.local(x, grid)


class AttentionMixer(nn.Module):
    """Softmax attention between all cells in heads of 32 channels. (B, L, C) tokens in and out.

    With ``rotary`` queries and keys are turned by the row and the column of their cell and then normalised.
    """

    def __init__(self, dim: int, rotary: bool):
        super().__init__()
        self.heads, self.rotary = max(dim // HEAD_DIM, 1), rotary
        width = self.heads * HEAD_DIM
        self.qkv, self.proj = nn.Linear(dim, 3 * width, bias=False), nn.Linear(width, dim, bias=False)
        self.q_norm = LayerNorm(HEAD_DIM, eps=1e-5) if rotary else nn.Identity()
        self.k_norm = LayerNorm(HEAD_DIM, eps=1e-5) if rotary else nn.Identity()

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``grid``: sizes of the grid whose cells the tokens are."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind()  # (b, h, l, c)
        if self.rotary:
            sin, cos = rotary_table(grid, x.device)
            sin, cos = sin.type_as(q), cos.type_as(q)
            q, k = apply_rot_embed(q, sin, cos), apply_rot_embed(k, sin, cos)
        # As published: the norms stand behind the rotation, so that it no longer keeps lengths.
        x = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))


@register_notrace_function
def rotary_table(grid: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sine and cosine (L, 32): the first half of the channels turns with the row, the second with the column.

    As published: computed in float32, whatever the model has.
    """
    rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
    angle = axial_angles(rows, columns, HEAD_DIM)
    return angle.sin(), angle.cos()


class Mamba2DBlock(nn.Module):
    """Norm, mix, add; norm, MLP, add. (B, C, H, W) in and out, channels last in memory.

    With ``scaled`` every channel of the skip has a learnt factor; the branches have none.
    """

    def __init__(self, dim: int, mixer: nn.Module, scaled: bool, drop_path: float = 0.0):
        super().__init__()
        self.norm1, self.mixer = TokenNorm(dim, eps=1e-5), mixer
        self.norm2, self.mlp = TokenNorm(dim, eps=1e-5), LeanMlp(dim, 4 * dim)
        self.scale1 = nn.Parameter(torch.ones(dim)) if scaled else None
        self.scale2 = nn.Parameter(torch.ones(dim)) if scaled else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        x = to_tokens(x)
        x = _scaled(x, self.scale1) + self.drop_path(self.mixer(self.norm1(x), grid))
        x = _scaled(x, self.scale2) + self.drop_path(self.mlp(self.norm2(x)))
        return to_map(x, grid)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


class Stem(nn.Module):
    """One overlapping convolution and a norm. (B, 3, H, W) to (B, C, H', W') with H' = (H - 3) // 4 + 1."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_chans, dim, 7, stride=4, padding=2), ChannelNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Downsample(nn.Module):
    """A convolution of stride 2, in v1 behind a norm. (B, C, H, W) to (B, C', H / 2, W / 2), rounded up."""

    def __init__(self, dim: int, out: int, norm: bool):
        super().__init__()
        self.norm = ChannelNorm(dim) if norm else nn.Identity()
        self.conv = nn.Conv2d(dim, out, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class MlpHead(nn.Module):
    """Pool, norm, one hidden layer, norm, classifier. (B, C, H, W) to (B, num_classes)."""

    def __init__(self, dim: int, num_classes: int, global_pool: str, drop_rate: float):
        super().__init__()
        hidden = 4 * dim
        self.norm1, self.fc1, self.act = LayerNorm(dim, eps=1e-5), nn.Linear(dim, hidden), nn.GELU()
        self.norm2, self.drop = LayerNorm(hidden, eps=1e-5), nn.Dropout(drop_rate)
        self.global_pool = _pool(global_pool)
        self.fc = _classifier(hidden, num_classes)

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier (0: none), and another pooling if ``global_pool`` is given."""
        if global_pool is not None:
            self.global_pool = _pool(global_pool)
        self.fc = _classifier(self.fc1.out_features, num_classes).to(self.fc1.weight)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool.is_identity():
            return x
        x = self.drop(self.norm2(self.act(self.fc1(self.norm1(self.global_pool(x))))))
        return x if pre_logits else self.fc(x)


def _pool(global_pool: str) -> nn.Module:
    return SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))


def _classifier(dim: int, num_classes: int) -> nn.Module:
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


MIXERS = ("scan", "scan_local", "rotary", "attention")


class Mamba2D(Hierarchical):
    """Mamba2D classifier for images of any size from 11 pixels a side. The defaults are ``mamba2d_t``.

    ``forward_features`` is the map of the last stage; the norm behind the pooling is part of the head.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: As in timm; dropout before the classifier.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        mixers: Of each stage: ``"scan"``, ``"scan_local"`` (beside convolutions), ``"rotary"`` (attention with rotary
            positions) or ``"attention"``.
        expand: Channels of a scan over those of its block.
        d_state: States of each channel of a scan.
        alternate: Every second block of a stage scans from the bottom right corner.
        scaled: Of each stage, whether the skips of its blocks are scaled.
        stage_norm: A norm ends each stage, and is part of what the next one and a detector see.
        downsample_norm: A norm stands before each downsampling.
        shared_input: One B for both directions of a scan, and a bias in the projection that makes it.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (64, 128, 320, 512),
        mixers: Sequence[str] = ("scan_local", "scan_local", "rotary", "rotary"),
        expand: int = 1,
        d_state: int = 16,
        alternate: bool = True,
        scaled: Sequence[bool] = (True, True, True, True),
        stage_norm: bool = True,
        downsample_norm: bool = False,
        shared_input: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        for name, values in (("dims", dims), ("mixers", mixers), ("scaled", scaled)):
            if len(values) != len(depths):
                raise ValueError(
                    f"Mamba2D: {name} must name one a stage ({len(depths)} in depths), got {tuple(values)}"
                )
        unknown = sorted(set(mixers) - set(MIXERS))
        if unknown:
            raise ValueError(f"Mamba2D: mixers must be of {', '.join(MIXERS)}, got {unknown[0]!r}")

        def mixer(stage: int, block: int) -> nn.Module:
            dim, name = dims[stage], mixers[stage]
            if name in ("rotary", "attention"):
                return AttentionMixer(dim, rotary=name == "rotary")
            return ScanMixer2d(
                dim, expand, d_state, local=name == "scan_local", shared_input=shared_input,
                reverse=alternate and block % 2 == 1,
            )  # fmt: skip

        stages = make_stages(
            depths, dims, drop_path_rate,
            block=lambda i, j, rate: Mamba2DBlock(dims[i], mixer(i, j), scaled[i], rate),
            downsample=lambda dim, out: Downsample(dim, out, downsample_norm),
            norm=ChannelNorm if stage_norm else None,
        )  # fmt: skip
        super().__init__(Stem(in_chans, dims[0]), stages, dims, nn.Identity(), num_classes=0)
        self._check_head(num_classes, global_pool)
        self.num_classes, self.head_hidden_size = num_classes, 4 * dims[-1]
        self.head = MlpHead(dims[-1], num_classes, global_pool, drop_rate)

    def no_weight_decay(self) -> set[str]:
        """Vectors aside (timm knows them). As published with v2; v1's authors decayed everything."""
        leaves = ("A_log", "D", "dt_bias")
        modules = [(name, module) for name, module in self.named_modules() if isinstance(module, SSM2d)]
        return {f"{name}.{leaf}" for name, _ in modules for leaf in leaves}


def keys(depths: Sequence[int]) -> list[Rule]:
    """Key rules; ``depths`` because the norm that ends a stage is published as one more block."""
    return [
        stack(("AT_log", "AL_log"), "A_log"),
        stack(("dt_projT.weight", "dt_projL.weight"), "dt_weight"),
        stack(("dt_projT.bias", "dt_projL.bias"), "dt_bias"),
        *(rename(rf"^backbone\.stages\.{i}\.{depth}\.", f"stages.{i}.norm.") for i, depth in enumerate(depths)),
        rename(r"^backbone\.stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        rename(r"^backbone\.ds\.stem\.conv\.", r"stem.conv."),
        rename(r"^backbone\.ds\.stem\.post_norm\.norm\.", r"stem.norm."),
        rename(r"^backbone\.ds\.ds(\d)\.conv\.", r"stages.\1.downsample.conv."),
        rename(r"^backbone\.ds\.ds(\d)\.pre_norm\.norm\.", r"stages.\1.downsample.norm."),
        rename(r"\.token_mixer\.", r".mixer."),
        rename(r"\.mixer\.(A_log|D|dt_weight|dt_bias)$", r".mixer.ssm.\1"),
        rename(r"\.mixer\.x_proj\.", r".mixer.ssm.x_proj."),
        rename(r"\.mixer\.local_norm\.", r".mixer.local.norm."),
        rename(r"\.mixer\.local_path\.pwconv1\.", r".mixer.local.widen."),
        rename(r"\.mixer\.local_path\.pwconv2\.", r".mixer.local.narrow."),
        rename(r"\.mixer\.local_path\.dwconv\.", r".mixer.local.conv."),
        rename(r"\.mixer\.local_path\.(act\d)\.", r".mixer.local.\1."),
        rename(r"\.res_scale(\d)\.scale$", r".scale\1"),
        rename(r"\.MLP\.", r".mlp."),
        rename(r"^head\.norm\.", r"head.norm2."),
        rename(r"^head\.fc2\.", r"head.fc."),
        rename(r"^norm\.", r"head.norm1."),
    ]


KEYS = keys((3, 3, 9, 3))


def _weights(size: str, top1: float) -> dict[str, Weights]:
    return {
        "in1k": Weights(
            "unknown", f"https://github.com/{REPOSITORY}", "arXiv:2412.16146", key="state_dict", top1=top1,
            url=f"https://github.com/{REPOSITORY}/releases/download/v2.0.0/M2D-{size}-backbone.ckpt", crop_pct=1.0,
        )
    }  # fmt: skip


def _variant(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    return Variant(
        name, Mamba2D, kwargs, keys(kwargs["depths"]), weights or {}, first_conv="stem.conv", classifier="head.fc",
        pool_size=(7, 7), description=description,
    )  # fmt: skip


V1: dict[str, Any] = dict(
    mixers=("scan_local", "scan_local", "attention", "attention"), expand=2, alternate=False,
    scaled=(False, False, True, True), stage_norm=False, downsample_norm=True, shared_input=True,
)  # fmt: skip

VARIANTS = [
    _variant("mamba2d_n", _weights("N", 79.6), depths=(3, 3, 9, 3), dims=(32, 64, 160, 256)),
    _variant("mamba2d_t", _weights("T", 84.0),
             depths=(3, 3, 9, 3), dims=(64, 128, 320, 512), drop_rate=0.15, drop_path_rate=0.175),
    _variant("mamba2d_s", _weights("S", 85.3),
             depths=(3, 12, 14, 3), dims=(96, 192, 384, 576), drop_rate=0.4, drop_path_rate=0.4),
    _variant("mamba2d_t_v1", None, "the first generation",
             depths=(3, 3, 9, 3), dims=(64, 128, 320, 512), drop_rate=0.15, drop_path_rate=0.175, **V1),
    _variant("test_mamba2d", None, "for tests", depths=(2, 1, 1, 1), dims=(8, 12, 32, 64), d_state=4),
]  # fmt: skip

TOKEN_MIXERS = {"2D": "scan", "2D_local": "scan_local", "RopeAttention": "rotary", "Attention": "attention"}
SAME = {"in_channels": "in_chans", "n_blocks": "depths", "embed_dim": "dims", "d_state": "d_state"}
UNCHANGED = {"channel_last": True, "ds_stages": ["mf_stem", "mf_2", "mf_2", "mf_2"]}
INEFFECTIVE = {"drop_path_rate", "recomp"}  # in training only; the same numbers by another way


def translate(kwargs: Mapping[str, Any], first: bool) -> dict[str, Any]:
    """Arguments of ``Mamba2D`` for those of the published classifier, of its first generation or its second."""
    given = dict(kwargs["backbone"])
    defaults_unknown(given, "n_blocks", "embed_dim", "token_mixer")
    types = given.pop("token_mixer")
    if not set(types) <= TOKEN_MIXERS.keys():
        raise NotCovered(f"token_mixer={types!r}")
    scales = given.pop("res_scale_init_values", (None, None, 1.0, 1.0))
    ours = dict(V1 if first else {"alternate": given.pop("inter_flip", False)})
    ours |= {"mixers": [TOKEN_MIXERS[name] for name in types], "scaled": [bool(scale) for scale in scales]}
    ours |= translated(given, SAME, UNCHANGED, INEFFECTIVE)
    head = kwargs["head"]
    if head.get("mlp_ratio", 4) != 4 or head["dim"] != ours["dims"][-1]:
        raise NotCovered(f"head={head!r}")
    return ours | {"num_classes": head["n_classes"]}


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``Mamba2DClassifier`` of the published code, of either generation, as our model."""
    if not entry.startswith("models.mamba2d_classifier.Mamba2DClassifier"):
        raise NotCovered(f"entry {entry!r} is no model of this family")
    ours = translate(kwargs, first="v1" in entry)
    return Published(Mamba2D(**ours), keys(ours["depths"]), run_classifier)
