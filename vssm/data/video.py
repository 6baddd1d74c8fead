"""Clips of videos: the frames around one that has a mask, for networks such as Vivim."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from vssm.data.augmentation import PatchAugment
from vssm.data.loading import Loader
from vssm.data.preparation import Preparation, Split
from vssm.data.volume_files import IMAGE_SUFFIXES, Case, stem_of, suffix_of
from vssm.data.volume_sources import PairedFolders
from vssm.data.volumes import Sampling


class VideoFolders(PairedFolders):
    """A folder with the frames of each video, and one with their masks: ``IMAGES/VIDEO/FRAME``, ``LABELS/VIDEO/FRAME``.

    A case is a frame with a mask, in the middle of a clip; at both ends of a video the last frame is repeated. The
    frames of a clip are its channels, one after the other: five RGB frames are 15 channels. Frames of one video stay
    together in the split.

    Args:
        images, labels: The folders.
        class_names: Names of the classes, the background first.
        frames: Frames of a clip, an odd number.
        label_values: Values of the classes in the masks (``[0, 255]``); 0, 1, 2, … if None.
        split: Which videos are for what.
        test_images, test_labels: Folders of test videos, if they are apart.
        loader, preparation, sampling, augment: See ``VolumeData``.
        predict: Folders of frames, or folders of those, for ``predict``.
    """

    def __init__(
        self,
        images: str,
        labels: str,
        class_names: list[str],
        *,
        frames: int = 5,
        label_values: list[int] | None = None,
        split: Split = Split(),
        test_images: str | None = None,
        test_labels: str | None = None,
        loader: Loader = Loader(batch_size=2, workers=8),
        preparation: Preparation = Preparation(),
        sampling: Sampling = Sampling(patches_per_volume=1, foreground=0.0),
        augment: PatchAugment | None = None,
        predict: str | list[str] | None = None,
    ):
        if frames < 1 or frames % 2 == 0:
            raise ValueError(f"VideoFolders: frames must be odd, the mask is that of the middle one, got {frames}")
        super().__init__(
            images, labels, class_names, label_values=label_values, split=split, test_images=test_images,
            test_labels=test_labels, loader=loader, preparation=preparation, sampling=sampling, augment=augment,
            predict=predict,
        )  # fmt: skip
        self.frames = frames

    def _divided(self, images: Path, labels: Path) -> dict[str, list[Case]]:
        videos = self._videos(images, labels)
        parts = self.split.assign("VideoFolders", [Case(name, ()) for name in videos])
        return {part: [case for video in chosen for case in videos[video.name]] for part, chosen in parts.items()}

    def _cases(self, images: Path, labels: Path) -> list[Case]:
        return [case for clips in self._videos(images, labels).values() for case in clips]

    def _videos(self, images: Path, labels: Path) -> dict[str, list[Case]]:
        """The clips of each video whose middle frame has a mask."""
        self._check_folders(images, labels)
        videos = {}
        for folder in sorted(path for path in labels.iterdir() if path.is_dir() and path.name[0] != "."):
            masks = {stem_of(file): str(file) for file in _frames(folder)}
            clips = self._clips(images / folder.name)
            lone = sorted(masks.keys() - clips.keys())
            if lone:
                raise ValueError(
                    f"VideoFolders: each mask of {folder} must have a frame in {images / folder.name}, "
                    f"{len(lone)} have none: {', '.join(lone[:5])}"
                )
            videos[folder.name] = [replace(clips[stem], label=mask) for stem, mask in masks.items()]
        if not any(videos.values()):
            raise ValueError(f"VideoFolders: {labels} must hold a folder of masks for each video, found none")
        return videos

    def _clips(self, folder: Path) -> dict[str, Case]:
        """The clip around every frame of a folder, by the frame's name without suffix."""
        files = _frames(folder) if folder.is_dir() else []
        last, half = len(files) - 1, self.frames // 2
        return {
            stem_of(file): Case(
                f"{folder.name}_{stem_of(file)}",
                tuple(str(files[min(max(i + offset, 0), last)]) for offset in range(-half, half + 1)),
            )
            for i, file in enumerate(files)
        }

    def _predict_cases(self) -> list[Case]:
        paths = [self.predict] if isinstance(self.predict, str) else self.predict or []
        folders = [Path(path) for path in paths]
        folders += sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir())
        cases = [case for folder in folders for case in self._clips(folder).values()]
        if not cases:
            raise ValueError(
                "VideoFolders: nothing to predict; give a folder of frames, or of such folders, "
                f"--data.init_args.predict=PATH, got {self.predict}"
            )
        return cases


def _frames(folder: Path) -> list[Path]:
    """Images in the order of time: 10.png after 9.png."""
    files = [file for file in folder.iterdir() if suffix_of(file) in IMAGE_SUFFIXES and file.name[0] != "."]
    return sorted(files, key=lambda file: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", file.name)])
