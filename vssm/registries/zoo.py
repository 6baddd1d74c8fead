"""The zoo: every variant of every family, found by name."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vssm.checkpoints import load_pretrained, load_weights
from vssm.models import variant as rows
from vssm.models.variant import Variant, variants
from vssm.scans.registry import Scan, find_scan, scan_rows

PERMISSIVE = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc-by-4.0")
MONAI_NAMES = {"num_classes": "out_channels", "in_chans": "in_channels"}
TASKS = ("classification", "segmentation", "detection", "pretraining")


def create_model(
    name: str, *, pretrained: bool = False, checkpoint_path: str | Path | None = None, **kwargs: Any
) -> nn.Module:
    """Make a model by name, as ``timm.create_model`` does; a classifier, segmenter or detector.

    Args:
        name: One of ``list_models()``, with a weights tag if wanted (``"vmamba_tiny.s1l8_in1k"``).
        pretrained: Load the published weights.
        checkpoint_path: Load this file, published or ours; every key must fit (``load_weights``).
        kwargs: Arguments of the model class (``scan="hilbert"``, ``num_classes=7``, ``in_chans=1``,
            ``drop_path_rate=0.1``; of a segmenter ``spatial_dims=3``, ``in_channels=4``, ``out_channels=2``) and, for a
            classifier, of timm (``features_only``, ``out_indices``, ``pretrained_cfg_overlay``). Weights made for
            other channels or classes than these are adapted as timm does; anything else must fit.

    Raises:
        ValueError: If there is no such model, or the weights do not fit.

    >>> create_model("vmamba_tiny", num_classes=7).num_classes
    7
    """
    row = find(name.partition(".")[0])
    _check_vocabulary(row, kwargs)
    if pretrained and checkpoint_path is not None:
        raise ValueError("create_model: pretrained=True and checkpoint_path= both say what to load; drop one")
    if row.task != "classification":
        return _build(row, name.partition(".")[2], pretrained, checkpoint_path, kwargs)
    if checkpoint_path is None:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    if kwargs.get("features_only"):                          # the wrapper has other keys: load before it is made
        overlay = {**kwargs.pop("pretrained_cfg_overlay", {}), "file": str(checkpoint_path)}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    model = timm.create_model(name, **kwargs)
    load_weights(model, checkpoint_path)
    return model


def _check_vocabulary(row: Variant, kwargs: Collection[str]) -> None:
    """Refuse timm's names for a segmenter, which speaks MONAI, and MONAI's for a classifier."""
    others = {"segmentation": MONAI_NAMES, "classification": {ours: theirs for theirs, ours in MONAI_NAMES.items()}}
    for name, right in others.get(row.task, {}).items():
        if name in kwargs:
            raise TypeError(f"create_model: {row.name} is for {row.task}, where {name} is called {right}")


def _build(
    row: Variant, tag: str, pretrained: bool, checkpoint_path: str | Path | None, kwargs: dict[str, Any]
) -> nn.Module:
    """A model that timm has no place for, with its weights."""
    if pretrained and not row.weights:
        raise ValueError(f"create_model: {row.name} has no published weights; drop pretrained=True")
    tag = tag or next(iter(row.weights), "")
    if tag and tag not in row.weights:
        published = ", ".join(row.weights) or "none"
        raise ValueError(f"create_model: {row.name} has no published weights {tag!r}; published: {published}")
    model = row.build(**kwargs)
    if checkpoint_path is not None:
        load_weights(model, checkpoint_path)
    elif pretrained:
        weights = row.weights[tag]
        differs = {
            "classifier": kwargs.get("out_channels", kwargs.get("num_classes", weights.num_classes))
            != weights.num_classes,
            "in_chans": kwargs.get("in_channels", weights.input_size[0]) != weights.input_size[0],
        }
        load_pretrained(model, weights, adapt=[name for name, asked in differs.items() if asked])
    return model


def find(name: str, who: str = "create_model") -> Variant:
    """The row of that name, which ``who`` asks for.

    Raises:
        ValueError: If there is none; the message begins with ``who`` and suggests the nearest names.
    """
    known = variants()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "list_models() names them"
    raise ValueError(f"{who}: no model named {name!r}; {hint}")


def list_models(
    pattern: str | Collection[str] = "*",
    *,
    pretrained: bool = False,
    task: str | None = None,
    family: str | None = None,
    scan: str | None = None,
    license: str | None = None,
    params_below: float | None = None,
    exclude: str | Collection[str] = (),
) -> list[str]:
    """Names of the models, sorted as people count.

    Args:
        pattern: Wildcards (``"vim_*"``); several mean any of them.
        pretrained: Only models with published weights.
        task: Only models for ``"classification"``, ``"segmentation"``, ``"detection"`` or ``"pretraining"``.
        family: Only this module of ``vssm.models`` (``"vmamba"``).
        scan: Only models that can be made with this scan order, ``create_model(name, scan=scan)``.
        license: Only models with published weights under this licence, by SPDX name in any case; ``"permissive"`` for
            any permissive one, which allows commercial use.
        params_below: Only models with fewer parameters.
        exclude: Wildcards to leave out.

    Raises:
        ValueError: If there is no such task, family, scan order or licence.

    >>> list_models("*_tiny", scan="hilbert", license="permissive", params_below=10e6)
    ['efficientvmamba_tiny', 'localvim_tiny', 'vim_tiny']
    """
    patterns, excluded = ([p] if isinstance(p, str) else list(p) for p in (pattern, exclude))
    allowed = PERMISSIVE if license == "permissive" else ((license or "").lower(),)
    order = None if scan is None else find_scan(scan)
    members = None if family is None else _members(family)
    if task is not None and task not in TASKS:
        raise ValueError(f"list_models: task must be one of {', '.join(TASKS)}, got {task!r}")
    known = {weights.license.lower() for row in variants().values() for weights in row.weights.values()}
    if license is not None and not {*allowed} <= known | {*PERMISSIVE}:
        said = ", ".join(("permissive", *sorted(known)))
        raise ValueError(f"list_models: license must be one of {said}, got {license!r}")

    def wanted(name: str, row: Variant) -> bool:
        return (
            any(fnmatchcase(name, p) for p in patterns)
            and not any(fnmatchcase(name, p) for p in excluded)
            and (bool(row.weights) or not pretrained)
            and (task is None or row.task == task)
            and (members is None or name in members)
            and (license is None or any(weights.license.lower() in allowed for weights in row.weights.values()))
            and (order is None or _reads(row, order))
            and (params_below is None or parameters(name) < params_below)
        )

    return sorted((name for name, row in variants().items() if wanted(name, row)), key=_as_people_count)


def _members(family: str) -> set[str]:
    known = {module.__name__.rpartition(".")[2]: module for module in rows.families()}
    if family not in known:
        raise ValueError(f"list_models: family must be one of {', '.join(known)}, got {family!r}")
    return {row.name for row in known[family].VARIANTS}


def _reads(row: Variant, order: Scan) -> bool:
    """Whether the model has a scan order to choose, and this one reads its grids."""
    arguments = inspect.signature(row.model).parameters
    dims = row.kwargs.get("spatial_dims", arguments["spatial_dims"].default if "spatial_dims" in arguments else 2)
    if "scan" not in arguments or dims not in order.spatial_dims:
        return False
    if scan_rows(order.name, dims) is not None:
        return True
    try:                                                     # not every mixer can do with rows that follow the grid
        with torch.device("meta"):
            row.build(scan=order.name)
    except ValueError:
        return False
    return True


@cache
def parameters(name: str) -> int:
    """Parameters of a model, counted without memory for them.

    >>> parameters("vmamba_tiny")
    30249064
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in find(name).build().parameters())


def _as_people_count(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
