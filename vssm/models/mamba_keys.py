"""Key rules of the mixer of github.com/state-spaces/mamba (Apache-2.0), which most families hold as ``mamba``."""

from __future__ import annotations

from collections.abc import Sequence

from vssm.models.keys import Rule, rename, reshape, stack


def mamba_keys(directions: Sequence[str] = ("",), name: str = "mamba") -> list[Rule]:
    """Rules that make a ``ScanMixer`` with ``conv="sequence"`` of the published module called ``name``.

    Args:
        directions: The suffix of each row's parameters: ``("", "_b")`` for ``D`` and ``D_b``.
        name: What stands before the parameters; it becomes ``mixer``.
    """

    def rows(published: str, leaf: str, ours: str) -> Rule:
        return stack([f"{name}.{published}{suffix}{leaf}" for suffix in directions], f"mixer.{ours}")

    return [
        stack([f"{name}.A{suffix}_log" for suffix in directions], "mixer.ssm.A_log"),
        rows("D", "", "ssm.D"),
        rows("x_proj", ".weight", "ssm.x_proj"),
        rows("dt_proj", ".weight", "ssm.dt_weight"),
        rows("dt_proj", ".bias", "ssm.dt_bias"),
        rows("conv1d", ".weight", "sequence_conv.weight"),
        rows("conv1d", ".bias", "sequence_conv.bias"),
        reshape(r"\.sequence_conv\.weight$", "k d 1 w -> k d w"),
        rename(rf"\.{name}\.(in|out)_proj\.", r".mixer.\1_proj."),
    ]
