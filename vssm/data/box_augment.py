"""Augmentation of images with boxes and masks: torchvision's, and the mosaics that YOLO detectors are trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

Scene = dict[str, Any]
"""``image`` uint8, ``boxes``, ``labels`` and perhaps ``masks``; tv_tensors, but for the labels."""

GREY = 114
SMALLEST, SHARE = 2.0, 0.1      # sides in pixels, and share of its area, of a box that is kept after a move


@dataclass(frozen=True)
class BoxAugment:
    """What is done to training images, in this order. Every random number comes from torch's generator.

    Args:
        mosaic: Probability of a mosaic (Bochkovskiy et al., 2020, arXiv:2004.10934): the image and three others meet at
            a random point of a canvas of twice ``canvas`` pixels.
        close_mosaic: There is none in so many epochs at the end of training.
        canvas: Side in pixels of what comes out of ``mosaic``, ``translate`` and ``scale``; an image that is in no
            mosaic is resized into it, the rest being grey.
        translate, scale: The largest move, as a share of ``canvas``, and the largest change of size: 0.5 for factors
            from 0.5 to 1.5.
        iou_crop: Probability of SSD's crop (``RandomIoUCrop``).
        photometric: Whether SSD's changes of colour (``RandomPhotometricDistort``) are made.
        hsv: Largest change of hue, saturation and value, as a share of each.
        hflip, vflip: Probability of a flip.
    """

    mosaic: float = 0.0
    close_mosaic: int = 10
    canvas: int = 640
    translate: float = 0.0
    scale: float = 0.0
    iou_crop: float = 0.0
    photometric: bool = False
    hsv: tuple[float, float, float] = (0.0, 0.0, 0.0)
    hflip: float = 0.5
    vflip: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < 1 or not 0 <= self.mosaic <= 1:
            raise ValueError(
                f"BoxAugment: scale must be in [0, 1) and mosaic in [0, 1], got {self.scale} and {self.mosaic}"
            )

    def __call__(self, scene: Scene, another: Callable[[], Scene], *, mosaic: bool = True) -> Scene:
        """Augment ``scene``; ``another`` draws one for a mosaic, which is made only if ``mosaic``."""
        together = mosaic and _chance(self.mosaic)
        if together:
            scene = combined([scene, another(), another(), another()], self.canvas)
        if self.mosaic or self.translate or self.scale:
            if not together:
                scene = fitted(scene, self.canvas)
            scene = self._moved(scene)
        steps: list[Any] = []
        if self.iou_crop:
            steps.append(v2.RandomApply([v2.RandomIoUCrop()], p=self.iou_crop))
        if self.photometric and scene["image"].shape[0] == 3:
            steps.append(v2.RandomPhotometricDistort())
        steps += [v2.RandomHorizontalFlip(self.hflip), v2.RandomVerticalFlip(self.vflip)]
        scene = v2.Compose(steps)(scene)
        if any(self.hsv):
            scene = {**scene, "image": self._recoloured(scene["image"])}
        sides = scene["boxes"][:, 2:] - scene["boxes"][:, :2]
        return chosen(scene, sides.amin(1) > 0 if len(sides) else sides.new_zeros(0, dtype=torch.bool))

    def _moved(self, scene: Scene) -> Scene:
        """Scaled about its centre and moved, then cut to the canvas; boxes that all but disappear are dropped."""
        factor = 1 + self.scale * _between(-1, 1)
        move = [self.translate * self.canvas * _between(-1, 1) for _ in range(2)]
        before = areas(scene["boxes"]) * factor**2

        def affine(x: Any) -> Any:
            fill = GREY if isinstance(x, tv_tensors.Image) else 0
            smooth = v2.InterpolationMode.BILINEAR if fill else v2.InterpolationMode.NEAREST
            x = TF.affine(x, 0.0, move, factor, [0.0, 0.0], interpolation=smooth, fill=fill)
            return TF.center_crop(x, [self.canvas, self.canvas])

        scene = over_tensors(affine, scene)
        boxes = scene["boxes"]
        sides = (boxes[:, 2:] - boxes[:, :2]).as_subclass(Tensor)
        return chosen(scene, (sides > SMALLEST).all(1) & (areas(boxes) > SHARE * before))

    def _recoloured(self, image: Tensor) -> Tensor:
        gains = [1 + share * _between(-1, 1) for share in self.hsv]
        if image.shape[0] == 1:
            return tv_tensors.Image((image.float() * gains[2]).clamp(0, 255).to(torch.uint8))
        hsv = np.array(TF.to_pil_image(image).convert("HSV"), dtype=np.float32) * np.array(gains, dtype=np.float32)
        hsv[..., 0] %= 256
        rgb = Image.fromarray(hsv.clip(0, 255).astype(np.uint8), "HSV").convert("RGB")
        return tv_tensors.Image(TF.pil_to_tensor(rgb))


def over_tensors(change: Callable[[Any], Any], scene: Scene) -> Scene:
    """``change`` applied to image, boxes and masks."""
    return {name: change(x) if isinstance(x, tv_tensors.TVTensor) else x for name, x in scene.items()}


def chosen(scene: Scene, keep: Tensor) -> Scene:
    """The scene with those objects only."""
    return {name: x if name == "image" else _like(x, x[keep]) for name, x in scene.items()}


def _like(x: Any, value: Tensor) -> Tensor:
    """A value of the kind of ``x``."""
    return tv_tensors.wrap(value, like=x) if isinstance(x, tv_tensors.TVTensor) else value


def areas(boxes: Tensor) -> Tensor:
    """Areas (n) of boxes (n, 4)."""
    return (boxes[:, 2:] - boxes[:, :2]).as_subclass(Tensor).prod(1)


def resized(scene: Scene, side: int) -> Scene:
    """The scene with its longer side at ``side`` pixels."""
    height, width = scene["image"].shape[-2:]
    scale = side / max(height, width)
    size = [max(round(height * scale), 1), max(round(width * scale), 1)]
    return over_tensors(lambda x: TF.resize(x, size, antialias=False), scene)


def fitted(scene: Scene, side: int) -> Scene:
    """The scene resized into a square, in its middle; the rest is grey."""
    scene = resized(scene, side)
    height, width = scene["image"].shape[-2:]
    left, top = (side - width) // 2, (side - height) // 2
    return placed([scene], [(left, top)], side)


def combined(scenes: list[Scene], side: int) -> Scene:
    """Four scenes around a random point of a square of ``2 * side`` pixels."""
    scenes = [resized(scene, side) for scene in scenes]
    x, y = (int(_between(side / 2, 3 * side / 2)) for _ in range(2))
    places = []
    for i, scene in enumerate(scenes):
        height, width = scene["image"].shape[-2:]
        places.append((x if i % 2 else x - width, y if i > 1 else y - height))
    return placed(scenes, places, 2 * side)


def placed(scenes: list[Scene], places: list[tuple[int, int]], side: int) -> Scene:
    """Scenes with their upper left corners at these places of a grey square; what lies outside is cut off."""
    canvas = torch.full((scenes[0]["image"].shape[0], side, side), GREY, dtype=torch.uint8)
    parts = []
    for scene, (left, top) in zip(scenes, places, strict=True):
        image = scene["image"]
        height, width = image.shape[-2:]
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, side), min(top + height, side)
        canvas[:, y1:y2, x1:x2] = image[:, y1 - top : y2 - top, x1 - left : x2 - left]
        objects = {name: x for name, x in scene.items() if name != "image"}
        parts.append(over_tensors(partial(TF.crop, top=-top, left=-left, height=side, width=side), objects))
    scene = {"image": tv_tensors.Image(canvas)}
    for name in parts[0]:
        values = [part[name] for part in parts]
        scene[name] = _like(values[0], torch.cat([value.as_subclass(Tensor) for value in values]))
    boxes = scene["boxes"]
    sides = (boxes[:, 2:] - boxes[:, :2]).as_subclass(Tensor)
    return chosen(scene, (sides > 0).all(1))


def _chance(probability: float) -> bool:
    return probability > 0 and float(torch.rand(())) < probability


def _between(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))
