"""Parameter groups, what is frozen, optimiser and learning rate, shared by all tasks; the work is timm's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vssm.layers.ssm import ssm_parameters


@dataclass(frozen=True)
class Optimizer:
    """An optimiser of timm and what it does to which parameter.

    Norms, biases and every parameter that the model names in ``no_weight_decay()`` are not decayed.

    Args:
        name: One of ``timm.optim.list_optimizers()``, or "adamw_schedule_free" (arXiv:2405.15682, from the package
            schedulefree), which takes a constant rate, after its warm-up, to the end.
        lr: Learning rate at its peak.
        lr_base_batch: The batch over all processes and accumulation steps that ``lr`` is for; it is scaled in
            proportion to the actual one. None takes ``lr`` as it stands.
        weight_decay: Decay of everything else.
        ssm_decay: "none" decays no ``A_log``, ``D`` and step-size bias of any state-space layer, as Mamba's authors
            advise; "published" decays those that the recipe of the model's published weights decayed; "all" decays
            these and everything else, norms and biases included.
        momentum: Of optimisers that have it.
        betas, eps: Of Adam and its relatives; None is the optimiser's own.
        layer_decay: Factor on the learning rate for each layer below the head; None trains all layers alike.
    """

    name: str = "adamw"
    lr: float = 1e-3
    lr_base_batch: int | None = None
    weight_decay: float = 0.05
    ssm_decay: Literal["none", "published", "all"] = "none"
    momentum: float = 0.9
    betas: tuple[float, float] | None = None
    eps: float | None = None
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        base = self.name.lower().rpartition("_")[2]  # as timm reads lookahead_adamw
        if not self.schedule_free and base not in (known := list_optimizers()):
            near = difflib.get_close_matches(self.name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "timm.optim.list_optimizers() names them"
            raise ValueError(f"Optimizer: no optimizer named {self.name!r}; {hint}")
        if self.ssm_decay == "all" and self.layer_decay is not None:
            raise ValueError("Optimizer: ssm_decay 'all' makes one group of all parameters, layer_decay one a layer")

    @property
    def schedule_free(self) -> bool:
        """Whether the optimiser averages the weights in the place of a schedule."""
        return self.name == "adamw_schedule_free"

    def build(self, model: nn.Module, batch: int) -> torch.optim.Optimizer:
        """Make the optimiser for ``model``, trained with ``batch`` samples a step in all."""
        lr = self.lr * batch / self.lr_base_batch if self.lr_base_batch else self.lr
        given = {name: getattr(self, name) for name in ("betas", "eps") if getattr(self, name) is not None}
        if self.schedule_free:
            return _schedule_free()(self.groups(model), lr=lr, **given)
        return create_optimizer_v2(self.groups(model), self.name, lr=lr, momentum=self.momentum, **given)

    def groups(self, model: nn.Module) -> list[dict]:
        """Sort the parameters by weight decay and, with ``layer_decay``, by learning rate."""
        if self.ssm_decay == "all":
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            return [{"params": parameters, "weight_decay": self.weight_decay}]
        excluded = set(getattr(model, "no_weight_decay", set)())
        if self.ssm_decay == "none":
            excluded.update(ssm_parameters(model))
        if self.layer_decay is None:
            return param_groups_weight_decay(model, self.weight_decay, no_weight_decay_list=excluded)
        excluded.update(name for name, _ in model.named_parameters() if name.endswith(".bias"))
        return param_groups_layer_decay(
            model, self.weight_decay, no_weight_decay_list=excluded, layer_decay=self.layer_decay
        )


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a fall, by optimiser steps.

    Args:
        warmup_epochs: Length of the warm-up; a fraction is allowed.
        warmup_lr, min_lr: Learning rates at the start and at the end. ``lr_base_batch`` does not scale them.
        shape: "cosine" falls along one half of a cosine, "poly" along (1 - t) ** ``power``, "steps" is multiplied by
            ``decay_rate`` at the end of each of ``decay_epochs`` (and has no ``min_lr``), "constant" does not fall.
        power: Of "poly"; 1 is a straight line.
        decay_epochs, decay_rate: Of "steps". Epochs count from the start of the run.
    """

    warmup_epochs: float = 5.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    shape: Literal["cosine", "poly", "steps", "constant"] = "cosine"
    power: float = 1.0
    decay_epochs: tuple[float, ...] = ()
    decay_rate: float = 0.1

    def __post_init__(self) -> None:
        if (self.shape == "steps") != bool(self.decay_epochs):
            raise ValueError(
                f"Schedule: decay_epochs must be given with shape 'steps' and with no other, got {self.shape!r} and "
                f"{list(self.decay_epochs)}"
            )

    def build(self, optimizer: torch.optim.Optimizer, steps: int, epochs: float) -> Scheduler:
        """Make the schedule of a run of ``steps`` optimiser steps in ``epochs`` epochs."""
        warmup = min(round(self.warmup_epochs * steps / epochs), steps - 1)
        common = {"warmup_t": warmup, "warmup_lr_init": self.warmup_lr, "t_in_epochs": False}
        if self.shape in ("steps", "constant"):
            decays = [round(epoch * steps / epochs) for epoch in self.decay_epochs]
            return MultiStepLRScheduler(optimizer, decays, self.decay_rate, warmup_prefix=False, **common)
        common |= {"t_initial": max(steps - warmup, 1), "lr_min": self.min_lr, "warmup_prefix": True}
        if self.shape == "poly":
            return PolyLRScheduler(optimizer, power=self.power, **common)
        return CosineLRScheduler(optimizer, **common)


def _schedule_free() -> Callable[..., torch.optim.Optimizer]:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise ImportError(
            "Optimizer: adamw_schedule_free is made by the package schedulefree, which is not installed; "
            "pip install 'vssm[train]' or pip install schedulefree"
        ) from error
    return AdamWScheduleFree


@dataclass(frozen=True)
class Freeze:
    """Keep some parameters as they are for the first epochs, such as an encoder that starts from a classifier.

    Their gradients are dropped before they are clipped and applied, so that the optimiser, too, first sees these
    parameters when they are free.

    Args:
        epochs: How many; 0 freezes nothing.
        parameters: Regular expression that the names of the parameters begin with.
    """

    epochs: int = 0
    parameters: str = r"encoder\."

    def of(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters of a model that this freezes.

        Raises:
            ValueError: If the expression matches none or all.
        """
        if not self.epochs:
            return []
        named = dict(model.named_parameters())
        frozen = [parameter for name, parameter in named.items() if re.match(self.parameters, name)]
        if len(frozen) in (0, len(named)):
            raise ValueError(
                f"Freeze: parameters must match the names of some parameters of {type(model).__name__}, "
                f"{self.parameters!r} matches {len(frozen)} of {len(named)}, which begin with "
                f"{', '.join(sorted({name.partition('.')[0] for name in named}))}"
            )
        return frozen
