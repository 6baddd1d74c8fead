"""Checkpoint files: read without running what they pickle, written whole or not at all."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

ENTRIES = (                                                     # first found is taken
    "model", "state_dict", "model_state_dict", "network_weights", "module", "model_ema", "state_dict_ema",
)  # fmt: skip
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "model.")     # prefixes of DDP, compile, mm* and Lightning


class _ConfigNode:
    """Stands in for ``yacs.config.CfgNode`` while unpickling: what is in the file becomes a plain dict."""

    def __new__(cls, *args: Any) -> OrderedDict:           # type: ignore[misc]
        return OrderedDict(*args)


_numpy_scalar = np.float64(0).__reduce__()[0]

# Classes that published files are known to pickle beside the weights; nothing of them is executed.
STAND_INS: list[Any] = [
    argparse.Namespace,
    (_ConfigNode, "yacs.config.CfgNode"),
    np.dtype,                                               # nnU-Net's files hold losses and scores as NumPy scalars
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def allow_stand_ins() -> None:
    """Let ``torch.load(weights_only=True)`` make the stand-ins, in timm's reader too.

    Not a ``safe_globals`` block: leaving one, timm's included, takes out what was allowed before it as well.
    """
    torch.serialization.add_safe_globals(STAND_INS)


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file, under the file's own names without wrapper prefixes."""

    state: dict[str, Tensor]
    path: Path
    key: str | None                                 # entry of the file that was taken; None: the file is the state dict
    entries: tuple[str, ...]                        # all top-level entries, empty if the file is the state dict
    metadata: Mapping[str, str]                     # of a safetensors file

    def __str__(self) -> str:
        return self.path.name if self.key is None else f"{self.path.name} (entry {self.key!r})"


def read_checkpoint(path: str | Path, *, key: str | None = None, prefix: str = "") -> Checkpoint:
    """Read the weights of a safetensors or PyTorch file.

    Args:
        path: ``.safetensors``, or anything ``torch.save`` wrote.
        key: Entry that holds the weights; by default the first of ``ENTRIES`` that the file has, or the file itself.
        prefix: Take only the entries that start with this, and cut it off (``"backbone."`` of a detector). Prefixes
            that every entry shares (``module.``, ``backbone.``, …) are cut off anyway.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, pickles an unknown class, or has no such entry.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_checkpoint: no file {path}")
    metadata: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        content, metadata = _read_safetensors(path)
    else:
        content = _read_pickle(path)
    state, key, entries = _weights_of(content, path, key)
    state = _without_prefix(state, path, prefix)
    return Checkpoint(state, path, key, entries, metadata)


def write_checkpoint(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``state`` as safetensors (by the suffix) or as ``{"model": state, "metadata": …}`` with ``torch.save``.

    The file appears under its name only when it is complete.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with written_whole(path) as part:
        if Path(path).suffix == ".safetensors":
            # safetensors refuses tensors that share memory
            state = {key: value.clone() for key, value in state.items()}
            safetensors.torch.save_file(state, part, metadata={"format": "pt", **(metadata or {})})
        else:
            torch.save({"model": state, "metadata": dict(metadata or {})}, part)


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a file to write beside ``path``, which then takes its place in one step; on an exception nothing changes.

    Whoever reads ``path`` finds the old content or the new, also when the process is killed in between.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")  # one name, so that a killed process leaves no second file behind
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"read_checkpoint: {path} is no whole safetensors file ({error}); fetch it again") from error


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start[:1] == b"<" or start.startswith(b"version https://git-lfs"):
        raise ValueError(f"read_checkpoint: {path} is a web page or a Git LFS pointer, no checkpoint; fetch it again")
    try:
        allow_stand_ins()
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unknown = _unknown_classes(path) or re.findall(r"GLOBAL ([\w.]+) was not an allowed", str(error))
        if not unknown:  # not in torch's words, which advise to run whatever the file holds
            raise ValueError(
                f"read_checkpoint: {path} must be a checkpoint of PyTorch or safetensors, got another or a damaged file"
            ) from error
        raise ValueError(
            f"read_checkpoint: {path} pickles {', '.join(unknown)}, which could run code; save its weights alone where "
            "it was made: torch.save(checkpoint['model'], 'weights.pth')"
        ) from error
    except (EOFError, RuntimeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(
            f"read_checkpoint: {path} ({path.stat().st_size:,} bytes) is damaged or no PyTorch file "
            f"({_first_line(error)}); fetch it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unknown_classes(path: Path) -> list[str]:
    """Names of what a zip checkpoint pickles beyond what is known to be harmless; empty if that cannot be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, pickle.UnpicklingError):
        return []                                    # a legacy file: torch reads the list from zip files alone


def _weights_of(content: Any, path: Path, key: str | None) -> tuple[dict[str, Tensor], str | None, tuple[str, ...]]:
    if not isinstance(content, Mapping):
        raise ValueError(f"read_checkpoint: {path} holds a {type(content).__name__}, not a dict of tensors")
    nested = tuple(name for name, value in content.items() if isinstance(value, Mapping) and value)
    if key is None:
        key = next((name for name in ENTRIES if name in nested), None)
    elif key not in nested:
        raise ValueError(f"read_checkpoint: {path} has no entry {key!r} with weights; it has {list(content)[:12]}")
    state = content if key is None else content[key]
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange or not state:
        what = f"entries that are no tensors: {strange[:6]}" if strange else "no entries"
        raise ValueError(f"read_checkpoint: {path} has {what}; name the entry that holds the weights with key=")
    return dict(state), key, () if key is None else tuple(map(str, content))


def _without_prefix(state: dict[str, Tensor], path: Path, prefix: str) -> dict[str, Tensor]:
    if prefix:
        state = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        if not state:
            raise ValueError(f"read_checkpoint: no entry of {path} starts with {prefix!r}")
    return without_wrappers(state)


def without_wrappers(state: dict[str, Any]) -> dict[str, Any]:
    """Cut off the prefixes of DDP, compile, mm* and Lightning that all names share.

    >>> without_wrappers({"module.model.a": 1, "module.model.b": 2})
    {'a': 1, 'b': 2}
    """
    while state and (shared := next((w for w in WRAPPERS if all(name.startswith(w) for name in state)), None)):
        state = {name[len(shared) :]: value for name, value in state.items()}
    return state
