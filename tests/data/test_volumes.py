"""Volumes: sources, splits, refusals by name, preparation, and patches that a key fixes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("monai", reason="needs the extra medical")

import nibabel
from small_volumes import AFFINE, blob, nnunet_folder, paired_folders, save

from vssm.data.augmentation import SliceAugment, VolumeAugment
from vssm.data.loading import Loader
from vssm.data.mni152 import Subject
from vssm.data.volume_files import Case, check_cases, read_volume, to_classes
from vssm.data.volume_sources import MNI152, Decathlon, NNUNetRaw, PairedFolders
from vssm.data.volumes import Patches, Preparation, Sampling, Split, cases_to_predict, cut_out

LOADER = Loader(batch_size=2, workers=0)
SMALL = Preparation(patch=(8, 8, 8))


def names(found):
    return {split: [case.name for case in cases] for split, cases in found.items()}


# ---- sources ----


def test_nnunet_folders(tmp_path):
    data = NNUNetRaw(str(nnunet_folder(tmp_path, channels=2)), split=Split(val=0.2, test=0.2), loader=LOADER,
                     preparation=SMALL)
    found = data.find()
    assert {split: len(cases) for split, cases in found.items()} == {"train": 3, "val": 1, "test": 1}
    assert sorted(name for part in names(found).values() for name in part) == [f"case{n}" for n in range(5)]
    assert data.class_names == ["background", "box", "corner"]
    data.setup("fit")
    assert data.in_channels == 2
    image, affine = read_volume(found["train"][0].images)
    assert image.shape == (2, 20, 24, 18)
    assert (image[1] == image[0] + 1).all()
    np.testing.assert_allclose(affine, AFFINE)


def test_labelled_test_folders_of_nnunet_are_the_test_cases(tmp_path):
    root = nnunet_folder(tmp_path)
    image, label = blob(9)
    save(root / "imagesTs" / "far_0000.nii.gz", image)
    save(root / "labelsTs" / "far.nii.gz", label)
    assert names(NNUNetRaw(str(root)).find())["test"] == ["far"]
    with pytest.raises(ValueError, match=r"has labelled test cases; set split\.test to 0"):
        NNUNetRaw(str(root), split=Split(test=0.2)).find()


def test_decathlon_folders(tmp_path):
    for number in range(3):
        image, label = blob(number)
        save(tmp_path / "imagesTr" / f"BRATS_{number}.nii.gz", np.stack([image, image + 5], -1))
        save(tmp_path / "labelsTr" / f"BRATS_{number}.nii.gz", label * 2)
    entries = [{"image": f"./imagesTr/BRATS_{n}.nii.gz", "label": f"./labelsTr/BRATS_{n}.nii.gz"} for n in range(3)]
    entries.append({"image": "./imagesTr/._BRATS_0.nii.gz", "label": "./labelsTr/._BRATS_0.nii.gz"})
    labels = {"0": "background", "4": "core", "2": "edema"}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, "training": entries}), encoding="utf-8")
    data = Decathlon(str(tmp_path), loader=LOADER, preparation=SMALL)
    data.setup("fit")
    assert (data.in_channels, data.class_names) == (2, ["background", "edema", "core"])
    assert data.data["val"][0].image.shape[0] == 2
    assert set(np.unique(data.data["val"][0].own_label)) == {0, 1, 2}


def test_folders_of_images_and_masks(tmp_path):
    root = paired_folders(tmp_path)
    data = PairedFolders(str(root / "images"), str(root / "masks"), ["skin", "lesion"], label_values=[0, 255],
                         label_suffix="_mask", loader=LOADER,
                         preparation=Preparation(patch=(16, 16, 1), size=(32, 32, 1)))
    data.setup("fit")
    assert data.in_channels == 3
    patch = data.data["train"][(0, 0, 0)]
    assert (patch["image"].shape, patch["label"].shape) == ((3, 16, 16), (16, 16))
    scan = data.data["val"][0]
    assert (tuple(scan.image.shape), scan.grid) == ((3, 32, 32, 1), (40, 36, 1))
    assert set(np.unique(scan.own_label)) == {0, 1}
    with Image.open(scan.case.images[0]) as image:
        np.testing.assert_array_equal(read_volume(scan.case.images)[0][..., 0], np.asarray(image).transpose(2, 0, 1))
    (root / "masks" / "3_mask.png").unlink()
    with pytest.raises(ValueError, match=r"each image of .*images must have a mask in .*masks, 1 have none: 3.png"):
        data.find()


def test_semi_synthetic_subjects_are_made_once_and_the_same(tmp_path):
    pytest.importorskip("nilearn", reason="needs the extra brain")
    options = {"train": 2, "val": 1, "test": 1, "subject": Subject(spacing_mm=6.0), "loader": LOADER,
               "preparation": Preparation(patch=(16, 16, 16))}
    data = MNI152(str(tmp_path / "a"), **options)
    data.prepare_data()
    data.setup("fit")
    files = sorted((tmp_path / "a").rglob("*.nii.gz"))
    assert len(files) == 8
    times = [file.stat().st_mtime_ns for file in files]
    data.prepare_data()
    assert [file.stat().st_mtime_ns for file in files] == times
    again = MNI152(str(tmp_path / "b"), **options)
    again.prepare_data()
    volumes = [nibabel.load(file).get_fdata() for file in files]
    for file, volume in zip(files, volumes):
        twin = nibabel.load(tmp_path / "b" / file.relative_to(tmp_path / "a"))
        np.testing.assert_array_equal(twin.get_fdata(), volume)
    images = [volume for file, volume in zip(files, volumes) if "images" in str(file)]
    assert not any((a == b).all() for i, a in enumerate(images) for b in images[:i])
    affine = nibabel.load(files[0]).affine
    assert np.diag(affine).tolist() == [6, 6, 6, 1]
    labels = [volume for file, volume in zip(files, volumes) if "labels" in str(file)]
    counts = [np.bincount(label.astype(int).ravel(), minlength=3) * 0.216 for label in labels]
    assert all(700 < count[1] < 1800 and 350 < count[2] < 1100 for count in counts)  # ml of grey and white matter
    with pytest.raises(ValueError, match="holds subjects made in another way"):
        MNI152(str(tmp_path / "a"), **{**options, "subject": Subject(spacing_mm=5.0)}).prepare_data()


# ---- splits ----


def test_cases_of_a_subject_stay_together():
    cases = [Case(f"patient{n:03}_frame{f}", ("x",)) for n in range(10) for f in (1, 12)]
    parts = Split(val=0.2, test=0.3, subject=r"(patient\d+)_frame").assign("Data", cases)
    subjects = {split: {case.name[:10] for case in part} for split, part in parts.items()}
    assert {split: len(part) for split, part in parts.items()} == {"train": 10, "val": 4, "test": 6}
    assert not subjects["train"] & subjects["val"] | subjects["train"] & subjects["test"]
    assert parts == Split(val=0.2, test=0.3, subject=r"(patient\d+)_frame").assign("Data", cases)
    assert parts != Split(val=0.2, test=0.3, subject=r"(patient\d+)_frame", seed=1).assign("Data", cases)


def test_splits_come_from_files(tmp_path):
    cases = [Case(name, ("x",)) for name in "abc"]
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps([{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"]}]))
    assert names(Split(file=str(file), fold=1).assign("Data", cases)) == {"train": ["b", "c"], "val": ["a"], "test": []}
    with pytest.raises(ValueError, match=r"split\.fold must be 0 … 1"):
        Split(file=str(file), fold=2).assign("Data", cases)
    with pytest.raises(ValueError, match=r"Data: split\.file must be a JSON file .* found no nowhere\.json"):
        Split(file="nowhere.json").assign("Data", cases)
    with pytest.raises(ValueError, match="names cases that do not exist: c"):
        Split(file=str(file)).assign("Data", cases[:2])


def test_splits_that_leave_nothing_to_train_with_are_refused():
    cases = [Case(name, ("x",)) for name in "abc"]
    with pytest.raises(ValueError, match="split must leave subjects to train with, got 3 subjects"):
        Split(val=0.5, test=0.5).assign("Data", cases)
    with pytest.raises(ValueError, match=r"does not match a"):
        Split(subject="z").assign("Data", cases)


# ---- refusals ----


def _missing(root):
    (root / "imagesTr" / "case1_0000.nii.gz").unlink()


def _shape(root):
    save(root / "labelsTr" / "case1.nii.gz", blob(1)[1][:-1])


def _spacing(root):
    save(root / "labelsTr" / "case1.nii.gz", blob(1)[1], np.diag([2.0, 1.2, 1, 1]))


def _elsewhere(root):
    moved = AFFINE.copy()
    moved[0, 3] += 40
    save(root / "labelsTr" / "case1.nii.gz", blob(1)[1], moved)


def _value(root):
    save(root / "labelsTr" / "case1.nii.gz", blob(1)[1] + 2)


def _not_finite(root):
    image = blob(1)[0].astype(np.float32)
    image[3, 3, 3] = np.nan
    save(root / "imagesTr" / "case1_0000.nii.gz", image)


def _cut_off(root):
    file = root / "imagesTr" / "case1_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:-3000])


def _no_volume(root):
    (root / "imagesTr" / "case1_0000.nii.gz").write_bytes(gzip.compress(b"no volume"))


@pytest.mark.parametrize(("spoil", "said"), [
    (_missing, r"case1: .*case1_0000.nii.gz does not exist"),
    (_shape, r"case1: .*labelsTr.* has the shape 19 x 24 x 18, .* has 20 x 24 x 18"),
    (_spacing, r"case1: .* has voxels of 2 x 1.2 x 1 mm, .* of 2 x 1 x 1.5 mm"),
    (_elsewhere, r"case1: .* lies elsewhere in space"),
    (_value, r"case1: .*label values must be among 0, 1, 2, got 3, 4"),
    (_not_finite, r"case1: .* holds NaN or infinity"),
    (_cut_off, r"case1: .*case1_0000.nii.gz cannot be read"),
    (_no_volume, r"case1: .*case1_0000.nii.gz cannot be read"),
])
def test_what_does_not_fit_is_refused_by_name_before_training(tmp_path, spoil, said):
    root = nnunet_folder(tmp_path)
    spoil(root)
    data = NNUNetRaw(str(root), loader=LOADER, preparation=SMALL)
    with pytest.raises(ValueError, match=r"NNUNetRaw: 1 of 5 cases do not fit; mend or remove them\n" + said):
        data.setup("fit")


def test_a_training_image_without_a_label_is_refused(tmp_path):
    root = nnunet_folder(tmp_path)
    (root / "labelsTr" / "case2.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"must have a label in .*labelsTr, 1 have none: case2; remove them or move"):
        NNUNetRaw(str(root)).find()


def test_colours_of_an_image_stand_in_one_file(tmp_path):
    """As in nnU-Net: dataset.json lists three channels, and NAME_0000.png holds them."""
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "imagesTr" / f"x{number}_0000.png")
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "labelsTr" / f"x{number}.png")
    (tmp_path / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "lung": 1}, "file_ending": ".png",
    }))
    data = NNUNetRaw(str(tmp_path), split=Split(val=0.3), preparation=Preparation((8, 8, 1)))
    data.setup("fit")
    assert data.in_channels == 3
    assert data.data["train"][0]["image"].shape == (3, 8, 8)


def test_cases_with_fewer_channels_are_refused(tmp_path):
    cases = []
    for number, channels in enumerate((2, 2, 1)):
        save(tmp_path / f"{number}.nii.gz", np.stack([blob(number)[0]] * channels, -1))
        cases.append(Case(str(number), (str(tmp_path / f"{number}.nii.gz"),)))
    with pytest.raises(ValueError, match="2: 1 channels, where most cases have 2"):
        check_cases("Data", cases, ())


@pytest.mark.parametrize(("described", "said"), [
    (None, "must describe the data, found no such file"),
    ({"labels": {"background": 0}}, "channel_names, file_ending is missing"),
    ({"labels": {"background": 0, "whole": [1, 2]}, "channel_names": {}, "file_ending": ""}, r"regions .*\(whole\)"),
    ({"labels": {"a": 1}, "channel_names": {}, "file_ending": ""}, "must name label 0, the background"),
])
def test_a_dataset_json_that_does_not_fit_is_refused(tmp_path, described, said):
    if described is not None:
        (tmp_path / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=said):
        NNUNetRaw(str(tmp_path)).find()


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Preparation(patch=(8, 1, 1)), "one of them 1 for a 2D network"),
    (lambda: Preparation(spacing_mm=(1, 1, 1), size=(8, 8, 8)), "drop one"),
    (lambda: Preparation(mean=(0.0,)), "mean and std go together"),
    (lambda: Sampling(patches_per_volume=0), "patches_per_volume must be 1 or more"),
    (lambda: Sampling(cache="disk"), "needs a folder"),
    (lambda: NNUNetRaw("x", loader=Loader(eval_batch_size=2)), "eval_batch_size must be 1"),
    (lambda: PairedFolders("x", "y", ["a", "b"], label_values=[0]), "must be one a class"),
    (lambda: PairedFolders("x", "y", ["a", "b"], test_images="z"), "test_images and test_labels must both be given"),
])
def test_bad_settings_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_label_values_become_class_numbers():
    assert to_classes(np.array([4, 0, 2, 4]), [0, 2, 4]).tolist() == [2, 0, 1, 2]
    assert to_classes(np.array([7, 0]), [7, 0]).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"among 0, 2, 4, got 1, 3"):
        to_classes(np.array([1, 0, 3]), [0, 2, 4])


# ---- preparation ----


def test_a_volume_is_turned_resampled_and_normalised():
    image, label = blob(0)
    ready = Preparation(patch=(8, 8, 8), spacing_mm=(2.0, 1.0, 3.0))(image[None].astype(np.float32), AFFINE, label)
    assert nibabel.aff2axcodes(ready["affine"].numpy()) == ("R", "A", "S")
    np.testing.assert_allclose(np.linalg.norm(ready["affine"][:3, :3], axis=0), (2, 1, 3))
    assert ready["image"].shape[1:] == ready["label"].shape
    assert abs(ready["image"].mean()) < 1e-5
    assert ready["image"].std() == pytest.approx(1, abs=1e-3)
    counts = [(array == 2).sum() * volume for array, volume in ((label, 3.0), (ready["label"].numpy(), 6.0))]
    assert counts[1] == pytest.approx(counts[0], rel=0.15)


def test_intensities_are_clipped_and_scaled_as_said():
    image = np.array([-2000.0, -100, 50, 3000], np.float32).reshape(1, 4, 1, 1) * np.ones((1, 4, 4, 4), np.float32)
    ready = Preparation(patch=(4, 4, 4), clip=(-200, 300), mean=(50.0,), std=(100.0,))(image, np.eye(4))
    assert ready["image"][0, :, 0, 0].tolist() == [-2.5, -1.5, 0, 2.5]
    kept = Preparation(patch=(4, 4, 4), nonzero=True)(np.where(image == 50, 0, image), np.eye(4))["image"][0, :, 0, 0]
    assert kept[2] == 0
    assert kept[[0, 1, 3]].mean() == pytest.approx(0, abs=1e-5)


# ---- patches ----


@pytest.fixture(scope="module")
def volumes():
    ready = []
    for number in range(3):
        image, label = blob(number)
        sample = Preparation()(image[None].astype(np.float32), np.eye(4), label)
        sample["places"] = [(sample["label"] == n).nonzero() for n in (1, 2)]
        ready.append(sample)
    return ready


def patches(volumes, patch=(12, 12, 12), augment=None, foreground=0.5, seed=0):
    preparation = Preparation(patch=patch)
    return Patches(volumes, per_volume=4, preparation=preparation, foreground=foreground, augment=augment, seed=seed)


EVERYTHING = VolumeAugment(rotate_prob=1.0, zoom_prob=1.0, noise_prob=1.0, blur_prob=1.0, brightness_prob=1.0,
                           contrast_prob=1.0, low_resolution_prob=1.0, gamma_prob=1.0, inverted_gamma_prob=1.0)
MOVED = VolumeAugment(rotate_prob=1.0, zoom_prob=1.0, noise_prob=0, blur_prob=0, brightness_prob=0, contrast_prob=0,
                      low_resolution_prob=0, gamma_prob=0, inverted_gamma_prob=0)
MOVED_FLAT = SliceAugment(rot90=0.5, affine_prob=1.0, elastic_prob=1.0, brightness_contrast_prob=0, gamma_prob=0,
                          noise_prob=0, blur_prob=0)
FLAT = SliceAugment(rot90=0.5, affine_prob=1.0, elastic_prob=1.0, brightness_contrast_prob=1.0, gamma_prob=1.0,
                    noise_prob=1.0, blur_prob=1.0)


@pytest.mark.parametrize(("patch", "augment"), [((12, 12, 12), EVERYTHING), ((12, 1, 12), FLAT), ((12, 12, 12), None)],
                         ids=["3d", "2d", "plain"])
def test_a_patch_is_a_function_of_seed_and_key(volumes, patch, augment):
    """Whatever was drawn before, and by whom: the states of MONAI's and albumentations' transforms do not matter."""
    first, second = patches(volumes, patch, augment), patches(volumes, patch, augment)
    keys = [(0, 3, 0), (5, 3, 0), (0, 4, 0), (0, 3, 1)]
    taken = [first[key] for key in keys]
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    again = [second[key] for key in reversed(keys)][::-1]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    for a, b in zip(taken, again):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])
    assert not any(torch.equal(a["image"], b["image"]) for i, a in enumerate(taken) for b in taken[:i])
    other = patches(volumes, patch, augment, seed=1)[keys[0]]
    assert not torch.equal(other["image"], taken[0]["image"])


@pytest.mark.parametrize(("patch", "augment", "shape"), [
    ((12, 8, 10), EVERYTHING, (12, 8, 10)),
    ((12, 10, 1), SliceAugment(affine_prob=1.0), (12, 10)),
    ((32, 8, 40), None, (32, 8, 40)),
], ids=["3d", "2d", "plain"])
def test_patches_have_the_size_asked_for(volumes, patch, augment, shape):
    """Also where the volume is smaller, (20, 24, 18)."""
    for index in range(6):
        sample = patches(volumes, patch, augment)[(0, index, 0)]
        assert sample["image"].shape == (1, *shape)
        assert sample["label"].shape == shape
        assert (sample["image"].dtype, sample["label"].dtype) == (torch.float32, torch.uint8)
        assert type(sample["image"]) is type(sample["label"]) is torch.Tensor
        assert set(sample["label"].unique().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize(("patch", "augment"), [((12, 12, 12), MOVED), ((12, 12, 1), MOVED_FLAT)], ids=["3d", "2d"])
def test_image_and_label_are_moved_alike(volumes, patch, augment):
    """An image of the label itself stays one through every change of shape, but for blurred edges."""
    quiet = [{**v, "image": v["label"][None].float() * 3} for v in volumes]
    for index in range(12):
        sample = patches(quiet, patch, augment, foreground=1.0)[(0, index, 0)]
        image, label = sample["image"][0], sample["label"].float()
        assert torch.corrcoef(torch.stack([image.flatten(), label.flatten()]))[0, 1] > 0.8


def test_quarter_turns_of_oblong_patches_are_refused(volumes):
    with pytest.raises(ValueError, match="rot90 needs square patches"):
        patches(volumes, (12, 10, 1), FLAT)[(0, 0, 0)]


def test_foreground_patches_are_centred_on_a_class(volumes):
    taken = [patches(volumes, (5, 5, 5), foreground=1.0)[(0, index, 0)]["label"] for index in range(12)]
    assert {int(label[2, 2, 2]) for label in taken} == {1, 2}
    anywhere = [patches(volumes, (5, 5, 5), foreground=0.0)[(0, index, 0)]["label"] for index in range(12)]
    assert any(int(label[2, 2, 2]) == 0 for label in anywhere)


@pytest.mark.parametrize("augment", [None, VolumeAugment(mirror=())], ids=["plain", "augmented"])
def test_every_voxel_is_seen(volumes, augment):
    """Also those at the border, where the margin that is cut out for turning lies outside."""
    shape = volumes[0]["label"].shape
    if augment is not None:
        augment._before, augment._after = (type(augment._after)([]) for _ in range(2))
    cells = torch.arange(volumes[0]["label"].numel(), dtype=torch.float32).view(1, *shape)
    data = patches([{**volumes[0], "image": cells}], (18, 22, 16), augment, foreground=0.0)
    seen = torch.cat([data[(epoch, index, 0)]["image"].flatten() for epoch in range(60) for index in range(4)])
    corners = [i * shape[1] * shape[2] + j * shape[2] + k
               for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)]
    assert set(map(float, corners)) <= set(seen.tolist())


def test_a_box_is_cut_out_and_padded():
    volume = torch.arange(20).view(4, 5)
    assert cut_out(volume, [-1, 3], [3, 3]).tolist() == [[0, 0, 0], [3, 4, 0], [8, 9, 0]]
    inside = cut_out(volume, [1, 1], [2, 2])
    inside.zero_()
    assert volume[1, 1] == 6  # a copy


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_the_cache_changes_no_patch(tmp_path, cache):
    root = nnunet_folder(tmp_path / "raw")
    def taken(cache):
        data = NNUNetRaw(str(root), loader=LOADER, preparation=SMALL,
                         sampling=Sampling(cache=cache, cache_dir=str(tmp_path / "cache")))
        data.setup("fit")
        return [data.data["train"][(1, index, 0)] for index in (0, 7, 8)]
    for a, b in zip(taken(cache), taken("none")):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])


@pytest.mark.parametrize(("cache", "times"), [("memory", 1), ("disk", 1), ("none", 3)])
def test_a_cached_volume_is_prepared_once(tmp_path, monkeypatch, cache, times):
    root, prepared = nnunet_folder(tmp_path / "raw"), []
    original = Preparation.__call__

    def counted(self, *arguments):
        prepared.append(arguments[0].tobytes()[:64])
        return original(self, *arguments)

    monkeypatch.setattr(Preparation, "__call__", counted)
    data = NNUNetRaw(str(root), loader=LOADER, preparation=SMALL,
                     sampling=Sampling(cache=cache, cache_dir=str(tmp_path / "cache"), patches_per_volume=4))
    data.setup("fit")
    for index in (0, 1, 2):  # of one volume
        data.data["train"][(0, index, 0)]
    assert max(prepared.count(one) for one in prepared) == times


def test_a_changed_file_is_not_taken_from_the_disk_cache(tmp_path):
    root = nnunet_folder(tmp_path / "raw")
    def first():
        data = NNUNetRaw(str(root), loader=LOADER, preparation=SMALL,
                         sampling=Sampling(cache="disk", cache_dir=str(tmp_path / "cache")))
        data.setup("fit")
        return data.data["train"][(0, 0, 0)]["image"], data.find()["train"][0]
    before, case = first()
    save(Path(case.images[0]), blob(77)[0])
    assert not torch.equal(first()[0], before)


# ---- prediction ----


def test_what_is_to_be_predicted_is_grouped_by_channels(tmp_path):
    for name in ("b_0001.nii.gz", "b_0000.nii.gz", "a_0000.nii.gz", "c.nii", "notes.txt", ".hidden.nii"):
        (tmp_path / name).write_bytes(b"")
    cases = cases_to_predict("predict", [tmp_path])
    assert {case.name: [Path(file).name for file in case.images] for case in cases} == {
        "a": ["a_0000.nii.gz"], "b": ["b_0000.nii.gz", "b_0001.nii.gz"], "c": ["c.nii"]
    }
    with pytest.raises(ValueError, match="must be a folder or a volume"):
        cases_to_predict("predict", [tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no volume"):
        cases_to_predict("predict", [tmp_path / "empty"])
