"""Semantic segmentation of photographs: cross-entropy on every pixel, mean intersection over union."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from vssm.checkpoints import load_weights
from vssm.checkpoints.files import written_whole
from vssm.data.scenes import IGNORED
from vssm.registries.zoo import create_model, find
from vssm.tasks.optimizer import Optimizer, Schedule
from vssm.tasks.scored import ScoredTask


class SemanticSegmentation(ScoredTask):
    """Train, validate, test and predict with one segmenter of images (B, 3, H, W) to logits (B, classes, H, W).

    Scores are taken at the size of the annotation, over all its labelled pixels: ``miou``, the mean over the classes
    that occur of intersection over union, and ``acc``, the share of pixels that are right.

    Args:
        model: Name of one of our segmenters (``"upernet"`` with ``model_kwargs: {backbone: NAME}``, or
            ``"upernet_vmamba_tiny"``), or a module given by ``class_path``.
        num_classes: Number of classes; those of the data must be as many.
        model_kwargs: Further arguments of the model.
        pretrained: Start from the published weights of the segmenter.
        checkpoint_path: Start from this file of the segmenter instead (``vssm.load_weights``).
        backbone_pretrained: Start the backbone from the published weights of its classifier.
        backbone_checkpoint_path: Start the backbone from this file of its classifier; every key must fit.
        auxiliary_weight: Weight of each further output of the model in training.
        window: Height and width of the windows that an image is cut into in evaluation; None takes it whole.
        overlap: Share of a window that the next one covers again; their logits are averaged.
        optimizer, schedule, ema_decay, ema_warmup: See ``Task``.
        grad_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Compile the model with ``torch.compile``.
    """

    score, score_name = "miou", "mIoU"

    def __init__(
        self,
        model: str | nn.Module,
        num_classes: int,
        *,
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        backbone_pretrained: bool = False,
        backbone_checkpoint_path: str | None = None,
        auxiliary_weight: float = 0.4,
        window: tuple[int, int] | None = None,
        overlap: float = 1 / 3,
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        grad_checkpointing: bool = False,
        compile: bool = False,
    ):
        if not 0 <= overlap < 1:
            raise ValueError(f"SemanticSegmentation: overlap must be 0 or more and below 1, got {overlap}")
        if window is not None and find_spec("monai") is None:
            raise ValueError(
                "SemanticSegmentation: window needs MONAI, which is not installed; run: pip install 'vssm[medical]'"
            )
        super().__init__(
            _build(model, num_classes, model_kwargs or {}, pretrained, backbone_pretrained, backbone_checkpoint_path),
            optimizer=optimizer,
            schedule=schedule,
            ema_decay=ema_decay,
            ema_warmup=ema_warmup,
            class_names=[str(number) for number in range(num_classes)],
        )
        self.save_hyperparameters(ignore=["model"] if isinstance(model, nn.Module) else [])
        if checkpoint_path is not None:
            load_weights(self.model, checkpoint_path)
        self.prepare_model(grad_checkpointing, compile)
        self.auxiliary_weight, self.window, self.overlap = auxiliary_weight, window, overlap
        self.score_with(_metrics(num_classes))

    # ---- training ----

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of the labelled pixels; further outputs are added with their weight."""
        outputs = self(images)
        first, *others = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        return _cross_entropy(first, target) + self.auxiliary_weight * sum(_cross_entropy(o, target) for o in others)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.finite_loss(batch, batch["image"], batch["label"])

    # ---- evaluation ----

    def logits(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(classes, *size) of an image (3, H, W), in float32."""
        if self.window is None:
            found = self(image[None])
        else:
            from monai.inferers import sliding_window_inference

            found = sliding_window_inference(image[None], self.window, 1, self, overlap=self.overlap)
        return F.interpolate(found.float(), size=size, mode="bilinear")[0]

    def evaluate(self, batch: dict[str, Any], metrics: MetricCollection, loss: MeanMetric) -> None:
        """Count the images of a batch, one by one."""
        for image, label in zip(batch["image"], batch["label"], strict=True):
            logits = self.logits(image, tuple(label.shape))[None]
            loss.update(_cross_entropy(logits, label[None]))
            metrics.update(logits, label[None])

    # ---- prediction ----

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[int, dict[str, Any]]]:
        """Write the class of each pixel as a PNG of the image's size into ``RUN/predictions``; return where."""
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "predictions"
        names, rows = self.trainer.datamodule.data["predict"].names, []
        columns = (batch[name] for name in ("image", "index", "height", "width"))
        for image, index, height, width in zip(*columns, strict=True):
            classes = self.logits(image, (int(height), int(width))).argmax(0).to(torch.uint8).cpu().numpy()
            file = folder / f"{Path(names[int(index)]).stem}.png"
            with written_whole(file) as part:
                Image.fromarray(classes).save(part, format="PNG")
            number = int(np.bincount(classes.ravel()).argmax())
            rows.append((int(index), {"prediction": str(file), "largest": self.class_names[number]}))
        return rows

    def prediction_rows(self, outputs: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
        return outputs


def _build(
    model: str | nn.Module,
    num_classes: int,
    kwargs: dict[str, Any],
    pretrained: bool,
    backbone_pretrained: bool,
    backbone_checkpoint_path: str | None,
) -> nn.Module:
    if isinstance(model, nn.Module):
        if pretrained or kwargs or backbone_pretrained or backbone_checkpoint_path:
            raise ValueError(
                "SemanticSegmentation: pretrained, model_kwargs and the backbone's weights are for models given by "
                f"name, got a {type(model).__name__}; give its arguments under model.init_args.model.init_args"
            )
        return model
    row = find(model.partition(".")[0], "SemanticSegmentation")
    if row.task != "segmentation":
        raise ValueError(
            f"SemanticSegmentation: {model} is for {row.task}; vssm.list_models(task='segmentation') names segmenters"
        )
    kwargs = {**kwargs, "out_channels": num_classes}
    try:
        if not (backbone_pretrained or backbone_checkpoint_path):
            return create_model(model, pretrained=pretrained, **kwargs)
        if pretrained:
            raise ValueError(
                "SemanticSegmentation: pretrained and the backbone's weights both say what to load; drop one"
            )
        arguments = {**row.kwargs, **kwargs}
        if "backbone" not in arguments:
            raise ValueError(f"SemanticSegmentation: {model} has no backbone with weights of its own")
        own = {"in_chans": arguments.get("in_channels", 3), **(arguments.pop("backbone_kwargs", None) or {})}
        classifier = create_model(
            arguments.pop("backbone"), pretrained=backbone_pretrained, checkpoint_path=backbone_checkpoint_path, **own
        )
        return row.build(**{**kwargs, "backbone": classifier, "backbone_kwargs": None})
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"SemanticSegmentation: model_kwargs do not fit {model}: {error}") from error


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the labelled pixels; zero where there is none."""
    total = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
    return total / (target != IGNORED).sum().clamp(min=1)


def _metrics(num_classes: int) -> dict[str, Metric]:
    options = {"num_classes": num_classes, "ignore_index": IGNORED}
    return {
        "miou": MulticlassJaccardIndex(**options),
        "acc": MulticlassAccuracy(average="micro", **options),
        "confusion": MulticlassConfusionMatrix(**options),
    }
