"""Where volumes come from: the brain inside nilearn, Decathlon and nnU-Net folders, folders of images and masks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from vssm.checkpoints.files import written_whole
from vssm.data.augmentation import PatchAugment
from vssm.data.loading import Loader
from vssm.data.mni152 import CLASSES, Subject
from vssm.data.preparation import Preparation, Split
from vssm.data.volume_files import IMAGE_SUFFIXES, Case, stem_of, suffix_of
from vssm.data.volumes import Sampling, VolumeData


class MNI152(VolumeData):
    """Semi-synthetic subjects made from the averaged brain inside nilearn; grey and white matter are the classes.

    The subjects are written once, as NIfTI files in nnU-Net's layout. Training, validation and test have other
    subjects, but the same underlying brain (``vssm.data.mni152``).

    Args:
        folder: Where they are written.
        train, val, test: Numbers of subjects.
        subject: How they are made.
        subject_seed: Of the subjects; not that of the run, so that runs with other seeds see the same ones.
        loader, preparation, sampling, augment, predict: See ``VolumeData``.
    """

    def __init__(
        self,
        folder: str = "data/mni152_semi_synthetic",
        *,
        train: int = 20,
        val: int = 2,
        test: int = 6,
        subject: Subject = Subject(),
        subject_seed: int = 0,
        loader: Loader = Loader(batch_size=2, workers=0),
        preparation: Preparation = Preparation(patch=(64, 64, 64)),
        sampling: Sampling = Sampling(cache="memory"),
        augment: PatchAugment | None = None,
        predict: str | list[str] | None = None,
    ):
        super().__init__(loader, preparation, sampling, augment, predict)
        self.folder, self.counts = Path(folder), {"train": train, "val": val, "test": test}
        self.subject, self.subject_seed = subject, subject_seed

    def prepare_data(self) -> None:
        """Write the subjects that are not there yet; on one process of a host."""
        recipe = {**asdict(self.subject), "seed": self.subject_seed}
        note = self.folder / "subjects.json"
        if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != recipe:
            raise ValueError(
                f"MNI152: {self.folder} holds subjects made in another way, {note}; give another "
                "data.init_args.folder, or remove it"
            )
        for split, count in self.counts.items():
            for number in range(count):
                case = self._case(split, number)
                if Path(case.label).is_file():
                    continue
                image, label, affine = self.subject.make(
                    (self.subject_seed, ("train", "val", "test").index(split), number)
                )
                _save(Path(case.images[0]), image, affine)
                _save(Path(case.label), label, affine)  # last: where it is, the subject is whole
        with written_whole(note) as part:
            part.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")

    def _case(self, split: str, number: int) -> Case:
        name = f"{split}{number:03}"
        images, labels = ("imagesTs", "labelsTs") if split == "test" else ("imagesTr", "labelsTr")
        return Case(
            name,
            (str(self.folder / images / f"{name}_0000.nii.gz"),),
            str(self.folder / labels / f"{name}.nii.gz"),
        )

    def find(self) -> dict[str, list[Case]]:
        self.class_names, self.label_values = list(CLASSES), (0, 1, 2)
        return {split: [self._case(split, n) for n in range(count)] for split, count in self.counts.items()}


def _save(file: Path, data: np.ndarray, affine: np.ndarray) -> None:
    values = data.round().astype(np.int16) if data.dtype == np.float32 else data
    with written_whole(file) as part:
        nibabel.save(nibabel.Nifti1Image(values, affine), part)


class DescribedFolder(VolumeData):
    """A folder whose ``dataset.json`` says what it holds.

    Args:
        root: The folder.
        split: Which cases are for what.
        loader, preparation, sampling, augment, predict: See ``VolumeData``.
    """

    def __init__(
        self,
        root: str,
        *,
        split: Split = Split(),
        loader: Loader = Loader(batch_size=2, workers=8),
        preparation: Preparation = Preparation(),
        sampling: Sampling = Sampling(),
        augment: PatchAugment | None = None,
        predict: str | list[str] | None = None,
    ):
        super().__init__(loader, preparation, sampling, augment, predict)
        self.root, self.split = Path(root), split


class Decathlon(DescribedFolder):
    """A task of the Medical Segmentation Decathlon: a folder with ``dataset.json``, ``imagesTr`` and ``labelsTr``.

    Its test images have no labels; ``split`` sets some of the training cases aside.

    Args:
        root: The folder.
        split: Which cases are for what.
        loader, preparation, sampling, augment, predict: See ``VolumeData``.
    """

    def find(self) -> dict[str, list[Case]]:
        described = _dataset_json("Decathlon", self.root, ("labels", "training"))
        labels = _numbers("Decathlon", {int(value): name for value, name in described["labels"].items()})
        self.label_values, self.class_names = tuple(labels), list(labels.values())
        cases = []
        for entry in described["training"]:
            image, label = (str(self.root / entry[key]) for key in ("image", "label"))
            if not Path(image).name.startswith("."):
                cases.append(Case(stem_of(image), (image,), label))
        return self.split.assign("Decathlon", cases)


class NNUNetRaw(DescribedFolder):
    """A raw folder of nnU-Net: ``dataset.json``, ``imagesTr/NAME_0000.SUFFIX``, ``labelsTr/NAME.SUFFIX``.

    Where ``imagesTs`` and ``labelsTs`` are there, they are the test cases; otherwise ``split`` sets some aside.

    Args:
        root: The folder, such as ``nnUNet_raw/Dataset701_AbdomenCT``.
        split: Which cases are for what.
        loader, preparation, sampling, augment, predict: See ``VolumeData``.
    """

    def find(self) -> dict[str, list[Case]]:
        described = _dataset_json("NNUNetRaw", self.root, ("labels", "channel_names", "file_ending"))
        listed = [name for name, value in described["labels"].items() if not isinstance(value, int)]
        if listed or "ignore" in described["labels"]:
            raise ValueError(
                f"NNUNetRaw: labels must be single numbers, {self.root / 'dataset.json'} has regions or an ignored "
                f"label ({', '.join(listed) or 'ignore'}); give the classes of the label files themselves, and score "
                "regions by model.init_args.regions"
            )
        labels = _numbers("NNUNetRaw", {value: name for name, value in described["labels"].items()})
        self.label_values, self.class_names = tuple(labels), list(labels.values())
        channels, ending = len(described["channel_names"]), described["file_ending"]
        cases = self.split.assign("NNUNetRaw", self._cases("Tr", channels, ending))
        if (self.root / "labelsTs").is_dir():
            if cases["test"]:
                raise ValueError(f"NNUNetRaw: {self.root} has labelled test cases; set split.test to 0")
            cases["test"] = self._cases("Ts", channels, ending)
        return cases

    def _cases(self, which: str, channels: int, ending: str) -> list[Case]:
        folder = self.root / f"labels{which}"
        labels = sorted(folder.glob(f"[!.]*{ending}"))
        if not labels:
            raise ValueError(f"NNUNetRaw: {folder} must hold labels named *{ending}, found none")
        names = [label.name[: -len(ending)] for label in labels]
        images = self.root / f"images{which}"
        there = {re.sub(r"_\d{4}$", "", file.name[: -len(ending)]) for file in images.glob(f"[!.]*{ending}")}
        lone = sorted(there - set(names))
        if lone and which == "Tr":
            raise ValueError(
                f"NNUNetRaw: each case of {images} must have a label in {folder}, {len(lone)} have none: "
                f"{', '.join(lone[:5])}; remove them or move them to imagesTs"
            )
        if ending in IMAGE_SUFFIXES and not (images / f"{names[0]}_0001{ending}").exists():
            channels = 1  # nnU-Net reads all colours from one file
        return [
            Case(name, tuple(str(images / f"{name}_{c:04}{ending}") for c in range(channels)), str(label))
            for name, label in zip(names, labels)
        ]


class PairedFolders(VolumeData):
    """A folder of images and one of masks with the same names: NIfTI volumes, or 2D images (PNG, JPEG, …).

    Args:
        images, labels: The folders.
        class_names: Names of the classes, the background first.
        label_values: Their values in the masks (``[0, 255]``); 0, 1, 2, … if None.
        label_suffix: What a mask's name has more than its image's (``_segmentation``).
        split: Which cases are for what.
        test_images, test_labels: Folders of test cases, if they are apart.
        loader, preparation, sampling, augment, predict: See ``VolumeData``.
    """

    def __init__(
        self,
        images: str,
        labels: str,
        class_names: list[str],
        *,
        label_values: list[int] | None = None,
        label_suffix: str = "",
        split: Split = Split(),
        test_images: str | None = None,
        test_labels: str | None = None,
        loader: Loader = Loader(batch_size=2, workers=8),
        preparation: Preparation = Preparation(),
        sampling: Sampling = Sampling(patches_per_volume=1, foreground=0.0),
        augment: PatchAugment | None = None,
        predict: str | list[str] | None = None,
    ):
        if label_values is not None and len(label_values) != len(class_names):
            raise ValueError(
                f"{type(self).__name__}: label_values must be one a class, got {len(label_values)} for "
                f"{len(class_names)}"
            )
        if (test_images is None) != (test_labels is None):
            raise ValueError(
                f"{type(self).__name__}: test_images and test_labels must both be given, "
                f"got {test_images!r} and {test_labels!r}"
            )
        super().__init__(loader, preparation, sampling, augment, predict)
        self.folders, self.test_folders = (Path(images), Path(labels)), (test_images, test_labels)
        self.names, self.values, self.label_suffix, self.split = class_names, label_values, label_suffix, split

    def find(self) -> dict[str, list[Case]]:
        self.class_names, self.label_values = self.names, tuple(self.values or range(len(self.names)))
        cases = self._divided(*self.folders)
        if self.test_folders[0] and self.test_folders[1]:
            if cases["test"]:
                raise ValueError(f"{type(self).__name__}: test_images is given; set split.test to 0")
            cases["test"] = self._cases(Path(self.test_folders[0]), Path(self.test_folders[1]))
        return cases

    def _check_folders(self, *folders: Path) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"{type(self).__name__}: {folder} must be a folder, found none")

    def _divided(self, images: Path, labels: Path) -> dict[str, list[Case]]:
        """The cases of two folders by what they are for."""
        return self.split.assign(type(self).__name__, self._cases(images, labels))

    def _cases(self, images: Path, labels: Path) -> list[Case]:
        """The cases of two folders."""
        self._check_folders(images, labels)
        masks = {stem_of(file): str(file) for file in labels.iterdir() if suffix_of(file) and file.name[0] != "."}
        files = sorted(file for file in images.iterdir() if suffix_of(file) and file.name[0] != ".")
        lone = [file.name for file in files if stem_of(file) + self.label_suffix not in masks]
        if lone or not files:
            found = f"{len(lone)} have none: {', '.join(lone[:5])}" if files else "there is no image"
            raise ValueError(f"{type(self).__name__}: each image of {images} must have a mask in {labels}, {found}")
        return [Case(stem_of(file), (str(file),), masks[stem_of(file) + self.label_suffix]) for file in files]


def _dataset_json(who: str, root: Path, keys: Sequence[str]) -> dict[str, Any]:
    file = root / "dataset.json"
    if not file.is_file():
        raise ValueError(f"{who}: {file} must describe the data, found no such file; set data.init_args.root")
    described = json.loads(file.read_text(encoding="utf-8"))
    missing = [key for key in keys if key not in described]
    if missing:
        raise ValueError(f"{who}: {file} must have {', '.join(keys)}, {', '.join(missing)} is missing")
    return described


def _numbers(who: str, labels: dict[int, str]) -> dict[int, str]:
    """The labels in the order of their values, the background (0) first."""
    if 0 not in labels:
        raise ValueError(f"{who}: dataset.json must name label 0, the background, got {sorted(labels)}")
    return dict(sorted(labels.items()))
