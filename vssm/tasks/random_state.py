"""The states of Python's, NumPy's and torch's random number generators, as values that a checkpoint may hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def get_random_state() -> dict[str, Any]:
    """Return the states of this process, as tensors and plain numbers (``torch.load(weights_only=True)`` reads them).

    >>> state = get_random_state()
    >>> first = random.random(), np.random.rand(), torch.rand(()).item()
    >>> set_random_state(state)
    >>> first == (random.random(), np.random.rand(), torch.rand(()).item())
    True
    """
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "name": numpy["bit_generator"],
            "words": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "position": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the states of ``get_random_state`` back."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    words = numpy["words"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], words, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
