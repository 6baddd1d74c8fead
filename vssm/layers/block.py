"""Residual blocks around any mixer: of maps, as in VMamba, and of tokens, as in Vim."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from timm.layers import DropPath
from torch import Tensor, nn

from vssm.layers.layout import over_map, to_map, to_tokens
from vssm.layers.norm import ChannelNorm

Make = Callable[[int], nn.Module]  # a part, for this many channels


class MixerBlock(nn.Module):
    """Norm, mix, add; with an MLP also norm, MLP, add. (B, C, *grid) in and out, channels last in memory.

    Args:
        dim: Channels.
        mixer: Makes the mixer, (tokens (B, L, C), grid) to tokens.
        mlp: Makes the MLP of tokens; None for none.
        norm: Makes the norms.
        drop_path: Rate of stochastic depth, for each branch.
    """

    def __init__(
        self, dim: int, mixer: Make, mlp: Make | None = None, norm: Make = ChannelNorm, drop_path: float = 0.0
    ):
        super().__init__()
        self.norm1, self.mixer = norm(dim), mixer(dim)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm(dim) if mlp else None
        self.mlp = mlp(dim) if mlp else None
        self.drop_path2 = DropPath(drop_path) if mlp and drop_path else nn.Identity()
        for made in (self.norm1, self.norm2):
            if isinstance(made, ChannelNorm):
                made.narrow = True

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        x = to_tokens(x)
        branch = self.drop_path1(self.mixer(over_map(self.norm1, x, grid), grid))
        if self.mlp is not None:
            x = x + branch
            branch = self.drop_path2(self.apply_mlp(over_map(self.norm2, x, grid), grid))
        # No view: where sizes are open, Inductor cannot tell in which order its strides are.
        return to_map(x, grid) + to_map(branch, grid)

    def apply_mlp(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        return self.mlp(x)


class TokenBlock(nn.Module):
    """Norm, mix, add. (B, L, C) tokens in and out; ``grid`` is that of the patches among them.

    Args:
        norm, mixer: Of tokens; the mixer knows the grid.
        drop_path: Rate of stochastic depth.
        layer_scale: Scales what the mixer returns.
        turn_in, turn_out: Rotary embedding of the stream before the block, and of what the block adds.
    """

    def __init__(
        self,
        norm: nn.Module,
        mixer: nn.Module,
        drop_path: float = 0.0,
        *,
        layer_scale: nn.Module | None = None,
        turn_in: nn.Module | None = None,
        turn_out: nn.Module | None = None,
    ):
        super().__init__()
        self.norm, self.mixer, self.layer_scale = norm, mixer, layer_scale
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.turn_in, self.turn_out = turn_in, turn_out

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        return self.step(x, grid)[2]

    def step(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The stream as the block reads it, the branch that it makes of it, and the stream behind it."""
        x = x if self.turn_in is None else self.turn_in(x, grid)
        branch = self.mixer(self.norm(x), grid)
        branch = branch if self.layer_scale is None else self.layer_scale(branch)
        added = self.drop_path(branch)
        return x, branch, x + (added if self.turn_out is None else self.turn_out(added, grid))
