"""A folder of tiny scenes in ADE20K's layout, and a configuration that trains on it in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def scene_folder(root: Path, *, training: int = 8, validation: int = 3) -> Path:
    """Dark images of 72 x 80 pixels with a bright disk: annotation 2 in it, 1 outside, 0 (unlabelled) at the top."""
    noise = np.random.default_rng(0)
    y, x = np.mgrid[:72, :80]
    for split, count in (("training", training), ("validation", validation)):
        for name in ("images", "annotations"):
            (root / name / split).mkdir(parents=True)
        for i in range(count):
            cy, cx, r = noise.integers(20, 52), noise.integers(20, 60), noise.integers(14, 24)
            disk = (y - cy) ** 2 + (x - cx) ** 2 < r**2
            pixels = (noise.normal(90, 25, (72, 80, 3)) + 90 * disk[..., None]).clip(0, 255).astype(np.uint8)
            labels = disk.astype(np.uint8) + 1
            labels[:4] = 0
            Image.fromarray(pixels).save(root / "images" / split / f"{i:02}.jpg")
            Image.fromarray(labels).save(root / "annotations" / split / f"{i:02}.png")
    return root


def scene_config(root: Path, **model: Any) -> dict[str, Any]:
    """A run of two epochs of four steps on ``scene_folder``, with drop path, dropout and a weight average."""
    return {
        "model": {
            "class_path": "vssm.tasks.SemanticSegmentation",
            "init_args": {
                "model": "test_upernet",
                "num_classes": 2,
                "model_kwargs": {"backbone_kwargs": {"drop_path_rate": 0.2}},
                "ema_decay": 0.5,
                "optimizer": {"lr": 1e-2},
                "schedule": {"shape": "poly", "warmup_epochs": 0.5, "min_lr": 0.0},
                **model,
            },
        },
        "data": {
            "class_path": "vssm.data.SceneFolder",
            "init_args": {
                "root": str(root),
                "num_classes": 2,
                "class_names": ["ground", "disk"],
                "loader": {"batch_size": 2, "eval_batch_size": 2, "workers": 0},
                "size": {"short": 64, "long": 128, "crop": [64, 64]},
            },
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": str(root.parent / "runs"),
                    "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1},
        "last_checkpoint": {"every_n_steps": 3},
    }
