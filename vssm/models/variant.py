"""What a family declares: its variants, their published weights, and how to rebuild the published constructor.

A module of ``vssm.models`` that holds a family has

- ``VARIANTS``: a list of ``Variant``, one row a published model; the registries find it by itself;
- ``KEYS``: its key rules (``vssm.models.keys``), named in its variants;
- ``REPOSITORY``: ``"owner/name"`` of the published code, which golden files name as ``source.repo``;
- ``published(entry, kwargs) -> Published``: the published constructor ``entry`` called with ``kwargs``, as our model.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Any, Literal

from torch import Tensor, nn

from vssm.models.keys import Rule

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Weights:
    """One published file: where it is, what it needs, what it reached.

    ``url``, ``hf_hub_id`` (with ``hf_hub_filename``) or ``file`` says where. ``sha256`` is None until somebody has
    opened the file; it is then recorded beside the download. ``key`` is the entry of the file that holds the weights
    behind the published numbers, where a file has several.
    """

    license: str                                    # of the weights; "unknown" where nobody says
    origin_url: str
    paper: str                                      # "arXiv:2401.10166"
    url: str | None = None
    hf_hub_id: str | None = None
    hf_hub_filename: str | None = None
    file: str | None = None
    sha256: str | None = None
    key: str | None = None                          # None: the first that exists of "model", "state_dict", …
    top1: float | None = None                       # percent on ImageNet-1k validation, as published
    top5: float | None = None
    num_classes: int = 1000
    input_size: tuple[int, ...] = (3, 224, 224)     # channels first; (C, D, H, W) of a volume
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    notes: str = ""

    def __post_init__(self):
        if not self.license:
            raise ValueError("Weights: license must be named, or 'unknown' where nobody says")
        if not (self.url or self.hf_hub_id or self.file):
            raise ValueError("Weights: one of url, hf_hub_id, file must say where the weights are")
        if self.hf_hub_id and not self.hf_hub_filename:
            raise ValueError(f"Weights: hf_hub_filename must name the file in {self.hf_hub_id}")


@dataclass(frozen=True)
class Variant:
    """One row: a published model under our name.

    Classifiers (and backbones) are registered with timm; a row of any other task is built by ``vssm.create_model``.
    """

    name: str
    model: Callable[..., nn.Module]                 # the class
    kwargs: Mapping[str, Any]                       # its arguments; what is not here is the class's default
    keys: Sequence[Rule]                            # published entries -> ours
    weights: Mapping[str, Weights] = field(default_factory=dict)        # tag -> file; the first is the default
    first_conv: str = "patch_embed.proj"            # modules that timm adapts to other channels and classes
    classifier: str | tuple[str, ...] = "head"      # several: heads whose outputs are averaged
    pool_size: tuple[int, int] | None = None        # feature map before pooling at input_size; None: a sequence
    fixed_input_size: bool = False                  # the model takes img_size and keeps a table of that size
    description: str = ""
    task: Literal["classification", "segmentation", "detection", "pretraining"] = "classification"

    def build(self, **kwargs: Any) -> nn.Module:
        """The model, with ``kwargs`` over the row's own; ``rows_of`` knows its row again."""
        model = self.model(**{**self.kwargs, **kwargs})
        vars(model)["variant_name"] = self.name
        return model


@dataclass(frozen=True)
class Published:
    """A published constructor call as our model.

    ``run(model, inputs)`` takes the golden file's input names and returns every recorded output under its golden name,
    intermediate ones included. ``float32_bounds`` are mismatches in float32 that the conditioning of a published model
    explains, by output; that of ``""`` is for all others.
    """

    model: nn.Module
    keys: Sequence[Rule]
    run: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
    float32_bounds: Mapping[str, float] = field(default_factory=dict)


class NotCovered(Exception):
    """A published option that no variant of ours uses; the message says which."""


def constructor(entry: str, *names: str) -> str:
    """The published constructor that a golden file's ``source.entry`` names: ``"FILE:NAME"``, perhaps with a remark.

    Raises:
        NotCovered: If it is none of ``names``.
    """
    name = entry.partition(":")[2].partition(" ")[0]
    if name not in names:
        raise NotCovered(f"entry {entry!r} is no model of this family")
    return name


def nothing_left(kwargs: Collection[str]) -> None:
    """Refuse arguments of a published constructor that have not been translated.

    Raises:
        NotCovered: If there is one.
    """
    if kwargs:
        raise NotCovered(f"arguments {', '.join(sorted(kwargs))}")


def defaults_unknown(kwargs: Collection[str], *names: str) -> None:
    """Refuse a call of a published constructor that leaves out arguments whose defaults nobody here knows.

    Raises:
        NotCovered: If one of ``names`` is not among ``kwargs``.
    """
    missing = set(names) - set(kwargs)
    if missing:
        raise NotCovered(f"the published defaults of {', '.join(sorted(missing))}")


def twins(rows: Sequence[Variant]) -> list[Variant]:
    """The rows without Mamba, ``NAME_nomamba``: models whose mixers are convolutions of the same width."""

    def twin(row: Variant) -> Variant:
        kwargs, description = {**row.kwargs, "mixer": "conv"}, f"{row.name}'s twin"
        return replace(row, name=f"{row.name}_nomamba", kwargs=kwargs, description=description)

    return list(map(twin, rows))


def translated(
    kwargs: Mapping[str, Any],
    same: Mapping[str, str],
    unchanged: Mapping[str, Any] | None = None,
    ineffective: Collection[str] = (),
) -> dict[str, Any]:
    """Arguments of a published constructor under our names.

    Args:
        kwargs: The published arguments.
        same: Published names and ours, where the values are the same.
        unchanged: Values of arguments for which we have no other.
        ineffective: Arguments that change no output.

    Raises:
        NotCovered: If an argument is none of these, or has another value than ``unchanged`` says.
    """
    given = {key: value for key, value in kwargs.items() if key not in ineffective}
    for key, value in (unchanged or {}).items():
        if given.pop(key, value) != value:
            raise NotCovered(f"{key}={kwargs[key]!r}")
    nothing_left(given.keys() - same.keys())
    return {same[key]: value for key, value in given.items()}


@cache
def families() -> tuple[ModuleType, ...]:
    """Every module of ``vssm.models`` that declares VARIANTS, sorted by name."""
    package = importlib.import_module("vssm.models")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"vssm.models.{name}") for name in names]
    return tuple(module for module in modules if hasattr(module, "VARIANTS"))


@cache
def variants() -> dict[str, Variant]:
    """Every variant of every family, by name."""
    found: dict[str, Variant] = {}
    for family in families():
        for variant in family.VARIANTS:
            if variant.name in found:
                raise ValueError(f"variants: {variant.name!r} stands in two rows; the second is in {family.__name__}")
            found[variant.name] = variant
    return found


def rows_of(model: nn.Module) -> list[Variant]:
    """The row that ``model`` was built from; every row of its class if it was built by hand."""
    known = variants()
    name = getattr(model, "variant_name", None)
    return [known[name]] if name in known else [row for row in known.values() if row.model is type(model)]
