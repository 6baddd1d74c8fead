"""Photographs with a class for every pixel, in ADE20K's folders; transforms of torchvision v2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from vssm.data.images import UNREADABLE, converted, image_files
from vssm.data.loading import Loader, OrderedData
from vssm.data.order import Key, preserved_rng, seed_rng
from vssm.models.variant import IMAGENET_MEAN, IMAGENET_STD

IGNORED = 255
"""The label of pixels that count nowhere: neither in the loss nor in a score."""


@dataclass(frozen=True)
class SceneSize:
    """How large images come to the model.

    Args:
        short, long: Images are resized, keeping their shape, until the shorter side is ``short`` or the longer one
            ``long`` pixels, whatever comes first.
        crop: Height and width of training crops; smaller images are padded, with pixels that count nowhere.
        multiple: In evaluation, sides are resized to multiples of this.
    """

    short: int = 512
    long: int = 2048
    crop: tuple[int, int] = (512, 512)
    multiple: int = 1

    def __post_init__(self) -> None:
        if min(self.short, self.long, *self.crop, self.multiple) < 1 or self.long < self.short:
            raise ValueError(f"SceneSize: all sizes must be 1 or more and long at least short, got {self}")

    def resized(self, height: int, width: int, factor: float = 1.0) -> tuple[int, int]:
        """Height and width after resizing, with ``short`` and ``long`` multiplied by ``factor``.

        >>> SceneSize().resized(480, 640), SceneSize().resized(100, 1000, 0.5)
        ((512, 683), (102, 1024))
        """
        scale = min(factor * self.short / min(height, width), factor * self.long / max(height, width))
        return max(round(height * scale), 1), max(round(width * scale), 1)

    def evaluated(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in evaluation: resized, then rounded up to multiples."""
        height, width = (-(-side // self.multiple) * self.multiple for side in self.resized(height, width))
        return height, width


@dataclass(frozen=True)
class SceneAugment:
    """Changes of training images, as in mmsegmentation's recipes for ADE20K.

    Args:
        scale: Range of the factor on the resized image.
        largest_share: A crop is drawn again, at most ten times, while one class has this share of it; 1: never.
        hflip: Probability of mirroring.
        photometric: Random brightness, contrast, saturation and hue, each with probability one half.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    largest_share: float = 0.75
    hflip: float = 0.5
    photometric: bool = True


class Scenes(Dataset):
    """Images, with labels where there are any; the random numbers of each are keyed by (seed, epoch, index, copy).

    In training image (3, *crop) and label (*crop). In evaluation image (3, H, W) resized, label at its own size.
    Images are float32, normalised; labels int64, ``IGNORED`` where nothing is said.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[Path] | None,
        *,
        who: str,
        num_classes: int,
        reduce_zero_label: bool,
        size: SceneSize,
        augment: SceneAugment | None,
        training: bool,
        statistics: tuple[Sequence[float], Sequence[float]],
        seed: int,
    ):
        self.files, self.labels, self.who = files, labels, who
        self.names = [str(file) for file in files]
        self.num_classes, self.reduce_zero_label, self.size = num_classes, reduce_zero_label, size
        self.augment, self.training, self.seed = augment, training, seed
        self.mean, self.std = statistics
        self.distort = v2.RandomPhotometricDistort() if augment and augment.photometric else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Key | int) -> dict[str, Any]:
        epoch, index, copy = (0, key, 0) if isinstance(key, int) else key
        with preserved_rng():
            seed_rng(self.seed, epoch, index, copy)
            image = self._image(index)
            label = None if self.labels is None else self._label(index, image.shape[1:])
            if self.training:
                image, label = self._cropped(image, label)
                return {"image": image, "label": label.long(), "index": index}
        height, width = image.shape[1:]
        image = self._normalised(self._resized(image, self.size.evaluated(height, width)))
        sample = {"image": image, "index": index, "height": height, "width": width}
        return sample if label is None else sample | {"label": label.long()}

    def _image(self, index: int) -> Tensor:
        return transforms.pil_to_tensor(read(self.who, self.files[index], "RGB"))

    def _label(self, index: int, size: Sequence[int]) -> Tensor:
        """(H, W), uint8, checked."""
        file = self.labels[index]
        found = np.asarray(read(self.who, file))
        if found.ndim != 2 or found.shape != tuple(size):
            raise ValueError(
                f"{self.who}: {file} must hold one class number a pixel of {self.files[index]}, {tuple(size)}, got "
                f"{found.shape}"
            )
        label = torch.from_numpy(found.astype(np.int64))
        if self.reduce_zero_label:                          # 0 is "unlabelled", classes count from 1
            label = torch.where((label == 0) | (label == IGNORED), IGNORED, label - 1)
        wrong = label[(label != IGNORED) & ((label < 0) | (label >= self.num_classes))]
        if len(wrong):
            shift = int(self.reduce_zero_label)
            raise ValueError(
                f"{self.who}: the labels of {file} must be below {self.num_classes + shift}, or {IGNORED}, got "
                f"{int(wrong[0]) + shift}; set num_classes, or reduce_zero_label where 0 means unlabelled"
            )
        return label.to(torch.uint8)

    def _cropped(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        augment, crop = self.augment, self.size.crop
        low, high = augment.scale if augment else (1.0, 1.0)
        height, width = image.shape[1:]
        size = self.size.resized(height, width, float(torch.empty(()).uniform_(low, high)))
        image = self._resized(image, size)
        label = transforms.resize(label[None], list(size), v2.InterpolationMode.NEAREST)[0]
        image, label = self._chosen(image, label, crop, augment.largest_share if augment else 1.0)
        if augment and torch.rand(()) < augment.hflip:
            image, label = image.flip(-1), label.flip(-1)
        if self.distort is not None:
            image = self.distort(tv_tensors.Image(image)).as_subclass(torch.Tensor)
        missing = [0, 0, max(crop[1] - image.shape[2], 0), max(crop[0] - image.shape[1], 0)]  # right and bottom
        image = transforms.pad(self._normalised(image), missing, fill=0.0)
        return image, transforms.pad(label[None], missing, fill=IGNORED)[0]

    @staticmethod
    def _chosen(image: Tensor, label: Tensor, crop: tuple[int, int], share: float) -> tuple[Tensor, Tensor]:
        """A crop in which no class has ``share`` of the labelled pixels or more; the tenth is taken as it is."""
        height, width = (min(side, limit) for side, limit in zip(label.shape, crop, strict=True))
        for _ in range(10 if share < 1 else 1):
            top, left = (int(torch.randint(side - part + 1, ())) for side, part in zip(label.shape, (height, width)))
            part = label[top : top + height, left : left + width]
            counts = torch.bincount(part.flatten().long(), minlength=IGNORED + 1)[:IGNORED]
            if int((counts > 0).sum()) > 1 and counts.max() < share * counts.sum():
                break
        return image[:, top : top + height, left : left + width], part

    def _resized(self, image: Tensor, size: Sequence[int]) -> Tensor:
        return transforms.resize(image, list(size), v2.InterpolationMode.BILINEAR, antialias=True)

    def _normalised(self, image: Tensor) -> Tensor:
        return transforms.normalize(image.float() / 255, list(self.mean), list(self.std))


def read(who: str, file: Path, mode: str | None = None) -> Image.Image:
    """Read an image, in its own mode if ``mode`` is None.

    Raises:
        ValueError: If it cannot be read; the message names the file.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return converted(image, mode) if mode else image
    except UNREADABLE as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"{who}: {file} must be an image, it cannot be read ({found})") from error


class SceneFolder(OrderedData):
    """ADE20K-style folders: ``root/images/training/NAME.jpg`` with ``root/annotations/training/NAME.png``.

    An annotation is an image of one channel whose values are class numbers. Before a run starts every image must have
    its annotation, of its size; class numbers are checked as they are read.

    Args:
        root: Folder that holds ``images`` and ``annotations``.
        num_classes: Number of classes.
        class_names: Their names; numbers if None.
        reduce_zero_label: 0 means unlabelled and classes count from 1, as in ADE20K. Otherwise they count from 0.
            255 is unlabelled always.
        train_folder, val_folder, test_folder: Names of the splits. ADE20K has no labelled test images: the validation
            images are tested.
        loader, size, augment: See there; ``augment: null`` only crops.
        mean, std: Normalisation of red, green and blue from 0 to 1.
        predict: Folder, file or list of them, for ``predict``.
    """

    def __init__(
        self,
        root: str,
        num_classes: int = 150,
        *,
        class_names: list[str] | None = None,
        reduce_zero_label: bool = True,
        train_folder: str = "training",
        val_folder: str = "validation",
        test_folder: str = "validation",
        loader: Loader = Loader(batch_size=16, eval_batch_size=1),
        size: SceneSize = SceneSize(),
        augment: SceneAugment | None = SceneAugment(),
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        predict: str | list[str] | None = None,
    ):
        super().__init__(loader)
        if not 2 <= num_classes < IGNORED:
            raise ValueError(f"SceneFolder: num_classes must be 2 … {IGNORED - 1}, got {num_classes}")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"SceneFolder: class_names must be num_classes={num_classes} names, got {len(class_names)} names; set "
                "data.init_args.num_classes"
            )
        self.root, self.num_classes, self.reduce_zero_label = Path(root), num_classes, reduce_zero_label
        self.names = class_names or [str(number) for number in range(num_classes)]
        self.folders = {"train": train_folder, "val": val_folder, "test": test_folder}
        self.size, self.augment, self.statistics, self.predict = size, augment, (mean, std), predict

    @staticmethod
    def collate(samples: list[Any]) -> Any:
        """Stack samples of one size; others stay lists, as the images of an evaluation do."""
        if len({tuple(sample["image"].shape) for sample in samples}) == 1 and "height" not in samples[0]:
            return default_collate(samples)
        return {name: [sample[name] for sample in samples] for name in samples[0]}

    def setup(self, stage: str) -> None:
        """Find the images of a stage, and check them."""
        self.class_names = self.names
        if stage == "predict":
            files = image_files("SceneFolder", self.predict)
            twice = [name for name, count in Counter(file.stem for file in files).items() if count > 1]
            if twice:                                       # label maps are named after images
                raise ValueError(
                    f"SceneFolder: images to predict must have different names, got {twice[0]} more than once; predict "
                    "their folders one by one"
                )
            self.data["predict"] = self._scenes(files, None, training=False)
            return
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            self.data[split] = self._scenes(*self._pairs(split), training=split == "train")

    def _scenes(self, files: Sequence[Path], labels: Sequence[Path] | None, *, training: bool) -> Scenes:
        return Scenes(
            files, labels, who="SceneFolder", num_classes=self.num_classes, reduce_zero_label=self.reduce_zero_label,
            size=self.size, augment=self.augment, training=training, statistics=self.statistics, seed=self.seed,
        )  # fmt: skip

    def _pairs(self, split: str) -> tuple[list[Path], list[Path]]:
        """The images of a split and their annotations, compared by name and size."""
        images, annotations = (self.root / kind / self.folders[split] for kind in ("images", "annotations"))
        for folder in (images, annotations):
            if not folder.is_dir():
                raise ValueError(
                    f"SceneFolder: {folder} must be a folder; set data.init_args.root, or "
                    f"data.init_args.{split}_folder if the split has another name"
                )
        files = sorted(file for file in images.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise ValueError(f"SceneFolder: {images} must hold images ({', '.join(IMG_EXTENSIONS)}), found none")
        labels = [annotations / f"{file.stem}.png" for file in files]
        missing = [label.name for label in labels if not label.is_file()]
        if missing:
            raise ValueError(
                f"SceneFolder: every image of {images} must have an annotation in {annotations}; {len(missing)} have "
                f"none: {', '.join(missing[:5])}"
            )
        for file, label in zip(files, labels, strict=True):
            if (size := _size(file)) != (found := _size(label)):
                raise ValueError(
                    f"SceneFolder: {label} must have the size of {file.name}, {size[0]} x {size[1]} pixels, got "
                    f"{found[0]} x {found[1]}"
                )
        return files, labels


def _size(file: Path) -> tuple[int, int]:
    """Width and height, from the header."""
    try:
        with Image.open(file) as image:
            return image.size
    except UNREADABLE as error:
        raise ValueError(f"SceneFolder: {file} must be an image, it cannot be read ({error})") from error
