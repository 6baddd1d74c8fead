"""Lightning data modules. Batches are dicts, as in MONAI: ``{"image": …, "label": …, "index": …}``."""

from __future__ import annotations

from vssm.data.images import Augment, ImageData, ImageFolder, Loader, MNIST5k, Pixels

__all__ = ["Augment", "ImageData", "ImageFolder", "Loader", "MNIST5k", "Pixels"]
