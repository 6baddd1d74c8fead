"""The segmentation task: loss, deep supervision, scores in millimetres, what it leaves behind and what it refuses."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import nn

pytest.importorskip("monai", reason="needs the extra medical")

import nibabel
from small_volumes import blob, nnunet_folder, paired_folders, save

import vssm
from vssm.data.augmentation import SliceAugment
from vssm.data.loading import Loader
from vssm.data.volume_sources import NNUNetRaw, PairedFolders
from vssm.data.volumes import Preparation, Sampling, Split
from vssm.tasks.case_report import Picture
from vssm.tasks.losses import Loss
from vssm.tasks.measures import dice, hausdorff95_mm
from vssm.tasks.optimizer import Freeze, Optimizer
from vssm.tasks.report import PredictionWriter
from vssm.tasks.segmentation import Inference, Segmentation

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
         "enable_progress_bar": False, "enable_model_summary": False}
LOADER = Loader(batch_size=2, workers=0)


class Threshold(nn.Module):
    """Knows the blobs: of mean 0 and deviation 1, the box is brighter than 0.85 and its corner than 3.15."""

    def __init__(self, spatial_dims=3):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.steps = (0.85, 3.15)

    def forward(self, x):
        x = x[:, :1] * self.scale
        low, high = self.steps
        return torch.cat([low - x, torch.minimum(x - low, high - x), x - high], 1)


class Pyramid(nn.Module):
    """Returns logits at three resolutions in training and one in evaluation."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv3d(1, 3, 1) for _ in range(3))

    def forward(self, x):
        outputs = [head(F.avg_pool3d(x, 2**i)) for i, head in enumerate(self.heads)]
        return outputs if self.training else outputs[0]


@pytest.fixture
def data(tmp_path):
    return NNUNetRaw(str(nnunet_folder(tmp_path / "raw")), split=Split(val=0.4, test=0.2), loader=LOADER,
                     preparation=Preparation(patch=(16, 16, 16), spacing_mm=(2.0, 1.25, 1.5)),
                     sampling=Sampling(patches_per_volume=2))


def test_the_loss_is_dice_plus_cross_entropy():
    task = Segmentation(nn.Conv3d(1, 3, 1), 3, loss=Loss(dice=1.0, ce=0.5))
    images, target = torch.randn(2, 1, 4, 5, 6), torch.randint(0, 3, (2, 4, 5, 6), dtype=torch.uint8)
    logits, onehot = task(images), F.one_hot(target.long(), 3).movedim(-1, 1)
    shares = logits.softmax(1)
    overlap, sizes = ((a.flatten(2).sum(2))[:, 1:] for a in (shares * onehot, shares + onehot))
    expected = (1 - 2 * overlap / sizes).mean() + 0.5 * F.cross_entropy(logits, target.long())
    torch.testing.assert_close(task.loss(images, target), expected, rtol=1e-4, atol=1e-5)


def test_deep_supervision_weighs_the_finest_most_and_the_coarsest_not():
    task = Segmentation(Pyramid(), 3)
    images, target = torch.randn(1, 1, 8, 8, 8), torch.randint(0, 3, (1, 8, 8, 8), dtype=torch.uint8)
    loss = task.loss(images, target)
    fine, middle, _ = task(images)
    wanted = target[:, None].long()
    half = task.criterion(middle, wanted[..., 1::2, 1::2, 1::2])
    torch.testing.assert_close(loss, (task.criterion(fine, wanted) + 0.5 * half) / 1.5)
    loss.backward()
    assert [head.weight.grad is not None for head in task.model.heads] == [True, True, False]


def test_the_loss_of_a_single_channel_is_that_of_its_sigmoid():
    """Binary cross-entropy plus 1 - (2 overlap + 1) / (sizes + 1) of each sample, as VM-UNet's authors train."""
    task = Segmentation(nn.Conv2d(3, 1, 1), 1, 3, loss=Loss(smooth=1.0))
    images, target = torch.randn(4, 3, 6, 5), torch.randint(0, 2, (4, 6, 5), dtype=torch.uint8)
    target[0] = 0
    logits, wanted = task(images)[:, 0], target.float()
    shares = logits.sigmoid()
    overlap, sizes = ((a.flatten(1).sum(1)) for a in (shares * wanted, shares + wanted))
    expected = F.binary_cross_entropy(shares, wanted) + (1 - (2 * overlap + 1) / (sizes + 1)).mean()
    torch.testing.assert_close(task.loss(images, target), expected)
    torch.testing.assert_close(task.class_logits(images).softmax(1)[:, 1], shares)


def test_a_single_channel_tells_two_classes_apart(tmp_path):
    """It finds the box as two channels with the same threshold do, in validation, test and prediction."""
    root = paired_folders(tmp_path)

    class Lesion(nn.Module):
        def __init__(self, both):
            super().__init__()
            self.scale, self.both = nn.Parameter(torch.ones(())), both

        def forward(self, x):
            x = x[:, :1] * self.scale - 0.5
            return torch.cat([x * 0, x], 1) if self.both else x

    found, files = {}, {}
    for channels in (1, 2):
        data = PairedFolders(str(root / "images"), str(root / "masks"), ["skin", "lesion"], label_values=[0, 255],
                             label_suffix="_mask", loader=LOADER, split=Split(val=0.3, test=0.3),
                             predict=str(root / "images"),
                             preparation=Preparation(patch=(32, 32, 1), size=(32, 32, 1)))
        task = Segmentation(Lesion(channels == 2), channels, 3)
        writer = PredictionWriter(str(tmp_path / f"out{channels}.csv"))
        trainer = Trainer(**QUIET, callbacks=[writer], default_root_dir=tmp_path / "run")
        found[channels] = trainer.validate(task, data, verbose=False)[0] | trainer.test(task, data, verbose=False)[0]
        trainer.predict(task, data, return_predictions=False)
        files[channels] = [np.asarray(Image.open(file)) for file in sorted((tmp_path / f"out{channels}").iterdir())]
    assert found[1]["test/dice"] == found[1]["test/dice_lesion"] > 0.7
    assert {k: v for k, v in found[1].items() if "loss" not in k} == {
        k: v for k, v in found[2].items() if "loss" not in k
    }
    assert len(files[1]) == 6
    for one, two in zip(files[1], files[2], strict=True):
        assert set(np.unique(one)) == {0, 255}
        np.testing.assert_array_equal(one, two)


def test_a_single_channel_is_refused_for_three_classes(data, tmp_path):
    with pytest.raises(ValueError, match="tells two classes apart, the data have 3"):
        Trainer(**QUIET, default_root_dir=tmp_path).validate(Segmentation(nn.Conv3d(1, 1, 1), 1), data)


class Recorded(Callback):
    """Remembers the weights after every epoch."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append(copy.deepcopy(pl_module.model.state_dict()))


def test_frozen_parameters_stay_for_the_first_epochs(data, tmp_path):
    """Bit for bit, weight decay included; then they learn, and the others always do."""
    model = nn.Sequential()
    model.add_module("encoder", nn.Conv3d(1, 4, 3, padding=1))
    model.add_module("head", nn.Conv3d(4, 3, 1))
    start, record = copy.deepcopy(model.state_dict()), Recorded()
    task = Segmentation(model, 3, freeze=Freeze(epochs=2), optimizer=Optimizer(lr=1e-2, weight_decay=0.5))
    trainer = Trainer(**QUIET, callbacks=[record], max_epochs=3, limit_val_batches=0, default_root_dir=tmp_path,
                      gradient_clip_val=1.0)
    trainer.fit(task, data)
    for name, value in start.items():
        learned = [not torch.equal(weights[name], value) for weights in record.weights]
        assert learned == ([False, False, True] if name.startswith("encoder.") else [True, True, True])


@pytest.mark.parametrize(("name", "pattern"), [
    ("test_msvmunet", r"(stem|stages)\."), ("test_swinumamba", r"encoder\.stages\."),
])
def test_published_recipes_freeze_what_starts_from_vmamba(name, pattern):
    """All but the patch embedding of Swin-UMamba, which learns from the start."""
    model = vssm.create_model(name)
    frozen = {id(parameter) for parameter in Freeze(10, pattern).of(model)}
    names = {n for n, parameter in model.named_parameters() if id(parameter) in frozen}
    started = {n for n, _ in model.named_parameters() if model.encoder_entry(n) is not None}
    assert names == {n for n in started if name == "test_msvmunet" or not n.startswith("encoder.stem.")}
    assert names


def test_freezing_nothing_or_everything_is_refused():
    for pattern in ("backbone", ""):
        with pytest.raises(ValueError, match="must match the names of some parameters of Sequential"):
            Segmentation(nn.Sequential(nn.Conv3d(1, 3, 1)), 3, freeze=Freeze(1, pattern))


def test_scores_are_those_of_whole_volumes_in_millimetres():
    truth, predicted = np.zeros((12, 10, 8), bool), np.zeros((12, 10, 8), bool)
    truth[2:6, 2:8, 2:6] = True
    predicted[4:8, 2:8, 2:6] = True
    assert dice(truth, predicted) == 0.5
    assert np.isnan(dice(truth & False, predicted & False))
    assert dice(truth, predicted & False) == 0.0
    assert hausdorff95_mm(truth, predicted, np.array([3.0, 1, 1])) == pytest.approx(6.0)
    assert hausdorff95_mm(truth[:, :, :1] | truth[:, :, 3:4], predicted[:, :, 3:4], np.array([3.0, 1, 1])) == 6.0
    assert np.isnan(hausdorff95_mm(truth, predicted & False, np.ones(3)))


def test_validation_and_test_find_what_there_is(data, tmp_path):
    """Thresholds on blobs are nearly right, on the prepared grid and on the files' own."""
    task = Segmentation(Threshold(), 3, regions={"whole": [1, 2], "corner": [2]})
    trainer = Trainer(**QUIET, default_root_dir=tmp_path / "run")
    [found] = trainer.validate(task, data, verbose=False)
    assert found["val/dice"] == pytest.approx((found["val/dice_whole"] + found["val/dice_corner"]) / 2)
    assert found["val/dice"] > 0.9
    [found] = trainer.test(task, data, verbose=False)
    assert found["test/dice"] > 0.85
    assert 0 <= found["test/hd95_mm"] < 12
    rows = list(csv.DictReader((tmp_path / "run" / "val_cases.csv").open()))
    assert [row["case"] for row in rows] == [case.name for case in data.find()["val"]]
    label = nibabel.load(data.find()["test"][0].label).get_fdata()
    [row] = csv.DictReader((tmp_path / "run" / "test_cases.csv").open())
    assert float(row["volume_ml_whole"]) == pytest.approx((label > 0).sum() * 3 / 1000, rel=0.2)
    pictures = sorted((tmp_path / "run" / "overlays").iterdir())
    assert [path.name[:4] for path in pictures] == ["test", "val_", "val_"]
    with Image.open(pictures[0]) as image:
        assert min(image.size) > 500


def test_a_class_that_is_nowhere_counts_for_nothing(data, tmp_path):
    """No Dice of a class without truth and prediction, and no distance to an empty mask."""
    for case in data.find()["val"]:
        save(Path(case.label), np.minimum(nibabel.load(case.label).get_fdata(), 1).astype(np.uint8))
    net = Threshold()
    net.steps = (0.85, 1e9)
    trainer = Trainer(**QUIET, default_root_dir=tmp_path / "run")
    [found] = trainer.validate(Segmentation(net, 3), data, verbose=False)
    assert np.isnan(found["val/dice_corner"])
    assert found["val/dice"] == found["val/dice_box"] > 0.9


def test_slices_are_trained_and_volumes_of_them_scored(tmp_path):
    data = NNUNetRaw(str(nnunet_folder(tmp_path / "raw")), split=Split(val=0.2, test=0.2), loader=LOADER,
                     preparation=Preparation(patch=(16, 16, 1)), augment=SliceAugment())
    task = Segmentation(nn.Conv2d(1, 3, 3, padding=1), 3)
    trainer = Trainer(**QUIET, max_steps=1, default_root_dir=tmp_path / "run")  # and no max_epochs
    trainer.fit(task, data)
    [found] = trainer.test(task, data, verbose=False)
    assert 0 <= found["test/dice"] <= 1


def test_images_are_answered_with_images(tmp_path):
    root = paired_folders(tmp_path)
    data = PairedFolders(str(root / "images"), str(root / "masks"), ["skin", "lesion"], label_values=[0, 255],
                         label_suffix="_mask", loader=LOADER, predict=str(root / "images"),
                         preparation=Preparation(patch=(32, 32, 1), size=(32, 32, 1)))
    writer = PredictionWriter(str(tmp_path / "out.csv"))
    trainer = Trainer(**QUIET, callbacks=[writer], max_epochs=1, default_root_dir=tmp_path / "run")
    task = Segmentation(nn.Conv2d(3, 2, 1), 2, in_channels=3)
    trainer.fit(task, data)
    trainer.predict(task, data)
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["file"] for row in rows] == sorted(str(path) for path in (root / "images").iterdir())
    for row in rows:
        with Image.open(row["prediction"]) as image:
            assert (image.size, image.mode) == ((36, 40), "L")
            assert set(np.unique(image)) <= {0, 255}


def test_data_that_do_not_fit_the_task_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="out_channels must be the number of classes in the data, 3, got 2"):
        Trainer(**QUIET).validate(Segmentation(nn.Conv3d(1, 2, 1), 2), data)
    with pytest.raises(ValueError, match="in_channels must be the number of channels in the data, 1, got 2"):
        Trainer(**QUIET).validate(Segmentation(nn.Conv3d(2, 3, 1), 3, in_channels=2), data)
    odd = NNUNetRaw(str(data.root), loader=LOADER, preparation=Preparation(patch=(20, 16, 1)))
    with pytest.raises(ValueError, match=r"patch \(20, 16, 1\) does not fit the model: SegMamba: .* pad it to"):
        Trainer(**QUIET).validate(Segmentation("test_segmamba", 3, 1), odd)
    trainer = Trainer(**QUIET, max_epochs=1, limit_val_batches=0, default_root_dir=tmp_path)
    task = Segmentation(nn.Conv3d(1, 3, 1), 3)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "task.ckpt", weights_only=False)
    other = copy.copy(data)
    other.preparation, other.data = Preparation(patch=(8, 8, 8), clip=(0.0, 1.0)), {}
    with pytest.raises(ValueError, match=r"prepared as for training, got spacing_mm None instead of \(2\.0, 1\."):
        Trainer(**QUIET).validate(task, other, ckpt_path=str(tmp_path / "task.ckpt"))


@pytest.mark.parametrize(("options", "said"), [
    ({"model": "segmambba"}, "no segmenter named 'segmambba'; did you mean segmamba"),
    ({"model": "vmamba_tiny"}, "Segmentation: vmamba_tiny is for classification"),
    ({"model": "test_segmamba", "model_kwargs": {"dephts": 1}}, "model_kwargs do not fit test_segmamba"),
    ({"model": "test_segmamba", "model_kwargs": {"in_channels": 1}}, "in_channels stand beside model_kwargs"),
    ({"model": nn.Identity(), "pretrained": True}, "for models given by name, got a Identity"),
    ({"model": nn.Identity(), "regions": {"all": [3]}}, r"regions must list class numbers 0 … 2, got all: \[3\]"),
    ({"model": nn.Identity(), "inference": Inference(flips=(0,)), "loss": Loss(dice=-1)}, "lambda_dice"),
])
def test_bad_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Segmentation(out_channels=3, **options)


def test_our_segmenters_are_built_by_name():
    task = Segmentation("test_segmamba", 5, in_channels=2)
    assert task.eval()(torch.randn(1, 2, 32, 32)).shape == (1, 5, 32, 32)
    assert task.hparams["model"] == "test_segmamba"
    assert blob(0)[0].shape == (20, 24, 18)


def test_pictures_show_images_upright_and_slices_as_radiologists_do():
    image, spacing = np.arange(6).reshape(2, 3, 1), np.array([1.0, 2.0, 4.0])
    (plane, _, _, aspect), = Picture.of("photo", image, image, image, spacing, rows_first=True).slices
    assert (plane.tolist(), aspect) == ([[0, 1, 2], [3, 4, 5]], 0.5)
    (plane, _, _, aspect), = Picture.of("slice", image, image, image, spacing).slices
    assert (plane.tolist(), aspect) == ([[2, 5], [1, 4], [0, 3]], 2.0)
