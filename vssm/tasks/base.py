"""What every task shares: optimiser, schedule, weight average, class names, and the stop at a non-finite loss."""

from __future__ import annotations

import math
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from lightning.pytorch import Callback, LightningModule
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from vssm.tasks.finite import NonFiniteLoss, all_finite, first_nonfinite_module
from vssm.tasks.optimizer import Optimizer, Schedule
from vssm.tasks.random_state import get_random_state, set_random_state
from vssm.tasks.saving import AveragedWeights, ScheduleFreeAverage, WeightAverage

T = TypeVar("T")
NETWORK = (
    "model", "model_kwargs", "num_classes", "in_channels", "out_channels", "detector", "backbone", "pyramid",
    "backbone_kwargs", "detector_kwargs"
)  # fmt: skip
"""Arguments of tasks that make the network what it is."""


class Task(LightningModule):
    """A model and how it is trained. A task adds the loss (``loss``), the evaluation steps and the predictions.

    Batches are dicts with ``image`` and ``index``. ``val/SCORE`` and ``test/SCORE`` must be logged: higher is better.

    Args:
        model: What is trained; ``forward`` is its.
        optimizer, schedule: See there.
        ema_decay: Also keep an exponential moving average of the weights, which is then what is validated, tested and
            saved as ``state_dict``; None keeps none.
        ema_warmup: Let the decay rise to ``ema_decay`` over the first steps, as timm does.
        class_names: Names of the classes until the data say theirs.
        classes_argument: The argument of the task that says how many classes there are, for messages.
    """

    score: ClassVar[str]
    """The metric by which the best checkpoint is chosen."""
    score_name: ClassVar[str]
    """The same in words, for the last line that ``vssm train test`` prints."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | dict[str, Any],
        schedule: Schedule | dict[str, Any],
        ema_decay: float | None,
        ema_warmup: bool,
        class_names: list[str],
        classes_argument: str = "num_classes",
    ):
        super().__init__()
        self.model = model
        self.optimizer, self.schedule = settings(Optimizer, optimizer), settings(Schedule, schedule)
        self.ema_decay, self.ema_warmup = ema_decay, ema_warmup
        if self.optimizer.schedule_free and (self.schedule.shape != "constant" or ema_decay is not None):
            raise ValueError(
                f"{type(self).__name__}: {self.optimizer.name} keeps an average of its own in the place of a schedule; "
                f"set schedule.shape='constant' and ema_decay=null, got {self.schedule.shape!r} and {ema_decay}"
            )
        self.class_names, self._classes_argument = class_names, classes_argument

    def prepare_model(self, grad_checkpointing: bool, compile: bool = False) -> None:
        """Recompute activations in the backward pass, and compile the model, where that is asked for.

        Raises:
            ValueError: If the model cannot recompute.
        """
        if grad_checkpointing:
            if not hasattr(self.model, "set_grad_checkpointing"):
                raise ValueError(
                    f"{type(self).__name__}: grad_checkpointing needs a model with set_grad_checkpointing, as those of "
                    f"vssm and timm, got a {type(self.model).__name__}; set model.init_args.grad_checkpointing=false"
                )
            cast(Any, self.model).set_grad_checkpointing(True)
        if compile:
            self.model.compile()

    def forward(self, images: Tensor) -> Any:
        return self.model(images)

    # ---- what a task says ----

    def run_model(self, images: Any, target: Any) -> Any:
        """Run the model as the loss does, to find out where a value that is not finite comes from."""
        return self(images)

    def loss(self, images: Any, target: Any) -> Tensor:
        """Return the training loss of ``self(images)``."""
        raise NotImplementedError

    def prediction_rows(self, outputs: Any) -> list[tuple[int, dict[str, Any]]]:
        """Return the rows of the table of predictions that an output of ``predict_step`` gives, each with its index."""
        raise NotImplementedError

    # ---- training ----

    def setup(self, stage: str) -> None:
        """Compare the classes of the data with those of the model."""
        names = getattr(self.trainer.datamodule, "class_names", None)
        if names:
            if len(names) != len(self.class_names):
                raise ValueError(
                    f"{type(self).__name__}: {self._classes_argument} must be the number of classes in the data, "
                    f"{len(names)}, got {len(self.class_names)}; set "
                    f"model.init_args.{self._classes_argument}={len(names)}"
                )
            self.class_names = list(names)

    def finite_loss(self, batch: dict[str, Any], images: Tensor, target: Any) -> Tensor:
        """Return ``loss(images, target)``, logged; a value that is not finite saves the batch and stops the run."""
        before = get_random_state()
        loss = self.loss(images, target)
        if not torch.isfinite(loss):
            self._stop(batch, images, target, before)
        self.log("train/loss_step", loss, prog_bar=True, on_step=True, on_epoch=False)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward on this thread: a process has one GPU, whose launches would wait for another thread to wake."""
        with torch.autograd.set_multithreading_enabled(False):
            super().backward(loss, *args, **kwargs)

    def _stop(self, batch: dict[str, Any], images: Tensor, target: Any, before: dict[str, Any]) -> None:
        """Save the batch and raise, naming the module; runs on the one process whose loss is not finite."""
        set_random_state(before)  # dropout and drop path as they were
        outputs: list[Any] = []
        with torch.compiler.set_stance("force_eager"):
            module = first_nonfinite_module(self.model, lambda: outputs.append(self.run_model(images, target)))
        if not all_finite(images):
            origin = "the images themselves are not finite"
        elif module is not None:
            origin = f"the first module that returned a non-finite value is {module}"
        elif all_finite(outputs):
            origin = "the logits are finite, the loss function overflowed"
        else:
            origin = "no single module turned finite inputs into non-finite outputs"
        folder = Path(self.run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"nonfinite_step{self.global_step}_rank{self.global_rank}.pt"
        saved = {"image": images, "target": target, "label": batch.get("label"), "index": batch.get("index")}
        torch.save({**saved, "random_state": before, "state_dict": self.state_dict(), "origin": origin}, file)
        raise NonFiniteLoss(
            f"{type(self).__name__}: the loss must be finite, got NaN or infinity in epoch {self.current_epoch}, step "
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
            raise ValueError(
                f"{type(self).__name__}: the schedule needs an end; set trainer.max_epochs or trainer.max_steps"
            )
        if trainer.train_dataloader is None:  # with max_steps alone Lightning has not asked for it yet
            trainer.fit_loop.setup_data()
        epochs = steps / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        self.total_steps = int(steps)
        scheduler = self.schedule.build(optimizer, self.total_steps, epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:
        """timm counts updates itself."""
        scheduler.step_update(self.global_step)

    def configure_callbacks(self) -> list[Callback]:
        self._averages: list[AveragedWeights] = []
        if self.ema_decay is not None:
            self._averages = [WeightAverage(self.ema_decay, warmup=self.ema_warmup)]
        elif self.optimizer.schedule_free:
            self._averages = [ScheduleFreeAverage()]
        return list(self._averages)

    @property
    def average(self) -> nn.Module:
        """The weight average during training, in evaluation mode."""
        return self._averages[0].module

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = self.class_names
        arguments = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        values = {name: value for name, value in arguments.items() if is_dataclass(value)}
        arguments.update({name: asdict(cast(Any, value)) for name, value in values.items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_network(checkpoint)
        trained = checkpoint.get("class_names", self.class_names)
        data = getattr(self._trainer, "datamodule", None)
        if getattr(data, "class_names", trained) not in ([], trained):
            expected, found = ", ".join(trained[:5]), ", ".join(self.class_names[:5])
            raise ValueError(
                f"{type(self).__name__}: the classes of the data must be those of the checkpoint, {expected}, …, "
                f"got {found}, …; keep a train folder with all classes beside the one that is tested"
            )
        self.class_names = trained

    def _check_network(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network in the words of the configuration, before tensors are compared."""
        saved = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        own = {name: value.shape for name, value in self.state_dict().items()}
        if saved == own:
            return
        then, now = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}), dict(self.hparams)
        differ = [name for name in NETWORK if name in then and name in now and then[name] != now[name]]
        said = "; ".join(f"{name} was {then[name]}, got {now[name]}" for name in differ)
        keys = sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name))
        raise ValueError(
            f"{type(self).__name__}: the network must be that of the checkpoint, {len(keys)} tensors differ "
            f"({', '.join(keys[:3])}, …){'; ' * bool(said)}{said}; use the config.yaml of the run, or start anew from "
            "its weights with --model.init_args.checkpoint_path FILE"
        )


def settings(kind: type[T], value: T | dict[str, Any]) -> T:
    """Return a dataclass of settings, which checkpoints hold as a plain dict.

    >>> settings(Schedule, {"warmup_epochs": 1}).warmup_epochs
    1
    """
    return kind(**value) if isinstance(value, dict) else value
