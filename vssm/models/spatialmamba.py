"""Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion (Xiao et al., 2024,
arXiv:2410.15091).

Four stages of mixer-and-MLP blocks. A mixer scans the map once, row by row, with one state a channel; dilated
convolutions then mix the states of neighbouring cells, and only what they give is read out.
Published code and weights: github.com/EdwardChasel/Spatial-Mamba (Apache-2.0). Same function; other key names, see
KEYS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vssm.kernels import selective_scan
from vssm.layers.init import linear_like_transformers
from vssm.layers.layout import over_map
from vssm.layers.mixer import ScanMixer
from vssm.layers.mlla import ConditionedBlock, InvertedDownsample, ResidualStem
from vssm.layers.norm import ChannelNorm
from vssm.layers.ssm import decay, ssm_parameters
from vssm.models.backbone import StageMaps, run_backbone, run_classifier
from vssm.models.base import Hierarchical, make_stages, widths
from vssm.models.keys import Rule, rename, reshape, stack
from vssm.models.names import MIXER, MLLA, unread
from vssm.models.variant import Published, Variant, Weights, constructor, translated

REPOSITORY = "EdwardChasel/Spatial-Mamba"
DILATIONS = (1, 3, 5)


class StateFusion(nn.Module):
    """A weighted sum of depthwise 3 x 3 convolutions, one a dilation. (B, C, H, W) in and out.

    Beyond the edge the map goes on as it ends. The published code merges the three kernels for inference and keeps the
    result until the process ends; here the parameters are used as they are.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(DILATIONS), dim, 3, 3))
        self.alpha = nn.Parameter(torch.ones(len(DILATIONS)))

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.weight * self.alpha[:, None, None, None]
        first, *others = (self.dilated(x, kernels[i, :, None], dilation) for i, dilation in enumerate(DILATIONS))
        for other in others:
            first = first + other
        return first

    @staticmethod
    def dilated(x: Tensor, kernel: Tensor, dilation: int) -> Tensor:
        x = nn.functional.pad(x, (dilation,) * 4, mode="replicate")
        return nn.functional.conv2d(x, kernel, dilation=dilation, groups=x.shape[1])


class FusedStateMixer(ScanMixer):
    """A gated mixer that reads its output from fused states. (B, L, C) tokens in and out.

    Rows of an order with several share the fusion, and what they read out is added up; the published order has one.
    """

    def __init__(self, dim: int, scan: str, scan_options: Mapping[str, Any] | None = None):
        super().__init__(dim, scan=scan, scan_options=scan_options, d_state=1, out_norm="layer")
        self.fusion = StateFusion(self.out_proj.in_features)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.act(over_map(self.conv, x, grid))
        delta, B, C = self.ssm.project(u)
        A_log, _, dt_bias = self.ssm.coefficients()
        # With one state a channel, and one in the place of C, what the scan returns is its states.
        delta, B, ones = (x[:, 0] if self.ssm.shared else x for x in (delta, B, torch.ones_like(C)))
        states, _ = selective_scan(
            u, delta, decay(A_log), B, ones, None, None, dt_bias,
            delta_softplus=True, table=self.table(grid, x.device), revisits=self.revisits,
        )  # fmt: skip
        rows = states.shape[1]
        fused = over_map(self.fusion, states.flatten(0, 1), grid).unflatten(0, (-1, rows))
        y = (fused * C).sum(1) + self.ssm.D.sum(0) * u
        return self.out_proj(over_map(self.out_norm, y, grid) * self.act(z))


class SpatialMamba(Hierarchical):
    """Spatial-Mamba classifier for images of any size. The defaults are ``spatialmamba_tiny``.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: As in timm.
        depths: Blocks of each stage.
        dim: Channels of the first stage, which double with every stage; or of all of them.
        mlp_ratio: Hidden channels of the MLP over those of the block.
        scan, scan_options: A registered order.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 4, 8, 4),
        dim: int | Sequence[int] = 64,
        mlp_ratio: float = 4.0,
        scan: str = "raster",
        scan_options: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        dims = widths("SpatialMamba", dim, depths)

        def block(i: int, j: int, rate: float) -> nn.Module:
            return ConditionedBlock(dims[i], FusedStateMixer(dims[i], scan, scan_options), mlp_ratio, rate)

        stages = make_stages(depths, dims, drop_path_rate, block, InvertedDownsample)
        super().__init__(
            ResidualStem(in_chans, dims[0]), stages, dims, ChannelNorm(dims[-1]),
            num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip
        self.apply(linear_like_transformers)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows them). As published: A_log and the fusion's kernels are decayed."""
        return set(ssm_parameters(self, "D", "dt_bias"))


KEYS: list[Rule] = [
    stack(tuple(f"state_fusion.{name}" for name in ("kernel_3", "kernel_3_1", "kernel_3_2")), "state_fusion.weight"),
    reshape(r"\.state_fusion\.weight$", "k d 1 h w -> k d h w"),
    reshape(r"\.x_proj_weight$", "r d -> 1 r d"),
    reshape(r"\.dt_projs_weight$", "d r -> 1 d r"),
    reshape(r"\.dt_projs_bias$", "d -> 1 d"),
    reshape(r"\.A_logs$", "d n -> 1 d n"),
    reshape(r"\.Ds$", "d -> 1 d"),
    rename(r"\.self_attention\.", r".mixer."),
    rename(r"\.mixer\.state_fusion\.", r".mixer.fusion."),
    *MIXER,
    rename(r"\.ln_(\d)\.", r".norm\1."),
    *MLLA,
]


def _weights(size: str, drive_id: str, top1: float) -> dict[str, Weights]:
    return {
        "in1k": Weights(
            "apache-2.0", f"https://github.com/{REPOSITORY}", "arXiv:2410.15091", top1=top1,
            url=f"https://drive.usercontent.google.com/download?id={drive_id}&export=download&confirm=t",
            hf_hub_filename=f"spatialmamba_{size}.pth",         # what a file of Google Drive is cached as
        )
    }  # fmt: skip


def _variant(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    return Variant(
        name, SpatialMamba, kwargs, KEYS, weights or {}, first_conv="stem.conv1.conv", classifier="head.fc",
        pool_size=(7, 7), description=description,
    )  # fmt: skip


VARIANTS = [
    _variant("spatialmamba_tiny", _weights("tiny", "19kXoqGSTuKKs4AHbdUSrdKZTwTWenLIW", 83.5),
             depths=(2, 4, 8, 4), dim=64, drop_path_rate=0.2),
    _variant("spatialmamba_small", _weights("small", "1Wb3sYoWLpgmWrmHMYKwdgDwGPZaqM28O", 84.6),
             depths=(2, 4, 21, 5), dim=64, drop_path_rate=0.3),
    _variant("spatialmamba_base", _weights("base", "1k8dHp2QRCOqBSgAi36YkhZp_O8LqOPjM", 85.3),
             depths=(2, 4, 21, 5), dim=96, drop_path_rate=0.5),
    _variant("test_spatialmamba", None, "for tests", depths=(1, 1, 1, 1), dim=8),
]  # fmt: skip

SAME = {"in_chans": "in_chans", "num_classes": "num_classes", "depths": "depths", "dims": "dim",
        "mlp_ratio": "mlp_ratio"}  # fmt: skip
UNCHANGED = {"d_state": 1, "norm_layer": "ln"}
INEFFECTIVE = {  # in training only; or, as published, nothing depends on it
    "drop_path_rate", "use_checkpoint", "pretrained", "drop_rate", "attn_drop_rate", "dt_init", "img_size",
    "patch_size", "patch_norm",
}  # fmt: skip


def translate(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``SpatialMamba`` for those of the published one."""
    # The published defaults, of no model.
    return translated({"depths": (2, 2, 9, 2), "dims": 96, **kwargs}, SAME, UNCHANGED, INEFFECTIVE)


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``SpatialMamba`` or ``Backbone_SpatialMamba`` of the published code as our model."""
    name = constructor(entry, "SpatialMamba", "Backbone_SpatialMamba")
    given = dict(kwargs)
    out_indices = given.pop("out_indices", (0, 1, 2, 3))
    ours = translate(given)
    if name == "SpatialMamba":
        return Published(SpatialMamba(**ours), KEYS, run_classifier)
    model = SpatialMamba(**{**ours, "num_classes": 0})
    maps = StageMaps(model, sorted(out_indices))
    return Published(maps, [*unread(len(maps.stages), len(model.stages)), *KEYS], run_backbone)
