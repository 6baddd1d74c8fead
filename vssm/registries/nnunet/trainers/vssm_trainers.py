"""nnU-Net's trainer with networks of vssm. The class to choose is named on nnU-Net's command line: ``-tr CLASS``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from vssm.registries.nnunet import PlanNetwork, segmamba, umamba


class VSSMTrainer(nnUNetTrainer):
    """Everything as in nnU-Net but the network.

    Half precision stays on: in our mixers the state of the scan, A, D and the step size's bias are float32 under
    autocast, which is what U-Mamba's trainer without AMP is for.
    """

    make: Callable[..., PlanNetwork]
    """``(configuration, in_channels, out_channels, deep_supervision)`` to the network."""

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network for the plan; nnU-Net calls this for inference too."""
        return cls.make(
            configuration_manager.configuration, num_input_channels, num_output_channels, enable_deep_supervision
        )

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """nnU-Net's own looks for a decoder."""
        module = self.network.module if self.is_ddp else self.network
        getattr(module, "_orig_mod", module).deep_supervision = enabled


class OneOutputTrainer(VSSMTrainer):
    """For networks whose decoder has one output."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's own signature)
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False


class nnUNetTrainerVSSM_SegMamba(OneOutputTrainer):
    make = staticmethod(partial(segmamba))


class nnUNetTrainerVSSM_SegMamba_NoMamba(OneOutputTrainer):
    """SegMamba's twin: convolutions in the place of its mixers."""

    make = staticmethod(partial(segmamba, mixer="conv"))


class nnUNetTrainerVSSM_UMambaBot(VSSMTrainer):
    make = staticmethod(partial(umamba))


class nnUNetTrainerVSSM_UMambaEnc(VSSMTrainer):
    make = staticmethod(partial(umamba, mamba="encoder"))


class nnUNetTrainerVSSM_UMambaEnc_NoMamba(VSSMTrainer):
    """U-Mamba Enc's twin."""

    make = staticmethod(partial(umamba, mamba="encoder", mixer="conv"))


class nnUNetTrainerVSSM_NoMamba(VSSMTrainer):
    """U-Mamba Bot's twin: the same network with a convolution in the place of its Mamba layer."""

    make = staticmethod(partial(umamba, mixer="conv"))
