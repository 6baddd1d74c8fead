"""Keys in few words: state-dict keys as a person can read them, and paste them into an issue."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor

Numbers = tuple[int, ...]
Box = tuple[Numbers, ...]           # the product of these sets of numbers


def grouped(keys: Iterable[str]) -> list[str]:
    """Every key, like layers on one line.

    >>> grouped(["layers.0.D", "layers.1.D", "layers.2.D", "layers.0.norm.weight", "layers.2.norm.weight", "cls_token"])
    ['layers.{0,2}.{D, norm.weight}', 'layers.1.D', 'cls_token']
    """
    endings: dict[tuple[str, Numbers], list[str]] = {}          # ("layers.*", (0,)) -> ["D", "norm.weight"]
    for key in keys:
        parts = key.split(".")
        cut = max((i + 1 for i, part in enumerate(parts) if part.isdecimal()), default=0)
        pattern = ".".join("*" if part.isdecimal() else part for part in parts[:cut])
        numbers = tuple(int(part) for part in parts[:cut] if part.isdecimal())
        endings.setdefault((pattern, numbers), []).append(".".join(parts[cut:]))
    layers: dict[tuple[str, tuple[str, ...]], list[Numbers]] = {}
    for (pattern, numbers), names in endings.items():
        layers.setdefault((pattern, tuple(names)), []).append(numbers)
    lines: list[str] = []
    for (pattern, endings_here), indices in layers.items():
        if not pattern:
            lines += endings_here
            continue
        ending = endings_here[0] if len(endings_here) == 1 else "{" + ", ".join(endings_here) + "}"
        for box in _boxes(indices):
            texts = iter(box)
            head = ".".join(_ranges(next(texts)) if part == "*" else part for part in pattern.split("."))
            lines.append(f"{head}.{ending}" if ending else head)
    return lines


def digest(state: Mapping[str, Tensor], lines: int = 12) -> str:
    """What a state dict holds, in at most ``lines`` lines below a checksum of its names and shapes."""
    named = "\n".join(f"{key} {tuple(value.shape)}" for key, value in sorted(state.items()))
    checksum = hashlib.sha256(named.encode()).hexdigest()[:8]
    numbers = sum(value.numel() for value in state.values())
    head = f"{len(state)} tensors, {numbers:,} numbers, keys {checksum}"
    groups = grouped(state)
    if len(groups) > lines:
        groups = [*groups[: lines - 1], f"… and {len(groups) - lines + 1} lines more"]
    return "\n".join([head, *(f"  {group}" for group in groups)])


def _boxes(indices: Iterable[Numbers]) -> list[Box]:
    """Write a set of index tuples as few products of sets: {(0, 0), (0, 1), (1, 0)} -> [{0} x {0, 1}, {1} x {0}]."""
    boxes: list[Box] = [tuple((number,) for number in numbers) for numbers in indices]
    for axis in reversed(range(len(boxes[0]))):
        merged: dict[Box, set[int]] = {}
        for box in boxes:
            merged.setdefault(box[:axis] + box[axis + 1 :], set()).update(box[axis])
        boxes = [(*rest[:axis], tuple(sorted(values)), *rest[axis:]) for rest, values in merged.items()]
    return boxes


def _ranges(numbers: Numbers) -> str:
    """(0, 1, 2, 5) -> "{0-2,5}"; (3,) -> "3"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else "{" + text + "}"
