"""Which extra of the package brings a module that is not installed."""

from __future__ import annotations

EXTRAS = {
    "albumentations": "images", "jsonargparse": "train", "lightning": "train", "matplotlib": "train", "mmcv": "mmseg",
    "mmengine": "mmseg", "mmseg": "mmseg", "monai": "medical", "nibabel": "medical", "nilearn": "brain",
    "pycocotools": "train", "torchmetrics": "train",
}  # fmt: skip


def missing(who: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise where ``who`` could not import a module: it names the extra that brings it.

    >>> missing("vssm.tasks", ModuleNotFoundError(name="lightning.pytorch"))
    ModuleNotFoundError("vssm.tasks: lightning is not installed; run: pip install 'vssm[train]'")
    """
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return error
    said = f"{who}: {module} is not installed; run: pip install 'vssm[{EXTRAS[module]}]'"
    return ModuleNotFoundError(said, name=error.name)
