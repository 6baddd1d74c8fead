"""Lightning modules, one a task, and the callbacks they share. The models they train are plain ``nn.Module``s."""

from __future__ import annotations

from vssm.tasks.classification import Classification, Mixup
from vssm.tasks.optimizer import Optimizer, Schedule

__all__ = ["Classification", "Mixup", "Optimizer", "Schedule"]
