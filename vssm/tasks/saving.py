"""What a checkpoint holds and when it is written, so that a killed run continues as if it had not been killed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from timm.utils import ModelEmaV3

from vssm.checkpoints.files import written_whole
from vssm.tasks.random_state import get_random_state, set_random_state


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, replaced in one step: Lightning itself moves them over from another file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with written_whole(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(path, *args, **kwargs)
        if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
            found = ", ".join(map(str, list(checkpoint)[:5])) if isinstance(checkpoint, dict) else type(checkpoint)
            raise ValueError(
                f"--ckpt_path: {path} must be a checkpoint of a run, got a file with {found}; published weights and "
                "others are read by --model.init_args.checkpoint_path FILE"
            )
        return checkpoint


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``; ``monitor`` None is the score that the task declares (``Task.score``)."""

    monitor: str | None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.monitor is None:
            score = getattr(pl_module, "score", None)
            if score is None:
                raise ValueError(
                    f"BestCheckpoint: monitor must name a metric that {type(pl_module).__name__} logs in validation, "
                    "got null; set best_checkpoint.monitor"
                )
            self.monitor = f"val/{score}"
        super().setup(trainer, pl_module, stage)


class LastCheckpoint(Checkpoint):
    """Keep ``checkpoints/last.ckpt`` in the run folder up to date, for ``--ckpt_path last``.

    It is written at the end of each epoch, after validation, and inside an epoch every ``every_n_steps`` optimiser
    steps (never after the last step of an epoch: Lightning would then resume behind that epoch's validation).

    Args:
        every_n_steps: Steps between two saves inside an epoch; None saves at the ends of epochs only.
    """

    def __init__(self, every_n_steps: int | None = 500):
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"LastCheckpoint: every_n_steps must be 1 or more, or null, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._file = Path("last.ckpt")
        self._saved_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._file = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "last.ckpt"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step == trainer.max_steps or (self.every_n_steps and step % self.every_n_steps == 0)
        if due and step != self._saved_step and not _epoch_done(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _epoch_done(trainer):  # also called where max_steps ends the run inside an epoch
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._saved_step = trainer.global_step
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(self._file, weights_only=False)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """With ``max_steps``, Lightning (2.6) would end a finished epoch a second time: let it be inside the next."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.max_steps == -1:
            return
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
        if epochs["current"]["processed"] == epochs["current"]["ready"]:
            for counts in epochs.values():
                done = counts["processed"]
                counts.update(completed=done, started=done + 1, ready=done + 1)
            batches.update(current=dict.fromkeys(batches["current"], 0), is_last_batch=False)

    def state_dict(self) -> dict[str, Any]:
        return {"saved_step": self._saved_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_step = state_dict["saved_step"]


def _epoch_done(trainer: Trainer) -> bool:
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


class RandomState(Callback):
    """Save the random number generators of every process in checkpoints, and put them back when training resumes."""

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [get_random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, get_random_state())
        checkpoint["random_state"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        states = checkpoint.get("random_state", [])
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"RandomState: the checkpoint has random states of {len(states)} processes, this run has "
                f"{trainer.world_size}; it continues with new ones"
            )
            return
        self._resumed = states[trainer.global_rank]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed is not None:  # now, not on loading: what happens between the two may draw numbers
            set_random_state(self._resumed)
            self._resumed = None


class AveragedWeights(Callback):
    """Train the weights of ``pl_module.model``, validate and save an average of them.

    In checkpoints the average is the ``state_dict``, so that testing, prediction and export use it, and the weights
    being trained are ``trained_state_dict``, from which training resumes. At the end of training the module holds the
    average. (Lightning's own callback, 2.6, puts the trained weights back when a checkpoint is tested after ``fit`` in
    one process.)
    """

    module: torch.nn.Module
    """A copy of the model, in evaluation mode, that holds the average."""

    def __init__(self) -> None:
        self._trained: torch.nn.Module | None = None

    def refresh(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring ``module`` up to date; it is about to be used."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.module.to(pl_module.device)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.refresh(trainer, pl_module)
            self._trained, pl_module.model = pl_module.model, self.module

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            pl_module.model, self._trained = self._trained, None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.refresh(trainer, pl_module)
        pl_module.model.load_state_dict(self.module.state_dict())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.refresh(trainer, pl_module)
            averaged = {f"model.{name}": value for name, value in self.module.state_dict().items()}
            checkpoint["trained_state_dict"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **averaged}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "trained_state_dict" not in checkpoint:
            raise ValueError(
                f"{type(self).__name__}: the checkpoint to resume from was written without a weight average; resume "
                "with the settings that it was written with"
            )
        self.module.load_state_dict(pl_module.model.state_dict())  # the module was loaded with the average
        pl_module.load_state_dict(checkpoint["trained_state_dict"])


class WeightAverage(AveragedWeights):
    """Exponential moving average of ``pl_module.model`` (timm's ``ModelEmaV3``).

    Args:
        decay: Share of the old average that is kept at each optimiser step.
        warmup: Let the decay rise from 0 in the first steps.
    """

    def __init__(self, decay: float, *, warmup: bool = False):
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"WeightAverage: decay must be between 0 and 1, got {decay}")
        self.decay, self.warmup = decay, warmup
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.average = ModelEmaV3(pl_module.model, decay=self.decay, use_warmup=self.warmup)
            self.module = self.average.module

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:  # not while gradients accumulate
            self._step = trainer.global_step
            self.average.update(pl_module.model, step=self._step)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["step"]


class ScheduleFreeAverage(AveragedWeights):
    """The average that a schedule-free optimiser keeps in the place of a schedule (arXiv:2405.15682).

    The optimiser's own ``eval()`` and ``train()`` would turn the weights into the average and back with rounding; here
    the average is computed beside them, so that validating or saving changes nothing. Buffers, such as the running
    statistics of batch norm, are those of the trained weights.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.module = copy.deepcopy(pl_module.model).eval().requires_grad_(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.optimizers[0].train()  # allows steps; the weights are those to be trained already

    @torch.no_grad()
    def refresh(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Extrapolate from the trained weights y and the optimiser's z: y = beta x + (1 - beta) z, x is the average."""
        (optimizer,) = trainer.optimizers
        averages = dict(zip(pl_module.model.parameters(), self.module.parameters(), strict=True))
        for group in optimizer.param_groups:
            for y in group["params"]:
                z = optimizer.state[y].get("z", y) if y in optimizer.state else y
                averages[y].copy_(y.lerp(z, 1 - 1 / group["betas"][0]))
        for ours, theirs in zip(self.module.buffers(), pl_module.model.buffers(), strict=True):
            ours.copy_(theirs)
