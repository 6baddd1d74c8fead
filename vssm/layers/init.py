"""Initialisation that several families share, for ``model.apply``."""

from __future__ import annotations

from torch import nn

from vssm.layers.ssm import SelectiveSSM


def linear_like_transformers(module: nn.Module) -> None:
    """Linear layers: truncated normal weights of deviation 0.02, no bias. Leaves other modules alone."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def ssm_like_transformers(module: nn.Module) -> None:
    """The same for the projections of SSMs, step sizes included; decay and skip weights stay as they are.

    What comes of published models that initialise all linear layers last, over what Mamba did: their step sizes start
    near softplus(0) = 0.69, not between 0.001 and 0.1.
    """
    if isinstance(module, SelectiveSSM):
        nn.init.trunc_normal_(module.x_proj, std=0.02)
        nn.init.trunc_normal_(module.dt_weight, std=0.02)
        nn.init.zeros_(module.dt_bias)
