"""A backbone under a feature pyramid, as torchvision's detectors take it: images in, a dict of maps out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Literal

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from vssm.layers.parts import check_choice

BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
NORMS: dict[str | None, Callable[[int], nn.Module] | None] = {
    None: None,
    "batch": nn.BatchNorm2d,
    "group": lambda dim: nn.GroupNorm(32, dim),
}
EXTRA: dict[str | None, Callable[[int], ExtraFPNBlock] | None] = {
    None: None,
    "pool": lambda dim: LastLevelMaxPool(),
    "p6p7": lambda dim: LastLevelP6P7(dim, dim),
}
EXTRA_LEVELS = {None: 0, "pool": 1, "p6p7": 2}


class FeaturePyramid(nn.Module):
    """Maps of a backbone, brought to one width and fused from coarse to fine (Lin et al., 2017, arXiv:1612.03144).

    Images (B, C, H, W) in; an ordered dict out: maps "0", "1", … (B, out_channels, h, w) from fine to coarse.

    Args:
        body: A module that returns maps and says of each ``num_chs`` and ``reduction`` in its ``feature_info``.
        levels: Strides of the maps that are read; all if None.
        out_channels: Width of the pyramid.
        extra: Coarser levels on top: ``"pool"``, the last one at every second cell, ``"p6p7"``, two convolutions, or
            None.
        norm: After the convolutions of the pyramid: ``"batch"``, ``"group"`` (of 32) or None.
        frozen_stages: The stem and so many stages (of an isotropic model: blocks) do not train and stay in evaluation
            mode; 0 leaves all to be trained.
        batch_norm: Those of the body: ``"train"``, ``"eval"`` (their statistics stay) or ``"frozen"`` (their weights,
            too).

    Raises:
        ValueError: If the body has no map of a level, or no stages to freeze.
    """

    def __init__(
        self,
        body: nn.Module,
        levels: Sequence[int] | None = None,
        out_channels: int = 256,
        *,
        extra: Literal["pool", "p6p7"] | None = None,
        norm: Literal["batch", "group"] | None = None,
        frozen_stages: int = 0,
        batch_norm: Literal["train", "eval", "frozen"] = "train",
    ):
        super().__init__()
        for name, value, known in (
            ("extra", extra, EXTRA), ("norm", norm, NORMS), ("batch_norm", batch_norm, ("train", "eval", "frozen"))
        ):  # fmt: skip
            check_choice("FeaturePyramid", name, value, known)
        strides = [info["reduction"] for info in body.feature_info]
        levels = strides if levels is None else list(levels)
        if not levels or sorted(set(levels)) != levels or not set(levels) <= set(strides):
            raise ValueError(
                f"FeaturePyramid: levels must be strides of the backbone's maps, rising, of {strides}, got {levels}"
            )
        self.take = [strides.index(level) for level in levels]
        self.strides = [*levels, *(levels[-1] * 2 ** (i + 1) for i in range(EXTRA_LEVELS[extra]))]
        self.body, self.out_channels, self.batch_norm = body, out_channels, batch_norm
        dims = [body.feature_info[i]["num_chs"] for i in self.take]
        block = EXTRA[extra]
        self.fpn = FeaturePyramidNetwork(dims, out_channels, block(out_channels) if block else None, NORMS[norm])
        for i, level in enumerate(getattr(body, "pyramid", [])):     # of an isotropic model: what nobody reads
            if i not in self.take and not isinstance(level, nn.Identity):
                body.pyramid[i] = nn.Identity()
        self._frozen = _frozen(body, frozen_stages)
        if batch_norm == "frozen":
            for module in self._batch_norms():
                module.requires_grad_(False)
        self.train(self.training)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        return self.fpn({str(i): maps[index] for i, index in enumerate(self.take)})

    def train(self, mode: bool = True) -> FeaturePyramid:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        if self.batch_norm != "train":
            for module in self._batch_norms():
                module.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.body.modules() if isinstance(module, BATCH_NORMS)]


def _frozen(body: nn.Module, stages: int) -> list[nn.Module]:
    """The stem and so many stages of a backbone, whose parameters are no longer trained; nothing for 0 stages."""
    if stages == 0:
        return []
    trunk = getattr(body, "trunk", None)
    parts = [body.stem, *body.stages] if trunk is None else [trunk.patch_embed, *trunk.blocks]
    if not 0 < stages < len(parts):
        raise ValueError(f"FeaturePyramid: frozen_stages must be 0 to {len(parts) - 1}, got {stages}")
    parts = parts[: stages + 1]
    loose = [] if trunk is None else trunk.parameters(recurse=False)          # position tables, class tokens
    for parameter in chain(loose, *(part.parameters() for part in parts)):
        parameter.requires_grad_(False)
    return parts
