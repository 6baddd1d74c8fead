"""How volumes are prepared for the network (MONAI), and which cases are for training, validation and test.

A 2D network is trained on slices of volumes, or on images, by a patch that is one voxel thick: ``patch: [96, 96, 1]``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vssm.data.volume_files import Case


@dataclass(frozen=True)
class Preparation:
    """How a volume is made ready for the network. It is saved in checkpoints, and repeated before a prediction.

    Args:
        patch: What the network sees at once, in voxels; one axis of size 1 makes slices for a 2D network.
        spacing_mm: Voxels are resampled to these edges; None leaves them.
        size: Volumes are resampled to this many voxels instead; -1 leaves an axis.
        orientation: Axes are turned and flipped to this one, by nibabel's codes; None leaves them. Images stay.
        crop_foreground: Cut off what is not above zero on any channel.
        clip: Intensities are limited to these first, such as Hounsfield units.
        mean, std: Subtracted and divided by, one number a channel; None takes those of each volume.
        nonzero: Take them over the voxels that are not zero, and leave zeros zero.
    """

    patch: tuple[int, int, int] = (96, 96, 96)
    spacing_mm: tuple[float, float, float] | None = None
    size: tuple[int, int, int] | None = None
    orientation: str | None = "RAS"
    crop_foreground: bool = False
    clip: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    nonzero: bool = False

    def __post_init__(self) -> None:
        if min(self.patch) < 1 or sorted(self.patch)[1] == 1:
            raise ValueError(
                f"Preparation: patch must have positive sizes, one of them 1 for a 2D network, got {self.patch}"
            )
        if self.spacing_mm is not None and self.size is not None:
            raise ValueError("Preparation: spacing_mm and size both say the grid; drop one")
        if (self.mean is None) != (self.std is None):
            raise ValueError("Preparation: mean and std go together; give both or none")

    @property
    def flat_axis(self) -> int | None:
        """The axis along which the patch is one voxel thick, if the network is 2D."""
        return self.patch.index(1) if 1 in self.patch else None

    def __call__(self, image: np.ndarray, affine: np.ndarray, label: np.ndarray | None = None) -> dict[str, Any]:
        """Prepare a volume.

        Args:
            image: (C, X, Y, Z) float32; it may be overwritten, for large volumes are not copied.
            affine: (4, 4), voxels to millimetres.
            label: Class numbers (X, Y, Z).

        Returns:
            "image" (C, X', Y', Z') float32, "affine" (4, 4) of its grid and, if given, "label" (X', Y', Z') uint8.
        """
        from monai.data import MetaTensor
        from monai.transforms import Compose, CropForegroundd, NormalizeIntensityd, Orientationd, Resized, Spacingd

        sample: Any = {"image": MetaTensor(torch.from_numpy(image), affine=torch.from_numpy(affine))}
        if label is not None:
            sample["label"] = MetaTensor(torch.from_numpy(label)[None].float(), affine=torch.from_numpy(affine))
        keys, modes = tuple(sample), ("bilinear", "nearest")[: len(sample)]
        steps: list[Any] = []
        if self.orientation is not None:
            steps.append(Orientationd(keys, axcodes=self.orientation, labels=None))
        if self.crop_foreground:
            steps.append(CropForegroundd(keys, source_key="image", select_fn=_above_zero, allow_smaller=True))
        if self.spacing_mm is not None:
            steps.append(
                Spacingd(
                    keys, self.spacing_mm, mode=modes, scale_extent=True, align_corners=True, dtype=torch.float32
                )
            )
        if self.size is not None:
            resize = {"image": "trilinear", "label": "nearest-exact"}
            steps.append(Resized(keys, self.size, mode=[resize[key] for key in keys]))
        sample = Compose(steps)(sample)
        if self.clip is not None:
            sample["image"] = sample["image"].clamp(*self.clip)
        normalise = NormalizeIntensityd(
            ("image",), subtrahend=self.mean, divisor=self.std, nonzero=self.nonzero, channel_wise=True
        )
        prepared = normalise(sample)["image"]
        result: dict[str, Any] = {"image": prepared.as_tensor().float().contiguous()}
        result["affine"] = torch.as_tensor(prepared.affine, dtype=torch.float64)
        if label is not None:
            result["label"] = sample["label"].as_tensor()[0].round().to(torch.uint8)
        return result


def _above_zero(image: Tensor) -> Tensor:
    return image > 0


@dataclass(frozen=True)
class Split:
    """Which cases are for what; cases of one subject stay together.

    Args:
        val, test: Shares of the subjects.
        seed: Of the draw.
        subject: Regular expression that finds the subject in a case's name, its first group if it has one
            (``(patient\\d+)_frame``); None takes each case for a subject.
        file: JSON with "train", "val" and "test" lists of case names instead, or nnU-Net's ``splits_final.json``.
        fold: Which fold of that.
    """

    val: float = 0.2
    test: float = 0.0
    seed: int = 0
    subject: str | None = None
    file: str | None = None
    fold: int = 0

    def assign(self, who: str, cases: Sequence[Case]) -> dict[str, list[Case]]:
        """Return the cases of "train", "val" and "test"."""
        if self.file is not None:
            return self._from_file(who, {case.name: case for case in cases})
        subjects = [self._subject(who, case.name) for case in cases]
        names = sorted(set(subjects))
        order = np.random.default_rng(self.seed).permutation(len(names))
        val, test = (round(share * len(names)) for share in (self.val, self.test))
        val = max(val, 1) if self.val > 0 else 0
        if val + test >= len(names):
            raise ValueError(
                f"{who}: split must leave subjects to train with, got {len(names)} subjects, {val} of them for "
                f"validation and {test} for test"
            )
        part = dict.fromkeys(names, "train")
        part.update({names[i]: "test" for i in order[:test]} | {names[i]: "val" for i in order[test : test + val]})
        return {split: [c for c, s in zip(cases, subjects) if part[s] == split] for split in ("train", "val", "test")}

    def _subject(self, who: str, name: str) -> str:
        if self.subject is None:
            return name
        found = re.search(self.subject, name)
        if found is None:
            raise ValueError(f"{who}: split.subject must match every case, {self.subject!r} does not match {name}")
        return found.group(1) if found.groups() else found.group()

    def _from_file(self, who: str, cases: dict[str, Case]) -> dict[str, list[Case]]:
        if not Path(self.file).is_file():
            raise ValueError(
                f"{who}: split.file must be a JSON file of case names, found no {self.file}; set it to null to divide "
                "by split.val and split.test"
            )
        listed = json.loads(Path(self.file).read_text(encoding="utf-8"))
        if isinstance(listed, list):
            if not 0 <= self.fold < len(listed):
                raise ValueError(f"{who}: split.fold must be 0 … {len(listed) - 1} in {self.file}, got {self.fold}")
            listed = listed[self.fold]
        parts = {split: list(listed.get(split, [])) for split in ("train", "val", "test")}
        unknown = [name for names in parts.values() for name in names if name not in cases]
        if unknown:
            raise ValueError(f"{who}: {self.file} names cases that do not exist: {', '.join(unknown[:5])}")
        return {split: [cases[name] for name in names] for split, names in parts.items()}
