"""Key rules: how the entries of a published state dict become ours, and back.

A family lists its rules once, in the order in which they turn published entries into ours; ``to_published`` runs them
backwards. Each rule has an inverse, except what stands in ``also(...)``: names and layouts that some published files
use beside the usual one. Those are understood on loading and never written.

    KEYS = [
        also(rename(r"\\.self_attention\\.", ".op.")),                    # first release
        also(reshape(r"\\.weight$", "o i 1 1 -> o i")),                  # linear layers kept as 1x1 convolutions
        rename(r"^layers\\.(\\d+)\\.blocks\\.", r"stages.\\1.blocks."),
        stack(("x_proj.weight", "x_proj_b.weight"), "x_proj"),          # two directions -> one (2, ...) tensor
        reshape(r"\\.A_logs$", "(k d) n -> k d n"),
    ]

A rule that does not apply to an entry leaves it alone, so that the loader can report it by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


class Rule(Protocol):
    """One step between published entries and ours."""

    def to_ours(self, state: State, expected: Shapes) -> State:
        """``state`` after this step; ``expected`` holds the shapes that this step should produce."""
        ...

    def to_published(self, state: State) -> State:
        """``state`` before this step."""
        ...


def to_ours(state: Mapping[str, Tensor], rules: Sequence[Rule], shapes: Shapes) -> State:
    """Turn a published state dict into ours.

    Args:
        state: Published entries.
        rules: The family's rules.
        shapes: Our entries and their shapes, ``shapes_of(model)``; rules that split or reshape read sizes from them.

    Raises:
        ValueError: If two entries end under one name.
    """
    stages = [_on_meta(shapes)]
    for rule in reversed(rules):
        stages.append(rule.to_published(stages[-1]))
    state = dict(state)
    for rule, expected in zip(rules, reversed(stages[:-1]), strict=True):
        state = rule.to_ours(state, {key: tuple(value.shape) for key, value in expected.items()})
    return state


def to_published(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> State:
    """Turn our state dict into the published one: the inverse of ``to_ours``."""
    state = dict(state)
    for rule in reversed(rules):
        state = rule.to_published(state)
    return state


def published_shapes(shapes: Shapes, rules: Sequence[Rule]) -> dict[str, tuple[int, ...]]:
    """Names and shapes a published file has for a model with our entries ``shapes``."""
    return {key: tuple(value.shape) for key, value in to_published(_on_meta(shapes), rules).items()}


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every entry of ``module.state_dict()``."""
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def rename(pattern: str, replacement: str) -> Rule:
    r"""Replace the regular expression ``pattern`` in every key, as ``re.sub`` does.

    The inverse is derived, so outside its groups the pattern may hold only literals, ``^`` and ``$``, and the
    replacement must use every group once.

    >>> rule = rename(r"^layers\.(\d+)\.", r"stages.\1.")
    >>> list(rule.to_published({"stages.3.norm": None}))
    ['layers.3.norm']
    """
    return _Rename(pattern, replacement, *_inverted(pattern, replacement))


def stack(published: Sequence[str], ours: str) -> Rule:
    """Stack several published tensors of one shape into one, along a new first axis.

    Names are the last parts of keys: ``stack(("D", "D_b"), "D")`` makes ``layers.0.mixer.D`` (2, d) of
    ``layers.0.mixer.D`` and ``layers.0.mixer.D_b`` (d), for every prefix.
    """
    return _Stack(tuple(published), ours)


def split(published: str, ours: Sequence[str], dim: int = 0) -> Rule:
    """Cut a published tensor along ``dim`` into several of ours. Names are the last parts of keys, as in ``stack``."""
    return _Split(published, tuple(ours), dim)


def reshape(pattern: str, axes: str) -> Rule:
    """Reshape the tensors whose key matches ``pattern``: ``axes`` names the published axes, then ours.

    ``"(k d) n -> k d n"`` separates an axis, ``"d 1 w -> d w"`` drops one of size 1, ``...`` stands for any further
    axes. Axes keep their order.
    """
    published, ours = ([_names(axis) for axis in _tokens(side)] for side in axes.split("->"))
    if [n for names in published for n in names] != [n for names in ours for n in names]:
        raise ValueError(f"reshape: both sides must name the same axes in the same order, got {axes!r}")
    return _Reshape(pattern, tuple(published), tuple(ours))


def drop(pattern: str) -> Rule:
    """Leave out published entries that hold nothing learned (tables that we compute). They are not written back."""
    return _Drop(pattern)


def also(rule: Rule) -> Rule:
    """Understand another published name or layout on loading; never write it."""
    return _Also(rule)


@dataclass(frozen=True)
class _Rename:
    pattern: str
    replacement: str
    inverse_pattern: str
    inverse_replacement: str

    def to_ours(self, state: State, expected: Shapes) -> State:
        return _renamed(state, self.pattern, self.replacement)

    def to_published(self, state: State) -> State:
        return _renamed(state, self.inverse_pattern, self.inverse_replacement)


@dataclass(frozen=True)
class _Stack:
    published: tuple[str, ...]
    ours: str

    def to_ours(self, state: State, expected: Shapes) -> State:
        return _joined(state, self.published, self.ours, torch.stack, lambda parts: len({p.shape for p in parts}) == 1)

    def to_published(self, state: State) -> State:
        out: State = {}
        for key, value in state.items():
            prefix = _prefix(key, self.ours)
            if prefix is None or value.ndim == 0 or len(value) != len(self.published):
                _put(out, key, value)
                continue
            for name, part in zip(self.published, value.unbind(), strict=True):
                _put(out, prefix + name, part)
        return out


@dataclass(frozen=True)
class _Split:
    published: str
    ours: tuple[str, ...]
    dim: int

    def to_ours(self, state: State, expected: Shapes) -> State:
        out: State = {}
        for key, value in state.items():
            prefix = _prefix(key, self.published)
            parts = [] if prefix is None else [prefix + name for name in self.ours]
            sizes = [expected[part][self.dim] for part in parts if part in expected]
            if parts and len(sizes) == len(parts) and value.ndim > self.dim and sum(sizes) == value.shape[self.dim]:
                for part, piece in zip(parts, value.split(sizes, self.dim), strict=True):
                    _put(out, part, piece)
            else:
                _put(out, key, value)
        return out

    def to_published(self, state: State) -> State:
        return _joined(state, self.ours, self.published, lambda parts: torch.cat(parts, self.dim), lambda parts: True)


@dataclass(frozen=True)
class _Reshape:
    pattern: str
    published: tuple[tuple[str, ...], ...]          # axes of the published tensor, each a product of named sizes
    ours: tuple[tuple[str, ...], ...]

    def to_ours(self, state: State, expected: Shapes) -> State:
        def reshaped(key: str, value: Tensor) -> Tensor:
            if not re.search(self.pattern, key) or key not in expected:
                return value
            shape = _converted(expected[key], self.ours, self.published)
            return value.reshape(expected[key]) if shape == tuple(value.shape) else value

        return {key: reshaped(key, value) for key, value in state.items()}

    def to_published(self, state: State) -> State:
        def reshaped(key: str, value: Tensor) -> Tensor:
            shape = _converted(value.shape, self.ours, self.published) if re.search(self.pattern, key) else None
            return value if shape is None else value.reshape(shape)

        return {key: reshaped(key, value) for key, value in state.items()}


@dataclass(frozen=True)
class _Drop:
    pattern: str

    def to_ours(self, state: State, expected: Shapes) -> State:
        return {key: value for key, value in state.items() if not re.search(self.pattern, key)}

    def to_published(self, state: State) -> State:
        return dict(state)


@dataclass(frozen=True)
class _Also:
    rule: Rule

    def to_ours(self, state: State, expected: Shapes) -> State:
        return self.rule.to_ours(state, expected)

    def to_published(self, state: State) -> State:
        return dict(state)


def _on_meta(shapes: Shapes) -> State:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _put(state: State, key: str, value: Tensor) -> None:
    if key in state:
        raise ValueError(f"keys: two entries of the file both become {key!r}; it mixes two naming schemes")
    state[key] = value


def _joined(
    state: State,
    names: tuple[str, ...],
    joined: str,
    join: Callable[[list[Tensor]], Tensor],
    fits: Callable[[list[Tensor]], bool],
) -> State:
    """``state`` with each complete set of ``names`` under one prefix joined into one entry, where the first stood."""
    groups: dict[str, list[str]] = {}
    for key in state:
        prefix = _prefix(key, names[0])
        group = [] if prefix is None else [prefix + name for name in names]
        if group and all(part in state for part in group) and fits([state[part] for part in group]):
            groups[key] = group
    members = {part for group in groups.values() for part in group}
    out: State = {}
    for key, value in state.items():
        if key in groups:
            prefix = key[: len(key) - len(names[0])]
            _put(out, prefix + joined, join([state[part] for part in groups[key]]))
        elif key not in members:
            _put(out, key, value)
    return out


def _renamed(state: State, pattern: str, replacement: str) -> State:
    out: State = {}
    for key, value in state.items():
        _put(out, re.sub(pattern, replacement, key), value)
    return out


def _prefix(key: str, name: str) -> str | None:
    """What stands before ``name`` if the key ends with it at a dot (or is it), else None."""
    if key != name and not key.endswith("." + name):
        return None
    return key[: len(key) - len(name)]


def _tokens(side: str) -> list[str]:
    return re.findall(r"\([^)]*\)|\S+", side)


def _names(token: str) -> tuple[str, ...]:
    """Sizes whose product is the axis: "(k d)" -> ("k", "d"), "1" -> ()."""
    return tuple(name for name in token.strip("()").split() if name != "1")


def _converted(
    shape: Iterable[int], have: tuple[tuple[str, ...], ...], want: tuple[tuple[str, ...], ...]
) -> tuple[int, ...] | None:
    """``shape``, whose axes are ``have`` (one name each), written with the axes ``want``; None if it has other axes."""
    shape = tuple(shape)
    rest = len(shape) - sum(names != ("...",) for names in have)
    if rest < 0 or (rest > 0 and ("...",) not in have):
        return None
    sizes: dict[str, tuple[int, ...]] = {}
    for names in have:
        count = rest if names == ("...",) else 1
        if not names and shape[0] != 1:
            return None
        sizes["".join(names)], shape = shape[:count], shape[count:]
    converted: tuple[int, ...] = ()
    for names in want:
        converted += sizes["..."] if names == ("...",) else (prod(prod(sizes[name]) for name in names),)
    return converted


def _inverted(pattern: str, replacement: str) -> tuple[str, str]:
    """The pattern and replacement that undo ``re.sub(pattern, replacement, key)``."""
    pieces = re.findall(r"\((?:\\.|[^()\\])*\)|\\.|.", pattern)
    groups = [piece for piece in pieces if piece.startswith("(")]
    used = re.findall(r"\\(\d)", replacement)
    literal = [piece for piece in pieces if piece not in ("^", "$") and not piece.startswith("(")]
    start, end = pattern.startswith("^"), pieces[-1:] == ["$"]
    inner = pieces[start : len(pieces) - end]
    if (
        any(re.fullmatch(r"[][.*+?{}|()]|\\[A-Za-z0-9]", piece) for piece in literal)
        or "^" in inner
        or "$" in inner
        or any(group.startswith("(?") for group in groups)
        or sorted(used) != [str(i + 1) for i in range(len(groups))]
    ):
        raise ValueError(
            f"rename: {pattern!r} -> {replacement!r} has no derived inverse; outside plain groups use literals, ^ "
            "and $ (a dot is \\.), and use every group once in the replacement"
        )
    parts = re.split(r"\\(\d)", replacement)                        # text, group number, text, …
    inverse = "".join(groups[int(p) - 1] if i % 2 else re.escape(p) for i, p in enumerate(parts))
    back, number = "", 0
    for piece in inner:
        if piece.startswith("("):
            number += 1
            back += f"\\{used.index(str(number)) + 1}"
        else:
            back += piece[-1].replace("\\", r"\\")
    return f"{'^' * start}{inverse}{'$' * end}", back
