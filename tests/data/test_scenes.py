"""Scenes: what is read, how labels are counted, how images are resized and cropped, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scene_runs import scene_folder

from vssm.data.scenes import IGNORED, SceneAugment, SceneFolder, Scenes, SceneSize


@pytest.fixture
def folder(tmp_path):
    return scene_folder(tmp_path / "data")


def scenes(folder, stage="fit", **options):
    data = SceneFolder(str(folder), 2, **{"size": SceneSize(64, 128, (64, 64)), **options})
    data.setup(stage)
    return data.data


def test_labels_count_from_the_first_class(folder):
    """Annotations 0, 1, 2 become unlabelled, 0, 1; at the size of the file."""
    sample = scenes(folder)["val"][0]
    annotation = np.asarray(Image.open(folder / "annotations" / "validation" / "00.png")).astype(int)
    expected = torch.from_numpy(np.where(annotation == 0, IGNORED, annotation - 1))
    assert torch.equal(sample["label"], expected)
    assert sample["image"].shape == (3, 64, 71)             # 72 x 80, its shorter side now 64
    assert (sample["height"], sample["width"]) == (72, 80)


def test_without_reduction_labels_stay(folder):
    label = SceneFolder(str(folder), 3, reduce_zero_label=False)
    label.setup("validate")
    annotation = np.asarray(Image.open(folder / "annotations" / "validation" / "00.png")).astype(np.int64)
    assert torch.equal(label.data["val"][0]["label"], torch.from_numpy(annotation))


def test_training_crops_follow_the_key(folder):
    """Crops have one size, image and label move together, and only the key decides."""
    train = scenes(folder)["train"]
    first, again, other = train[(0, 3, 0)], train[(0, 3, 0)], train[(1, 3, 0)]
    assert first["image"].shape == (3, 64, 64)
    assert first["label"].shape == (64, 64)
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["label"], again["label"])
    assert not torch.equal(first["image"], other["image"])


def test_image_and_label_move_together(folder):
    """Where the annotation says disk the crop is bright, whatever the augmentation of place."""
    train = scenes(folder, augment=SceneAugment(photometric=False))["train"]
    for epoch in range(6):
        sample = train[(epoch, 1, 0)]
        grey, label = sample["image"].mean(0), sample["label"]
        if (label == 1).any() and (label == 0).any():
            assert grey[label == 1].mean() > grey[label == 0].mean() + 1


def test_what_is_padded_counts_nowhere(folder):
    train = scenes(folder, size=SceneSize(16, 64, (64, 64)), augment=SceneAugment(scale=(1.0, 1.0), hflip=0.0))["train"]
    sample = train[(0, 0, 0)]
    assert (sample["label"][16:] == IGNORED).all()
    assert (sample["image"][:, 16:] == 0).all()
    assert (sample["label"][4:16, :18] != IGNORED).any()


def test_one_class_does_not_fill_a_crop():
    """Crops are drawn again until one shows class 1 too, an eighth of the columns; with 1.0 the first is taken."""
    label = torch.zeros(32, 320, dtype=torch.uint8)
    label[:, 140:180] = 1
    torch.manual_seed(0)

    def shown(share):
        crops = [Scenes._chosen(torch.zeros(3, 32, 320), label, (32, 32), share)[1] for _ in range(40)]
        return sum(len(part.unique()) == 2 for part in crops)

    assert shown(0.75) > shown(1.0) + 10


def test_evaluation_sizes():
    assert SceneSize(512, 2048).evaluated(480, 640) == (512, 683)
    assert SceneSize(512, 2048, multiple=32).evaluated(480, 640) == (512, 704)
    assert SceneSize(512, 2048).evaluated(100, 1000) == (205, 2048)


def test_batches_of_one_size_are_stacked_and_others_listed(folder):
    data = scenes(folder)
    assert SceneFolder.collate([data["train"][0], data["train"][1]])["image"].shape == (2, 3, 64, 64)
    batch = SceneFolder.collate([data["val"][0], data["val"][1]])
    assert [tuple(x.shape) for x in batch["image"]] == [(3, 64, 71)] * 2


def spoil(folder, what):
    annotation = folder / "annotations" / "training" / "03.png"
    image = folder / "images" / "training" / "03.jpg"
    if what == "missing":
        annotation.unlink()
    elif what == "size":
        Image.fromarray(np.zeros((70, 80), np.uint8)).save(annotation)
    elif what == "image":
        image.write_bytes(b"no image")
    elif what == "empty":
        for file in (folder / "images" / "validation").iterdir():
            file.unlink()


@pytest.mark.parametrize(("what", "said"), [
    ("missing", r"every image of .*training must have an annotation .*; 1 have none: 03\.png"),
    ("size", r"03\.png must have the size of 03\.jpg, 80 x 72 pixels, got 80 x 70"),
    ("image", r"03\.jpg must be an image, it cannot be read"),
    ("empty", r"validation must hold images .* found none"),
])
def test_broken_folders_are_refused_before_training(folder, what, said):
    spoil(folder, what)
    with pytest.raises(ValueError, match=said):
        scenes(folder)


def test_wrong_labels_are_refused_by_name(folder):
    annotation = folder / "annotations" / "validation" / "01.png"
    Image.fromarray(np.full((72, 80), 7, np.uint8)).save(annotation)
    with pytest.raises(ValueError, match=r"labels of .*01\.png must be below 3, or 255, got 7; set num_classes"):
        scenes(folder)["val"][1]
    Image.fromarray(np.zeros((72, 80, 3), np.uint8)).save(annotation)
    with pytest.raises(ValueError, match=r"01\.png must hold one class number a pixel"):
        scenes(folder)["val"][1]


@pytest.mark.parametrize(("options", "said"), [
    ({"num_classes": 1}, r"num_classes must be 2 … 254, got 1"),
    ({"val_folder": "val"}, r"images.val must be a folder; .*val_folder"),
])
def test_wrong_arguments_are_refused(folder, options, said):
    with pytest.raises(ValueError, match=said):
        SceneFolder(**{"root": str(folder), "num_classes": 2, **options}).setup("fit")


def test_prediction_needs_images(folder, tmp_path):
    with pytest.raises(ValueError, match="SceneFolder: nothing to predict"):
        scenes(folder, "predict")
    found = scenes(folder, "predict", predict=str(folder / "images" / "validation"))["predict"]
    assert len(found.names) == 3
    assert "label" not in found[0]
    with pytest.raises(ValueError, match="must have different names, got 00 more than once"):
        scenes(folder, "predict", predict=str(folder / "images"))
