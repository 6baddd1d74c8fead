"""A folder of tiny images and a configuration that trains on it in seconds, for the tests of data, tasks and train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback
from PIL import Image
from tree import ROOT

EXACT = ("state_dict", "trained_state_dict", "optimizer_states", "lr_schedulers", "random_state", "global_step")
"""What of a checkpoint is the same, bit for bit, after a run that was killed and resumed."""


def image_folder(root: Path, *, train: int = 12, val: int = 5, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write ``root/{train,val}/CLASS/N.png``, 20 x 24 pixels; the mean colour tells the class."""
    noise = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = noise.normal(80 + 100 * number, 40, (20, 24, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:02}.png")
    return root


def small_config(root: Path, **model: Any) -> dict[str, Any]:
    """A run of two epochs of six steps on ``image_folder``, with drop path, dropout, mixup and a weight average."""
    kwargs = {"img_size": 32, "patch_size": 16, "drop_path_rate": 0.3, "proj_drop_rate": 0.2}
    return {
        "model": {
            "class_path": "vssm.tasks.Classification",
            "init_args": {
                "model": "test_vit",
                "num_classes": 2,
                "model_kwargs": kwargs,
                "mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
                "label_smoothing": 0.1,
                "ema_decay": 0.8,
                "optimizer": {"lr": 1e-3},
                "schedule": {"warmup_epochs": 1},
                **model,
            },
        },
        "data": {
            "class_path": "vssm.data.ImageFolder",
            "init_args": {
                "root": str(root),
                "test_folder": "val",
                "loader": {"batch_size": 4, "workers": 0},
                "pixels": {"image_size": 32},
                "augment": {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25},
            },
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": str(root.parent / "runs"),
                    "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1},
        "last_checkpoint": {"every_n_steps": 2},
    }


def write_config(file: Path, config: dict[str, Any]) -> str:
    """Write a configuration; return its name for ``--config``."""
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(file)


class StopAt(Callback):
    """Raise before an optimiser step, as an interrupted process would end."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


KILLER = """
import os, signal
from lightning.pytorch import Callback

class KillAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def fit_process(folder: Path, name: str, config: dict[str, Any], *arguments: str, kill_at: int | None = None) -> str:
    """Fit in another process, in the run folders ``folder/name``; return its last line.

    With ``kill_at`` the process kills itself before that optimiser step, which is then checked.
    """
    trainer = {**config["trainer"], "default_root_dir": str(folder / name)}
    if kill_at is not None:
        (folder / "killer.py").write_text(KILLER, encoding="utf-8")
        trainer["callbacks"] = [{"class_path": "killer.KillAt", "init_args": {"step": kill_at}}]
    file = write_config(folder / f"{name}.yaml", {**config, "trainer": trainer})
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "fit", "--config", file, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == (0 if kill_at is None else -signal.SIGKILL), done.stderr[-3000:]
    return (done.stdout.strip().splitlines() or [""])[-1]


def checkpoint(root: Path, *, version: int = 0, name: str = "last") -> dict[str, Any]:
    """Load a checkpoint of a run under ``root``."""
    return torch.load(root / f"version_{version}" / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Two nests of dicts, lists, tensors and values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{index}")
    else:
        assert a == b, where
