"""Losses that need a second model: distillation from a teacher, and MESA's from the weight average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg
from torch import Tensor, nn


@dataclass(frozen=True)
class Distillation:
    """A frozen teacher, from which the model's second classifier learns (DeiT, arXiv:2012.12877, section 4).

    In training the model returns the logits of both classifiers, as GroupMamba and timm's ``deit_*_distilled`` do after
    ``set_distilled_training(True)``. The teacher sees the same images, mixup included; the loss is

        (1 - alpha) CE(logits, target) + alpha D(taught, teacher(images)),

    where D is the cross-entropy with the teacher's most probable class ("hard"), or the Kullback-Leibler divergence of
    both distributions at ``temperature``, times its square ("soft").

    Args:
        teacher: Name of a model of timm or ours, with pretrained weights; ``NAME.TAG`` names which.
        checkpoint_path: Weights of the teacher instead, as ``timm.create_model`` reads them.
        kind: "hard" or "soft".
        alpha: Share of the teacher in the loss.
        temperature: Of "soft".
    """

    teacher: str
    checkpoint_path: str | None = None
    kind: Literal["hard", "soft"] = "hard"
    alpha: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if ":" not in self.teacher and not timm.is_model(self.teacher):
            raise ValueError(f"Distillation: teacher must be a model of timm or vssm, got {self.teacher!r}")
        if not 0 <= self.alpha <= 1 or self.temperature <= 0:
            raise ValueError(
                f"Distillation: alpha must be from 0 to 1 and temperature positive, got {self.alpha} and "
                f"{self.temperature}"
            )

    def build(self, model: nn.Module, num_classes: int) -> nn.Module:
        """Make the teacher of ``model``: frozen, in evaluation mode, for images that are normalised for ``model``.

        Raises:
            ValueError: If the pretrained weights are for another number of classes.
        """
        source: dict[str, Any] = {"pretrained": True}
        if self.checkpoint_path is not None:
            source = {"checkpoint_path": self.checkpoint_path}
        elif ":" not in self.teacher and (known := get_pretrained_cfg(self.teacher).num_classes) != num_classes:
            raise ValueError(
                f"Distillation: the teacher must know the classes of the data, {num_classes}, {self.teacher} was "
                f"pretrained on {known}; train it on them and give its checkpoint_path"
            )
        teacher = timm.create_model(self.teacher, num_classes=num_classes, **source)
        return Teacher(teacher, getattr(model, "pretrained_cfg", {})).eval().requires_grad_(False)

    def loss(self, outputs: tuple[Tensor, Tensor], base: Tensor, teacher: Tensor) -> Tensor:
        """Weigh ``base``, the loss of the first of ``outputs``, and that of the second against the teacher's logits."""
        _, taught = outputs
        if self.kind == "hard":
            other = F.cross_entropy(taught, teacher.argmax(-1))
        else:
            ours, theirs = ((x / self.temperature).log_softmax(-1) for x in (taught, teacher))
            other = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * self.temperature**2
        return (1 - self.alpha) * base + self.alpha * other


class Teacher(nn.Module):
    """A model that reads images (B, C, H, W) normalised by the mean and std of ``cfg``, a timm pretrained_cfg."""

    def __init__(self, model: nn.Module, cfg: dict[str, Any]):
        super().__init__()
        self.model = model
        mean, std = (torch.tensor(cfg.get(name, model.pretrained_cfg[name])) for name in ("mean", "std"))
        own_mean, own_std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))
        self.register_buffer("scale", (std / own_std)[:, None, None], persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * self.scale + self.shift)


@dataclass(frozen=True)
class Mesa:
    """Let the weight average teach the weights: ``weight`` CE(logits, softmax(average's logits)) joins the loss.

    MESA (Du et al., 2022, arXiv:2205.14083), as the recipes of Spatial-Mamba and VSSD have it.

    Args:
        weight: Factor of that part.
        start: Share of the run's steps before it begins.
    """

    weight: float
    start: float = 0.25

    def __post_init__(self) -> None:
        if self.weight <= 0 or not 0 <= self.start < 1:
            raise ValueError(
                f"Mesa: weight must be positive and start from 0 to below 1, got {self.weight} and {self.start}"
            )

    def loss(self, logits: Tensor, average: Tensor) -> Tensor:
        """Return the part that joins the loss."""
        return self.weight * F.cross_entropy(logits, average.softmax(-1))


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of a model that is not trained, in float32."""
    return model(images).float()
