"""The zoo in stock nnU-Net v2, through its search path for external trainers. Needs the extra ``nnunet``.

    export nnUNet_extTrainer=$(python -m vssm.registries.nnunet)
    nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerVSSM_SegMamba

Planning, preprocessing, augmentation, loss, schedule, validation and prediction are nnU-Net's own; a trainer of
``trainers/`` puts the network in. A network is built from the plans: its patch size, strides, kernels and widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from vssm.models.segmamba import SegMamba
from vssm.models.segmenter import Segmenter
from vssm.models.umamba import UMamba, from_plan

__all__ = ["PlanNetwork", "segmamba", "trainer_folder", "umamba"]


def trainer_folder() -> Path:
    """The folder for ``nnUNet_extTrainer``."""
    return Path(__file__).parent / "trainers"


class PlanNetwork(nn.Module):
    """A segmenter as nnU-Net's trainers use it.

    Patches of any size come in; where the segmenter needs multiples, they are padded at the far ends with the values of
    the border, and the logits are cut off again. With ``deep_supervision`` the logits come as a list, finest first, in
    training and in evaluation, as nnU-Net's own networks return them.

    Args:
        model: SegMamba, or U-Mamba built without deep supervision.
        deep_supervision: Return the logits of every stage of the decoder; may be set at any time, for U-Mamba.
    """

    def __init__(self, model: Segmenter, deep_supervision: bool = False):
        super().__init__()
        self.model, self.deep_supervision = model, deep_supervision

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.deep_supervision:
            model = cast(UMamba, self.model)
            model.check(x)
            return model.all_logits(model.decode(model.encode(x)))
        size = x.shape[2:]
        missing = [-side % multiple for side, multiple in zip(size, self.model.multiple, strict=True)]
        if any(missing):
            x = F.pad(x, [n for pad in reversed(missing) for n in (0, pad)], mode="replicate")
        return self.model(x)[(..., *(slice(side) for side in size))]


def segmamba(
    configuration: Mapping[str, Any],
    in_channels: int,
    out_channels: int,
    deep_supervision: bool,
    *,
    mixer: str = "scan",
) -> PlanNetwork:
    """SegMamba as published, for patches as a configuration of a plan has them; the rest of the plan is not read.

    Raises:
        ValueError: If deep supervision is asked for: its decoder has one output.
    """
    if deep_supervision:
        raise ValueError("nnunet: SegMamba has one output; set enable_deep_supervision = False in the trainer")
    return PlanNetwork(SegMamba(len(configuration["patch_size"]), in_channels, out_channels, mixer=mixer))


def umamba(
    configuration: Mapping[str, Any],
    in_channels: int,
    out_channels: int,
    deep_supervision: bool,
    *,
    mamba: str = "bottleneck",
    mixer: str = "scan",
) -> PlanNetwork:
    """U-Mamba for a configuration of a plan (``from_plan``); ``mamba="encoder"`` for Enc, ``mixer="conv"`` for twins.

    Raises:
        ValueError: If the configuration lacks what U-Mamba reads.
    """
    arguments = from_plan(configuration, mamba=mamba)
    model = UMamba(in_channels=in_channels, out_channels=out_channels, mixer=mixer, **arguments)
    return PlanNetwork(model, deep_supervision)
