"""Lightning data modules. Batches are dicts, as in MONAI: ``{"image": …, "label": …, "index": …}``.

Those of volumes and videos need MONAI and are imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module

from vssm.registries.extras import missing

try:
    from vssm.data.box_augment import BoxAugment
    from vssm.data.detection import CocoDetection, DetectionData, DigitScenes, VocDetection
    from vssm.data.images import Augment, ImageData, ImageFolder, Loader, MNIST5k, Pixels
    from vssm.data.scenes import SceneAugment, SceneFolder, SceneSize
except ModuleNotFoundError as error:
    raise missing("vssm.data", error) from error

WITH_MONAI = {
    "Decathlon": "volume_sources", "MNI152": "volume_sources", "NNUNetRaw": "volume_sources",
    "PairedFolders": "volume_sources", "SliceAugment": "augmentation", "VideoFolders": "video",
    "VolumeAugment": "augmentation",
}  # fmt: skip

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


def __getattr__(name: str) -> object:
    if name not in WITH_MONAI:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{WITH_MONAI[name]}"), name)
    except ModuleNotFoundError as error:
        raise missing(f"{__name__}.{name}", error) from error
