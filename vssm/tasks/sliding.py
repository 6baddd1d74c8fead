"""Sliding-window inference on volumes that are too large to hold their logits: planes come out as they are finished.

The weighted mean is that of ``monai.inferers.sliding_window_inference(mode="gaussian")``. Sums are kept only for the
planes that windows still to come will touch, so memory grows with one window times a plane, not with the volume.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor

from vssm.data.volumes import Scan

PLANES = 16
"""How many finished planes come out at once, at most."""


@dataclass(frozen=True)
class Inference:
    """How a whole volume is predicted.

    Args:
        overlap: Share of a window that the next one covers again; along the flat axis of a 2D network there is none.
        batch_size: Windows that the network sees at once.
        flips: Axes of the volume (0, 1, 2) that are flipped, in all combinations; the logits are averaged.
    """

    overlap: float = 0.5
    batch_size: int = 4
    flips: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1 or self.batch_size < 1 or not set(self.flips) <= {0, 1, 2}:
            raise ValueError(
                "Inference: overlap must be 0 or more and below 1, batch_size 1 or more and flips among 0, 1, 2, got "
                f"{self.overlap}, {self.batch_size} and {self.flips}"
            )


def window_logits(
    network: Callable[[Tensor], Any], windows: Tensor, flat_axis: int | None, flips: Sequence[int] = ()
) -> Tensor:
    """Return the logits of windows (B, C, X, Y, Z), averaged over flips; a 2D network sees no ``flat_axis``."""

    def once(x: Tensor) -> Tensor:
        y = network(x if flat_axis is None else x.squeeze(flat_axis + 2))
        return y if flat_axis is None else y.unsqueeze(flat_axis + 2)

    axes = [axis + 2 for axis in flips if axis != flat_axis]
    total = once(windows)
    for subset in (s for n in range(1, len(axes) + 1) for s in itertools.combinations(axes, n)):
        total = total + once(windows.flip(subset)).flip(subset)
    return total / 2 ** len(axes)


def stream_logits(
    network: Callable[[Tensor], Any],
    volume: Tensor,
    patch: Sequence[int],
    *,
    inference: Inference = Inference(),
    axis: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yield the logits of a volume as chunks of finished planes, in order.

    Args:
        network: Takes (B, C, *patch), without the axis where the patch is 1; returns logits of the same size.
        volume: (C, X, Y, Z); only windows of it go to ``device``.
        patch: Size of a window; smaller volumes are padded with zeros.
        inference: Overlap, batch and flips.
        axis: The planes are perpendicular to this axis of the volume.
        device: Where the network runs.

    Yields:
        (planes, classes, …) float32 on the CPU, the two other axes of the volume at the end.
    """
    shape, patch = tuple(volume.shape[1:]), tuple(patch)
    flat = patch.index(1) if 1 in patch else None
    missing = [max(size - n, 0) for n, size in zip(shape, patch)]
    if any(missing):
        volume = F.pad(volume, [pad for m in reversed(missing) for pad in (m // 2, m - m // 2)])
    padded = tuple(volume.shape[1:])
    steps = tuple(p if p == n else max(int(p * (1 - inference.overlap)), 1) for n, p in zip(padded, patch))
    windows = sorted(dense_patch_slices(padded, patch, steps, return_slice=True), key=lambda w: w[axis].start)
    weight = compute_importance_map(patch, mode="gaussian", sigma_scale=0.125, dtype=torch.float32).cpu()
    weight = weight.clamp(min=max(float(weight.min()), 1e-3))
    inner = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, shape))  # what is not padding
    other = [a for a in range(3) if a != axis]
    starts = sorted({window[axis].start for window in windows})
    sums = norm = torch.empty(0)
    for start, following in zip(starts, [*starts[1:], padded[axis]]):
        rows = [window for window in windows if window[axis].start == start]
        for first in range(0, len(rows), inference.batch_size):
            group = rows[first : first + inference.batch_size]
            batch = torch.stack([volume[(slice(None), *window)] for window in group]).to(device)
            logits = window_logits(network, batch, flat, inference.flips).float().cpu()
            if not sums.numel():
                size = [patch[a] if a == axis else padded[a] for a in range(3)]
                sums, norm = torch.zeros(logits.shape[1], *size), torch.zeros(1, *size)
            for window, values in zip(group, logits):
                place = tuple(slice(None) if a == axis else window[a] for a in range(3))
                sums[(slice(None), *place)] += values * weight
                norm[(slice(None), *place)] += weight
        done, rest = following - start, patch[axis] - (following - start)
        low, high = (min(max(edge - start, 0), done) for edge in (inner[axis].start, inner[axis].stop))
        for first in range(low, high, PLANES):  # a slab has all classes: no copy of a whole one is made
            n = min(PLANES, high - first)
            finished = (sums.narrow(axis + 1, first, n) / norm.narrow(axis + 1, first, n)).movedim(axis + 1, 0)
            yield finished[:, :, inner[other[0]], inner[other[1]]]
        for total in (sums, norm):
            for first in range(0, rest, done):
                n = min(done, rest - first)
                total.narrow(axis + 1, first, n).copy_(total.narrow(axis + 1, first + done, n))
            total.narrow(axis + 1, max(rest, 0), patch[axis] - max(rest, 0)).zero_()


@dataclass(frozen=True)
class GridMap:
    """From the planes of a prepared volume to the voxels of the grid that its file has.

    Both grids lie along the same anatomical axes, so that each axis is resampled by itself.

    Args:
        order: nibabel's orientation transform from the file's axes to the prepared ones.
        positions: For each prepared axis, where the file's voxels lie on it, in prepared voxels.
        shape: The prepared grid.
    """

    order: np.ndarray
    positions: tuple[np.ndarray, np.ndarray, np.ndarray]
    shape: tuple[int, ...]

    @classmethod
    def between(
        cls, shape: Sequence[int], affine: np.ndarray, own_shape: Sequence[int], own_affine: np.ndarray
    ) -> GridMap:
        """Map the prepared grid (``shape``, ``affine``) to the file's own (``own_shape``, ``own_affine``)."""
        own = nibabel.orientations.io_orientation(own_affine)
        order = nibabel.orientations.ornt_transform(own, nibabel.orientations.io_orientation(affine))
        turned = own_affine @ nibabel.orientations.inv_ornt_aff(order, tuple(own_shape))
        step = np.linalg.inv(affine) @ turned  # turned voxel -> prepared voxel
        if np.abs(step[:3, :3] - np.diag(np.diag(step)[:3])).max() > 1e-3:
            raise ValueError("GridMap: the two grids must lie along the same axes, got a rotation between them")
        sizes = [own_shape[int(np.flatnonzero(order[:, 0] == axis)[0])] for axis in range(3)]
        positions = tuple(step[axis, axis] * np.arange(n) + step[axis, 3] for axis, n in enumerate(sizes))
        return cls(order, positions, tuple(shape))

    def turned(self, volume: np.ndarray) -> np.ndarray:
        """Return a view of the file's grid (X, Y, Z, …) with the prepared axes."""
        axes = [int(np.flatnonzero(self.order[:, 0] == axis)[0]) for axis in range(3)]
        flips = tuple(slice(None, None, int(self.order[axis, 1])) for axis in range(3))
        return volume[flips].transpose(*axes, *range(3, volume.ndim))

    def resample(self, chunks: Iterator[Tensor], axis: int) -> Iterator[tuple[int, Tensor | None]]:
        """Yield (plane, logits) for each plane of the file's grid along ``axis``, in order.

        Args:
            chunks: Finished planes of the prepared volume, ``stream_logits``.
            axis: The axis along which they come.

        Yields:
            Number of the plane and its logits (classes, …), interpolated linearly; None where it lies outside.
        """
        others = [self._weights(a) for a in range(3) if a != axis]
        first, second, share, outside = self._weights(axis)
        held: Tensor | None = None  # planes from number ``base`` on
        base, end = 0, 0
        for plane in range(len(share)):
            if outside[plane]:
                yield plane, None
                continue
            while end <= second[plane]:
                chunk = next(chunks)
                keep = held[max(int(first[plane]) - base, 0) :] if held is not None else chunk[:0]
                base, end = end - len(keep), end + len(chunk)
                held = torch.cat([keep, chunk]) if len(keep) else chunk
            assert held is not None
            low, high = held[first[plane] - base], held[second[plane] - base]
            yield plane, _blend(_blend(low.lerp(high, float(share[plane])), 1, others[0]), 2, others[1])

    def _weights(self, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For each of the file's voxels: two prepared neighbours, the share of the second, whether it is outside.

        Outside is a voxel or more away: a grid of other spacing may end up to half a voxel sooner.
        """
        position, n = self.positions[axis], self.shape[axis]
        inside = np.clip(position, 0, n - 1)
        inside = np.where(np.abs(inside - inside.round()) < 1e-4, inside.round(), inside)
        first = np.floor(inside).astype(int)
        second = np.minimum(first + 1, n - 1)
        return first, np.where(inside > first, second, first), inside - first, np.abs(position - inside) > 0.999


def _blend(plane: Tensor, axis: int, weights: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> Tensor:
    """Interpolate one axis of (classes, H, W); outside, the first class, the background, is certain."""
    first, second, share, outside = weights
    if not outside.any() and not share.any() and np.array_equal(first, np.arange(plane.shape[axis])):
        return plane
    low, high = (plane.index_select(axis, torch.from_numpy(index)) for index in (first, second))
    view = [-1 if d == axis else 1 for d in range(3)]
    mixed = low.lerp(high, torch.from_numpy(share).to(plane.dtype).view(view))
    if outside.any():
        certain = torch.full((len(plane), 1, 1), -100.0)
        certain[0] = 100.0
        mixed = torch.where(torch.from_numpy(outside).view(view), certain, mixed)
    return mixed


def segment(
    network: Callable[[Tensor], Any],
    scan: Scan,
    patch: Sequence[int],
    inference: Inference,
    *,
    device: torch.device | str = "cpu",
    probabilities: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Return the class numbers (X, Y, Z), uint8, of a scan on its own grid.

    Args:
        network: See ``stream_logits``.
        scan: The prepared volume and its grid.
        patch, inference, device: See ``stream_logits``.
        probabilities: (X, Y, Z, classes) float32, filled with the probabilities; may be a memory map.
        progress: Called with the number of planes that are done and of all.
    """
    grid = GridMap.between(scan.image.shape[1:], scan.affine, scan.grid, scan.grid_affine)
    axis = list(patch).index(1) if 1 in patch else int(np.argmax(scan.image.shape[1:]))
    label = np.zeros(scan.grid, dtype=np.uint8)
    planes = np.moveaxis(grid.turned(label), axis, 0)
    shares = None if probabilities is None else np.moveaxis(grid.turned(probabilities), axis, 0)
    with torch.inference_mode():
        chunks = stream_logits(network, scan.image, patch, inference=inference, axis=axis, device=device)
        for number, logits in grid.resample(chunks, axis):
            if logits is not None:
                planes[number] = logits.argmax(0).numpy()
            if shares is not None and logits is None:
                shares[number] = np.eye(1, shares.shape[-1], dtype=np.float32)[0]
            elif shares is not None and logits is not None:
                shares[number] = logits.softmax(0).movedim(0, -1).numpy()
            if progress is not None:
                progress(number + 1, len(planes))
    return label
