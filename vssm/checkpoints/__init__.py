"""Published file ⇄ our models, strict: every key fits, or an error names every key that does not.

Key layouts come from the published code; no published file could be opened where this was written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vssm.checkpoints.adapt import Adapted, adapt_state
from vssm.checkpoints.digest import digest
from vssm.checkpoints.download import DownloadError, cached_path, locate, sha256, source_url
from vssm.checkpoints.files import Checkpoint, read_checkpoint, without_wrappers, write_checkpoint
from vssm.checkpoints.fit import Misfits, best_row, explanation, looks_like, misfits, translated
from vssm.checkpoints.transfer import Transfer, load_encoder
from vssm.models.keys import Rule, shapes_of
from vssm.models.variant import Weights

__all__ = [
    "Checkpoint",
    "DownloadError",
    "Report",
    "Transfer",
    "accept_published_names",
    "cached_path",
    "digest",
    "load_encoder",
    "load_pretrained",
    "load_state",
    "load_weights",
    "locate",
    "looks_like",
    "read_checkpoint",
    "sha256",
    "source_url",
    "write_checkpoint",
]


@dataclass(frozen=True)
class Report:
    """What a load did: tensors and numbers of the model that came from the file."""

    source: str
    tensors: tuple[int, int]                        # loaded, of all
    numbers: tuple[int, int]
    adapted: tuple[str, ...]                        # what was changed to fit, in words
    skipped: Misfits                                # what allow_partial let pass

    def __str__(self) -> str:
        share = 100 * self.numbers[0] / max(1, self.numbers[1])
        loaded = f"{self.tensors[0]} of {self.tensors[1]} tensors, {share:.1f} % of {self.numbers[1]:,} numbers"
        return "\n".join([f"{self.source}: {loaded}", *self.adapted, *([str(self.skipped)] if self.skipped else [])])


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    key: str | None = None,
    prefix: str = "",
    adapt: Collection[str] = (),
    allow_partial: Collection[str] = (),
) -> Report:
    """Load a file, published or ours, into ``model``; every key must fit.

    Args:
        model: A model of the zoo.
        path: A ``.safetensors`` or PyTorch file. Nothing that it pickles is executed.
        key: Entry of the file that holds the weights (``"model_ema"``); by default ``"model"``, ``"state_dict"``, …
        prefix: Take only the entries under this prefix (``"backbone."`` of a detector's checkpoint).
        adapt: Differences to adapt: ``"classifier"`` (the model keeps its own), ``"in_chans"``, ``"img_size"``.
        allow_partial: Modules whose keys may be missing, left over or of another shape (``["head"]``), by the names
            that the error shows. The model keeps what it has there.

    Returns:
        What was loaded, and what was not.

    Raises:
        ValueError: If the file cannot be read or does not fit; the message names the keys by group and the
            architecture of the zoo that the file looks like.
    """
    checkpoint = read_checkpoint(path, key=key, prefix=prefix)
    return load_state(model, checkpoint.state, adapt=adapt, allow_partial=allow_partial, source=str(checkpoint))


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    keys: Sequence[Rule] | None = None,
    *,
    adapt: Collection[str] = (),
    allow_partial: Collection[str] = (),
    source: str = "the state dict",
) -> Report:
    """Load a state dict under published names or ours into ``model``; see ``load_weights``.

    ``keys`` are the rules for the published names, by default those of the model's variant.
    """
    if isinstance(allow_partial, str):
        raise ValueError(f"load_weights: allow_partial must be a collection of modules, got {allow_partial!r}")
    shapes, own = shapes_of(model), model.state_dict()
    variant = best_row(model, state, shapes)
    rules = keys if keys is not None else variant.keys if variant else ()
    ours, published = translated(state, rules, shapes)
    adapted = Adapted(ours)
    if adapt:
        if variant is None:
            raise ValueError(f"load_weights: {type(model).__name__} has no row in the zoo that says what to adapt")
        adapted = adapt_state(model, variant, ours, adapt)
        ours = adapted.state
    found = misfits(ours, published, rules, shapes)
    if found.without(allow_partial):
        name = variant.name if variant else type(model).__name__
        raise ValueError(f"load_weights: {source} {explanation(state, found.without(allow_partial), name)}")
    fitting = {name: ours[name] for name, shape in shapes.items() if name in ours and ours[name].shape == shape}
    model.load_state_dict({**own, **fitting})
    loaded = [value.numel() for name, value in fitting.items() if name not in adapted.own]
    total = sum(value.numel() for value in own.values())
    return Report(source, (len(loaded), len(own)), (sum(loaded), total), adapted.done, found)


def load_pretrained(
    model: nn.Module, weights: Weights, *, cache_dir: str | Path | None = None, adapt: Collection[str] = ()
) -> Report:
    """Fetch ``weights`` if need be and load them into ``model``."""
    return load_weights(model, locate(weights, cache_dir), key=weights.key, adapt=adapt)


def accept_published_names(model: nn.Module) -> None:
    """Make ``model.load_state_dict`` understand published names too, so that other loaders (timm's) can be used.

    A state dict under the model's own names is loaded as ever. Any other loses the prefix that all its names share (as
    ``model.`` of a training run) and is translated; where it does not fit and the load is strict, the RuntimeError says
    what ``load_weights`` would.
    """
    model.register_load_state_dict_pre_hook(_translate)


def _translate(
    model: nn.Module, state: dict[str, Any], prefix: str, metadata: object, strict: bool, *errors: list[str]
) -> None:
    shapes = shapes_of(model)
    given = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if {name: tuple(value.shape) for name, value in given.items()} == shapes:
        return
    for name in given:
        del state[prefix + name]
    given = without_wrappers(given)
    variant = best_row(model, given, shapes)
    rules = variant.keys if variant else ()
    ours, published = translated(given, rules, shapes)
    found = misfits(ours, published, rules, shapes)
    if found and strict and not prefix:
        name = variant.name if variant else type(model).__name__
        raise RuntimeError(f"load_state_dict: the state dict {explanation(given, found, name)}")
    state.update({prefix + name: value for name, value in ours.items()})
