"""EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba (Pei et al., 2024, arXiv:2403.09977).

Two stages of blocks that scan every second cell of every second row, four times over, beside a convolution; then two
stages of inverted residuals. Published code: github.com/TerryPei/EfficientVMamba (no licence file); its weights are on
the Hugging Face hub (Apache-2.0). Same function; other key names, see KEYS.

The repository's configuration of the small model is 96 channels wide and has twice the published parameters. The
released file is as large as ``efficientvmamba_small_d64``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from timm.layers import DropPath, register_notrace_function
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from vssm.kernels import selective_scan
from vssm.layers.conv import depthwise
from vssm.layers.downsample import PatchMerging
from vssm.layers.init import linear_like_transformers
from vssm.layers.layout import over_map, over_tokens, to_map, to_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.mlp import LeanMlp
from vssm.layers.norm import ChannelNorm
from vssm.layers.ssm import decay, ssm_parameters
from vssm.layers.stem import PatchStem
from vssm.models.backbone import StageMaps, run_backbone, run_classifier
from vssm.models.base import Hierarchical, make_stages, widths
from vssm.models.keys import Rule, drop, rename
from vssm.models.names import FIRST_RELEASE, SSM_SHAPES, frame, unread
from vssm.models.variant import Published, Variant, Weights, constructor, defaults_unknown, translated
from vssm.scans import scan_shape, to_sequences

REPOSITORY = "TerryPei/EfficientVMamba"
SCANNED = 2  # stages that scan; those behind them are convolutions
D_STATE = 16  # As published: no argument of the published model reaches it, nor the rank of the step sizes.

register_notrace_function(to_sequences)


class AtrousMixer(ScanMixer):
    """A gated mixer in which a direction that leaves cells out projects only those it reads. (B, L, C) in and out."""

    def __init__(self, dim: int, expand: float, scan: str, scan_options: Mapping[str, Any] | None = None):
        super().__init__(dim, scan=scan, scan_options=scan_options, expand=expand, d_state=D_STATE, out_norm="layer")
        grid = (12, 12)  # any will do
        self.leaves_out = scan_shape(scan, grid, **self.scan_options)[1] < prod(grid)

    def mix(self, x: Tensor, z: Tensor | None, grid: Sequence[int]) -> Tensor:
        if not self.leaves_out:
            return super().mix(x, z, grid)
        table, ssm = self.table(grid, x.device), self.ssm
        u = self.act(over_map(self.conv, x, grid))
        # Padding is a step as any other: it reads zeros, so B is zero there and delta its bias.
        dt, B, C = (to_sequences(u, table) @ ssm.x_proj.mT).split(ssm.splits, -1)  # each (b, k, t, ·)
        A_log, D, dt_bias = ssm.coefficients()
        y, _ = selective_scan(
            u, dt @ ssm.dt_weight.mT, decay(A_log), B, C, D, None, dt_bias,
            delta_softplus=True, table=table, read="steps", merge="sum", revisits=self.revisits,
        )  # fmt: skip
        return over_map(self.out_norm, y, grid)


class ChannelGate(nn.Module):
    """Scale the channels of a map by what the mean of the normalised map says. (B, C, H, W) in and out."""

    def __init__(self, dim: int, reduction: int = 8):
        super().__init__()
        self.norm = ChannelNorm(dim)
        hidden = dim // reduction
        self.reduce, self.act, self.expand = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(self.act(self.reduce(self.norm(x).mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class EfficientBlock(nn.Module):
    """Norm; scan and convolve side by side, gate both, add; norm, MLP, add if ``mlp_ratio`` is not 0.

    (B, C, H, W) in and out, channels last in memory.
    """

    def __init__(
        self,
        dim: int,
        expand: float,
        scan: str,
        scan_options: Mapping[str, Any] | None,
        mlp_ratio: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm, self.mixer = ChannelNorm(dim, narrow=True), AtrousMixer(dim, expand, scan, scan_options)
        self.conv_branch = nn.Sequential(depthwise(dim, 3), nn.BatchNorm2d(dim), nn.GELU(), nn.Conv2d(dim, dim, 1))
        self.gate = ChannelGate(dim)
        self.norm2 = ChannelNorm(dim, narrow=True) if mlp_ratio else None
        self.mlp = LeanMlp(dim, int(dim * mlp_ratio)) if mlp_ratio else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        grid, h = x.shape[2:], self.norm(x)
        scanned = to_map(self.mixer(to_tokens(h), grid), grid)
        # As published: one gate for both branches.
        x = x + self.drop_path(self.gate(scanned) + self.gate(self.conv_branch(h)))
        return x if self.mlp is None else x + self.drop_path(over_tokens(self.mlp, self.norm2(x)))


def conv_block(dim: int, drop_path: float) -> nn.Module:
    """The inverted residual of EfficientNet with squeeze-and-excitation. (B, C, H, W) in and out."""
    squeeze = partial(SqueezeExcite, rd_ratio=1 / 8, rd_round_fn=int)
    return InvertedResidual(dim, dim, exp_ratio=4, act_layer=nn.ReLU, se_layer=squeeze, drop_path_rate=drop_path)


class EfficientVMamba(Hierarchical):
    """EfficientVMamba classifier for images of any size from one patch. The defaults are ``efficientvmamba_tiny``.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: As in timm.
        depths: Blocks of each stage.
        dim: Channels of the first stage, which double with every stage; or of all of them.
        expand, scan, scan_options: Of the mixers, see ``ScanMixer``.
        mlp_ratio: Hidden channels of an MLP behind each mixer over those of its block; 0 for no MLP.
        patch_size: Pixels of the image to one cell of the first stage.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 4, 2),
        dim: int | Sequence[int] = 48,
        expand: float = 2.0,
        scan: str = "atrous",
        scan_options: Mapping[str, Any] | None = None,
        mlp_ratio: float = 0.0,
        patch_size: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        dims = widths("EfficientVMamba", dim, depths)

        def block(i: int, j: int, rate: float) -> nn.Module:
            if i >= SCANNED:
                return conv_block(dims[i], rate)
            return EfficientBlock(dims[i], expand, scan, scan_options, mlp_ratio, rate)

        stages = make_stages(depths, dims, drop_path_rate, block, PatchMerging)
        super().__init__(
            PatchStem(in_chans, dims[0], patch_size), stages, dims, ChannelNorm(dims[-1]),
            reduction=patch_size, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip
        self.apply(linear_like_transformers)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows them). As published: A_log and the step-size bias are decayed."""
        return set(ssm_parameters(self, "D"))


def keys(depths: Sequence[int]) -> list[Rule]:
    """Key rules; ``depths`` because published convolution stages count their permutes, too."""
    shifted = []
    for i in range(SCANNED, len(depths)):
        blocks = range(depths[i])
        shifted += [rename(rf"^layers\.{i}\.{j + 1}\.", f"stages.{i}.blocks.{j}.") for j in blocks]
        shifted += [rename(rf"^layers\.{i}\.{depths[i] + 2}\.", f"stages.{i + 1}.downsample.")]
    return [
        *FIRST_RELEASE,
        *SSM_SHAPES,
        *frame(SCANNED + 1),
        *shifted,
        rename(r"\.se\.norm\.", r".gate.norm."),
        rename(r"\.se\.global_reduce\.", r".gate.reduce."),
        rename(r"\.se\.channel_select\.", r".gate.expand."),
        rename(r"\.conv_pw\.1\.", r".bn1."),
        rename(r"\.conv_pw\.0\.", r".conv_pw."),
        rename(r"\.conv_dw\.1\.", r".bn2."),
        rename(r"\.conv_dw\.0\.", r".conv_dw."),
        rename(r"\.conv_pw2\.1\.", r".bn3."),
        rename(r"\.conv_pw2\.0\.", r".conv_pwl."),
    ]


KEYS = keys((2, 2, 4, 2))


def _weights(size: str, top1: float, notes: str = "") -> dict[str, Weights]:
    return {
        "in1k": Weights(
            "apache-2.0", f"https://github.com/{REPOSITORY}", "arXiv:2403.09977", key="state_dict",
            hf_hub_id=f"{REPOSITORY}-{size.capitalize()}", hf_hub_filename=f"efficient_vmamba_{size}.ckpt",
            top1=top1, notes=notes,
        )
    }  # fmt: skip


def _variant(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    return Variant(
        name, EfficientVMamba, kwargs, keys(kwargs.get("depths", (2, 2, 4, 2))), weights or {},
        first_conv="stem.conv1", classifier="head.fc", pool_size=(7, 7), description=description,
    )  # fmt: skip


VARIANTS = [
    _variant("efficientvmamba_tiny",
             _weights("tiny", 76.5, "retraining by the published configuration is reported to reach 74.7"),
             dim=48, drop_path_rate=0.2),
    _variant("efficientvmamba_small", None, "as the repository configures it; not what was released as small",
             dim=96, drop_path_rate=0.2),
    _variant("efficientvmamba_small_d64", _weights("small", 78.7), "the released small model",
             dim=64, drop_path_rate=0.2),
    _variant("efficientvmamba_base", _weights("base", 81.8), depths=(2, 2, 9, 2), dim=96, drop_path_rate=0.2),
    _variant("test_efficientvmamba", None, "for tests", depths=(1, 1, 1, 1), dim=8),
]  # fmt: skip

UNCHANGED = {"step_size": 2, "patch_norm": True, "downsample_version": "v1"}
INEFFECTIVE = {  # in training only; or, as published, handed on under names that nothing reads
    "drop_path_rate", "use_checkpoint", "pretrained", "d_state", "dt_rank", "drop_rate", "attn_drop_rate", "shared_ssm",
    "softmax_version", "window_size",
}  # fmt: skip
SAME = {"in_chans": "in_chans", "num_classes": "num_classes", "patch_size": "patch_size", "depths": "depths",
        "dims": "dim", "ssm_ratio": "expand", "mlp_ratio": "mlp_ratio"}  # fmt: skip


def translate(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``EfficientVMamba`` for those of the published ``EfficientVSSM``."""
    ours = translated(kwargs, SAME, UNCHANGED, INEFFECTIVE)
    defaults_unknown(kwargs, "dims", "depths")
    return ours


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``EfficientVSSM`` or ``Backbone_EfficientVSSM`` of the published code as our model."""
    name = constructor(entry, "EfficientVSSM", "Backbone_EfficientVSSM")
    given = dict(kwargs)
    out_indices = given.pop("out_indices", (0, 1, 2, 3))
    ours = translate(given)
    own_keys = keys(ours["depths"])
    if name == "EfficientVSSM":
        return Published(EfficientVMamba(**ours), own_keys, run_classifier)
    model = EfficientVMamba(**{**ours, "num_classes": 0})
    maps = StageMaps(model, sorted(out_indices))
    kept, depths = len(maps.stages), [len(stage.blocks) for stage in model.stages]
    left_out = [*unread(kept, len(depths)), drop(rf"^layers\.{kept - 1}\.{depths[kept - 1] + 2}\.")]
    return Published(maps, [*left_out, *own_keys], run_backbone)
