"""Segmentation of volumes and slices: Dice and cross-entropy, sliding windows, Dice and HD95 by class."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torchmetrics import MeanMetric

from vssm.registries.extras import missing

try:
    from monai.inferers import sliding_window_inference
except ModuleNotFoundError as error:
    raise missing("vssm.tasks.segmentation", error) from error

from vssm.checkpoints import load_encoder, load_weights
from vssm.data.preparation import Preparation
from vssm.data.volume_files import IMAGE_SUFFIXES, read_volume, suffix_of, write_label
from vssm.data.volumes import Scan
from vssm.registries.zoo import create_model, find, list_models
from vssm.tasks.base import Task, settings
from vssm.tasks.case_report import CaseReport, Picture
from vssm.tasks.losses import Loss, deep_supervision
from vssm.tasks.measures import dice, hausdorff95_mm
from vssm.tasks.optimizer import Freeze, Optimizer, Schedule
from vssm.tasks.report import PredictionWriter
from vssm.tasks.sliding import Inference, segment, window_logits


class Segmentation(Task):
    """Train, validate, test and predict with one segmenter; logits of the input's spatial size.

    Validation runs MONAI's sliding windows on prepared volumes. Test and prediction answer on the grid that each file
    has, and so compare with its label as it stands.

    Args:
        model: Name of one of our segmenters (``vssm.list_models(task="segmentation")``), or a module given by
            ``class_path``, such as MONAI's.
        out_channels: Number of classes, the background included; those of the data must be as many. Or 1: a single
            channel whose sigmoid is the probability of the second of two classes.
        in_channels: Channels of the data; of a frame, where the network takes clips. Their frames come as channels
            (``vssm.data.video``), and the answer is the network's for the middle one.
        model_kwargs: Further arguments of the model, such as ``deep_supervision``.
        pretrained: Start from the published weights.
        checkpoint_path: Start from this file instead (``vssm.load_weights``).
        encoder_weights: Start the encoder from a classifier: a row of the zoo, or a file
            (``vssm.checkpoints.load_encoder``).
        freeze: Parameters that stay as they are for the first epochs.
        loss: See there. Where the model returns a list (deep supervision), finest first, the terms are weighted 1, 1/2,
            1/4, …, the coarsest with 0, over their sum, as in nnU-Net.
        inference: Windows of validation, test and prediction.
        regions: What is scored, by name: a region is a list of class numbers (``{"WT": [1, 2, 3]}``). None scores
            every class but the background.
        pictures: How many cases are drawn, each with truth and prediction side by side.
        optimizer, schedule, ema_decay, ema_warmup: See ``Task``.
        grad_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Compile the model with ``torch.compile``.
    """

    score, score_name = "dice", "mean Dice"

    def __init__(
        self,
        model: str | nn.Module,
        out_channels: int,
        in_channels: int = 1,
        *,
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        encoder_weights: str | None = None,
        freeze: Freeze = Freeze(),
        loss: Loss = Loss(),
        inference: Inference = Inference(),
        regions: dict[str, list[int]] | None = None,
        pictures: int = 2,
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        grad_checkpointing: bool = False,
        compile: bool = False,
    ):
        super().__init__(
            _build(model, in_channels, out_channels, pretrained, model_kwargs or {}),
            optimizer=optimizer,
            schedule=schedule,
            ema_decay=ema_decay,
            ema_warmup=ema_warmup,
            class_names=[str(number) for number in range(max(out_channels, 2))],
            classes_argument="out_channels",
        )
        self.save_hyperparameters(ignore=["model"] if isinstance(model, nn.Module) else [])
        if checkpoint_path is not None:
            load_weights(self.model, checkpoint_path)
        if encoder_weights is not None:
            load_encoder(self.model, encoder_weights)
        self.prepare_model(grad_checkpointing, compile)
        self.frames = getattr(self.model, "frames", 1)
        self.in_channels, self.out_channels = in_channels * self.frames, out_channels
        self.freeze = settings(Freeze, freeze)
        self._frozen = self.freeze.of(self.model)
        self.criterion = settings(Loss, loss).build(out_channels)
        self.inference = settings(Inference, inference)
        numbers = range(len(self.class_names))
        for name, members in (regions or {}).items():
            if not members or not set(members) <= set(numbers):
                raise ValueError(
                    f"Segmentation: regions must list class numbers 0 … {numbers[-1]}, got {name}: {members}"
                )
        self._regions, self.pictures = regions, pictures
        count = len(self.regions)
        self.means = nn.ModuleDict(
            {
                split: nn.ModuleList([MeanMetric(nan_strategy="ignore") for _ in range(2 * count)])
                for split in ("val", "test")
            }
        )
        self.val_loss = MeanMetric()
        self.preparation: Preparation | None = None
        self.label_values: tuple[int, ...] = ()
        self.case_rows: list[tuple[int, dict[str, Any]]] = []
        self.case_pictures: list[Picture] = []

    @property
    def regions(self) -> Mapping[str, list[int]]:
        """What is scored: names and class numbers."""
        return self._regions or {name: [number] for number, name in enumerate(self.class_names) if number}

    def setup(self, stage: str) -> None:
        """Compare classes and channels of the data with those of the model; take over how volumes are prepared."""
        data = self.trainer.datamodule
        names = getattr(data, "class_names", None)
        if self.out_channels == 1 and names and len(names) != 2:
            raise ValueError(
                f"Segmentation: a single channel tells two classes apart, the data have {len(names)}; set "
                f"model.init_args.out_channels={len(names)}"
            )
        super().setup(stage)
        if data.in_channels not in (None, self.in_channels):
            if self.frames > 1:
                raise ValueError(
                    f"Segmentation: the data must have {self.frames} frames of {self.in_channels // self.frames} "
                    f"channels, got {data.in_channels} channels in all; see vssm.data.video.VideoFolders"
                )
            raise ValueError(
                f"Segmentation: in_channels must be the number of channels in the data, {data.in_channels}, got "
                f"{self.in_channels}; set model.init_args.in_channels={data.in_channels}"
            )
        self.preparation = data.preparation
        sides = [size for size in data.preparation.patch if size > 1]
        frames = [self.frames] if self.frames > 1 else []
        try:
            if hasattr(self.model, "check"):
                self.model.check(torch.empty(1, *frames, self.in_channels // self.frames, *sides, device="meta"))
        except ValueError as error:
            raise ValueError(
                f"Segmentation: data.init_args.preparation.patch {tuple(data.preparation.patch)} does not fit the "
                f"model: {error}"
            ) from error
        self.label_values = data.label_values or self.label_values

    def forward(self, images: Tensor) -> Any:
        """Return the model's logits for images (B, C, …); of a clip's frames, those of the middle one."""
        if self.frames == 1:
            return self.model(images)
        outputs = self.model(images.unflatten(1, (self.frames, -1)))
        return (outputs[0] if isinstance(outputs, tuple) else outputs)[:, self.frames // 2]

    # ---- training ----

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.finite_loss(batch, batch["image"], batch["label"])

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the loss for images (B, C, …) and class numbers (B, …)."""
        outputs, target = self(images), self._wanted(target)
        if isinstance(outputs, (list, tuple)):
            return deep_supervision(self.criterion, outputs, target)
        return self.criterion(outputs.float(), target)

    def _wanted(self, target: Tensor) -> Tensor:
        """Class numbers (B, …) as the criterion takes them, (B, 1, …)."""
        return target.unsqueeze(1).to(torch.float if self.out_channels == 1 else torch.long)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.current_epoch < self.freeze.epochs:
            for parameter in self._frozen:
                parameter.grad = None

    def configure_callbacks(self) -> list[Callback]:
        return [*super().configure_callbacks(), CaseReport()]

    # ---- evaluation ----

    def class_logits(self, images: Tensor) -> Tensor:
        """Return the logits of every class, (B, classes, …), the finest where the model returns several.

        Where it has a single channel, those of the first class are 0: the softmax of both is then its sigmoid.
        """
        logits = self(images)
        logits = logits[0] if isinstance(logits, (list, tuple)) else logits
        return logits if self.out_channels > 1 else torch.cat([torch.zeros_like(logits), logits], 1)

    def validation_step(self, scan: Scan, batch_idx: int) -> None:
        patch, flat = self.preparation.patch, self.preparation.flat_axis
        logits = sliding_window_inference(
            scan.image[None],
            patch,
            self.inference.batch_size,
            lambda windows: window_logits(self.class_logits, windows, flat).float(),
            overlap=self.inference.overlap,
            mode="gaussian",
            sw_device=self.device,
            device="cpu",
        )
        loss = self.criterion(logits[:, -self.out_channels :], self._wanted(scan.label[None]))
        self.val_loss.update(loss.to(self.device))
        spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)
        truth, predicted = scan.label.numpy(), logits[0].argmax(0).numpy()
        self._score("val", scan, truth, predicted, spacing)
        if len(self.case_pictures) < self.pictures:
            self._picture(scan, scan.image[self._shown].numpy(), truth, predicted, spacing)

    def test_step(self, scan: Scan, batch_idx: int) -> None:
        predicted = segment(self.class_logits, scan, self.preparation.patch, self.inference, device=self.device)
        spacing = np.linalg.norm(scan.grid_affine[:3, :3], axis=0)
        self._score("test", scan, scan.own_label, predicted, spacing)
        if len(self.case_pictures) < self.pictures:
            image = read_volume(scan.case.images)[0][self._shown]
            self._picture(scan, image, scan.own_label, predicted, spacing)

    def _picture(self, scan: Scan, *volumes: np.ndarray) -> None:
        rows_first = suffix_of(scan.case.images[0]) in IMAGE_SUFFIXES
        self.case_pictures.append(Picture.of(scan.case.name, *volumes, rows_first=rows_first))

    @property
    def _shown(self) -> int:
        """The channel that pictures show: the first, of the middle frame."""
        return self.frames // 2 * (self.in_channels // self.frames)

    def _score(self, split: str, scan: Scan, truth: np.ndarray, predicted: np.ndarray, spacing_mm: np.ndarray) -> None:
        """Add a case to the means: Dice and, in millimetres, HD95 of each region."""
        row: dict[str, Any] = {"case": scan.case.name}
        means = cast(nn.ModuleList, self.means[split])
        for number, (name, members) in enumerate(self.regions.items()):
            a, b = np.isin(truth, members), np.isin(predicted, members)
            values = {f"dice_{name}": dice(a, b), f"hd95_mm_{name}": hausdorff95_mm(a, b, spacing_mm)}
            for metric, value in zip(means[2 * number : 2 * number + 2], values.values()):
                metric.update(value)
            row |= values
            row[f"volume_ml_{name}"] = float(b.sum() * spacing_mm.prod() / 1000)
        self.case_rows.append((scan.index, row))

    def on_validation_epoch_start(self) -> None:
        self.case_rows, self.case_pictures = [], []

    def on_test_epoch_start(self) -> None:
        self.case_rows, self.case_pictures = [], []

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss.compute(), sync_dist=True)
        self.val_loss.reset()
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _log_means(self, split: str) -> None:
        values = []
        for metric in cast(nn.ModuleList, self.means[split]):
            values.append(metric.compute())  # over all processes
            metric.reset()
        dices, distances = torch.stack(values[0::2]), torch.stack(values[1::2])
        named = {f"{split}/dice_{name}": value for name, value in zip(self.regions, dices)}
        named |= {f"{split}/hd95_mm_{name}": value for name, value in zip(self.regions, distances)}
        self.log_dict(named, sync_dist=True)
        means = {f"{split}/dice": dices.nanmean(), f"{split}/hd95_mm": distances.nanmean()}
        self.log_dict(means, prog_bar=True, sync_dist=True)

    # ---- prediction ----

    def predict_step(self, scan: Scan, batch_idx: int) -> dict[str, Any]:
        """Write the classes of a volume beside the table of predictions, on the volume's own grid."""
        tables = [Path(c.path) for c in self.trainer.callbacks if isinstance(c, PredictionWriter)]
        folder = tables[0].with_suffix("") if tables else Path("predictions")
        predicted = segment(self.class_logits, scan, self.preparation.patch, self.inference, device=self.device)
        file = write_prediction(folder, scan, predicted, self.label_values)
        return {"index": scan.index, "file": str(file), "volumes_ml": self.volumes_ml(scan, predicted)}

    def prediction_rows(self, outputs: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        """Return the file that was written for a volume, and the volume of each region."""
        return [(outputs["index"], {"prediction": outputs["file"], **outputs["volumes_ml"]})]

    def volumes_ml(self, scan: Scan, predicted: np.ndarray) -> dict[str, float]:
        """Return the volume of each region in millilitres."""
        voxel_ml = abs(np.linalg.det(scan.grid_affine[:3, :3])) / 1000
        return {
            f"volume_ml_{name}": round(sum(int((predicted == number).sum()) for number in members) * voxel_ml, 4)
            for name, members in self.regions.items()
        }

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["preparation"] = asdict(self.preparation) if self.preparation else None
        checkpoint["label_values"] = list(self.label_values)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("preparation")
        if saved is None:
            return
        trained = Preparation(**saved)
        differing = [
            f"{name} {value} instead of {asdict(trained)[name]}"
            for name, value in asdict(self.preparation or trained).items()
            if name != "patch" and value != asdict(trained)[name]
        ]
        if differing:
            raise ValueError(
                "Segmentation: volumes must be prepared as for training, got "
                f"{'; '.join(differing)}; restore data.init_args.preparation"
            )
        self.preparation = self.preparation or trained
        self.label_values = self.label_values or tuple(checkpoint["label_values"])


def write_prediction(folder: Path, scan: Scan, predicted: np.ndarray, values: tuple[int, ...]) -> Path:
    """Write class numbers as the label values that the training data have, as NIfTI or PNG; return the file."""
    if values and tuple(values) != tuple(range(len(values))):
        kind = np.uint8 if min(values) >= 0 and max(values) < 256 else np.int16
        predicted = np.asarray(values, dtype=kind)[predicted]
    like = scan.case.images[0]
    file = folder / f"{scan.case.name}{'.png' if suffix_of(like) in IMAGE_SUFFIXES else '.nii.gz'}"
    write_label(file, predicted, like)
    return file


def _build(
    model: str | nn.Module, in_channels: int, out_channels: int, pretrained: bool, kwargs: dict[str, Any]
) -> nn.Module:
    if isinstance(model, nn.Module):
        if pretrained or kwargs:
            raise ValueError(
                "Segmentation: pretrained and model_kwargs are for models given by name, got a "
                f"{type(model).__name__}; give its arguments under model.init_args.model.init_args"
            )
        return model
    beside = {"in_channels", "out_channels", "pretrained"} & set(kwargs)
    if beside:
        raise ValueError(f"Segmentation: {', '.join(sorted(beside))} stand beside model_kwargs, got them inside it")
    known = list_models(task="segmentation")
    if model.partition(".")[0] not in known:
        if model in list_models():
            task = find(model).task
            raise ValueError(f"Segmentation: {model} is for {task}; `vssm models --task segmentation` names segmenters")
        near = difflib.get_close_matches(model, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`vssm models` names them"
        raise ValueError(f"Segmentation: no segmenter named {model!r}; {hint}")
    try:
        return create_model(
            model, pretrained=pretrained, in_channels=in_channels, out_channels=out_channels, **kwargs
        )
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"Segmentation: model_kwargs do not fit {model}: {error}") from error
