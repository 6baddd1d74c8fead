"""The zoo in mmsegmentation: ``custom_imports = dict(imports=["vssm.registries.mmseg"])`` in a config.

    backbone=dict(type="VSSMBackbone", model="vmamba_tiny", pretrained=True, drop_path_rate=0.2)

gives any head of mmsegmentation the maps of a classifier of the zoo. Needs the extra ``mmseg``: mmsegmentation 1.2.2
with mmengine 0.10 and mmcv-lite 2.1. ``mmseg.models`` imports two compiled ops of mmcv, which mmcv-lite lacks; where
they are missing, this module puts PyTorch versions of these two in their place, before it imports mmsegmentation.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vssm.checkpoints import accept_published_names
from vssm.models.backbone import as_backbone
from vssm.registries.zoo import create_model, find

__all__ = ["allow_resume", "backbone", "ensure_mmcv_ops"]


def point_sample(input: Tensor, points: Tensor, align_corners: bool = False, **options: Any) -> Tensor:
    """Values of maps (B, C, H, W) at ``points`` (B, P, 2) or (B, h, w, 2), x and y from 0 to 1."""
    listed = points.ndim == 3
    grid = points.unsqueeze(2) if listed else points
    values = F.grid_sample(input, 2 * grid - 1, align_corners=align_corners, **options)
    return values.squeeze(3) if listed else values


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> Tensor:
    """Focal loss (arXiv:1708.02002) of logits (N, classes) for labels (N,); ``classes`` is the background.

    As in mmcv, ``weight`` (classes,) weighs each row by its label, which then may not be the background, and "mean"
    divides by N.
    """
    truth = F.one_hot(target.long(), input.shape[1] + 1)[:, :-1].to(input.dtype)
    chosen = torch.where(truth > 0, input.sigmoid(), (-input).sigmoid())
    share = torch.where(truth > 0, alpha, 1 - alpha)
    loss = share * (1 - chosen) ** gamma * F.binary_cross_entropy_with_logits(input, truth, reduction="none")
    if weight is not None:
        loss = loss * weight[target.long()].unsqueeze(1)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / max(len(input), 1)}[reduction]


def ensure_mmcv_ops() -> bool:
    """Make ``import mmcv.ops`` work beside mmcv-lite; return whether that needed the stand-in.

    A compiled mmcv is left alone. Any other op is a ``ModuleNotFoundError`` that names it, as mmsegmentation expects.
    """
    try:
        importlib.import_module("mmcv.ops")
        return getattr(sys.modules["mmcv.ops"], "stands_in_for_compiled_ops", False)
    except ModuleNotFoundError as error:
        if error.name not in ("mmcv._ext", "mmcv.ops"):
            raise
    for name in [name for name in sys.modules if name == "mmcv.ops" or name.startswith("mmcv.ops.")]:
        del sys.modules[name]                               # left behind by the import that failed

    def missing(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError(
            f"mmcv.ops.{name} needs a compiled mmcv; this is mmcv-lite with vssm's stand-in", name="mmcv._ext"
        )

    ops: Any = types.ModuleType("mmcv.ops", "point_sample and sigmoid_focal_loss without a compiler.")
    ops.point_sample, ops.sigmoid_focal_loss = point_sample, sigmoid_focal_loss
    ops.stands_in_for_compiled_ops, ops.__getattr__ = True, missing
    sys.modules["mmcv.ops"] = ops
    vars(sys.modules["mmcv"])["ops"] = ops
    return True


ensure_mmcv_ops()
from mmengine.logging.history_buffer import HistoryBuffer  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402


def allow_resume() -> None:
    """Let ``torch.load`` read what a Runner of mmengine saves beside the weights, so that ``resume=True`` works.

    From torch 2.6 on it reads plain weights only. What is allowed here includes ``getattr``, which is more than a file
    of a stranger should call: do it where you resume runs of your own.
    """
    scalars = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "uint8", "bool")]
    array = importlib.import_module("numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray")
    torch.serialization.add_safe_globals(
        [HistoryBuffer, array._reconstruct, array.scalar, np.ndarray, np.dtype, getattr, *scalars]
    )


@MODELS.register_module(name="VSSMBackbone")
def backbone(
    model: str,
    out_indices: Sequence[int] | None = None,
    pretrained: bool = False,
    checkpoint_path: str | None = None,
    with_cp: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A classifier of the zoo as a backbone: a module that returns maps of strides 4, 8, 16 and 32 (``as_backbone``).

    Args:
        model: Name of a classifier.
        out_indices: Stages or blocks; by default four.
        pretrained: Start from the published weights of the classifier.
        checkpoint_path: Start from this file of the classifier, published or ours; every key must fit. (Checkpoints of
            whole segmenters are for ``load_from=`` of the config; their published names are understood.)
        with_cp: Recompute activations in the backward pass to save memory.
        kwargs: Arguments of the classifier: ``drop_path_rate``, ``scan``, ``img_size``, …

    Raises:
        ValueError: If there is no such classifier, or a file does not fit.
    """
    if find(model.partition(".")[0], "VSSMBackbone").task != "classification":
        raise ValueError(f"VSSMBackbone: model must name a classifier of the zoo, got {model!r}")
    classifier = create_model(model, pretrained=pretrained, checkpoint_path=checkpoint_path, **kwargs)
    maps = as_backbone(classifier, **({} if out_indices is None else {"out_indices": out_indices}))
    maps.set_grad_checkpointing(with_cp)
    vars(maps)["variant_name"] = model.partition(".")[0]
    accept_published_names(maps)
    return maps
