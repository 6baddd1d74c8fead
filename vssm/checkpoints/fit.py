"""Does a state dict fit a model, and if not, what is missing, left over or of another shape?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from vssm.checkpoints.digest import digest, grouped
from vssm.models import variant as rows
from vssm.models.keys import Rule, Shapes, State, published_shapes, shapes_of, to_ours, to_published

ALIKE = 0.5         # share of fitting entries from which a file "looks like" an architecture
SURE = 0.9          # share from which no other family can be meant
RELATED = 0.2       # share of names, numbers aside, from which a family is compared in full


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
    """Names of the variants whose entries agree best with ``state`` in name and shape; none if few do.

    Only families whose names are partly those of ``state`` are built, the most alike first, and no further one once a
    row fits almost entirely.
    """
    scores: dict[str, float] = {}
    for family in _families_alike(state):
        scores |= {row.name: _agreement(state, row) for row in family.VARIANTS}
        if max(scores.values()) > SURE:
            break
    best = max(scores.values(), default=0.0)
    return [name for name, score in scores.items() if score == best] if best > ALIKE else []


def _families_alike(state: Mapping[str, Tensor]) -> list[ModuleType]:
    """Families one of whose rows, the small one for tests if there is one, shares names with ``state``, best first."""
    given, found = _patterns(state), []
    for family in rows.families():
        row = next((row for row in family.VARIANTS if row.name.startswith("test_")), family.VARIANTS[0])
        shapes = _row_shapes(row)
        share = max(
            len(given & names) / max(len(given), len(names))
            for names in (_patterns(shapes), _patterns(published_shapes(shapes, row.keys)))
        )
        found.append((share, family))
    return [family for share, family in sorted(found, key=lambda pair: -pair[0]) if share > RELATED]


def _patterns(names: Iterable[str]) -> set[str]:
    """Names without their numbers: a deeper model has the same."""
    return {re.sub(r"\d+", "", name) for name in names}


def _row_shapes(row: rows.Variant) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(row.build())


def _agreement(state: Mapping[str, Tensor], row: rows.Variant) -> float:
    """The share of entries of ``state`` and of the row that agree in name and shape."""
    shapes = _row_shapes(row)
    try:
        ours, published = translated(state, row.keys, shapes)
    except ValueError:                                       # two entries under one name: not this family's file
        return 0.0
    if published:                                            # half of a stacked pair still counts under its own name
        ours, shapes = to_published(ours, row.keys), published_shapes(shapes, row.keys)
    return _fitting(ours, shapes) / max(len(ours), len(shapes))


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
