"""GroupMamba: Efficient Group-Based Visual State Space Model (Shaker et al., CVPR 2025, arXiv:2407.13772).

Four stages of mixer-and-MLP blocks; each mixer splits the channels in four groups, which scan the map in one direction
each. Behind the last stage the mean of the map passes a block of its own, then two classifiers: one that learnt from
labels and one that learnt from a teacher.
Published code: github.com/Amshaker/GroupMamba (MIT). Its weights are on the Hugging Face hub, on pages that are marked
MIT while their text speaks of a non-commercial licence. Same function; other key names, see KEYS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp, SelectAdaptivePool2d
from torch import Tensor, nn

from vssm.layers.init import linear_like_transformers
from vssm.layers.layout import over_map, to_map, to_tokens
from vssm.layers.mlp import ConvMlp
from vssm.layers.norm import ChannelNorm, TokenNorm
from vssm.layers.ssm import SelectiveSSM, ssm_parameters
from vssm.models.backbone import run_classifier
from vssm.models.base import Hierarchical, linear_head, make_stages
from vssm.models.keys import Rule, rename, reshape, stack
from vssm.models.variant import NotCovered, Published, Variant, Weights, constructor, translated
from vssm.scans import scan_rows, scan_table, visits_once

REPOSITORY = "Amshaker/GroupMamba"
GROUPS = 4
STAGE_EPS = 1e-6  # of the norms between and inside blocks of published models; those of stems and mixers have 1e-5


class Stem(nn.Module):
    """Convolutions at half the size, then one to a quarter. (B, 3, H, W) to (B, C, H / 4, W / 4), rounded up."""

    def __init__(self, in_chans: int, width: int, dim: int):
        super().__init__()
        layers: list[nn.Module] = []
        for chans, size, stride in ((in_chans, 7, 2), (width, 3, 1), (width, 3, 1)):
            conv = nn.Conv2d(chans, width, size, stride=stride, padding=size // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.proj, self.norm = nn.Conv2d(width, dim, 3, stride=2, padding=1), ChannelNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.conv(x)))


class Downsample(nn.Module):
    """A norm, a convolution of stride 2, and a norm. (B, C, H, W) to (B, C', H / 2, W / 2), rounded up."""

    def __init__(self, dim: int, out: int, eps: float):
        super().__init__()
        self.norm1 = ChannelNorm(dim, eps)
        self.proj, self.norm2 = nn.Conv2d(dim, out, 3, stride=2, padding=1), ChannelNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.proj(self.norm1(x)))


class GroupLinear(nn.Module):
    """A linear layer of its own for each group, without bias. (B, L, k, C) to (B, k, L, C')."""

    def __init__(self, groups: int, dim: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("blki,koi->bklo", x, self.weight)


class GroupConv(nn.Module):
    """A depthwise 3 x 3 convolution, its parameters by group. (B, k C, H, W) in and out."""

    def __init__(self, groups: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, dim, 3, 3))
        self.bias = nn.Parameter(torch.zeros(groups, dim))
        nn.init.normal_(self.weight, std=math.sqrt(2 / 9))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.flatten(0, 1)[:, None], self.bias.flatten()
        return nn.functional.conv2d(x, weight, bias, padding=1, groups=weight.shape[0])


class GroupLayerNorm(nn.Module):
    """Layer norm over the channels of each group. (B, k, L, C) in and out."""

    def __init__(self, groups: int, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(groups, dim)), nn.Parameter(torch.zeros(groups, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.layer_norm(x, self.weight.shape[1:])
        return x * self.weight[:, None] + self.bias[:, None]


class GroupScan(nn.Module):
    """A small gated Mamba for each group of channels, one direction each. (B, L, C) tokens in and out.

    Group g reads row g of the order, beginning again where the order has fewer rows. On maps that are not square the
    published backward pass puts the gradients of the groups that read columns in the wrong cells; here they are exact.
    """

    def __init__(self, dim: int, scan: str, scan_options: Mapping[str, Any] | None):
        super().__init__()
        self.scan, self.scan_options, self.revisits = scan, dict(scan_options or {}), not visits_once(scan)
        self.rows = scan_rows(scan, 2, **self.scan_options)
        if self.rows is None:
            raise ValueError(f"GroupMamba: groups read a row each, those of {scan!r} follow the grid; choose another")
        width = dim // GROUPS
        self.in_proj = GroupLinear(GROUPS, width, 2 * width)
        self.conv, self.act = GroupConv(GROUPS, width), nn.SiLU()
        self.ssm = SelectiveSSM(width, GROUPS, d_state=1, dt_rank=math.ceil(width / 16), per_row=True)
        self.out_norm = GroupLayerNorm(GROUPS, width)
        self.out_proj = GroupLinear(GROUPS, width, width)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``grid``: sizes of the grid whose cells the tokens are."""
        x, z = self.in_proj(x.unflatten(-1, (GROUPS, -1))).chunk(2, dim=-1)  # (b, k, l, c) each
        x = self.act(over_map(self.conv, x.transpose(1, 2).flatten(2), grid))
        x = x.unflatten(-1, (GROUPS, -1)).transpose(1, 2)
        y = self.ssm(x, self.table(grid, x.device), merge=None, revisits=self.revisits)
        y = self.out_norm(y) * self.act(z)
        return self.out_proj(y.transpose(1, 2)).transpose(1, 2).flatten(2)

    def table(self, grid: Sequence[int], device: torch.device) -> Tensor:
        """(GROUPS, T)."""
        table = scan_table(self.scan, grid, device, **self.scan_options)
        return table if self.rows == GROUPS else table.repeat(-(-GROUPS // self.rows), 1)[:GROUPS]


class GroupMixer(nn.Module):
    """Norm, scan by groups, weigh the channels, norm, project. (B, L, C) tokens in and out."""

    def __init__(self, dim: int, scan: str, scan_options: Mapping[str, Any] | None):
        super().__init__()
        self.norm = LayerNorm(dim, eps=1e-5)
        self.affinity = Mlp(dim, dim // 16, act_layer=nn.ReLU)
        self.groups = GroupScan(dim, scan, scan_options)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        x = self.norm(x)
        affinity = self.affinity(x.mean(1, keepdim=True)).sigmoid()
        # As published: a product with the input, not a sum; then the same norm again.
        y = self.groups(x, grid) * self.skip_scale * x * affinity
        return self.proj(self.norm(y))


class GroupMambaBlock(nn.Module):
    """Mix, add; norm, MLP, add. (B, C, H, W) in and out, channels last in memory. The mixer has its own norm."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        scan: str,
        scan_options: Mapping[str, Any] | None,
        eps: float,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.mixer = GroupMixer(dim, scan, scan_options)
        self.norm, self.mlp = TokenNorm(dim, eps=eps), ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        x = to_tokens(x)
        x = x + self.drop_path(self.mixer(x, grid))
        x = x + self.drop_path(self.mlp(self.norm(x), grid))
        return to_map(x, grid)


class ClassBlock(nn.Module):
    """Mix, norm, add; norm, MLP, add, of the class token. (B, C) in and out.

    As published: the patches stand beside the token, but the mixer sees a grid of one cell.
    """

    def __init__(
        self, dim: int, mlp_ratio: float, scan: str, scan_options: Mapping[str, Any] | None, eps: float
    ):
        super().__init__()
        self.mixer, self.norm1 = GroupMixer(dim, scan, scan_options), LayerNorm(dim, eps=eps)
        self.norm2, self.mlp = LayerNorm(dim, eps=eps), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        x = x + self.norm1(self.mixer(x, (1, 1)))
        x = x + self.mlp(self.norm2(x))
        return x[:, 0]


class ClassHead(nn.Module):
    """Pool, the class block, norm, and one or two classifiers. (B, C, H, W) to (B, num_classes).

    Two classifiers are averaged; in training with ``paired`` both outputs are returned.
    """

    def __init__(
        self,
        dim: int,
        block: nn.Module,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        distillation: bool,
        eps: float,
    ):
        super().__init__()
        self.dim, self.distillation, self.paired = dim, distillation, False
        self.block, self.norm, self.drop = block, LayerNorm(dim, eps=eps), nn.Dropout(drop_rate)
        self.set_pool(global_pool, num_classes)
        self.set_classes(num_classes)

    def set_pool(self, global_pool: str, num_classes: int) -> None:
        if not global_pool and num_classes:
            raise ValueError(
                f"GroupMamba: global_pool='' returns the map, which no classifier reads, got {num_classes} classes; "
                "pass global_pool='avg' or num_classes=0"
            )
        self.pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True) if global_pool else None

    def set_classes(self, num_classes: int) -> None:
        self.fc = linear_head(self.dim, num_classes)
        self.fc_dist = linear_head(self.dim, num_classes) if self.distillation and num_classes else None

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers (0: none), and another pooling if ``global_pool`` is given."""
        if global_pool is not None:
            self.set_pool(global_pool, num_classes)
        self.set_classes(num_classes)
        self.to(self.norm.weight)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if self.pool is None:
            return x
        x = self.drop(self.norm(self.block(self.pool(x))))
        if pre_logits or self.fc_dist is None:
            return x if pre_logits else self.fc(x)
        logits, taught = self.fc(x), self.fc_dist(x)
        return (logits, taught) if self.paired and self.training else (logits + taught) / 2


class GroupMamba(Hierarchical):
    """GroupMamba classifier for images of any size. The defaults are ``groupmamba_tiny``.

    ``forward_features`` is the last map, which no norm follows; all that the head sees is its mean.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: As in timm.
        depths: Blocks of each stage.
        dims: Channels of each stage, multiples of 4.
        stem_dim: Channels in the stem.
        mlp_ratios: Hidden channels of the MLPs over those of the block, by stage.
        distillation: Have a second classifier, which learns from a teacher.
        norm_eps: Of the norms between and inside blocks.
        scan, scan_options: A registered order, whose rows are the directions of the groups.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (3, 4, 9, 3),
        dims: Sequence[int] = (64, 128, 348, 448),
        stem_dim: int = 32,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        distillation: bool = True,
        norm_eps: float = STAGE_EPS,
        scan: str = "cross",
        scan_options: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if not len(depths) == len(dims) == len(mlp_ratios) or any(dim % GROUPS for dim in dims):
            raise ValueError(
                f"GroupMamba: dims must be {len(depths)} multiples of {GROUPS}, one a stage, as mlp_ratios are, got "
                f"{tuple(dims)} and {tuple(mlp_ratios)}"
            )

        def block(i: int, j: int, rate: float) -> nn.Module:
            return GroupMambaBlock(dims[i], mlp_ratios[i], scan, scan_options, norm_eps, rate)

        stages = make_stages(depths, dims, drop_path_rate, block, partial(Downsample, eps=norm_eps))
        super().__init__(Stem(in_chans, stem_dim, dims[0]), stages, dims, nn.Identity(), num_classes=0)
        block = ClassBlock(dims[-1], mlp_ratios[-1], scan, scan_options, norm_eps)
        self.num_classes = num_classes
        self.head = ClassHead(dims[-1], block, num_classes, global_pool, drop_rate, distillation, norm_eps)
        self.apply(linear_like_transformers)
        self.apply(_init_conv)

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training return both classifiers' outputs, as the published model does, for a loss with a teacher."""
        if enable and not self.head.distillation:
            raise ValueError("GroupMamba: distilled training needs two classifiers; create it with distillation=True")
        self.head.paired = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        return self.head.fc if self.head.fc_dist is None else (self.head.fc, self.head.fc_dist)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows most). As published: A_log and the step-size bias are decayed."""
        norms = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, GroupLayerNorm)}
        return norms | set(ssm_parameters(self, "D"))


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        with torch.no_grad():
            module.weight.mul_(math.sqrt(module.groups))  # outputs of one group alone are counted
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _by_group(published: str, ours: str) -> Rule:
    return stack([f"mamba_g{g + 1}.{published}" for g in range(GROUPS)], f"groups.{ours}")


KEYS: list[Rule] = [
    _by_group("in_proj.weight", "in_proj.weight"),
    _by_group("conv2d.weight", "conv.weight"),
    _by_group("conv2d.bias", "conv.bias"),
    _by_group("x_proj_weight", "ssm.x_proj"),
    _by_group("dt_projs_weight", "ssm.dt_weight"),
    _by_group("dt_projs_bias", "ssm.dt_bias"),
    _by_group("A_logs", "ssm.A_log"),
    _by_group("Ds", "ssm.D"),
    _by_group("out_norm.weight", "out_norm.weight"),
    _by_group("out_norm.bias", "out_norm.bias"),
    _by_group("out_proj.weight", "out_proj.weight"),
    reshape(r"\.groups\.conv\.weight$", "k d 1 h w -> k d h w"),
    reshape(r"\.ssm\.(x_proj|dt_weight)$", "k 1 r d -> k r d"),
    reshape(r"\.ssm\.dt_bias$", "k 1 d -> k d"),
    rename(r"\.attn\.fc(\d)\.", r".attn.affinity.fc\1."),
    rename(r"\.attn\.", r".mixer."),
    rename(r"\.mlp\.dwconv\.dwconv\.", r".mlp.conv."),
    rename(r"^head\.", r"head.fc."),
    rename(r"^dist_head\.", r"head.fc_dist."),
    rename(r"^post_network\.0\.", r"head.block."),
    rename(r"^norm4\.", r"head.norm."),
    rename(r"^patch_embed1\.", r"stem."),
    *(rename(rf"^block{i}\.(\d+)\.", rf"stages.{i - 1}.blocks.\1.") for i in range(1, 5)),
    rename(r"^(stages\.\d+\.blocks\.\d+)\.norm2\.", r"\1.norm."),
    *(rename(rf"^norm{i}\.", f"stages.{i}.downsample.norm1.") for i in range(1, 4)),
    *(rename(rf"^patch_embed{i}\.norm\.", f"stages.{i - 1}.downsample.norm2.") for i in range(2, 5)),
    *(rename(rf"^patch_embed{i}\.proj\.", f"stages.{i - 1}.downsample.proj.") for i in range(2, 5)),
]


def _variant(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    return Variant(
        name, GroupMamba, kwargs, KEYS, weights or {}, first_conv="stem.conv.0",
        classifier=("head.fc", "head.fc_dist"), pool_size=(7, 7), description=description,
    )  # fmt: skip


def _weights(size: str, top1: float) -> dict[str, Weights]:
    return {
        "in1k": Weights(
            "unknown", f"https://github.com/{REPOSITORY}", "arXiv:2407.13772",
            hf_hub_id=f"Abdelrahman-shaker/GroupMamba-{size.capitalize()}",
            hf_hub_filename=f"groupmamba_{size}_ema.pth", top1=top1,
            notes="licence: the page is marked MIT, its text says non-commercial",
        )
    }  # fmt: skip


# The name of the base model's file is that of the other two with its own size; its page could not be seen.
VARIANTS = [
    _variant("groupmamba_tiny", _weights("tiny", 83.3), drop_path_rate=0.05),
    _variant("groupmamba_small", _weights("small", 83.9),
             depths=(3, 4, 16, 3), dims=(64, 128, 348, 512), stem_dim=64, drop_path_rate=0.05),
    _variant("groupmamba_base", _weights("base", 84.5),
             depths=(3, 6, 21, 3), dims=(96, 192, 424, 512), stem_dim=64, drop_path_rate=0.05),
    _variant("test_groupmamba", None, "for tests",
             depths=(1, 1, 1, 1), dims=(16, 16, 20, 24), stem_dim=8, mlp_ratios=(2, 2, 1, 1)),
]  # fmt: skip

SAME = {"in_chans": "in_chans", "num_classes": "num_classes", "mlp_ratios": "mlp_ratios", "depths": "depths",
        "distillation": "distillation", "stem_hidden_dim": "stem_dim", "embed_dims": "dims"}  # fmt: skip
NORM_LAYERS = {"LayerNorm(eps=1e-6)": STAGE_EPS, "LayerNorm": 1e-5}  # the published argument, and its eps
UNCHANGED = {"num_stages": 4}
TRAINING = {"drop_path_rate", "pretrained"}  # do not change what is computed


def translate(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``GroupMamba`` for those of the published one."""
    given = {"depths": (3, 4, 6, 3), "norm_layer": "LayerNorm", **kwargs}  # the published defaults, of no model
    return _translated(given)


def _translated(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(kwargs)
    norm = given.pop("norm_layer", "LayerNorm(eps=1e-6)")
    if norm not in NORM_LAYERS:
        raise NotCovered(f"norm_layer={norm!r}")
    return {**translated(given, SAME, UNCHANGED, TRAINING), "norm_eps": NORM_LAYERS[norm]}


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``GroupMamba`` of the published code, or one of its three factories, as our model."""
    factories = {row.name: row.kwargs for row in VARIANTS if row.weights}
    name = constructor(entry, "GroupMamba", *factories)
    if name == "GroupMamba":
        ours = translate(kwargs)
    else:
        ours = {**factories[name], **_translated(kwargs)}
    return Published(GroupMamba(**ours), KEYS, _run)


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    pooled = model.forward_head(model.forward_features(inputs["x"]), pre_logits=True)
    return run_classifier(model, inputs) | {"pre_head": pooled}
