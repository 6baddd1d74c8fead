"""VM-UNet: Vision Mamba UNet for Medical Image Segmentation (Ruan and Xiang, 2024, arXiv:2402.02491).

A U of VMamba's first blocks: four directions are scanned, summed and gated; there is no MLP.
Published code: github.com/JCruan519/VM-UNet (Apache-2.0); no trained weights. Same function; other key names, see KEYS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vssm.layers.conv import ConvMixer
from vssm.layers.mixer import ScanMixer
from vssm.layers.parts import chosen
from vssm.models.keys import Rule, rename
from vssm.models.patchunet import PatchUNet, keys, run, translate
from vssm.models.variant import Published, Variant

REPOSITORY = "JCruan519/VM-UNet"


class VMUNet(PatchUNet):
    """VM-UNet, also in 3D. (B, C, H, W) to logits (B, out_channels, H, W); sides are multiples of 32.

    The published network applies a sigmoid to the logits of a single class; here a loss or a threshold does.

    Args:
        spatial_dims, in_channels, out_channels, depths, decoder_depths, dim, drop_path_rate: See ``PatchUNet``.
        mixer: ``"scan"``, or ``"conv"`` for the twin without Mamba.
        d_state, expand, scan, scan_options: Of the mixers, see ``ScanMixer``.
    """

    encoders = ("vanilla_vmamba_small", "vanilla_vmamba_tiny", "vanilla_vmamba_base")

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
        d_state: int = 16,
        expand: float = 2.0,
        scan: str = "cross",
        scan_options: Mapping[str, Any] | None = None,
        drop_path_rate: float = 0.2,
    ):
        scanning = partial(
            ScanMixer, scan=scan, scan_options=scan_options, spatial_dims=spatial_dims, d_state=d_state, expand=expand,
            out_norm="layer",
        )  # fmt: skip
        mixers = {"scan": scanning, "conv": partial(ConvMixer, spatial_dims=spatial_dims)}
        super().__init__(
            chosen("VMUNet", "mixer", mixer, mixers), spatial_dims=spatial_dims, in_channels=in_channels,
            out_channels=out_channels, depths=depths, decoder_depths=decoder_depths, dim=dim,
            drop_path_rate=drop_path_rate,
        )  # fmt: skip

    def encoder_entry(self, name: str) -> str | None:
        """The entry of a VMamba classifier that starts our entry ``name``; None for what starts at random.

        As published: the blocks on the way up start from those on the way down at the same size.
        """
        if name.startswith("stem."):
            return name
        if match := re.match(r"merges\.(\d+)\.", name):
            return f"stages.{int(match[1]) + 1}.downsample.{name[match.end() :]}"
        if match := re.match(r"(encoder|decoder)\.(\d+)\.(\d+)\.", name):
            level = int(match[2]) if match[1] == "encoder" else len(self.encoder) - 1 - int(match[2])
            return f"stages.{level}.blocks.{match[3]}.{name[match.end() :]}"
        return None


KEYS: list[Rule] = keys([
    rename(r"\.mixer\.(x_proj_weight|dt_projs_weight|dt_projs_bias|A_logs|Ds)$", r".mixer.ssm.\1"),
])  # fmt: skip


def _variant(name: str, description: str, **kwargs: Any) -> Variant:
    return Variant(name, VMUNet, kwargs, KEYS, task="segmentation", description=description)


VARIANTS = [
    _variant("vmunet_isic", "one class, as trained on ISIC17 and ISIC18", out_channels=1),
    _variant("vmunet_synapse", "nine classes, as trained on Synapse", out_channels=9),
    _variant("vmunet_deep", "the published class's own depths",
             out_channels=9, depths=(2, 2, 9, 2), decoder_depths=(2, 9, 2, 2)),
    _variant("vmunet_nomamba", "not published: vmunet_isic with convolutions for mixers", mixer="conv"),
    _variant("test_vmunet", "for tests", depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1), dim=16),
]  # fmt: skip


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``VMUNet`` of the published code as our model."""
    return Published(VMUNet(**translate(entry, kwargs)), KEYS, run)
