"""Segment volumes or images with a trained network, on the grid that each file has.

    vssm predict runs/segmamba_mni/version_0 scan.nii.gz --output out
    vssm predict best.ckpt imagesTs --output out --flips 0 1 2 --probabilities

A folder gives all its volumes; NAME_0000.nii.gz, NAME_0001.nii.gz, … are channels of one. Each is prepared as for
training, predicted window by window, and the logits are resampled to its own grid plane by plane: no array of all
classes is ever held, so that large volumes need little more memory than the volume itself. Writes NAME.nii.gz (NAME.png
for images) with the affine of the input, NAME_probabilities.nii (float32, classes last) if asked, and volumes.csv.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from rich.progress import Progress

from vssm.data.volume_files import IMAGE_SUFFIXES, UNREADABLE, check_cases, suffix_of
from vssm.data.volumes import Scans, cases_to_predict
from vssm.tasks.report import write_table
from vssm.tasks.segmentation import Segmentation, write_prediction
from vssm.tasks.sliding import segment

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vssm predict", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a run folder (its best checkpoint), or a .ckpt file")
    parser.add_argument("inputs", type=Path, nargs="+", help="volumes, images, or folders of them")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    parser.add_argument("--flips", type=int, nargs="*", choices=(0, 1, 2),
                        help="axes to mirror, such as 0 1 2; all mirrored copies are averaged")  # fmt: skip
    parser.add_argument("--overlap", type=float, help="of the windows, 0 … 1; that of training by default")
    parser.add_argument("--batch-size", type=int, help="windows at once")
    parser.add_argument("--probabilities", action="store_true", help="write those of all classes too")
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    try:
        task = load_task(options.checkpoint, options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        asked = {name: getattr(options, name) for name in ("flips", "overlap", "batch_size")}
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        task.inference = replace(task.inference, **given)
        if task.frames > 1:
            raise ValueError(
                f"the network of {options.checkpoint} takes clips of {task.frames} frames: run `vssm train predict "
                "--config RUN/config.yaml --ckpt_path best --data.init_args.predict FOLDER`"
            )
        cases = cases_to_predict("vssm predict", options.inputs)
        names = [case.name for case in cases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"inputs must have different names, got {', '.join(twice[:5])} twice; predict them apart")
        channels = check_cases("vssm predict", cases, (), read=False)
        if channels != task.in_channels:
            raise ValueError(f"volumes must have {task.in_channels} channels for this network, got {channels}")
        if not _writable(options.output):
            raise ValueError(f"--output {options.output} must be a folder that can be written to; name another")
    except (OSError, ValueError) as error:
        print(f"vssm predict: {str(error).removeprefix('vssm predict: ')}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    try:
        rows.extend(_predict(task, cases, options))
    except Unreadable as error:  # any other error is not the input's
        print(f"vssm predict: {error}", file=sys.stderr)
        return 2
    finally:
        if rows:
            write_table(options.output / "volumes.csv", rows)
    return 0


def _writable(folder: Path) -> bool:
    """Whether ``folder`` is one that takes files, or can be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK)


class Unreadable(Exception):
    """A volume whose header could be read, and its voxels not."""


def load_task(path: Path, device: str) -> Segmentation:
    """Return the trained task of a run folder or checkpoint, in evaluation mode.

    Raises:
        ValueError: If there is none, or it says not how to build the network or to prepare volumes.
    """
    file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
    if not file.is_file():
        last = file.with_name("last.ckpt")
        hint = f"; {last} is there: name it to use it" if path.is_dir() and last.is_file() else ""
        wanted = "a run folder with checkpoints/best.ckpt, or a checkpoint"
        raise ValueError(f"{path} must be {wanted}; found neither{hint}")
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if "preparation" not in saved or saved.get("preparation") is None:
        raise ValueError(f"{file} must be a checkpoint of vssm.tasks.segmentation.Segmentation, got another")
    if not isinstance(saved.get("hyper_parameters", {}).get("model"), str):
        raise ValueError(
            f"{file} must name its network; this one was trained with a module given by class_path: run "
            "`vssm train predict --config RUN/config.yaml --ckpt_path best --data.init_args.predict INPUT`"
        )
    given = {name: value for name, value in saved["hyper_parameters"].items() if not name.startswith("_")}
    arguments: dict[str, Any] = {**given, "pretrained": False, "checkpoint_path": None, "encoder_weights": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*`isinstance\(treespec, LeafSpec\)` is deprecated")
        task = Segmentation(**arguments)
    task.on_load_checkpoint(saved)
    task.load_state_dict(saved["state_dict"])
    return task.to(device).eval()


def _predict(task: Segmentation, cases: list[Any], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Predict and write every case; yield its row of the table of volumes."""
    images = all(suffix_of(file) in IMAGE_SUFFIXES for case in cases for file in case.images)
    scans = Scans(cases, replace(task.preparation, orientation=None) if images else task.preparation, None)
    with Progress(disable=options.quiet) as progress:
        for index, case in enumerate(cases):
            started, bar = time.monotonic(), progress.add_task(case.name, total=None)
            try:
                scan = scans[index]
            except UNREADABLE as error:
                files = ", ".join(case.images)
                raise Unreadable(f"{files} cannot be read ({type(error).__name__}: {error})") from error

            shares: ProbabilityFile | None = None
            if options.probabilities:
                file = options.output / f"{case.name}_probabilities.nii"
                shares = ProbabilityFile(file, scan.grid, scan.grid_affine, len(task.class_names))

            def show(done: int, planes: int, bar: Any = bar, shares: ProbabilityFile | None = shares) -> None:
                progress.update(bar, completed=done, total=planes)
                if shares is not None and done % 16 == 0:
                    shares.release()

            with shares or nullcontext():
                predicted = segment(
                    task.class_logits,
                    scan,
                    task.preparation.patch,
                    task.inference,
                    device=task.device,
                    probabilities=shares.values if shares else None,
                    progress=show,
                )
            file = write_prediction(options.output, scan, predicted, task.label_values)
            progress.console.print(f"{file}  {time.monotonic() - started:.1f} s", highlight=False, soft_wrap=True)
            yield {"case": case.name, "prediction": str(file), **task.volumes_ml(scan, predicted)}


class ProbabilityFile:
    """A NIfTI file (X, Y, Z, classes), float32, that is filled through memory and appears when it is whole.

    What has been written is let go of by ``release``, so that the process does not grow with the file.
    """

    def __init__(self, file: Path, grid: tuple[int, int, int], affine: np.ndarray, classes: int):
        self.file, self.shape, self.affine = file, (*grid, classes), affine

    def __enter__(self) -> ProbabilityFile:
        header = nibabel.Nifti1Header()
        header.set_data_dtype(np.float32)
        header.set_data_shape(self.shape)
        header.set_sform(self.affine, code=1)
        header.set_qform(self.affine, code=1)
        header["magic"], header["vox_offset"] = b"n+1", 352
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.part = self.file.with_name(f".part-{self.file.name}")
        with open(self.part, "w+b") as handle:
            handle.write(header.binaryblock)
            handle.truncate(352 + 4 * int(np.prod(self.shape, dtype=np.int64)))
            self.memory = mmap.mmap(handle.fileno(), 0)
        self.values = np.ndarray(self.shape, "<f4", self.memory, 352, order="F")
        return self

    def release(self) -> None:
        """Leave to the system what was written so far."""
        if hasattr(self.memory, "madvise"):  # not on Windows
            self.memory.madvise(mmap.MADV_DONTNEED)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            del self.values
            self.memory.close()
            os.replace(self.part, self.file)
        self.part.unlink(missing_ok=True)
