"""Random changes to patches of volumes (MONAI) and to slices (albumentations), each keyed by a seed."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor


class PatchAugment:
    """Changes an image and its label alike. ``margin`` times the patch is cut out: turned, it shows no border."""

    margin: float = 1.0

    def __call__(self, image: Tensor, label: Tensor, patch: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
        """Return image (C, *patch) and label (*patch); ``seed`` alone says what happens.

        Args:
            image: Float32, (C, *cut), at least as large as ``patch``.
            label: Class numbers, uint8, (*cut).
        """
        raise NotImplementedError


class VolumeAugment(PatchAugment):
    """MONAI's random transforms; the defaults are close to nnU-Net's.

    Args:
        rotate_deg, rotate_prob: Largest angle about each axis.
        zoom, zoom_prob: Range of sizes.
        noise_std, noise_prob: Largest standard deviation of Gaussian noise.
        blur_sigma, blur_prob: Of a Gaussian, in voxels.
        brightness, brightness_prob: Largest change of a factor on the intensities.
        contrast, contrast_prob: The same about their mean.
        low_resolution, low_resolution_prob: Range of the resolution of a copy that is resampled back.
        gamma, gamma_prob, inverted_gamma_prob: Range of the exponent, also on inverted intensities.
        mirror: Axes that are mirrored, each with probability one half.
    """

    def __init__(
        self,
        *,
        rotate_deg: float = 30.0,
        rotate_prob: float = 0.2,
        zoom: tuple[float, float] = (0.7, 1.4),
        zoom_prob: float = 0.2,
        noise_std: float = 0.1,
        noise_prob: float = 0.1,
        blur_sigma: tuple[float, float] = (0.5, 1.0),
        blur_prob: float = 0.2,
        brightness: float = 0.25,
        brightness_prob: float = 0.15,
        contrast: float = 0.25,
        contrast_prob: float = 0.15,
        low_resolution: tuple[float, float] = (0.5, 1.0),
        low_resolution_prob: float = 0.25,
        gamma: tuple[float, float] = (0.7, 1.5),
        gamma_prob: float = 0.3,
        inverted_gamma_prob: float = 0.1,
        mirror: tuple[int, ...] = (0, 1, 2),
    ):
        from monai.transforms import (
            CenterSpatialCropd,
            Compose,
            RandAdjustContrastd,
            RandFlipd,
            RandGaussianNoised,
            RandGaussianSmoothd,
            RandRotated,
            RandScaleIntensityd,
            RandScaleIntensityFixedMeand,
            RandSimulateLowResolutiond,
            RandZoomd,
        )

        both, modes = ("image", "label"), ("bilinear", "nearest")
        angle = math.radians(rotate_deg)
        self.margin = 1.25 if rotate_prob > 0 or zoom_prob > 0 else 1.0
        turn = RandRotated(both, angle, angle, angle, prob=rotate_prob, mode=modes, padding_mode="border")
        size = RandZoomd(both, prob=zoom_prob, min_zoom=zoom[0], max_zoom=zoom[1], mode=("trilinear", "nearest-exact"))
        shape = [(turn, rotate_prob), (size, zoom_prob)]
        one = ("image",)
        blur = {f"sigma_{axis}": blur_sigma for axis in "xyz"}
        mean = RandScaleIntensityFixedMeand(one, factors=contrast, prob=contrast_prob, preserve_range=True)
        values = [
            (RandGaussianNoised(one, prob=noise_prob, std=noise_std), noise_prob),
            (RandGaussianSmoothd(one, prob=blur_prob, **blur), blur_prob),
            (RandScaleIntensityd(one, factors=brightness, prob=brightness_prob), brightness_prob),
            (mean, contrast_prob),
            (RandSimulateLowResolutiond(one, prob=low_resolution_prob, zoom_range=low_resolution), low_resolution_prob),
            (
                RandAdjustContrastd(one, prob=inverted_gamma_prob, gamma=gamma, invert_image=True, retain_stats=True),
                inverted_gamma_prob,
            ),
            (RandAdjustContrastd(one, prob=gamma_prob, gamma=gamma, retain_stats=True), gamma_prob),
        ]
        flips = [RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in mirror]
        self._before = Compose([transform for transform, prob in shape if prob > 0])
        self._after = Compose([*(transform for transform, prob in values if prob > 0), *flips])
        self._crop = CenterSpatialCropd

    def __call__(self, image: Tensor, label: Tensor, patch: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
        sample: Any = {"image": image, "label": label[None].float()}
        self._before.set_random_state(seed=seed)
        self._after.set_random_state(seed=seed ^ 0x5BD1E995)
        sample = self._after(self._crop(("image", "label"), patch)(self._before(sample)))
        image, label = (torch.as_tensor(sample[name]) for name in ("image", "label"))
        return _plain(image), _plain(label)[0].round().to(torch.uint8)


class SliceAugment(PatchAugment):
    """albumentations on 2D patches; intensities are brought to 0 … 1 for it and back.

    Args:
        hflip, vflip, rot90: Probabilities; rot90, of quarter turns, needs square patches.
        rotate_deg, scale, shift, affine_prob: Largest rotation, change of size and shift (a share of the side).
        elastic_prob: Of an elastic deformation.
        brightness, contrast, brightness_contrast_prob: Largest changes.
        gamma, gamma_prob: Range of the exponent.
        noise_std, noise_prob: Range of the standard deviation of the noise, intensities being 0 … 1.
        blur_prob: Of a Gaussian blur.
    """

    def __init__(
        self,
        *,
        hflip: float = 0.5,
        vflip: float = 0.5,
        rot90: float = 0.0,
        rotate_deg: float = 20.0,
        scale: float = 0.2,
        shift: float = 0.05,
        affine_prob: float = 0.5,
        elastic_prob: float = 0.0,
        brightness: float = 0.1,
        contrast: float = 0.1,
        brightness_contrast_prob: float = 0.3,
        gamma: tuple[float, float] = (0.8, 1.25),
        gamma_prob: float = 0.2,
        noise_std: tuple[float, float] = (0.01, 0.05),
        noise_prob: float = 0.15,
        blur_prob: float = 0.1,
    ):
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise its import asks a server for its version
        import albumentations as A

        self.margin = 1.25 if affine_prob > 0 and (rotate_deg or scale or shift) else 1.0
        self.rot90 = rot90
        affine = A.Affine(
            rotate=(-rotate_deg, rotate_deg),
            scale=(1 - scale, 1 + scale),
            translate_percent=(-shift, shift),
            border_mode=1,
            p=affine_prob,
        )
        self._before = A.Compose([affine, A.ElasticTransform(alpha=50, sigma=6, border_mode=1, p=elastic_prob)])
        self._after = A.Compose(
            [
                A.HorizontalFlip(p=hflip),
                A.VerticalFlip(p=vflip),
                A.RandomRotate90(p=rot90),
                A.RandomBrightnessContrast(brightness, contrast, p=brightness_contrast_prob),
                A.RandomGamma(tuple(round(100 * g) for g in gamma), p=gamma_prob),
                A.GaussNoise(std_range=noise_std, p=noise_prob),
                A.GaussianBlur(blur_limit=3, p=blur_prob),
            ]
        )

    def __call__(self, image: Tensor, label: Tensor, patch: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
        if self.rot90 > 0 and patch[0] != patch[1]:
            raise ValueError(f"SliceAugment: rot90 needs square patches, got {patch}")
        low, high = image.min(), image.max()
        span = (high - low).clamp(min=1e-8)
        pixels, mask = ((image - low) / span).movedim(0, -1).contiguous().numpy(), label.numpy()
        self._before.set_random_seed(seed)
        done = self._before(image=pixels, mask=mask)
        cut = tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(mask.shape, patch))
        self._after.set_random_seed(seed ^ 0x5BD1E995)
        done = self._after(image=np.ascontiguousarray(done["image"][cut]), mask=np.ascontiguousarray(done["mask"][cut]))
        pixels = done["image"].reshape(*done["mask"].shape, -1)
        changed = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0))).float() * span + low
        return changed, torch.from_numpy(np.ascontiguousarray(done["mask"]))


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without MONAI's metadata."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor
