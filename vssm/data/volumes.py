"""Volumes for segmentation: patches in a keyed order, whole scans for evaluation, and the data module of both."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.transforms import Transform
from torch import Tensor
from torch.utils.data import Dataset

from vssm.data.augmentation import PatchAugment
from vssm.data.loading import Loader, OrderedData
from vssm.data.order import Key, preserved_rng, seed_rng
from vssm.data.preparation import Preparation, Split
from vssm.data.volume_files import (
    IMAGE_SUFFIXES,
    Case,
    check_cases,
    read_label,
    read_volume,
    stem_of,
    suffix_of,
    to_classes,
)

__all__ = [
    "Patches",
    "Preparation",
    "Prepare",
    "Sampling",
    "Scan",
    "Scans",
    "Split",
    "VolumeData",
    "cases_to_predict",
    "cut_out",
]

PLACES = 10_000
"""How many voxels of each class are remembered, as centres of patches."""


@dataclass
class Scan:
    """A whole case for evaluation: the prepared volume, and the grid that the answer must have.

    Args:
        index: Its number in the data set.
        case: Its files.
        image: Prepared, (C, X, Y, Z).
        affine: Of the prepared grid, (4, 4).
        grid: The case's own (X, Y, Z).
        grid_affine: Its affine, (4, 4).
        label: Class numbers on the prepared grid, if they are known.
        own_label: Class numbers on the case's own grid, if they are known.
    """

    index: int
    case: Case
    image: Tensor
    affine: np.ndarray
    grid: tuple[int, int, int]
    grid_affine: np.ndarray
    label: Tensor | None = None
    own_label: np.ndarray | None = None


class Scans(Dataset):
    """The cases of a split, one ``Scan`` an item."""

    def __init__(self, cases: Sequence[Case], preparation: Preparation, values: Sequence[int] | None):
        self.cases, self.preparation, self.values = cases, preparation, values
        self.names = [case.images[0] for case in cases]

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: Key | int) -> Scan:
        index = key if isinstance(key, int) else key[1]
        case = self.cases[index]
        image, affine = read_volume(case.images)
        label = None
        if case.label is not None and self.values is not None:
            label = to_classes(read_label(case.label), self.values)
        shape = image.shape[1:]
        ready = self.preparation(image, affine, label)
        return Scan(
            index, case, ready["image"], ready["affine"].numpy(), shape, affine, ready.get("label"), own_label=label
        )


class Patches(Dataset):
    """Patches of prepared volumes; which ones and what is done to them is keyed by (seed, epoch, index, copy).

    Args:
        volumes: Data set of dicts with "image", "label" and "places", as ``Prepare`` makes them.
        per_volume: Patches of each volume in an epoch.
        patch: Size of a patch.
        foreground: Share of the patches that are centred on a voxel of a class drawn among those that the volume has;
            the others lie anywhere.
        augment: What is done to them.
        seed: Of all that.
    """

    def __init__(
        self,
        volumes: Any,
        *,
        per_volume: int,
        preparation: Preparation,
        foreground: float,
        augment: PatchAugment | None,
        seed: int,
    ):
        self.volumes, self.per_volume, self.preparation = volumes, per_volume, preparation
        self.foreground, self.augment, self.seed = foreground, augment, seed

    def __len__(self) -> int:
        return len(self.volumes) * self.per_volume

    def __getitem__(self, key: Key | int) -> dict[str, Any]:
        epoch, index, copy = (0, key, 0) if isinstance(key, int) else key
        volume = self.volumes[index // self.per_volume]
        with preserved_rng():
            seed_rng(self.seed, epoch, index, copy)  # whatever a transform draws from
            draw = np.random.default_rng((self.seed, epoch, index, copy))
            image, label = self._patch(volume, draw)
        return {"image": image, "label": label, "index": index}

    def _patch(self, volume: dict[str, Any], draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        patch, flat = self.preparation.patch, self.preparation.flat_axis
        margin = self.augment.margin if self.augment else 1.0
        cut = tuple(1 if axis == flat else round(size * margin) for axis, size in enumerate(patch))
        start = [s - (c - p) // 2 for s, c, p in zip(self._start(volume, patch, draw), cut, patch)]
        image, label = cut_out(volume["image"], start, cut), cut_out(volume["label"], start, cut)
        if flat is not None:
            image, label = image.squeeze(flat + 1), label.squeeze(flat)
            patch = tuple(size for axis, size in enumerate(patch) if axis != flat)  # type: ignore[assignment]
        if self.augment is not None:
            image, label = self.augment(image, label, patch, int(draw.integers(2**32 - 1)))
        return image, label

    def _start(self, volume: dict[str, Any], patch: Sequence[int], draw: np.random.Generator) -> list[int]:
        """Return where the patch begins; in a volume that is smaller, that may be outside."""
        shape = volume["label"].shape
        if draw.random() < self.foreground and volume["places"]:
            places = volume["places"][draw.integers(len(volume["places"]))]
            centre = places[draw.integers(len(places))].tolist()
            start = [c - size // 2 for c, size in zip(centre, patch)]
        else:
            start = [int(draw.integers(min(0, n - size), max(0, n - size) + 1)) for n, size in zip(shape, patch)]
        return [  # no more of the outside than a volume that is smaller than the patch needs
            max(min(first, n - size), 0) if n >= size else max(min(first, 0), n - size)
            for first, n, size in zip(start, shape, patch)
        ]


def cut_out(volume: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return a copy of the box that begins at ``start`` on the last axes; zero where it lies outside.

    >>> cut_out(torch.arange(3), [1], [3]).tolist()
    [1, 2, 0]
    """
    spatial = volume.shape[-len(size) :]
    inside: Any = tuple(slice(max(first, 0), min(first + n, full)) for first, n, full in zip(start, size, spatial))
    box = volume[(..., *inside)]
    if box.shape[-len(size) :] == tuple(size):
        return box.clone()
    result = volume.new_zeros(*volume.shape[: volume.ndim - len(size)], *size)
    target: Any = tuple(slice(s.start - first, s.stop - first) for s, first in zip(inside, start))
    result[(..., *target)] = box
    return result


@dataclass(frozen=True)
class Prepare(Transform):
    """Reads and prepares a case for training; a class, not a closure, for workers that are spawned.

    A ``Transform``, for MONAI's caches keep the result of nothing else.
    """

    preparation: Preparation
    values: tuple[int, ...]

    def __call__(self, case: Case) -> dict[str, Any]:
        image, affine = read_volume(case.images)
        ready = self.preparation(image, affine, to_classes(read_label(case.label), self.values))
        places = []
        for number in range(1, len(self.values)):
            voxels = (ready["label"] == number).nonzero()
            if len(voxels):
                places.append(voxels[:: math.ceil(len(voxels) / PLACES)].to(torch.int32))
        return {"image": ready["image"], "label": ready["label"], "places": places}


@dataclass(frozen=True)
class Sampling:
    """How patches are drawn from the training volumes, and where those are kept.

    Args:
        patches_per_volume: How many patches an epoch draws from each volume.
        foreground: Share of the patches that are centred on a class other than the background.
        cache: Prepared volumes stay in "memory", or on "disk" in ``cache_dir``, or are made again ("none").
        cache_dir: Where; each preparation has a folder in it.
        check: Read every voxel and label before training starts ("full"), or the headers only ("headers").
    """

    patches_per_volume: int = 4
    foreground: float = 0.33
    cache: Literal["memory", "disk", "none"] = "none"
    cache_dir: str | None = None
    check: Literal["full", "headers"] = "full"

    def __post_init__(self) -> None:
        if self.patches_per_volume < 1 or not 0 <= self.foreground <= 1:
            raise ValueError(
                f"Sampling: patches_per_volume must be 1 or more and foreground 0 … 1, got {self.patches_per_volume} "
                f"and {self.foreground}"
            )
        if self.cache == "disk" and self.cache_dir is None:
            raise ValueError("Sampling: cache: disk needs a folder; set data.init_args.sampling.cache_dir")


class VolumeData(OrderedData):
    """Patches for training and whole scans for evaluation, from the cases that a subclass finds.

    Args:
        loader: Batches of patches and their order; evaluation takes one scan at a time.
        preparation: What is done to every volume.
        sampling: How patches are drawn.
        augment: What is done to them.
        predict: Files or folders, for ``predict``.
    """

    def __init__(
        self,
        loader: Loader,
        preparation: Preparation,
        sampling: Sampling,
        augment: PatchAugment | None,
        predict: str | list[str] | None,
    ):
        if loader.eval_batch_size not in (None, 1):
            raise ValueError(f"{type(self).__name__}: loader.eval_batch_size must be 1, got {loader.eval_batch_size}")
        super().__init__(replace(loader, eval_batch_size=1))
        self.preparation, self.sampling, self.augment, self.predict = preparation, sampling, augment, predict
        self.in_channels: int | None = None
        self.label_values: tuple[int, ...] = ()

    # ---- what a subclass says ----

    def find(self) -> dict[str, list[Case]]:
        """Return the cases of "train", "val" and "test"; set ``class_names`` and ``label_values``."""
        raise NotImplementedError

    # ---- Lightning ----

    def setup(self, stage: str) -> None:
        """Find the cases of a stage, and refuse those that do not fit before anything is trained."""
        who = type(self).__name__
        if stage == "predict":
            cases = self._predict_cases()
            self.in_channels = check_cases(who, cases, (), read=False)
            self.data["predict"] = Scans(cases, self._image_preparation(cases), None)
            return
        found = self.find()
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        for split in splits:
            if not found[split]:
                raise ValueError(f"{who}: there is no {split} case; see data.init_args.split and the folders")
        if any(split not in self.data for split in splits):
            everything = [case for split in splits for case in found[split]]
            self.in_channels = check_cases(who, everything, self.label_values, read=self.sampling.check == "full")
        for split in splits:
            if split in self.data:
                continue
            preparation = self._image_preparation(found[split])
            if split != "train":
                self.data[split] = Scans(found[split], preparation, self.label_values)
                continue
            self.data[split] = Patches(
                self._volumes(found[split], preparation),
                per_volume=self.sampling.patches_per_volume,
                preparation=preparation,
                foreground=self.sampling.foreground,
                augment=self.augment,
                seed=self.seed,
            )

    def _image_preparation(self, cases: Sequence[Case]) -> Preparation:
        """The preparation; images have no orientation."""
        images = all(suffix_of(file) in IMAGE_SUFFIXES for case in cases for file in case.images)
        return replace(self.preparation, orientation=None) if images else self.preparation

    def _volumes(self, cases: list[Case], preparation: Preparation) -> Any:
        from monai.data import CacheDataset, PersistentDataset
        from monai.data import Dataset as MonaiDataset

        prepare = Prepare(preparation, self.label_values)
        if self.sampling.cache == "memory":
            return CacheDataset(cases, prepare, num_workers=4, progress=False, copy_cache=False)
        if self.sampling.cache == "none":
            return MonaiDataset(cases, prepare)
        settings = json.dumps([asdict(preparation), self.label_values], sort_keys=True)
        folder = Path(self.sampling.cache_dir) / hashlib.sha256(settings.encode()).hexdigest()[:16]
        return PersistentDataset(cases, prepare, cache_dir=folder, hash_func=_case_digest)

    @staticmethod
    def collate(samples: list[Any]) -> Any:
        """Make a batch of patches; a scan is a batch by itself."""
        return samples[0] if isinstance(samples[0], Scan) else OrderedData.collate(samples)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave scans where they are: only windows of them go to the device."""
        return batch if isinstance(batch, Scan) else super().transfer_batch_to_device(batch, device, dataloader_idx)

    # ---- prediction ----

    def _predict_cases(self) -> list[Case]:
        if self.predict is None:
            raise ValueError(
                f"{type(self).__name__}: nothing to predict; give a folder or files, --data.init_args.predict=PATH"
            )
        paths = [self.predict] if isinstance(self.predict, str) else self.predict
        return cases_to_predict(type(self).__name__, [Path(path) for path in paths])


def _case_digest(case: Case) -> bytes:
    """A name for the prepared case that changes when one of its files does."""
    files = [*case.images, *([case.label] if case.label else [])]
    stamps = [(file, Path(file).stat().st_mtime_ns, Path(file).stat().st_size) for file in files]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:32].encode()


def cases_to_predict(who: str, paths: Sequence[Path]) -> list[Case]:
    """Return the cases in files and folders; ``NAME_0000.nii.gz``, ``NAME_0001.nii.gz``, … are channels of one case."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{who}: {path} must be a folder or a volume, found neither")
        files += sorted(p for p in path.iterdir() if suffix_of(p) and p.name[0] != ".") if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{who}: {', '.join(map(str, paths))} holds no volume and no image")
    groups: dict[tuple[Path, int], list[Path]] = {}
    for number, file in enumerate(files):
        stem = stem_of(file)
        name = re.sub(r"_\d{4}$", "", stem)
        groups.setdefault((file.parent / name, number if name == stem else -1), []).append(file)
    return [Case(path.name, tuple(map(str, sorted(members)))) for (path, _), members in groups.items()]
