"""Semi-synthetic subjects made from the one averaged brain, MNI152, that ships inside nilearn.

Every subject is the same brain under another random deformation, contrast, bias field and noise, so a score on held-out
subjects says that a network learns from such images, and nothing about real anatomical variation. Say "semi-synthetic"
beside each number.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = ("background", "grey", "white")


@dataclass(frozen=True)
class Subject:
    """How a subject is made of the brain. Lengths are in mm, intensities in shares of the white matter's.

    Args:
        spacing_mm: Edge of the voxels.
        rotation_deg, scale, shift_mm: Largest rotation about each axis, change of size and shift, either way.
        warp_mm: Standard deviation of the displacements at the control points of a smooth deformation.
        warp_grid_mm: Distance of the control points.
        contrast: Largest change of the grey and of the white matter's intensity, and of the exponent of a gamma curve.
        bias: Standard deviation of the logarithm of a smooth multiplicative field, with control points every 60 mm.
        noise: Largest standard deviation of the Gaussian noise.
    """

    spacing_mm: float = 2.5
    rotation_deg: float = 12.0
    scale: float = 0.1
    shift_mm: float = 6.0
    warp_mm: float = 4.0
    warp_grid_mm: float = 24.0
    contrast: float = 0.15
    bias: float = 0.2
    noise: float = 0.06

    def make(self, key: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Make the subject of a key, always the same.

        Returns:
            The image (X, Y, Z) float32, the label (X, Y, Z) uint8 (0 background, 1 grey, 2 white matter) and the
            affine (4, 4) that maps voxels to millimetres.
        """
        brain, affine = read_brain()
        draw = np.random.default_rng(tuple(key))
        size_mm = np.array(brain.shape[1:])  # voxels of 1 mm
        shape = tuple(int(n) for n in np.ceil(size_mm / self.spacing_mm))
        warped = _sample(brain, self._coordinates(draw, shape, size_mm))
        t1, grey, white = warped
        label = torch.stack([1 - grey - white, grey, white]).argmax(0)
        image = t1.clamp(0, 1) ** (1 + draw.uniform(-self.contrast, self.contrast))
        for tissue in (grey, white):
            image = image + tissue * draw.uniform(-self.contrast, self.contrast) / 2
        field = _smooth(draw, 1, self.bias, np.maximum(np.ceil(size_mm / 60), 2).astype(int), shape)[0]
        image = image * field.exp()
        noise = draw.standard_normal(shape, dtype=np.float32) * draw.uniform(0.2, 1.0) * self.noise
        image = (image + torch.from_numpy(noise)).clamp(min=0) * 1000
        corner = affine[:3, 3] + (self.spacing_mm - 1) / 2
        own = np.diag([self.spacing_mm] * 3 + [1.0])
        own[:3, 3] = corner
        return image.numpy().astype(np.float32), label.numpy().astype(np.uint8), own

    def _coordinates(self, draw: np.random.Generator, shape: tuple[int, ...], size_mm: np.ndarray) -> Tensor:
        """Where each voxel of the subject lies in the brain, (X, Y, Z, 3), in voxels of 1 mm."""
        angles = np.deg2rad(draw.uniform(-self.rotation_deg, self.rotation_deg, 3))
        matrix = np.eye(3)
        for axis, angle in enumerate(angles):
            turn, (a, b) = np.eye(3), [other for other in range(3) if other != axis]
            turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
            matrix = matrix @ turn
        matrix = matrix @ np.diag(1 + draw.uniform(-self.scale, self.scale, 3))
        shift = draw.uniform(-self.shift_mm, self.shift_mm, 3)
        centre = (size_mm - 1) / 2
        axes = [torch.arange(n) * self.spacing_mm + (self.spacing_mm - 1) / 2 - c for n, c in zip(shape, centre)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).float()
        points = np.maximum(np.ceil(size_mm / self.warp_grid_mm), 4).astype(int)
        warp = _smooth(draw, 3, self.warp_mm, points, shape).movedim(0, -1)
        return grid @ torch.from_numpy(matrix.T).float() + torch.from_numpy(centre + shift).float() + warp


@cache
def read_brain() -> tuple[Tensor, np.ndarray]:
    """Return T1, grey and white matter of the installed nilearn, (3, 197, 233, 189) in 0 … 1, and their affine."""
    spec = importlib.util.find_spec("nilearn")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "MNI152: the brain is read from the package nilearn, which is not installed; run: "
            "pip install --no-deps nilearn"
        )
    import nibabel

    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    files = [folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz" for name in ("t1", "gm", "wm")]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"MNI152: {file} must hold the brain; run: pip install --no-deps 'nilearn>=0.10'")
    images = [nibabel.load(file) for file in files]
    maps = np.stack([np.asanyarray(image.dataobj).astype(np.float32) / 255 for image in images])
    return torch.from_numpy(maps), np.asarray(images[0].affine)


def _sample(maps: Tensor, coordinates: Tensor) -> Tensor:
    """Interpolate (C, X, Y, Z) linearly at (X', Y', Z', 3) in voxels; zero outside."""
    sizes = torch.tensor(maps.shape[1:])
    unit = (2 * coordinates + 1) / sizes - 1
    return F.grid_sample(maps[None], unit.flip(-1)[None], align_corners=False)[0]


def _smooth(
    draw: np.random.Generator, channels: int, std: float, points: np.ndarray, shape: tuple[int, ...]
) -> Tensor:
    """Normal numbers at control points, interpolated by cubic B-splines to (channels, *shape)."""
    field = torch.from_numpy(draw.normal(0, std, (channels, *points + 3)).astype(np.float32))
    for axis, (n, control) in enumerate(zip(shape, points), start=1):
        position = torch.arange(n) * (control / n)
        first = position.long()
        t = position - first
        weights = (
            (1 - t) ** 3 / 6,
            (3 * t**3 - 6 * t**2 + 4) / 6,
            (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
            t**3 / 6,
        )
        view = [-1 if d == axis else 1 for d in range(field.ndim)]
        parts = [field.index_select(axis, first + k) * w.view(view) for k, w in enumerate(weights)]
        field = torch.stack(parts).sum(0)
    return field
