"""Does a state dict fit a model, and if not, what is missing, left over or of another shape?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vssm.checkpoints.digest import digest, grouped
from vssm.models import variant as rows
from vssm.models.keys import Rule, Shapes, State, published_shapes, shapes_of, to_ours, to_published

ALIKE = 0.5         # share of fitting entries from which a file "looks like" an architecture


@dataclass(frozen=True)
class Misfits:
    """What keeps a state dict from fitting, under the names that the file uses."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]         # name -> (in the file, in the model)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def without(self, modules: Iterable[str]) -> Misfits:
        """The misfits outside ``modules``."""
        starts = tuple(f"{name}." for name in modules)

        def outside(name: str) -> bool:
            return not f"{name}.".startswith(starts)

        return Misfits(
            tuple(filter(outside, self.missing)),
            tuple(filter(outside, self.unexpected)),
            {name: shapes for name, shapes in self.reshaped.items() if outside(name)},
        )

    def __str__(self) -> str:
        lines = []
        for keys, what in ((self.missing, "missing"), (self.unexpected, "unexpected")):
            if keys:
                lines += [f"{what} keys ({len(keys)}):", *(f"  {line}" for line in grouped(keys))]
        alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
        for name, shapes in self.reshaped.items():
            alike.setdefault(shapes, []).append(name)
        if alike:
            lines.append(f"keys of another shape ({len(self.reshaped)}):")
        for (in_file, in_model), names in alike.items():
            lines += [f"  {line} is {in_file} in the file, {in_model} in the model" for line in grouped(names)]
        return "\n".join(lines)


def best_row(model: nn.Module, state: Mapping[str, Tensor], shapes: Shapes) -> rows.Variant | None:
    """The row of ``model``; for one built by hand, the row of its class whose rules suit ``state`` best."""
    candidates = rows.rows_of(model)
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    return max(candidates, key=lambda row: _fitting(translated(state, row.keys, shapes)[0], shapes))


def translated(state: Mapping[str, Tensor], rules: Sequence[Rule], shapes: Shapes) -> tuple[State, bool]:
    """``state`` under our names, and whether it came under the published ones."""
    ours = to_ours(state, rules, shapes)
    return (ours, True) if _fitting(ours, shapes) > _fitting(state, shapes) else (dict(state), False)


def misfits(state: State, published: bool, rules: Sequence[Rule], shapes: Shapes) -> Misfits:
    """Compare ``state`` (our names) with ``shapes``; name what differs as the published files do if it came so."""
    found = _compared(state, shapes)
    if published and found:
        return _compared(to_published(state, rules), published_shapes(shapes, rules)) or found
    return found


def looks_like(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the variants whose entries agree best with ``state`` in name and shape; none if few do."""
    scores: dict[str, float] = {}
    for name, variant in rows.variants().items():
        with torch.device("meta"):
            shapes = shapes_of(variant.build())
        try:
            ours, published = translated(state, variant.keys, shapes)
        except ValueError:                                   # two entries under one name: not this family's file
            continue
        if published:                                        # half of a stacked pair still counts under its own name
            ours, shapes = to_published(ours, variant.keys), published_shapes(shapes, variant.keys)
        scores[name] = _fitting(ours, shapes) / max(len(ours), len(shapes))
    best = max(scores.values(), default=0.0)
    return [name for name, score in scores.items() if score == best] if best > ALIKE else []


def explanation(state: Mapping[str, Tensor], found: Misfits, name: str) -> str:
    """Why ``state`` does not fit the model ``name``: the misfits, what the file looks like, what it holds."""
    alike = looks_like(state)
    if name in alike:
        guess = (
            f"looks like {name} and does not fit it; load_weights adapts other classes, channels or image sizes on "
            "request: adapt=('classifier', 'in_chans', 'img_size')"
        )
    elif alike:
        guess = f"does not fit {name}; it looks like {' or '.join(alike[:3])}"
    else:
        guess = f"does not fit {name}; it looks like no model of the zoo"
    if any(key.startswith("backbone.") for key in state):
        guess += "; prefix='backbone.' takes its backbone alone"
    return f"{guess}\n{found}\nthe file holds {digest(state)}"


def _fitting(state: Mapping[str, Tensor], shapes: Shapes) -> int:
    return sum(name in state and tuple(state[name].shape) == tuple(shape) for name, shape in shapes.items())


def _compared(state: Mapping[str, Tensor], shapes: Shapes) -> Misfits:
    reshaped = {
        name: (tuple(state[name].shape), tuple(shape))
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    }
    return Misfits(
        tuple(name for name in shapes if name not in state), tuple(n for n in state if n not in shapes), reshaped
    )
