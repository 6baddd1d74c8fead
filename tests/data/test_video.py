"""Clips of videos: which frames they hold, how they are split, and a network of clips trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

pytest.importorskip("monai", reason="needs the extra medical")

from vssm.cli.predict import main as predict
from vssm.data.augmentation import SliceAugment
from vssm.data.loading import Loader
from vssm.data.preparation import Preparation, Split
from vssm.data.video import VideoFolders
from vssm.tasks.report import PredictionWriter
from vssm.tasks.segmentation import Segmentation

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
         "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """Three videos of four frames; frame i of video v is 50 v + 10 i everywhere, its left half the lesion."""
    for video in range(3):
        for kind in ("images", "masks"):
            (tmp_path / kind / f"v{video}").mkdir(parents=True)
        mask = np.zeros((40, 36), np.uint8)
        mask[:, :18] = 255
        for i in range(4):
            pixels = np.full((40, 36, 3), 50 * video + 10 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"v{video}" / f"{i}.png")
            if i != 1:
                Image.fromarray(mask).save(tmp_path / "masks" / f"v{video}" / f"{i}.png")
    return tmp_path


def clips(root, **options):
    given = {"split": Split(val=0.34, test=0.34), "loader": Loader(batch_size=2, workers=0),
             "preparation": Preparation((32, 32, 1), size=(32, 32, 1), mean=(0.0,) * 15, std=(1.0,) * 15)}  # fmt: skip
    return VideoFolders(str(root / "images"), str(root / "masks"), ["tissue", "polyp"],
                        **{"label_values": [0, 255], **given, **options})  # fmt: skip


def test_a_clip_has_the_frames_around_the_one_with_a_mask(root):
    """Frame 1 has no mask, and is in the clips of its neighbours; the ends are repeated."""
    found = clips(root).find()
    assert sorted(len(cases) for cases in found.values()) == [3, 3, 3]
    for cases in found.values():
        assert len({case.name.partition("_")[0] for case in cases}) == 1  # of one video
    first, _, last = found["train"]
    video = first.name.partition("_")[0]
    assert [file.rpartition("/")[2] for file in first.images] == ["0.png", "0.png", "0.png", "1.png", "2.png"]
    assert [file.rpartition("/")[2] for file in last.images] == ["1.png", "2.png", "3.png", "3.png", "3.png"]
    assert (last.name, last.label) == (f"{video}_3", str(root / "masks" / video / "3.png"))


def test_videos_that_are_apart_are_the_test_cases(root):
    apart = {"test_images": str(root / "images"), "test_labels": str(root / "masks")}
    found = clips(root, split=Split(val=0.34), **apart).find()
    assert [case.name for case in found["test"]] == [f"v{video}_{i}" for video in range(3) for i in (0, 2, 3)]
    assert {len(found[part]) for part in ("train", "val")} == {3, 6}
    with pytest.raises(ValueError, match=r"VideoFolders: test_images is given; set split\.test to 0"):
        clips(root, **apart).find()


def test_frames_are_channels(root):
    data = clips(root)
    data.setup("fit")
    sample = data.data["train"][1]
    video = int(data.find()["train"][1].name[1])
    assert data.in_channels == 15
    frames = sample["image"].unflatten(0, (5, 3))
    assert frames.shape == (5, 3, 32, 32)
    expected = torch.tensor([0.0, 10, 20, 30, 30]) + 50 * video
    torch.testing.assert_close(frames.mean((1, 2, 3)), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("augment", [None, SliceAugment()], ids=["plain", "augmented"])
def test_vivim_is_trained_and_answers_for_the_middle_frame(root, tmp_path, augment, capsys):
    data = clips(root, augment=augment, predict=str(root / "images"))
    task = Segmentation("test_vivim", 1, 3)
    writer = PredictionWriter(str(tmp_path / "out.csv"))
    trainer = Trainer(**QUIET, callbacks=[writer], max_epochs=1, default_root_dir=tmp_path / "run")
    trainer.fit(task, data)
    assert trainer.global_step == 1
    [found] = trainer.test(task, data, verbose=False)
    assert 0 <= found["test/dice_polyp"] <= 1
    trainer.predict(task, data, return_predictions=False)
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"v{video}_{i}.png" for video in range(3) for i in range(4)]
    assert Image.open(files[0]).size == (36, 40)

    trainer.save_checkpoint(tmp_path / "vivim.ckpt", weights_only=False)
    assert predict([str(tmp_path / "vivim.ckpt"), str(root / "images" / "v0")]) == 2
    assert "takes clips of 5 frames: run `vssm train predict" in capsys.readouterr().err

    clip = torch.randn(2, 5, 3, 32, 32)
    task.eval()
    torch.testing.assert_close(task(clip.flatten(1, 2)), task.model(clip)[0][:, 2])


def test_frames_are_in_the_order_of_time(root):
    for kind in ("images", "masks"):
        (root / kind / "v0" / "3.png").rename(root / kind / "v0" / "10.png")
    cases = [case for part in clips(root).find().values() for case in part if case.name.startswith("v0_")]
    assert [case.name for case in cases] == ["v0_0", "v0_2", "v0_10"]
    assert [Path(file).name for file in cases[-1].images] == ["1.png", "2.png", "10.png", "10.png", "10.png"]


def test_data_without_the_clip_s_frames_are_refused(root, tmp_path):
    data = clips(root, frames=3, preparation=Preparation((32, 32, 1), size=(32, 32, 1)))
    with pytest.raises(ValueError, match="the data must have 5 frames of 3 channels, got 9 channels in all"):
        Trainer(**QUIET, default_root_dir=tmp_path).validate(Segmentation("test_vivim", 1, 3), data)


def test_what_is_no_video_is_refused(root):
    with pytest.raises(ValueError, match="frames must be odd"):
        clips(root, frames=4)
    with pytest.raises(ValueError, match="test_images and test_labels must both be given"):
        clips(root, test_images=str(root / "images"))
    with pytest.raises(ValueError, match="must be a folder, found none"):
        clips(root / "nowhere").find()
    with pytest.raises(ValueError, match="must hold a folder of masks for each video"):
        VideoFolders(str(root / "images"), str(root / "masks" / "v0"), ["a", "b"]).find()
    (root / "images" / "v1" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"each mask of .*v1 must have a frame in .*v1, 1 have none: 3"):
        clips(root).find()
    with pytest.raises(ValueError, match="nothing to predict"):
        clips(root).setup("predict")
