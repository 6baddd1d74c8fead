"""Volumes and images in files: reading, writing, and checks that name every file that does not fit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from PIL import Image

from vssm.checkpoints.files import written_whole

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr", ".img")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, ImageFileError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Case:
    """One volume, or 2D image, of a data set.

    Args:
        name: Its name in tables and messages, without suffix.
        images: One file a channel, or one file with all channels (the last axis of a 4D NIfTI file, RGB).
        label: File of class numbers; None where there is none.
    """

    name: str
    images: tuple[str, ...]
    label: str | None = None


def suffix_of(file: str | Path) -> str | None:
    """Return the suffix of a file that can be read, or None.

    >>> suffix_of("a/B.NII.GZ"), suffix_of("notes.txt")
    ('.nii.gz', None)
    """
    name = Path(file).name.lower()
    return next((suffix for suffix in VOLUME_SUFFIXES + IMAGE_SUFFIXES if name.endswith(suffix)), None)


def stem_of(file: str | Path) -> str:
    """Return the file's name without its suffix.

    >>> stem_of("scans/patient_7.nii.gz")
    'patient_7'
    """
    name = Path(file).name
    return name[: len(name) - len(suffix_of(name) or Path(name).suffix)]


def read_header(file: str | Path) -> tuple[tuple[int, ...], int, np.ndarray]:
    """Return grid (X, Y, Z), number of channels and affine (4, 4) of a file; 2D images have Z = 1."""
    if suffix_of(file) in IMAGE_SUFFIXES:
        with Image.open(file) as image:
            return (image.height, image.width, 1), len(image.getbands()), np.eye(4)
    header = nibabel.load(file)
    shape = tuple(header.shape)
    if not 2 <= len(shape) <= 4:
        raise ValueError(f"a volume has 2, 3 or 4 axes, got {shape}")
    return (*shape, 1)[:3], shape[3] if len(shape) == 4 else 1, np.asarray(header.affine, dtype=float)


def read_volume(files: Sequence[str | Path]) -> tuple[np.ndarray, np.ndarray]:
    """Return the channels of a case, (C, X, Y, Z) float32, and their affine (4, 4).

    Raises:
        ValueError: If a file cannot be read, or holds NaN or infinity, which would spread over the volume.
    """
    channels = []
    for file in files:
        read = _read(file)
        if not all(_finite(channel) for channel in read):
            raise ValueError(f"{file} holds NaN or infinity")
        channels += read
    return np.stack(channels).astype(np.float32, copy=False), read_header(files[0])[2]


def _finite(channel: np.ndarray) -> bool:
    return bool(np.issubdtype(channel.dtype, np.integer) or all(np.isfinite(part).all() for part in channel))


def read_label(file: str | Path) -> np.ndarray:
    """Return class numbers (X, Y, Z) as they stand in the file."""
    channels = _read(file)
    if len(channels) > 1 and any(not np.array_equal(channels[0], other) for other in channels[1:3]):
        raise ValueError(f"{file}: a label has one channel, got {len(channels)} that differ")
    return channels[0]


def _read(file: str | Path) -> list[np.ndarray]:
    """Channels, each (X, Y, Z)."""
    if suffix_of(file) in IMAGE_SUFFIXES:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "CMYK", "YCbCr") else image)
        return [np.ascontiguousarray(channel)[..., None] for channel in np.atleast_3d(pixels).transpose(2, 0, 1)]
    volume = nibabel.load(file)
    whole = _is_integer(volume)
    data = np.asanyarray(volume.dataobj) if whole else volume.get_fdata(dtype=np.float32, caching="unchanged")
    if data.ndim == 4:
        return [data[..., channel] for channel in range(data.shape[3])]
    return [data if data.ndim == 3 else data[..., None]]


def _is_integer(volume: Any) -> bool:
    slope, inter = getattr(volume.dataobj, "slope", 1.0), getattr(volume.dataobj, "inter", 0.0)
    return bool(np.issubdtype(volume.get_data_dtype(), np.integer) and slope == 1 and inter == 0)


def write_label(file: Path, label: np.ndarray, like: str | Path) -> None:
    """Write class numbers (X, Y, Z) with the grid of ``like``, in its kind of file; the file appears whole."""
    with written_whole(file) as part:
        if suffix_of(file) in IMAGE_SUFFIXES:
            Image.fromarray(label[..., 0].astype(np.uint8)).save(part)
        else:
            nibabel.save(nifti_like(label, like), part)


def nifti_like(data: np.ndarray, like: str | Path) -> nibabel.Nifti1Image:
    """Return a NIfTI image of ``data`` with affine, codes and units of the file ``like``."""
    source = nibabel.load(like)
    image = nibabel.Nifti1Image(data, source.affine)
    if isinstance(source, nibabel.Nifti1Image):
        for which in ("qform", "sform"):
            affine, code = getattr(source, f"get_{which}")(coded=True)
            getattr(image, f"set_{which}")(affine, int(code))
        image.header.set_xyzt_units(*source.header.get_xyzt_units())
    return image


def to_classes(label: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Return the number of each value's class, uint8; every value must be one of ``values``.

    >>> to_classes(np.array([0, 255, 255]), [0, 255]).tolist()
    [0, 1, 1]
    """
    found = np.unique(label)
    strange = [value for value in found.tolist() if value not in values]
    if strange:
        listed = ", ".join(f"{value:g}" for value in strange[:5])
        raise ValueError(f"label values must be among {', '.join(map(str, values))}, got {listed}")
    if list(values) == list(range(len(values))):
        return label.astype(np.uint8)
    order = np.argsort(values)
    return order[np.searchsorted(np.asarray(values)[order], label)].astype(np.uint8)


def check_cases(who: str, cases: Iterable[Case], values: Sequence[int], *, read: bool = True) -> int:
    """Refuse cases whose files are missing, unreadable or do not fit one another; return their number of channels.

    Args:
        who: Whose error it is.
        cases: What is checked.
        values: The label values that may occur.
        read: Read every voxel. Without it a file that is cut off, a strange label value or a NaN is found only when
            the case is used.

    Raises:
        ValueError: Naming each case that does not fit, and what is wrong with it.
    """
    cases = list(cases)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checked = list(pool.map(lambda case: _problem(case, values, read), cases))
    problems = [f"{case.name}: {found}" for case, found in zip(cases, checked) if isinstance(found, str)]
    channels = [found for found in checked if isinstance(found, int)]
    usual = max(set(channels), key=channels.count, default=0)
    problems += [
        f"{case.name}: {found} channels, where most cases have {usual}"
        for case, found in zip(cases, checked)
        if isinstance(found, int) and found != usual
    ]
    if problems:
        more = f"\n… and {len(problems) - 10} more" if len(problems) > 10 else ""
        listed = "\n".join(problems[:10])
        count = f"{len(problems)} of {len(cases)} cases"
        raise ValueError(f"{who}: {count} do not fit; mend or remove them\n{listed}{more}")
    return usual


def _problem(case: Case, values: Sequence[int], read: bool) -> str | int:
    """What is wrong with a case, or its number of channels."""
    files = [*case.images, *([case.label] if case.label else [])]
    for file in files:
        if not Path(file).is_file():
            return f"{file} does not exist"
        if suffix_of(file) is None:
            return f"{file} must end in one of {', '.join(VOLUME_SUFFIXES + IMAGE_SUFFIXES)}"
    headers = []
    for file in files:
        try:
            headers.append(read_header(file))
        except UNREADABLE as error:
            return f"{file} cannot be read ({type(error).__name__}: {error})"
    grid, _, affine = headers[0]
    for file, (other, _, own) in zip(files[1:], headers[1:]):
        if other != grid:
            return f"{file} has the shape {_sizes(other)}, {case.images[0]} has {_sizes(grid)}"
        spacing, expected = (np.linalg.norm(matrix[:3, :3], axis=0) for matrix in (own, affine))
        if not np.allclose(spacing, expected, rtol=1e-3):
            return f"{file} has voxels of {_sizes(spacing)} mm, {case.images[0]} of {_sizes(expected)} mm"
        corners = np.array([[0, 0, 0, 1], [*(n - 1 for n in grid), 1]]).T
        if np.abs((own - affine) @ corners)[:3].max() > 0.5 * expected.min():
            return f"{file} lies elsewhere in space than {case.images[0]}: their affines differ by half a voxel or more"
    if read:
        for file in case.images:
            try:
                finite = all(_finite(channel) for channel in _read(file))
            except UNREADABLE as error:
                return f"{file} cannot be read ({type(error).__name__}: {error})"
            if not finite:
                return f"{file} holds NaN or infinity"
        if case.label:
            try:
                to_classes(read_label(case.label), values)
            except UNREADABLE as error:
                return f"{case.label} does not fit ({error})"
    return sum(channels for _, channels, _ in headers[: len(case.images)])


def _sizes(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
