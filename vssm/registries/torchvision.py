"""torchvision's detectors on any classifier of the zoo, and the zoo's own detectors under torchvision's protocol.

In training mode ``detector(images, targets)`` returns a dict of losses, in evaluation mode ``detector(images)`` a list
of dicts: ``boxes`` (n, 4) x1, y1, x2, y2 in pixels of the image that was given, ``labels`` (n) from 1 on, ``scores``
(n), and ``masks`` (n, 1, H, W) of Mask R-CNN. Images are a list of (C, H, W) in [0, 1], of any sizes.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from vssm.checkpoints import load_weights
from vssm.layers.pyramid import FeaturePyramid
from vssm.models.backbone import as_backbone
from vssm.models.base import Hierarchical
from vssm.models.mambayolo_detector import MambaYOLODetector
from vssm.models.variant import IMAGENET_MEAN, IMAGENET_STD
from vssm.registries.zoo import create_model, find, list_models

__all__ = ["DETECTORS", "FCOS", "FasterRCNN", "MaskRCNN", "OnBackbone", "RetinaNet", "create_detector"]


class OnBackbone:
    """What training asks of a detector whose ``backbone`` is a ``FeaturePyramid`` over a classifier of the zoo."""

    backbone: FeaturePyramid
    matcher: Mapping[str, Any] = {}                 # the classifier's groups of layers, under their names here

    def no_weight_decay(self) -> set[str]:
        """What the recipe of the backbone does not decay."""
        return {f"backbone.body.{name}" for name in self.backbone.body.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Mapping[str, Any]:
        """Layers of the backbone, for learning rates that fall with depth; pyramid and heads train at the full rate."""
        return self.matcher

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep block inputs of the backbone only and recompute the rest in backward; the output stays the same."""
        self.backbone.body.set_grad_checkpointing(enable)


class RetinaNet(OnBackbone, detection.RetinaNet):
    """RetinaNet (Lin et al., 2017, arXiv:1708.02002)."""


class FCOS(OnBackbone, detection.FCOS):
    """FCOS (Tian et al., 2019, arXiv:1904.01355)."""


class FasterRCNN(OnBackbone, detection.FasterRCNN):
    """Faster R-CNN (Ren et al., 2015, arXiv:1506.01497)."""


class MaskRCNN(OnBackbone, detection.MaskRCNN):
    """Mask R-CNN (He et al., 2017, arXiv:1703.06870)."""


DENSE = {"levels": (8, 16, 32), "extra": "p6p7"}
TWO_STAGE = {"levels": (4, 8, 16, 32), "extra": "pool"}
DETECTORS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {      # class, and its pyramid as torchvision has it
    "retinanet": (RetinaNet, DENSE),
    "fcos": (FCOS, DENSE),
    "faster_rcnn": (FasterRCNN, TWO_STAGE),
    "mask_rcnn": (MaskRCNN, TWO_STAGE),
}


def create_detector(
    name: str,
    backbone: str | nn.Module | None = None,
    *,
    num_classes: int,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    pyramid: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Make a detector with torchvision's protocol, see the module.

    Args:
        name: ``"retinanet"``, ``"fcos"``, ``"faster_rcnn"``, ``"mask_rcnn"``, or a detector of the zoo
            (``list_models(task="detection")``), which needs no backbone.
        backbone: A classifier of the zoo, by name or as a module, which loses its head.
        num_classes: Classes with the background, as torchvision counts: 91 for COCO's numbers, 81 for its 80 classes.
        pretrained: Start from the published weights: of the backbone; of a detector of the zoo, its own.
        checkpoint_path: Start from this file, of the same (a backbone's may have any classes, channels or image size).
        backbone_kwargs: Arguments of a backbone given by name, over its row's own: ``drop_path_rate``, ``in_chans``, …
        pyramid: Arguments of ``FeaturePyramid``: ``levels``, ``out_channels``, ``extra``, ``norm``,
            ``frozen_stages``, ``batch_norm``.
        kwargs: Arguments of torchvision's class (``min_size``, ``max_size``, ``score_thresh``, …; the statistics of
            the images are the backbone's), or of ``MambaYOLODetector``.

    Raises:
        ValueError: If there is no such detector or backbone, or the arguments do not go together.

    >>> create_detector("fcos", "vmamba_tiny", num_classes=91).backbone.strides
    [8, 16, 32, 64, 128]
    """
    if num_classes < 2:
        raise ValueError(
            f"create_detector: num_classes must be 2 or more (the background is one of them), got {num_classes}"
        )
    if name not in DETECTORS:
        return _own(name, backbone, num_classes, pretrained, checkpoint_path, backbone_kwargs, pyramid, kwargs)
    if backbone is None:
        raise ValueError(f"create_detector: {name} needs a backbone; name a classifier of the zoo, list_models()")
    model = _classifier(backbone, pretrained, checkpoint_path, backbone_kwargs)
    kind, defaults = DETECTORS[name]
    options = {**defaults, **(pyramid or {})}
    statistics = _statistics(model)
    matcher, body = _matcher(model), _body(model, options["levels"])
    maps = FeaturePyramid(body, **options)
    _check_arguments(name, kind, kwargs)
    detector = kind(maps, num_classes, **{**_parts(kind, maps), **statistics, **kwargs})
    detector.matcher = matcher
    return detector


def _own(
    name: str,
    backbone: object,
    num_classes: int,
    pretrained: bool,
    checkpoint_path: str | Path | None,
    backbone_kwargs: object,
    pyramid: object,
    kwargs: dict[str, Any],
) -> nn.Module:
    """A detector of the zoo."""
    known = [*DETECTORS, *list_models(task="detection")]
    if name.partition(".")[0] not in known:
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"create_detector: no detector named {name!r}; {hint}")
    given = {"backbone": backbone, "backbone_kwargs": backbone_kwargs, "pyramid": pyramid}
    for argument, value in given.items():
        if value is not None:
            raise ValueError(f"create_detector: {name} has its own backbone; drop {argument}, got {value!r}")
    names = inspect.signature(MambaYOLODetector).parameters
    own = {key: kwargs.pop(key) for key in list(kwargs) if key in names}
    model = create_model(
        name, pretrained=pretrained, checkpoint_path=checkpoint_path, num_classes=num_classes - 1, **kwargs
    )
    return MambaYOLODetector(model, **own)


def _classifier(
    backbone: str | nn.Module, pretrained: bool, checkpoint_path: str | Path | None, kwargs: Mapping[str, Any] | None
) -> nn.Module:
    if isinstance(backbone, nn.Module):
        if pretrained or checkpoint_path or kwargs:
            raise ValueError(
                "create_detector: pretrained, checkpoint_path and backbone_kwargs are for a backbone given by name, "
                f"got a {type(backbone).__name__}; build it with them"
            )
        return backbone
    row = find(backbone.partition(".")[0], "create_detector")
    if row.task != "classification":
        raise ValueError(f"create_detector: the backbone must be a classifier of the zoo, {backbone} does {row.task}")
    options = dict(kwargs or {})
    if "dynamic_img_size" in inspect.signature(row.model).parameters:           # images come in any size
        options.setdefault("dynamic_img_size", True)
    model = create_model(backbone, pretrained=pretrained, **options)
    if checkpoint_path is not None:
        load_weights(model, checkpoint_path, adapt=("classifier", "in_chans", "img_size"))
    return model


def _statistics(model: nn.Module) -> dict[str, list[float]]:
    """Mean and deviation of the backbone's images; one number where it reads grey ones."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    found = {"image_mean": cfg.get("mean", IMAGENET_MEAN), "image_std": cfg.get("std", IMAGENET_STD)}
    channels = len(found["image_mean"])
    if cfg.get("first_conv"):
        channels = model.get_submodule(cfg["first_conv"]).weight.shape[1]
    grey = {name: [sum(value) / len(value)] * channels for name, value in found.items()}
    return grey if channels != len(found["image_mean"]) else {name: list(value) for name, value in found.items()}


def _body(model: nn.Module, levels: Sequence[int]) -> nn.Module:
    """The classifier as a backbone; of a hierarchical one only the stages that ``levels`` ask for get norms."""
    if not isinstance(model, Hierarchical):
        return as_backbone(model)
    strides = [info["reduction"] for info in model.feature_info]
    take = [strides.index(level) for level in levels if level in strides]
    if len(take) < len(levels):
        raise ValueError(
            f"create_detector: pyramid levels must be strides of the backbone's maps, {strides}, got {list(levels)}"
        )
    return as_backbone(model, out_indices=take)


def _matcher(model: nn.Module) -> Mapping[str, Any]:
    """The classifier's groups of layers under the names they will have in the detector."""
    prefix = r"^backbone\.body\." if isinstance(model, Hierarchical) else r"^backbone\.body\.trunk\."

    def moved(pattern: Any) -> Any:
        if isinstance(pattern, str):
            return pattern.replace("^", prefix)
        return [(moved(each), *rest) for each, *rest in pattern]

    groups: Mapping[str, Any] = getattr(model, "group_matcher", dict)()
    return {name: moved(pattern) for name, pattern in groups.items()}


def _parts(kind: type[nn.Module], maps: FeaturePyramid) -> dict[str, Any]:
    """Anchors and pooling as torchvision has them, for the strides of these maps."""
    strides = maps.strides
    if kind is FCOS:
        return {"anchor_generator": AnchorGenerator([(s,) for s in strides], [(1.0,)] * len(strides))}
    ratios = [(0.5, 1.0, 2.0)] * len(strides)
    if kind is RetinaNet:
        sizes = [tuple(int(4 * s * 2 ** (i / 3)) for i in range(3)) for s in strides]
        return {"anchor_generator": AnchorGenerator(sizes, ratios)}
    names = [str(i) for i in range(len(maps.take))]
    parts: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator([(8 * s,) for s in strides], ratios),
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
    }
    if kind is MaskRCNN:
        parts["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
    return parts


def _check_arguments(name: str, kind: type[nn.Module], kwargs: Mapping[str, Any]) -> None:
    """torchvision's classes hand arguments that they do not know on and on."""
    known = set(inspect.signature(kind).parameters) - {"backbone", "num_classes", "kwargs"}
    known |= {"fixed_size", "size_divisible"}
    if not kwargs.keys() <= known:
        unknown = ", ".join(sorted(kwargs.keys() - known))
        raise ValueError(f"create_detector: {name} takes no {unknown}; it takes {', '.join(sorted(known))}")
