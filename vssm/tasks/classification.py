"""Image classification: any timm or vssm model, cross-entropy, timm's mixup, AdamW with warm-up and cosine."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch.nn.functional as F
from timm.data.mixup import Mixup as TimmMixup
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from vssm.checkpoints import load_weights
from vssm.registries.zoo import find, list_models
from vssm.tasks.base import settings
from vssm.tasks.distillation import Distillation, Mesa, predictions
from vssm.tasks.optimizer import Optimizer, Schedule
from vssm.tasks.scored import ScoredTask


@dataclass(frozen=True)
class Mixup:
    """timm's mixup and cutmix, by its names; both are off by default."""

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"


class Classification(ScoredTask):
    """Train, validate, test and predict with one classifier; images (B, C, H, W) in, logits (B, num_classes) out.

    Args:
        model: Name of a model, ours or timm's, or a module given by ``class_path``.
        num_classes: Number of classes; those of the data must be as many.
        model_kwargs: Further arguments of ``timm.create_model``: ``drop_path_rate``, ``scan``, ``img_size``, …
        pretrained: Start from the published weights (with a new head where ``num_classes`` differs).
        checkpoint_path: Start from this file instead, published or ours (``vssm.load_weights``).
        adapt: What of that file may be made to fit: another "classifier", other "in_chans", another "img_size".
        optimizer, schedule, mixup: See there.
        label_smoothing: Of the training loss.
        ema_decay: Also keep an exponential moving average of the weights, which is then what is validated, tested and
            saved as ``state_dict``; None keeps none.
        ema_warmup: Let the decay rise to ``ema_decay`` over the first steps, as timm does.
        distillation: A teacher for the model's second classifier; None for none.
        mesa: Let the weight average teach the weights, too; needs ``ema_decay``. None does not.
        grad_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Compile the model with ``torch.compile``.
    """

    score, score_name = "acc1", "accuracy"

    def __init__(
        self,
        model: str | nn.Module,
        num_classes: int,
        *,
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        adapt: tuple[Literal["classifier", "in_chans", "img_size"], ...] = (),
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        mixup: Mixup = Mixup(),
        label_smoothing: float = 0.0,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        distillation: Distillation | None = None,
        mesa: Mesa | None = None,
        grad_checkpointing: bool = False,
        compile: bool = False,
    ):
        super().__init__(
            _build(model, num_classes, pretrained, model_kwargs or {}),
            optimizer=optimizer,
            schedule=schedule,
            ema_decay=ema_decay,
            ema_warmup=ema_warmup,
            class_names=[str(number) for number in range(num_classes)],
        )
        self.save_hyperparameters(ignore=["model"] if isinstance(model, nn.Module) else [])
        if checkpoint_path is not None:
            load_weights(self.model, checkpoint_path, adapt=adapt)
        self.prepare_model(grad_checkpointing, compile)
        self.label_smoothing = label_smoothing
        self.mixup, mixup = None, settings(Mixup, mixup)
        if mixup.mixup_alpha > 0 or mixup.cutmix_alpha > 0:
            self.mixup = TimmMixup(**vars(mixup), label_smoothing=label_smoothing, num_classes=num_classes)
        self.num_classes = num_classes
        self.distillation = None if distillation is None else settings(Distillation, distillation)
        self.mesa = None if mesa is None else settings(Mesa, mesa)
        self._teacher: list[nn.Module] = []  # in a list: no part of this module, its checkpoints, its modes
        if self.mesa is not None and (ema_decay is None or self.distillation is not None):
            raise ValueError(
                "Classification: mesa needs ema_decay, whose average teaches, and no distillation beside it, got "
                f"ema_decay={ema_decay} and distillation={distillation}"
            )
        if self.distillation is not None:
            if not hasattr(self.model, "set_distilled_training"):
                raise ValueError(
                    "Classification: distillation needs a model with a second classifier and set_distilled_training, "
                    f"as groupmamba_* and deit_*_distilled are, got a {type(self.model).__name__}"
                )
            self.model.set_distilled_training(True)
        self.score_with(_metrics(num_classes))

    # ---- training ----

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images, target = batch["image"], batch["label"]
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        return self.finite_loss(batch, images, target)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        pixels = getattr(self.trainer.datamodule, "pixels", None)
        in_chans = (self.hparams.get("model_kwargs") or {}).get("in_chans", 3)
        if isinstance(self.hparams.get("model"), str) and pixels is not None and pixels.in_chans != in_chans:
            raise ValueError(
                f"Classification: the model must take images of {pixels.in_chans} channels, as data.init_args.pixels."
                f"in_chans says, got {in_chans}; set model.init_args.model_kwargs.in_chans={pixels.in_chans}"
            )
        if stage == "fit" and self.mixup is not None and (size := self.trainer.datamodule.loader.batch_size) % 2:
            raise ValueError(
                f"Classification: mixup pairs the images of a batch, so loader.batch_size must be even, got {size}"
            )
        if stage == "fit" and self.distillation is not None:
            self._teacher = [self.distillation.build(self.model, self.num_classes)]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for teacher in self._teacher:
            teacher.to(self.device)

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy; of soft targets without further smoothing, since timm's mixup smooths them.

        With ``distillation`` or ``mesa`` also what they add.
        """
        smoothing = self.label_smoothing if target.ndim == 1 else 0.0
        outputs = self(images)
        logits = outputs if self.distillation is None else outputs[0]
        loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
        if self.distillation is not None:
            return self.distillation.loss(outputs, loss, predictions(self._teacher[0], images))
        if self.mesa is not None and self.global_step >= self.mesa.start * self.total_steps:
            return loss + self.mesa.loss(logits, predictions(self.average, images))
        return loss

    # ---- evaluation ----

    def evaluate(self, batch: dict[str, Tensor] | None, metrics: MetricCollection, loss: MeanMetric) -> None:
        """Count the logits of a batch."""
        if batch is None:  # none of its images could be read
            return
        logits = self(batch["image"]).float()
        loss.update(F.cross_entropy(logits, batch["label"]), weight=len(logits))
        metrics.update(logits, batch["label"])

    # ---- prediction ----

    def predict_step(self, batch: dict[str, Tensor] | None, batch_idx: int) -> dict[str, Tensor] | None:
        """Return the most probable class of each image and its probability."""
        if batch is None:
            return None
        probability, label = self(batch["image"]).float().softmax(dim=-1).max(dim=-1)
        return {"index": batch["index"], "label": label, "probability": probability}

    def prediction_rows(self, outputs: dict[str, Tensor]) -> list[tuple[int, dict[str, Any]]]:
        """Return class and probability of each image."""
        columns = (outputs[name].tolist() for name in ("index", "label", "probability"))
        return [(i, {"class": self.class_names[c], "probability": f"{p:.6f}"}) for i, c, p in zip(*columns)]


def _build(model: str | nn.Module, num_classes: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if isinstance(model, nn.Module):
        if pretrained or kwargs:
            raise ValueError(
                "Classification: pretrained and model_kwargs are for models given by name, got a "
                f"{type(model).__name__}; give its arguments under model.init_args.model.init_args"
            )
        return model
    if "num_classes" in kwargs or "pretrained" in kwargs:
        raise ValueError("Classification: num_classes and pretrained stand beside model_kwargs, got them inside it")
    if num_classes < 2:
        raise ValueError(f"Classification: num_classes must be 2 or more, got {num_classes}")
    if ":" not in model and not timm.is_model(model):  # hf-hub:…, local-dir:… are looked up by timm
        if model in list_models():
            raise ValueError(f"Classification: {model} is for {find(model).task}; set model.class_path to that task")
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`vssm models` and timm.list_models() name them"
        raise ValueError(f"Classification: no model named {model!r}; {hint}")
    try:
        return timm.create_model(model, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"Classification: model_kwargs do not fit {model}: {error}") from error


def _metrics(num_classes: int) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {
        "acc1": MulticlassAccuracy(num_classes, average="micro"),
        "confusion": MulticlassConfusionMatrix(num_classes),
    }
    if num_classes > 5:
        metrics["acc5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    return metrics
