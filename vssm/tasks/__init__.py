"""Lightning modules, one a task, and the callbacks they share. The models they train are plain ``nn.Module``s."""

from __future__ import annotations

from vssm.tasks.classification import Classification, Mixup
from vssm.tasks.distillation import Distillation, Mesa
from vssm.tasks.optimizer import Optimizer, Schedule

__all__ = ["Classification", "Distillation", "Mesa", "Mixup", "Optimizer", "Schedule"]
