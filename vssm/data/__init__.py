"""Lightning data modules. Batches are dicts, as in MONAI: ``{"image": …, "label": …, "index": …}``."""

from __future__ import annotations

from vssm.registries.extras import missing

try:
    from vssm.data.box_augment import BoxAugment
    from vssm.data.detection import CocoDetection, DetectionData, DigitScenes, VocDetection
    from vssm.data.images import Augment, ImageData, ImageFolder, Loader, MNIST5k, Pixels
    from vssm.data.scenes import SceneAugment, SceneFolder, SceneSize
except ModuleNotFoundError as error:
    raise missing("vssm.data", error) from error

__all__ = [
    "Augment",
    "BoxAugment",
    "CocoDetection",
    "DetectionData",
    "DigitScenes",
    "ImageData",
    "ImageFolder",
    "Loader",
    "MNIST5k",
    "Pixels",
    "SceneAugment",
    "SceneFolder",
    "SceneSize",
    "VocDetection",
]
