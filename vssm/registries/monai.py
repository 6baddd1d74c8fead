"""The zoo in MONAI: encoders of FlexibleUNet, and feature extractors of MONAI's detectors. Needs the extra ``medical``.

Importing this module registers every hierarchical classifier of the zoo, by its name:

>>> import vssm.registries.monai
>>> from monai.networks.nets import FlexibleUNet
>>> unet = FlexibleUNet(in_channels=1, out_channels=3, backbone="vmamba_nano", spatial_dims=3)

Networks of the zoo need no registration to stand in a bundle: ``"_target_": "vssm.create_model"``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vssm.registries.extras import missing

try:
    from monai.networks.blocks.convolutions import Convolution
    from monai.networks.blocks.encoder import BaseEncoder
    from monai.networks.blocks.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7
    from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE
except ModuleNotFoundError as error:
    raise missing("vssm.registries.monai", error) from error

from vssm.models.backbone import as_backbone
from vssm.models.base import Hierarchical
from vssm.models.variant import variants
from vssm.registries.zoo import create_model, find

__all__ = ["FPNExtractor", "FlexEncoder", "encoder_names"]


def encoder_names() -> list[str]:
    """Names of the classifiers that give maps of strides 4, 8, 16 and 32."""
    return [
        name
        for name, row in variants().items()
        if row.task == "classification" and isinstance(row.model, type) and issubclass(row.model, Hierarchical)
    ]


def classifier(model: str, spatial_dims: int, in_channels: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    """The classifier ``model`` without its head, in 2D or 3D.

    Raises:
        ValueError: If there is no such classifier, or none of these dimensions.
    """
    row = find(model, "monai")
    if row.task != "classification":
        raise ValueError(f"monai: the backbone must be a classifier of the zoo, got {model!r}")
    if spatial_dims not in (2, 3):
        raise ValueError(f"monai: spatial_dims must be 2 or 3, got {spatial_dims}")
    kwargs = {"in_chans": in_channels, "num_classes": 0, "global_pool": "", **kwargs}
    if spatial_dims == 2:
        return create_model(model, pretrained=pretrained, **kwargs)
    if "spatial_dims" not in inspect.signature(row.model).parameters:
        volumes = [name for name in encoder_names() if "spatial_dims" in inspect.signature(find(name).model).parameters]
        raise ValueError(f"monai: {model} builds in 2D only; in 3D there are {', '.join(volumes)}")
    if pretrained:
        raise ValueError(f"monai: the published weights of {model} are for images; pass pretrained=False in 3D")
    return row.build(spatial_dims=3, **kwargs)


class Widths(Sequence[int]):
    """Channels of the five maps of an encoder. The model is built (without memory) when they are read, not before."""

    def __init__(self, model: str):
        self.model = model

    def __getitem__(self, index: Any) -> Any:
        return self._read()[index]

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[int]:
        return iter(self._read())

    def _read(self) -> tuple[int, ...]:
        with torch.device("meta"):
            dims = [info["num_chs"] for info in find(self.model).build(num_classes=0, global_pool="").feature_info]
        return (dims[0] // 2, *dims)


class FlexEncoder(nn.Module, BaseEncoder):
    """A classifier of the zoo as encoder of FlexibleUNet: maps of strides 2, 4, 8, 16, 32.

    FlexibleUNet halves from the first map on, so a convolution of stride 2 stands beside the backbone, whose own first
    map has stride 4. Sides must be multiples of 32, or of 2 where FlexibleUNet pads (``is_pad``).

    Args:
        model: Name of a hierarchical classifier.
        spatial_dims, in_channels: As in MONAI. Families that build in 3D: VMamba.
        pretrained: Start from the published weights; in 2D only.
    """

    def __init__(self, model: str, spatial_dims: int = 2, in_channels: int = 3, pretrained: bool = False):
        super().__init__()
        self.maps = as_backbone(classifier(model, spatial_dims, in_channels, pretrained))
        half = self.maps.feature_info[0]["num_chs"] // 2
        self.first = Convolution(spatial_dims, in_channels, half, strides=2, norm="instance", act="leakyrelu")

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.first(x), *self.maps(x)]

    @classmethod
    def get_encoder_names(cls) -> list[str]:
        return encoder_names()

    @classmethod
    def get_encoder_parameters(cls) -> list[dict[str, Any]]:
        """Fresh dicts: FlexibleUNet writes its own arguments into them."""
        return [dict(model=name, spatial_dims=2, in_channels=3, pretrained=False) for name in encoder_names()]

    @classmethod
    def num_outputs(cls) -> list[int]:
        return [5 for _ in encoder_names()]

    @classmethod
    def num_channels_per_output(cls) -> list[Any]:
        return [Widths(name) for name in encoder_names()]


FLEXUNET_BACKBONE.register_class(FlexEncoder)


class FPNExtractor(nn.Module):
    """A classifier of the zoo and a feature pyramid: ``feature_extractor`` of MONAI's ``RetinaNet``, in 2D and 3D.

    (B, in_channels, *size) to a dict of maps of ``out_channels``, by level, finest first. Sides must be multiples of
    ``size_divisible``.

    Args:
        model: Name of a classifier.
        spatial_dims, in_channels: As in MONAI.
        out_channels: Channels of each map.
        levels: Which of the strides 4, 8, 16, 32 (levels 0 to 3) have a map.
        extra: Coarser maps on top: ``"pool"`` (one) or ``"p6p7"`` (two).
        pretrained: Start from the published weights; in 2D only.
        backbone_kwargs: Arguments of the classifier: ``drop_path_rate``, ``scan``, …
    """

    def __init__(
        self,
        model: str,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 256,
        *,
        levels: Sequence[int] = (0, 1, 2, 3),
        extra: Literal["pool", "p6p7"] | None = "pool",
        pretrained: bool = False,
        backbone_kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if list(levels) != sorted(set(levels)) or not set(levels) <= {0, 1, 2, 3} or not levels:
            raise ValueError(f"FPNExtractor: levels must rise within 0, 1, 2, 3, got {tuple(levels)}")
        if extra not in ("pool", "p6p7", None):
            raise ValueError(f"FPNExtractor: extra must be 'pool', 'p6p7' or None, got {extra!r}")
        trunk = classifier(model, spatial_dims, in_channels, pretrained, **(backbone_kwargs or {}))
        stages = isinstance(trunk, Hierarchical)            # stages that no level needs are then left out
        self.maps = as_backbone(trunk, **({"out_indices": levels} if stages else {}))
        self.levels = tuple(range(len(levels)) if stages else levels)
        dims = [self.maps.feature_info[i]["num_chs"] for i in self.levels]
        top: Any = None
        if extra:
            pool = LastLevelMaxPool(spatial_dims)
            top = pool if extra == "pool" else LastLevelP6P7(spatial_dims, dims[-1], out_channels)
        self.fpn = FeaturePyramidNetwork(spatial_dims, dims, out_channels, top)
        self.out_channels = out_channels
        self.size_divisible = self.maps.feature_info[self.levels[-1]]["reduction"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.maps(x)
        return self.fpn({str(level): maps[level] for level in self.levels})
