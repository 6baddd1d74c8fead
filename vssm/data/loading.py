"""Batches in a keyed order, for every data module: what a run gives does not depend on workers, kills or resumes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, default_collate

from vssm.data.order import KeyedSampler, ResumableLoader

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Loader:
    """How samples are batched and ordered.

    Args:
        batch_size: Samples per process and step.
        eval_batch_size: The same for validation, test and prediction; ``batch_size`` if None.
        workers: Loader processes, by default one a core and at most 8; 0 reads in the main process. Changes no result.
        seed: Seed of order and augmentation; that of ``seed_everything`` if None.
        repeats: Repeated augmentation, see ``KeyedSampler``.
        max_corrupt: How many unreadable images a data set of images may have.
    """

    batch_size: int = 128
    eval_batch_size: int | None = None
    workers: int = min(8, CORES)
    seed: int | None = None
    repeats: int = 1
    max_corrupt: int = 10

    def __post_init__(self) -> None:
        smallest = {"batch_size": 1, "eval_batch_size": 1, "workers": 0, "repeats": 1, "max_corrupt": 0}
        for name, least in smallest.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"Loader: {name} must be {least} or more, got {value}")


class OrderedData(LightningDataModule):
    """Loaders over ``data``, one data set a split, whose items are asked for by ``Key``.

    A subclass fills ``data`` ("train", "val", "test", "predict") and ``class_names`` in ``setup``. The items of each
    data set are drawn from the generators that ``seed_rng(seed, *key)`` sets; a "predict" set has ``names``, the file
    of each item.

    Args:
        loader: Batches and their order.
    """

    def __init__(self, loader: Loader):
        super().__init__()
        self.loader = loader
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if loader.seed is None else loader.seed
        self.class_names: list[str] = []
        self.data: dict[str, Any] = {}  # data sets with a length
        self._saved_order: dict[str, int] | None = None

    @staticmethod
    def collate(samples: list[Any]) -> Any:
        """Make a batch of samples; None, of a sample that could not be read, is left out."""
        readable = [sample for sample in samples if sample is not None]
        return default_collate(readable) if readable else None

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled, augmented batches, all of the same size."""
        ranks, size = self.trainer.world_size, len(self.data["train"])
        if size // ranks < self.loader.batch_size:
            raise ValueError(
                f"{type(self).__name__}: {size} training samples on {ranks} processes must fill a batch of "
                f"{self.loader.batch_size}; lower data.init_args.loader.batch_size"
            )
        sampler = KeyedSampler(
            size, seed=self.seed, shuffle=True, repeats=self.loader.repeats, rank=self.trainer.global_rank, ranks=ranks
        )
        return ResumableLoader(
            self.data["train"],
            sampler=sampler,
            drop_last=True,
            position=self._position,
            **self._options(self.loader.batch_size),
        )

    def val_dataloader(self) -> DataLoader:
        """Return the validation samples, each exactly once over all processes."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        """Return the test samples, each exactly once over all processes."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        """Return what is to be predicted; Lightning shares them out."""
        return DataLoader(self.data["predict"], **self._options(self.loader.eval_batch_size or self.loader.batch_size))

    def _evaluation(self, split: str) -> DataLoader:
        sampler = KeyedSampler(
            len(self.data[split]),
            seed=self.seed,
            shuffle=False,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
        )
        return DataLoader(
            self.data[split], sampler=sampler, **self._options(self.loader.eval_batch_size or self.loader.batch_size)
        )

    def _options(self, batch_size: int) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "num_workers": self.loader.workers,
            "persistent_workers": self.loader.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": self.collate,
            "generator": torch.Generator(),  # otherwise each epoch draws one number from the global generator
        }

    # ---- resuming ----

    def state_dict(self) -> dict[str, int]:
        """Return what fixes the order of batches."""
        if "train" not in self.data:
            return {}
        ranks = self.trainer.world_size
        size = len(self.data["train"])
        return {
            "seed": self.seed,
            "samples": size,
            "batch": self.loader.batch_size,
            "processes": ranks,
            "repeats": self.loader.repeats,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Remember the order of the checkpoint: a run may only continue inside an epoch that has the same."""
        self._saved_order = state_dict

    def _position(self) -> int:
        position = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if position and self._saved_order not in (None, self.state_dict()):
            raise ValueError(
                f"{type(self).__name__}: a run resumes inside an epoch only with the order it had, "
                f"{self._saved_order}, got {self.state_dict()}; restore these settings or resume from the end of an "
                "epoch"
            )
        return position
