"""A classifier's stages as the backbone of detectors and segmenters, and how golden files are run on both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from vssm.layers.norm import ChannelNorm
from vssm.models.base import Hierarchical


class StageMaps(nn.Module):
    """The maps of stages ``out_indices``, each under a norm of its own; the next stage reads them without it.

    Args:
        model: A classifier, whose stem and stages are used.
        out_indices: Stages.
        norm: The norm of each map, for its channels.
    """

    def __init__(
        self,
        model: Hierarchical,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norm: Callable[[int], nn.Module] = ChannelNorm,
    ):
        super().__init__()
        if not all(0 <= i < len(model.stages) for i in out_indices):
            raise ValueError(
                f"StageMaps: out_indices must name stages 0 to {len(model.stages) - 1}, got {tuple(out_indices)}"
            )
        self.out_indices = tuple(out_indices)
        self.feature_info = [model.feature_info[i] for i in self.out_indices]
        self.stem, self.stages = model.stem, model.stages[: max(self.out_indices) + 1]
        norms = {str(i): norm(model.feature_info[i]["num_chs"]) for i in self.out_indices}
        self.out_norms = nn.ModuleDict(norms)
        self._undecayed = model.no_weight_decay()

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                maps[i] = self.out_norms[str(i)](x)
        return [maps[i] for i in self.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep block inputs only and recompute the rest in backward; the output stays the same."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """What the classifier's recipe does not decay, as far as it is here."""
        return self._undecayed & {name for name, _ in self.named_parameters()}


def run_classifier(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and the map of every stage of a ``Hierarchical``, for ``Published.run``."""
    features, maps = model.forward_intermediates(inputs["x"])
    return {"logits": model.forward_head(features)} | {f"stage{i}": x for i, x in enumerate(maps)}


def run_backbone(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The maps of a ``StageMaps``, for ``Published.run``."""
    return {f"out{i}": x for i, x in zip(model.out_indices, model(inputs["x"]), strict=True)}
