"""Lightning modules, one a task, and the callbacks they share. The models they train are plain ``nn.Module``s.

``Segmentation``, of volumes, needs MONAI and is imported when it is asked for.
"""

from __future__ import annotations

from vssm.registries.extras import missing

try:
    from vssm.tasks.classification import Classification, Mixup
    from vssm.tasks.detection import Detection
    from vssm.tasks.distillation import Distillation, Mesa
    from vssm.tasks.optimizer import Optimizer, Schedule
    from vssm.tasks.semantic import SemanticSegmentation
except ModuleNotFoundError as error:
    raise missing("vssm.tasks", error) from error

__all__ = [
    "Classification",
    "Detection",
    "Distillation",
    "Mesa",
    "Mixup",
    "Optimizer",
    "Schedule",
    "SemanticSegmentation",
]


def __getattr__(name: str) -> object:
    if name == "Segmentation":
        from vssm.tasks.segmentation import Segmentation

        return Segmentation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
