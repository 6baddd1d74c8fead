"""A checkpoint is replaced whole; averages are evaluated and saved; random states survive a checkpoint."""

from __future__ import annotations

import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from vssm.tasks.random_state import get_random_state, set_random_state
from vssm.tasks.saving import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, WeightAverage


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, file)
    with pytest.raises((AttributeError, TypeError, Exception), match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "bad": lambda: None}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_random_states_survive_a_weights_only_checkpoint():
    random.gauss(0, 1), np.random.randn(), torch.randn(3)  # leave half of a pair of normal numbers in each
    buffer = io.BytesIO()
    torch.save(get_random_state(), buffer)
    expected = random.gauss(0, 1), np.random.randn(), torch.randn(1).item(), torch.rand(()).item()
    buffer.seek(0)
    set_random_state(torch.load(buffer, weights_only=True))
    assert (random.gauss(0, 1), np.random.randn(), torch.randn(1).item(), torch.rand(()).item()) == expected


def test_the_best_checkpoint_follows_the_score_of_the_task(tmp_path):
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    best, module = BestCheckpoint(mode="max"), SimpleNamespace(score="dice")
    best.setup(trainer, module, "fit")
    assert best.monitor == "val/dice"
    chosen = BestCheckpoint(monitor="val/loss", mode="min")
    chosen.setup(trainer, module, "fit")
    assert chosen.monitor == "val/loss"
    with pytest.raises(ValueError, match="BestCheckpoint: monitor must name a metric that SimpleNamespace logs"):
        BestCheckpoint(mode="max").setup(trainer, SimpleNamespace(), "fit")


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="LastCheckpoint: every_n_steps must be 1 or more"):
        LastCheckpoint(0)
    with pytest.raises(ValueError, match="WeightAverage: decay must be between 0 and 1, got 1"):
        WeightAverage(1)
