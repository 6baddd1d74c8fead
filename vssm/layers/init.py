"""Initialisation that several families share, for ``model.apply``."""

from __future__ import annotations

from torch import nn


def linear_like_transformers(module: nn.Module) -> None:
    """Linear layers: truncated normal weights of deviation 0.02, no bias. Leaves other modules alone."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
