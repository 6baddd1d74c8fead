"""UPerNet: semantic segmentation with pyramid pooling and a feature pyramid (Xiao et al., 2018, arXiv:1807.10221).

The head of nearly every published ADE20K result, with the auxiliary FCN head (Long et al., 2015, arXiv:1411.4038) that
those recipes add on stride 16. The function, the defaults and the key names are those of mmsegmentation's
``EncoderDecoder`` with ``UPerHead`` and ``FCNHead`` (github.com/open-mmlab/mmsegmentation, Apache-2.0), so its
checkpoints load; the backbone may be any classifier of the zoo.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vssm.models.backbone import as_backbone
from vssm.models.keys import Shapes, State, to_ours, to_published
from vssm.models.variant import NotCovered, Published, Variant, Weights, variants

REPOSITORY = "open-mmlab/mmsegmentation"
ADE20K_CLASSES = 150


def _conv(dim: int, out: int, size: int) -> nn.Module:
    """Convolution without bias, batch norm, ReLU: three modules, so that ``convert_sync_batchnorm`` leaves the ReLU."""
    conv = nn.Conv2d(dim, out, size, padding=size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out), act=nn.ReLU()))


class PoolingPyramid(nn.ModuleList):
    """A map averaged over s × s parts for each s of ``scales``, projected, and resized back (arXiv:1612.01105)."""

    def __init__(self, dim: int, channels: int, scales: Sequence[int]):
        super().__init__(nn.Sequential(nn.AdaptiveAvgPool2d(s), _conv(dim, channels, 1)) for s in scales)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [_resized(level(x), x.shape[2:]) for level in self]


class UPerHead(nn.Module):
    """Maps of falling resolution in, logits (B, out_channels, H, W) at the size of the first one out.

    Args:
        dims: Channels of each map.
        out_channels: Classes.
        channels: Width of the head.
        pool_scales: Of the pyramid pooling on the last map.
        dropout: Of whole channels, before the classifier.
    """

    def __init__(
        self,
        dims: Sequence[int],
        out_channels: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        self.psp_modules = PoolingPyramid(dims[-1], channels, pool_scales)
        self.bottleneck = _conv(dims[-1] + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(_conv(dim, channels, 1) for dim in dims[:-1])
        self.fpn_convs = nn.ModuleList(_conv(channels, channels, 3) for _ in dims[:-1])
        self.fpn_bottleneck = _conv(len(dims) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, out_channels, 1)
        _init(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        last = maps[-1]
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([last, *self.psp_modules(last)], dim=1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + _resized(levels[i], levels[i - 1].shape[2:])
        out = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        out = [_resized(x, out[0].shape[2:]) for x in out]
        return self.conv_seg(self.dropout(self.fpn_bottleneck(torch.cat(out, dim=1))))


class FCNHead(nn.Module):
    """One convolution and a classifier on one map."""

    def __init__(self, dim: int, out_channels: int, channels: int = 256, dropout: float = 0.1):
        super().__init__()
        self.convs = nn.Sequential(_conv(dim, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, out_channels, 1)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))


class UPerNet(nn.Module):
    """Images (B, C, H, W) in, logits (B, out_channels, H, W) out; in training mode also those of the auxiliary head.

    Args:
        backbone: Name of a classifier of the zoo, or a classifier, which loses its head. Hierarchical ones give maps of
            strides 4 to 32, each under a norm of its own; isotropic ones as published for them.
        in_channels: Channels of the images.
        out_channels: Classes.
        backbone_kwargs: Arguments of a backbone given by name, over its row's own: ``drop_path_rate``, ``scan``, …
        channels, pool_scales, dropout: See ``UPerHead``.
        auxiliary_channels: Width of the auxiliary head, which reads the map before the last; 0 for none. In training
            mode the model then returns ``[logits, auxiliary logits]``, otherwise the logits alone.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "vmamba_tiny",
        in_channels: int = 3,
        out_channels: int = ADE20K_CLASSES,
        *,
        backbone_kwargs: Mapping[str, Any] | None = None,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.backbone = as_backbone(_classifier(backbone, in_channels, backbone_kwargs))
        dims = [info["num_chs"] for info in self.backbone.feature_info]
        self.decode_head = UPerHead(dims, out_channels, channels, pool_scales, dropout)
        self.auxiliary_head = None
        if auxiliary_channels:
            self.auxiliary_head = FCNHead(dims[-2], out_channels, auxiliary_channels, dropout)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        maps, size = self.backbone(x), x.shape[2:]
        logits = _resized(self.decode_head(maps), size)
        if not self.training or self.auxiliary_head is None:
            return logits
        return [logits, _resized(self.auxiliary_head(maps[-2]), size)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep block inputs of the backbone only and recompute the rest in backward; the output stays the same."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """What the recipe of the backbone does not decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}


def _classifier(backbone: str | nn.Module, in_channels: int, kwargs: Mapping[str, Any] | None) -> nn.Module:
    if isinstance(backbone, nn.Module):
        if kwargs:
            raise ValueError(
                f"UPerNet: backbone_kwargs are for a backbone given by name, got a {type(backbone).__name__}; build it "
                "with them"
            )
        return backbone
    row = variants().get(backbone)
    if row is None or row.task != "classification":
        raise ValueError(
            f"UPerNet: backbone must name a classifier of the zoo, got {backbone!r}; "
            "vssm.list_models(task='classification') names them"
        )
    return row.build(**{"in_chans": in_channels, "num_classes": 0, "global_pool": "", **(kwargs or {})})


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == torch.Size(size) else F.interpolate(x, size=tuple(size), mode="bilinear")


def _init(head: UPerHead | FCNHead) -> None:
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(head.conv_seg.weight, std=0.01)
    nn.init.zeros_(head.conv_seg.bias)


@dataclass(frozen=True)
class BackboneKeys:
    """The key rules of a classifier of the zoo, for the entries under ``backbone.``. The heads' names are ours."""

    name: str

    def to_ours(self, state: State, expected: Shapes) -> State:
        inner, rest = _parted(state)
        shapes = {key.removeprefix(PREFIX): shape for key, shape in expected.items() if key.startswith(PREFIX)}
        return _joined(to_ours(inner, variants()[self.name].keys, shapes), rest)

    def to_published(self, state: State) -> State:
        inner, rest = _parted(state)
        return _joined(to_published(inner, variants()[self.name].keys), rest)


PREFIX = "backbone."


def _parted(state: State) -> tuple[State, State]:
    inner = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    return inner, {key: value for key, value in state.items() if not key.startswith(PREFIX)}


def _joined(inner: State, rest: State) -> State:
    return {PREFIX + key: value for key, value in inner.items()} | rest


HEADS = ("decode_head.conv_seg", "auxiliary_head.conv_seg")


def _variant(backbone: str, weights: Weights, first_conv: str = "conv1") -> Variant:
    return Variant(
        f"upernet_{backbone}", UPerNet, {"backbone": backbone}, [BackboneKeys(backbone)], {"ade20k": weights},
        first_conv=f"backbone.stem.{first_conv}", classifier=HEADS, task="segmentation",
    )  # fmt: skip


def _ade20k(licence: str, repository: str, paper: str, miou: str, **place: Any) -> Weights:
    return Weights(
        licence, f"https://github.com/{repository}", paper, key="state_dict", num_classes=ADE20K_CLASSES,
        input_size=(3, 512, 512), notes=f"ADE20K validation mIoU as published: {miou} (one scale / several)", **place,
    )  # fmt: skip


def _vmamba(file: str, miou: str) -> Weights:
    url = f"https://github.com/MzeroMiko/VMamba/releases/download/{file}.pth"
    return _ade20k("mit", "MzeroMiko/VMamba", "arXiv:2401.10166", miou, url=url)


def _vssd(file: str, miou: str) -> Weights:
    place = {"hf_hub_id": "YuhengSSS/VSSD", "hf_hub_filename": f"{file}.pth"}
    return _ade20k("unknown", "YuHengsss/VSSD", "arXiv:2407.18559", miou, **place)


CONFIG = "4xb4-160k_ade20k-512x512"
VARIANTS = [
    _variant("vanilla_vmamba_tiny", _vmamba(f"%23v0seg/vssmtiny_upernet_{CONFIG}_iter_160000", "47.3 / 48.3")),
    _variant("vanilla_vmamba_small", _vmamba(f"%23v0seg/vssmsmall_upernet_{CONFIG}_iter_160000", "49.5 / 50.5")),
    _variant("vanilla_vmamba_base", _vmamba(f"%23v0seg/vssmbase_upernet_{CONFIG}_iter_128000", "50.0 / 51.3")),
    _variant("vmamba_tiny_s2l5", _vmamba(f"%23v2seg/upernet_vssm_{CONFIG}_tiny_iter_160000", "48.3 / 48.6")),
    _variant("vmamba_tiny", _vmamba(f"%23v2seg/upernet_vssm_{CONFIG}_tiny_s_iter_160000", "47.9 / 48.8")),
    _variant("vmamba_small_s2l15", _vmamba(f"%23v2seg/upernet_vssm_{CONFIG}_small_iter_144000", "50.6 / 51.2")),
    _variant("vmamba_base_s2l15", _vmamba(f"%23v2seg/upernet_vssm_{CONFIG}_base_iter_160000", "51.0 / 51.6")),
    _variant("vssd_micro", _vssd(f"upernet_vssd_final_{CONFIG}_micro", "45.6 / 46.0"), "conv1.conv"),
    _variant("vssd_tiny", _vssd(f"upernet_vssd_{CONFIG}_tiny", "47.9 / 48.7"), "conv1.conv"),
    Variant(
        "upernet", UPerNet, {}, [], classifier=HEADS, task="segmentation", first_conv="backbone.stem.conv1",
        description="not published: on any backbone, backbone=NAME",
    ),
    Variant(
        "test_upernet", UPerNet, {"backbone": "test_vmamba", "channels": 8, "auxiliary_channels": 4},
        [BackboneKeys("test_vmamba")], first_conv="backbone.stem.conv1", classifier=HEADS, task="segmentation",
        description="for tests",
    ),
]  # fmt: skip


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """No recorded outputs: the tests compare the heads with mmsegmentation itself where it is installed."""
    raise NotCovered(f"entry {entry!r}: UPerNet is compared with the installed mmsegmentation, not with recordings")
