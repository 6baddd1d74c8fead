"""HyMamba: the segmentation network of MambaMIM (Tang et al., 2024, arXiv:2408.08070), and its encoder.

MedNeXt-like convolutions above Mamba blocks at 1/16 of the size. The encoder can also read some patches of an image
alone, which is how it is pre-trained (``vssm.models.mambamim``, where the variants stand, too).
Published code: github.com/FengheTan9/MambaMIM (Apache-2.0). Same function; other key names, see ``segmenter_keys``.
What the published code holds and never uses is left out: the backward parameters of its mixers. The table of positions
is computed, for any grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import Mlp
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vssm.layers.conv import CONVS, ConvMixer
from vssm.layers.layout import to_map, to_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.norm import ChannelNorm
from vssm.layers.parts import check_choice
from vssm.layers.ssm import SelectiveSSM, ssm_parameters
from vssm.layers.unetr import UpBlock
from vssm.models.keys import Rule, drop, rename
from vssm.models.mamba_keys import mamba_keys
from vssm.models.segmenter import Segmenter

EPS = 1e-6  # of the norms between convolutions
SLOPE = 0.01
POOLS = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
MIXERS = ("scan", "conv")


def keep(x: Tensor, visible: Tensor | None) -> Tensor:
    """``x`` (B, C, *grid) where ``visible`` (B, 1, *coarser grid) is 1, and 0 elsewhere; all of it if that is None."""
    return x if visible is None else x * spread(visible, x).to(x.dtype)


def spread(visible: Tensor, x: Tensor) -> Tensor:
    """A mask of patches on the grid of ``x``: each entry repeated."""
    return nn.functional.interpolate(visible, x.shape[2:], mode="nearest")


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, two of side 1 with GELU between them, add. (B, C, *grid) in and out."""

    def __init__(self, spatial_dims: int, dim: int, kernel: int, ratio: int):
        super().__init__()
        conv = CONVS[spatial_dims]
        self.conv1, self.norm = conv(dim, dim, kernel, padding=kernel // 2, groups=dim), ChannelNorm(dim, EPS)
        self.conv2, self.act, self.conv3 = conv(dim, ratio * dim, 1), nn.GELU(), conv(ratio * dim, dim, 1)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        # Masked once, at its end: until there no cell sees another but through conv1, and x is masked already.
        return x + keep(self.conv3(self.act(self.conv2(self.norm(self.conv1(x))))), visible)


class ResidualBlock(nn.Module):
    """Two convolutions of side 3 under channel norms, and a residual. (B, C, *grid) to (B, C', *grid)."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int):
        super().__init__()
        conv = CONVS[spatial_dims]
        self.conv1, self.norm1 = conv(in_channels, out_channels, 3, padding=1), ChannelNorm(out_channels, EPS)
        self.conv2, self.norm2 = conv(out_channels, out_channels, 3, padding=1), ChannelNorm(out_channels, EPS)
        self.conv3 = self.norm3 = None
        if in_channels != out_channels:
            self.conv3, self.norm3 = conv(in_channels, out_channels, 1), ChannelNorm(out_channels, EPS)
        self.act = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        y = keep(self.act(self.norm1(self.conv1(x))), visible)
        residual = x if self.conv3 is None else self.norm3(self.conv3(x))
        return self.act(keep(self.norm2(self.conv2(y)), visible) + residual)


class MambaBlock(nn.Module):
    """Norm, mixer, add; norm, MLP, add. (B, L, C) tokens in and out."""

    def __init__(self, spatial_dims: int, dim: int, mixer: str):
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), Mlp(dim, 2 * dim)
        self.mixer: nn.Module = ConvMixer(dim, spatial_dims)
        if mixer == "scan":
            self.mixer = ScanMixer(dim, scan="raster", spatial_dims=spatial_dims, conv="sequence", conv_size=4)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        x = x + self.mixer(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


def positions(grid: Sequence[int], dim: int, device: torch.device | None = None) -> Tensor:
    """A table (L, C) of sines and cosines of each axis, cells in row-major order. As published, in float32."""
    count = dim // (2 * len(grid))
    frequencies = 1 / 10000 ** (torch.arange(count, dtype=torch.float32, device=device) / count)
    axes = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
    angles = [axis.flatten()[:, None] * frequencies for axis in torch.meshgrid(*axes, indexing="ij")]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


class HybridEncoder(nn.Module):
    """Maps of an image, or of the patches of it that are visible.

    (B, in_channels, *size) to maps (B, channels[1], *size), (B, channels[2], *size / 2), …, of which the last two have
    ``channels[-1]`` channels. The last map comes out of Mamba blocks.

    Args:
        spatial_dims, in_channels: As in MONAI.
        channels: Of the stem and of each level.
        depths, kernel_size, mlp_ratios: Blocks of each level below the first, side of their depthwise convolution, and
            their hidden channels over their channels.
        mamba_depth: Mamba blocks.
        mixer: ``"scan"``, or ``"conv"``: a convolution in its place.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        *,
        channels: Sequence[int] = (32, 64, 128, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 1),
        kernel_size: int | Sequence[int] = 3,
        mlp_ratios: Sequence[int] = (2, 4, 4, 4),
        mamba_depth: int = 4,
        mixer: str = "scan",
    ):
        super().__init__()
        check_choice("HybridEncoder", "spatial_dims", spatial_dims, (2, 3))
        check_choice("HybridEncoder", "mixer", mixer, MIXERS)
        kernel_size = [kernel_size] * len(depths) if isinstance(kernel_size, int) else kernel_size
        for name, values in (("depths", depths), ("kernel_size", kernel_size), ("mlp_ratios", mlp_ratios)):
            if len(values) != len(channels) - 1:
                raise ValueError(
                    f"HybridEncoder: {name} must have {len(channels) - 1} entries, one less than channels, got "
                    f"{tuple(values)}"
                )
        if channels[-1] % (2 * spatial_dims):
            raise ValueError(
                f"HybridEncoder: the last of channels must be a multiple of {2 * spatial_dims}, sine and cosine of "
                f"each axis, got {channels[-1]}"
            )
        conv, widths = CONVS[spatial_dims], channels[1:]
        self.reduction, self.grad_checkpointing = 2 ** len(widths), False
        self.pool = POOLS[spatial_dims](2)
        self.stem = conv(in_channels, channels[0], 3, padding=1)
        self.expands = nn.ModuleList(conv(i, o, 3, padding=1) for i, o in zip(channels, widths))
        self.heads = nn.ModuleList(ResidualBlock(spatial_dims, width, width) for width in widths)
        self.layers = nn.ModuleList(
            nn.ModuleList(ConvNeXtBlock(spatial_dims, width, kernel, ratio) for _ in range(depth))
            for width, depth, kernel, ratio in zip(widths, depths, kernel_size, mlp_ratios, strict=True)
        )
        self.blocks = nn.ModuleList(MambaBlock(spatial_dims, channels[-1], mixer) for _ in range(mamba_depth))
        self.blocks.apply(_init_linear)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.convolve(x)
        return [*maps[:-1], self.scan(maps[-1])]

    def convolve(self, x: Tensor, visible: Tensor | None = None, first: int = 0) -> list[Tensor]:
        """The maps before the Mamba blocks, from level ``first`` on; of the ``visible`` patches alone, if given."""
        x, maps = keep(self.stem(keep(x, visible)), visible), []
        for i, (expand, head) in enumerate(zip(self.expands, self.heads, strict=True)):
            if i:
                x = self.level(i - 1, x, visible)
            x = keep(expand(x), visible)
            if i >= first:
                maps.append(self.run(head, x, visible))
        return [*maps, self.level(len(self.layers) - 1, x, visible)]

    def level(self, i: int, x: Tensor, visible: Tensor | None) -> Tensor:
        x = self.pool(x)
        for block in self.layers[i]:
            x = self.run(block, x, visible)
        return x

    def scan(self, x: Tensor, visible: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """The last map through the Mamba blocks. (B, C, *grid) in and out.

        Args:
            x: The map.
            visible: Patches (B, 1, *grid), equally many of each sample. The blocks then read the visible tokens, and
                ``mask_token`` (1, 1, C) stands for the others behind them.
            mask_token: See above.
        """
        grid, tokens = x.shape[2:], to_tokens(x)
        tokens = tokens + positions(grid, tokens.shape[-1], x.device).to(x.dtype)
        if visible is None:
            return to_map(self.mix(tokens, grid), grid)
        batch, cells, dim = tokens.shape
        order = torch.argsort(1 - visible.flatten(1), dim=1, stable=True)       # visible ones first, in row-major order
        # As published: as many tokens are read as the whole batch has visible ones, so some masked ones behind them.
        read = min(int(visible.sum()), cells)
        kept = tokens.gather(1, order[:, :read, None].expand(-1, -1, dim))
        kept = self.mix(kept, (*(1,) * (len(grid) - 1), read))
        filled = torch.cat([kept, mask_token.to(kept.dtype).expand(batch, cells - read, dim)], 1)
        return to_map(filled.gather(1, torch.argsort(order, dim=1)[..., None].expand(-1, -1, dim)), grid)

    def mix(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        for block in self.blocks:
            tokens = self.run(block, tokens, grid)
        return tokens

    def run(self, module: nn.Module, *arguments: Any) -> Tensor:
        return checkpoint(module, *arguments) if self.grad_checkpointing else module(*arguments)


def _init_linear(module: nn.Module) -> None:
    """As published: Xavier's uniform distribution, no bias; the step sizes of the SSM are no exception."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SelectiveSSM):
        for weight in (*module.x_proj.unbind(), *module.dt_weight.unbind()):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(module.dt_bias)


class HyMamba(Segmenter):
    """The segmentation network on a ``HybridEncoder``. The defaults are the published network for BTCV.

    (B, in_channels, *size) to logits (B, out_channels, *size), for sizes whose sides are multiples of 16 (with five
    entries in ``channels``).

    Args:
        spatial_dims, in_channels, out_channels: As in MONAI.
        channels, depths, kernel_size, mlp_ratios, mamba_depth, mixer: Of the encoder.
    """

    encoders = ("mambamim_encoder", "mambamim")  # rows that load_encoder starts from

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 14,
        *,
        channels: Sequence[int] = (32, 64, 128, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 1),
        kernel_size: int | Sequence[int] = 3,
        mlp_ratios: Sequence[int] = (2, 4, 4, 4),
        mamba_depth: int = 4,
        mixer: str = "scan",
    ):
        super().__init__(spatial_dims, in_channels, out_channels, multiple=2 ** (len(channels) - 1))
        self.encoder = HybridEncoder(
            spatial_dims, in_channels, channels=channels, depths=depths, kernel_size=kernel_size,
            mlp_ratios=mlp_ratios, mamba_depth=mamba_depth, mixer=mixer,
        )  # fmt: skip
        widths = [*channels[1:], channels[-1]]
        self.ups = nn.ModuleList(UpBlock(spatial_dims, i, o) for o, i in list(pairwise(widths))[::-1])
        self.last = ResidualBlock(spatial_dims, channels[1], channels[0])
        self.out = CONVS[spatial_dims](channels[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.decode(self.encoder(x))

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits, of the encoder's maps."""
        *skips, y = maps
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            y = self.encoder.run(up, y, skip)
        return self.out(self.encoder.run(self.last, y))

    def no_weight_decay(self) -> set[str]:
        """A_log and D, as the code of Mamba marks them."""
        return set(ssm_parameters(self, "A_log", "D"))

    @staticmethod
    def encoder_entry(name: str) -> str | None:
        """The entry of a pre-trained model that starts our entry ``name``; None for what starts at random."""
        return name if name.startswith("encoder.") else None


def encoder_keys(levels: int = 4, prefix: str = "") -> list[Rule]:
    """Key rules of the encoder; ``prefix`` is what stands before the published names."""
    start = "^" + prefix.replace(".", r"\.")
    return [
        drop(start + r"mae\.pos_embed$"),
        drop(start + r"mae\.blocks\.\d+\.mamba\.(A_b_log|D_b|conv1d_b\.|x_proj_b\.|dt_proj_b\.)"),  # never used
        *mamba_keys(),
        rename(start + r"mae\.blocks\.", r"encoder.blocks."),
        rename(start + r"embeddings\.stem\.", r"encoder.stem."),
        *(rename(start + rf"embeddings\.expend{i + 1}\.", f"encoder.expands.{i}.") for i in range(levels)),
        *(rename(start + rf"embeddings\.encoder{i + 1}\.", f"encoder.heads.{i}.") for i in range(levels)),
        *(rename(start + rf"embeddings\.layer{i + 2}\.", f"encoder.layers.{i}.") for i in range(levels)),
    ]


def segmenter_keys(levels: int = 4) -> list[Rule]:
    """Key rules of the segmentation network."""
    ups = [(rf"^decoder\.decoder{levels + 1 - i}", f"ups.{i}") for i in range(levels)]
    return [
        *encoder_keys(levels),
        *(rename(rf"{theirs}\.transp_conv\.conv\.", f"{ours}.up.") for theirs, ours in ups),
        *(rename(rf"{theirs}\.conv_block\.(conv\d)\.conv\.", rf"{ours}.block.\1.") for theirs, ours in ups),
        rename(r"^decoder\.decoder1\.", r"last."),
        rename(r"^decoder\.out\.conv\.", r"out."),
    ]
