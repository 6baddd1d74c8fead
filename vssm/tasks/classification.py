"""Image classification: any timm or vssm model, cross-entropy, timm's mixup, AdamW with warm-up and cosine."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from timm.data.mixup import Mixup as TimmMixup
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from vssm.checkpoints import load_weights
from vssm.tasks.finite import NonFiniteLoss, all_finite, first_nonfinite_module
from vssm.tasks.optimizer import Optimizer, Schedule
from vssm.tasks.random_state import get_random_state, set_random_state
from vssm.tasks.saving import WeightAverage

T = TypeVar("T")


@dataclass(frozen=True)
class Mixup:
    """timm's mixup and cutmix, by its names; both are off by default."""

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"


class Classification(LightningModule):
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
        grad_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Compile the model with ``torch.compile``.
    """

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
        grad_checkpointing: bool = False,
        compile: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters(ignore=["model"] if isinstance(model, nn.Module) else [])
        self.model = _build(model, num_classes, pretrained, model_kwargs or {})
        if checkpoint_path is not None:
            load_weights(self.model, checkpoint_path, adapt=adapt)
        if grad_checkpointing:
            cast(Any, self.model).set_grad_checkpointing(True)
        if compile:
            self.model.compile()
        self.optimizer, self.schedule = _settings(Optimizer, optimizer), _settings(Schedule, schedule)
        self.label_smoothing = label_smoothing
        self.ema_decay, self.ema_warmup = ema_decay, ema_warmup
        self.mixup, mixup = None, _settings(Mixup, mixup)
        if mixup.mixup_alpha > 0 or mixup.cutmix_alpha > 0:
            self.mixup = TimmMixup(**vars(mixup), label_smoothing=label_smoothing, num_classes=num_classes)
        self.num_classes = num_classes
        self.class_names = [str(number) for number in range(num_classes)]
        self.val_metrics, self.test_metrics = _metrics(num_classes, "val/"), _metrics(num_classes, "test/")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    # ---- training ----

    def setup(self, stage: str) -> None:
        """Compare the classes of the data with the head of the model."""
        names = getattr(self.trainer.datamodule, "class_names", None)
        if names:
            if len(names) != self.num_classes:
                raise ValueError(
                    f"Classification: num_classes must be the number of classes in the data, {len(names)}, got "
                    f"{self.num_classes}; set model.init_args.num_classes={len(names)}"
                )
            self.class_names = list(names)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images, target, smoothing = batch["image"], batch["label"], self.label_smoothing
        if self.mixup is not None:
            (images, target), smoothing = self.mixup(images, target), 0.0  # timm's mixup smooths the labels itself
        before = get_random_state()
        loss = F.cross_entropy(self(images), target, label_smoothing=smoothing)
        if not torch.isfinite(loss):
            self._stop(batch, images, target, before)
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(images))
        return loss

    def _stop(self, batch: dict[str, Tensor], images: Tensor, target: Tensor, before: dict[str, Any]) -> None:
        """Save the batch and raise, naming the module; runs on the one process whose loss is not finite."""
        set_random_state(before)  # dropout and drop path as they were
        logits: list[Tensor] = []
        with torch.compiler.set_stance("force_eager"):
            module = first_nonfinite_module(self.model, lambda: logits.append(self.model(images)))
        if not all_finite(images):
            origin = "the images themselves are not finite"
        elif module is not None:
            origin = f"the first module that returned a non-finite value is {module}"
        elif all_finite(logits):
            origin = "the logits are finite, the loss function overflowed"
        else:
            origin = "no single module turned finite inputs into non-finite outputs"
        folder = Path(self.run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"nonfinite_step{self.global_step}_rank{self.global_rank}.pt"
        saved = {"image": images, "target": target, "label": batch["label"], "index": batch.get("index")}
        torch.save({**saved, "random_state": before, "state_dict": self.state_dict(), "origin": origin}, file)
        raise NonFiniteLoss(
            f"Classification: the loss must be finite, got NaN or infinity in epoch {self.current_epoch}, step "
            f"{self.global_step}: {origin}; batch and weights are saved in {file}"
        )

    def on_fit_start(self) -> None:
        """Remember the run folder: asking the trainer for it involves all processes."""
        self.run_folder = self.trainer.log_dir or self.trainer.default_root_dir

    def configure_optimizers(self) -> dict[str, Any]:
        trainer, loader = self.trainer, self.trainer.datamodule.loader
        batch = loader.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        optimizer = self.optimizer.build(self.model, batch)
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("Classification: the schedule needs an end; set trainer.max_epochs or trainer.max_steps")
        epochs = steps / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        scheduler = self.schedule.build(optimizer, int(steps), epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: CosineLRScheduler, metric: Any) -> None:
        """timm counts updates itself."""
        scheduler.step_update(self.global_step)

    def configure_callbacks(self) -> list[Callback]:
        return [] if self.ema_decay is None else [WeightAverage(self.ema_decay, warmup=self.ema_warmup)]

    # ---- evaluation ----

    def validation_step(self, batch: dict[str, Tensor] | None, batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics, self.val_loss)

    def test_step(self, batch: dict[str, Tensor] | None, batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics, self.test_loss)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val", self.val_metrics, self.val_loss)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test", self.test_metrics, self.test_loss)

    def _evaluate(self, batch: dict[str, Tensor] | None, metrics: MetricCollection, loss: MeanMetric) -> None:
        if batch is None:  # none of its images could be read
            return
        logits = self(batch["image"]).float()
        loss.update(F.cross_entropy(logits, batch["label"]), weight=len(logits))
        metrics.update(logits, batch["label"])

    def _log_metrics(self, split: str, metrics: MetricCollection, loss: MeanMetric) -> None:
        values = metrics.compute()  # over all processes
        self.confusion = values.pop(f"{split}/confusion")
        self.log_dict({**values, f"{split}/loss": loss.compute()}, prog_bar=True, sync_dist=True)
        metrics.reset()
        loss.reset()

    # ---- prediction ----

    def predict_step(self, batch: dict[str, Tensor] | None, batch_idx: int) -> dict[str, Tensor] | None:
        """Return the most probable class of each image and its probability."""
        if batch is None:
            return None
        probability, label = self(batch["image"]).float().softmax(dim=-1).max(dim=-1)
        return {"index": batch["index"], "label": label, "probability": probability}

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = self.class_names
        arguments = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        settings = {name: value for name, value in arguments.items() if is_dataclass(value)}
        arguments.update({name: asdict(cast(Any, value)) for name, value in settings.items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = checkpoint.get("class_names", self.class_names)
        data = getattr(self._trainer, "datamodule", None)
        if getattr(data, "class_names", trained) not in ([], trained):
            expected, found = ", ".join(trained[:5]), ", ".join(self.class_names[:5])
            raise ValueError(
                f"Classification: the classes of the data must be those of the checkpoint, {expected}, …, "
                f"got {found}, …; keep a train folder with all classes beside the one that is tested"
            )
        self.class_names = trained


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
    if ":" not in model and not timm.is_model(model):  # hf-hub:…, local-dir:… are looked up by timm
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`vssm models` and timm.list_models() name them"
        raise ValueError(f"Classification: no model named {model!r}; {hint}")
    try:
        return timm.create_model(model, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"Classification: model_kwargs do not fit {model}: {error}") from error


def _settings(kind: type[T], value: T | dict[str, Any]) -> T:
    return kind(**value) if isinstance(value, dict) else value  # checkpoints hold plain dicts


def _metrics(num_classes: int, prefix: str) -> MetricCollection:
    metrics: dict[str, Metric] = {
        "acc1": MulticlassAccuracy(num_classes, average="micro"),
        "confusion": MulticlassConfusionMatrix(num_classes),
    }
    if num_classes > 5:
        metrics["acc5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    return MetricCollection(metrics, prefix=prefix)
