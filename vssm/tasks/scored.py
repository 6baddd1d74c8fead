"""What tasks share whose scores torchmetrics counts batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchmetrics import MeanMetric, Metric, MetricCollection

from vssm.tasks.base import Task


class ScoredTask(Task):
    """A task with metrics, a mean loss and a confusion matrix of what is validated and tested.

    A task calls ``score_with`` in its constructor, and says in ``evaluate`` how a batch counts.
    """

    def score_with(self, metrics: Mapping[str, Metric]) -> None:
        """Count with these metrics, one of them ``"confusion"``, which is drawn and not logged."""
        collection = MetricCollection(dict(metrics))
        self.val_metrics, self.test_metrics = collection.clone(prefix="val/"), collection.clone(prefix="test/")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def evaluate(self, batch: Any, metrics: MetricCollection, loss: MeanMetric) -> None:
        """Count a batch."""
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, self.val_metrics, self.val_loss)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, self.test_metrics, self.test_loss)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val", self.val_metrics, self.val_loss)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test", self.test_metrics, self.test_loss)

    def _log_metrics(self, split: str, metrics: MetricCollection, loss: MeanMetric) -> None:
        values = metrics.compute()  # over all processes
        self.confusion = values.pop(f"{split}/confusion")
        self.log_dict({**values, f"{split}/loss": loss.compute()}, prog_bar=True, sync_dist=True)
        metrics.reset()
        loss.reset()
