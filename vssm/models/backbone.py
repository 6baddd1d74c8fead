"""A classifier's stages as the backbone of detectors and segmenters, and how golden files are run on both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from vssm.layers.norm import ChannelNorm
from vssm.models.base import Hierarchical, Isotropic


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


def run_blocks(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every block of a Vim or LocalVim reads and adds, features and logits, for ``Published.run``."""
    x, grid = model.embed(inputs["x"])
    out: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        read, branch, x = block.step(x, grid)
        out |= {f"layers.{i}.hidden": branch, f"layers.{i}.residual": read}
    x = model.norm(x)
    return out | {"features": model.forward_head(x, pre_logits=True), "logits": model.forward_head(x)}


def run_features(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The maps of a backbone by their number, for ``Published.run``."""
    return {f"feat{i}": x for i, x in enumerate(model(inputs["x"]))}


def run_backbone(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The maps of a ``StageMaps``, for ``Published.run``."""
    return {f"out{i}": x for i, x in zip(model.out_indices, model(inputs["x"]), strict=True)}


class TrunkMaps(nn.Module):
    """Maps from several depths of a model of one stride, its ``trunk``; a subclass says which and what they become.

    Args:
        trunk: A classifier.
    """

    def __init__(self, trunk: Isotropic):
        super().__init__()
        self.trunk = trunk

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep block inputs only and recompute the rest in backward; the output stays the same."""
        self.trunk.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """What the classifier's recipe does not decay, as far as it is here."""
        names = {name for name, _ in self.named_parameters()}
        return names & {f"trunk.{name}" for name in self.trunk.no_weight_decay()}


class TokenMaps(TrunkMaps):
    """Maps of strides 4, 8, 16, 32 from four depths of a model of one stride, resized by a small pyramid.

    As BEiT (arXiv:2106.08254) and Vim made them for UPerNet.

    Args:
        model: A classifier, which loses its head and its last norm.
        out_indices: Four blocks; by default the ends of four equal parts of the depth.
    """

    def __init__(self, model: Isotropic, out_indices: Sequence[int] | None = None):
        super().__init__(model)
        depth = len(model.blocks)
        self.out_indices = tuple(out_indices or quarters(depth))
        if len(self.out_indices) != 4 or not all(0 <= i < depth for i in self.out_indices):
            raise ValueError(f"TokenMaps: out_indices must name four of {depth} blocks, got {self.out_indices}")
        dim, stride = model.embed_dim, cast(int, model.feature_info[0]["reduction"])
        model.prune_intermediate_layers(list(self.out_indices), prune_norm=True)
        self.pyramid = nn.ModuleList(pyramid(dim, stride))
        self.feature_info = [{"num_chs": dim, "reduction": 4 * 2**i, "module": f"pyramid.{i}"} for i in range(4)]

    def forward(self, x: Tensor) -> list[Tensor]:
        take = sorted(set(self.out_indices))
        found = dict(zip(take, self.trunk.forward_intermediates(x, take, intermediates_only=True)))
        return [level(found[i]) for level, i in zip(self.pyramid, self.out_indices, strict=True)]


def quarters(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of ``depth`` blocks.

    >>> quarters(24)
    (5, 11, 17, 23)
    """
    return tuple(max(depth * (i + 1) // 4 - 1, 0) for i in range(4))


def pyramid(dim: int, stride: int) -> list[nn.Module]:
    """Modules that bring four maps of one ``stride`` (16 or 8) to strides 4, 8, 16, 32; channels stay ``dim``."""

    def double() -> nn.Module:
        return nn.ConvTranspose2d(dim, dim, 2, stride=2)

    if stride == 16:
        quadruple = nn.Sequential(double(), nn.BatchNorm2d(dim), nn.GELU(), double())
        return [quadruple, nn.Sequential(double()), nn.Identity(), nn.MaxPool2d(2)]
    if stride == 8:
        return [nn.Sequential(double()), nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)]
    raise ValueError(f"pyramid: the maps' stride must be 16 or 8, got {stride}")


def as_backbone(model: nn.Module, **options: Any) -> nn.Module:
    """A classifier of the zoo as a module that returns maps of strides 4, 8, 16 and 32, and has ``feature_info``.

    Args:
        model: A hierarchical classifier becomes ``StageMaps``; an isotropic one what its class says
            (``as_backbone``), or else ``TokenMaps``. It loses its head.
        options: Arguments of that module: ``out_indices``, …

    Raises:
        ValueError: If it is no such classifier.
    """
    if hasattr(model, "as_backbone"):
        return model.as_backbone(**options)
    if isinstance(model, Hierarchical):
        return StageMaps(model, **options)
    if isinstance(model, Isotropic):
        return TokenMaps(model, **options)
    raise ValueError(f"as_backbone: the model must be a classifier of the zoo, got a {type(model).__name__}")
