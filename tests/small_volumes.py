"""Small volumes on disk and a configuration that trains on them in seconds, for the tests of segmentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

AFFINE = np.array([[-2.0, 0, 0, 30], [0, 0, 1.5, -10], [0, 1.0, 0, 5], [0, 0, 0, 1]])  # axes L, S, A


def blob(number: int, shape: tuple[int, ...] = (20, 24, 18)) -> tuple[np.ndarray, np.ndarray]:
    """Return an image, int16, and its label, uint8: a bright box (1) with a brighter corner (2) in noise."""
    draw = np.random.default_rng(number)
    label = np.zeros(shape, np.uint8)
    start = [int(draw.integers(1, n // 3)) for n in shape]
    label[tuple(slice(s, s + n // 2) for s, n in zip(start, shape))] = 1
    label[tuple(slice(s, s + n // 4) for s, n in zip(start, shape))] = 2
    return (draw.normal(100, 15, shape) + 80 * label).astype(np.int16), label


def save(file: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, affine), file)


def nnunet_folder(root: Path, *, cases: int = 5, channels: int = 1) -> Path:
    """Write a raw folder of nnU-Net."""
    for number in range(cases):
        image, label = blob(number)
        for channel in range(channels):
            save(root / "imagesTr" / f"case{number}_{channel:04}.nii.gz", image + channel)
        save(root / "labelsTr" / f"case{number}.nii.gz", label)
    described = {
        "channel_names": {str(channel): "MRI" for channel in range(channels)},
        "labels": {"background": 0, "box": 1, "corner": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    return root


def paired_folders(root: Path, *, cases: int = 6) -> Path:
    """Write ``root/images/N.png``, RGB, and ``root/masks/N_mask.png`` with 0 and 255."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(cases):
        image, label = blob(number, (40, 36))
        Image.fromarray(np.stack([image, image // 2, image], -1).clip(0, 255).astype(np.uint8)).save(
            root / "images" / f"{number}.png"
        )
        Image.fromarray(((label > 0) * 255).astype(np.uint8)).save(root / "masks" / f"{number}_mask.png")
    return root


UNET = {"class_path": "monai.networks.nets.UNet"}


def unet(spatial_dims: int = 3, in_channels: int = 1, out_channels: int = 3, **options: Any) -> dict[str, Any]:
    """A tiny UNet of MONAI, as a configuration."""
    arguments = {"spatial_dims": spatial_dims, "in_channels": in_channels, "out_channels": out_channels,
                 "channels": [4, 8], "strides": [2], "num_res_units": 1, "dropout": 0.1, **options}
    return {**UNET, "init_args": arguments}


def volume_config(root: Path, runs: Path, **model: Any) -> dict[str, Any]:
    """A run of two epochs of six steps on ``nnunet_folder``, with augmentation and a weight average."""
    return {
        "model": {
            "class_path": "vssm.tasks.segmentation.Segmentation",
            "init_args": {
                "model": unet(),
                "out_channels": 3,
                "inference": {"overlap": 0.25},
                "optimizer": {"lr": 1e-2},
                "schedule": {"warmup_epochs": 0.5},
                "ema_decay": 0.5,
                **model,
            },
        },
        "data": {
            "class_path": "vssm.data.volume_sources.NNUNetRaw",
            "init_args": {
                "root": str(root),
                "split": {"val": 0.2, "test": 0.2},
                "loader": {"batch_size": 2, "workers": 0},
                "preparation": {"patch": [32, 16, 16], "spacing_mm": [2.0, 1.25, 1.5]},
                "sampling": {"patches_per_volume": 4, "cache": "memory"},
                "augment": {
                    "class_path": "vssm.data.augmentation.VolumeAugment",
                    "init_args": {"rotate_prob": 0.5, "zoom_prob": 0.5, "gamma_prob": 0.5},
                },
            },
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": str(runs),
                    "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1},
        "last_checkpoint": {"every_n_steps": 2},
    }
