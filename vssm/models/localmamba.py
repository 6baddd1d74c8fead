"""LocalMamba: Visual State Space Model with Windowed Selective Scan (Huang et al., 2024, arXiv:2403.09338).

Every block reads its grid in four of eight directions: rows, columns, windows of side 2 and of side 7, each also
backwards. Which four, a search chose for each block; the outputs pass one channel attention and are added up.
``LocalVim`` is an isotropic host like Vim, ``LocalVMamba`` a hierarchical one like the first VMamba.
Published code and weights: github.com/hunto/LocalMamba (Apache-2.0, both). Same functions; other key names, see KEYS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.fx
from timm.layers import (
    DropPath,
    LayerNorm,
    RmsNorm,
    apply_rot_embed,
    calculate_drop_path_rates,
    lecun_normal_,
    register_notrace_function,
    to_2tuple,
)
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vssm.kernels import causal_conv1d, selective_scan
from vssm.layers.downsample import PatchMerging
from vssm.layers.init import linear_like_transformers
from vssm.layers.layout import over_map, to_map, to_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.norm import ChannelNorm
from vssm.layers.patch import PatchEmbed
from vssm.layers.position import CLASS_TOKENS, Rotary, insert_class_tokens, resize_tokens, split_class_tokens
from vssm.layers.ssm import decay, ssm_parameters
from vssm.layers.stem import PatchStem
from vssm.models.backbone import StageMaps
from vssm.models.base import Hierarchical, Isotropic, Stage, adapted, linear_head
from vssm.models.keys import Rule, drop, rename, reshape, stack
from vssm.models.variant import NotCovered, Published, Variant, Weights
from vssm.scans import scan_shape, scan_table

REPOSITORY = "hunto/LocalMamba"
EPS = 1e-5
NORMS = {"rms": RmsNorm, "layer": LayerNorm}
POOLS = ("avg", "token", "")

Directions = str | Sequence[str]
FIXED = "h h_flip w2 w2_flip"
SEARCHED_VIM = (
    "h v_flip w7 w7_flip", "h_flip w2_flip w7 w7_flip", "h h_flip v w7", "h h_flip v v_flip", "h h_flip v v_flip",
    "h h_flip v v_flip", "h_flip v v_flip w7", "h_flip v v_flip w2_flip", "h h_flip v v_flip", "h h_flip v v_flip",
    "h v v_flip w2", "h v v_flip w2_flip", "h h_flip v_flip w7", "h_flip v v_flip w2", "h h_flip v v_flip",
    "h v w2 w2_flip", "v v_flip w2 w7", "h h_flip v w2", "h h_flip w2_flip w7", "v v_flip w2 w2_flip",
)  # fmt: skip
SEARCHED_TINY = (
    "h h_flip w7 w7_flip", "h_flip v_flip w2 w2_flip", "h_flip v_flip w2_flip w7", "h_flip v v_flip w2",
    "h h_flip v_flip w2_flip", "h_flip v_flip w2 w2_flip", "h w2_flip w7 w7_flip", "h h_flip v v_flip",
    "h v_flip w7 w7_flip", "h_flip v w2 w7_flip", "v v_flip w2 w7_flip", "h h_flip v_flip w2_flip",
    "v_flip w2_flip w7 w7_flip", "h_flip v_flip w2_flip w7_flip", "h_flip v w7 w7_flip",
)  # fmt: skip
SEARCHED_SMALL = (
    "h v v_flip w7_flip", "h h_flip v w7", "h_flip v v_flip w7", "h_flip v w2_flip w7", "h_flip v w2_flip w7",
    "h_flip v_flip w2 w7_flip", "h_flip v v_flip w7", "h v v_flip w7", "h v v_flip w7", "h v v_flip w7_flip",
    "h h_flip v v_flip", "h v v_flip w2", "v v_flip w2_flip w7", "h h_flip v w2", "h_flip v v_flip w7_flip",
    "h h_flip v v_flip", "h v v_flip w7_flip", "h v v_flip w7_flip", "h h_flip v_flip w7", "h_flip v_flip w2_flip w7",
    "h_flip v v_flip w7_flip", "v v_flip w7 w7_flip", "h v v_flip w7_flip", "h_flip v v_flip w2", "h v v_flip w2_flip",
    "h h_flip v w7", "h h_flip w7 w7_flip", "h v_flip w2 w2_flip", "h v_flip w2 w7", "h v v_flip w7_flip",
    "h_flip v w2_flip w7", "h_flip v_flip w7 w7_flip", "h v w7 w7_flip",
)  # fmt: skip


class ChannelAttention(nn.Module):
    """Scale the channels of each direction by what the mean of its normalised cells says. (b, k, l, d) in and out."""

    def __init__(self, dim: int, reduction: int = 8):
        super().__init__()
        self.norm = LayerNorm(dim, eps=EPS)
        hidden = dim // reduction
        self.reduce, self.act, self.expand = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(self.act(self.reduce(self.norm(x).mean(2)))).sigmoid()
        return x * gate.unsqueeze(2)


class LocalMixer(ScanMixer):
    """A gated mixer whose directions pass one channel attention before they are added up. (B, L, C) in and out.

    Args:
        dim, scan, scan_options: See ``ScanMixer``; ``columns`` are the rows of ``scan`` that read column by column.
        conv: ``"grid"``: one convolution over the grid, gate after a norm of the sum, padding only decays the state;
            ``"sequence"``: a convolution along each direction, which padding passes with values of its own, gate inside
            each direction.
        class_token: It lies in the ``"middle"`` of the tokens, and in every direction after as many steps; or None.
    """

    fuses_gate = False

    def __init__(
        self,
        dim: int,
        scan: str,
        scan_options: Mapping[str, Any] | None,
        columns: Sequence[int],
        conv: str,
        class_token: str | None = None,
    ):
        super().__init__(
            dim, scan=scan, scan_options=scan_options, conv=conv, conv_size=3 if conv == "grid" else 4,
            out_norm="layer" if conv == "grid" else None, class_token=class_token,
        )  # fmt: skip
        self.columns = tuple(columns)
        grid = (12, 12)
        self.leaves_out = scan_shape(scan, grid, **self.scan_options)[1] < math.prod(grid)
        self.attention = ChannelAttention(self.out_proj.in_features)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        z = self.act(z)
        if self.conv is not None:
            y = self.merged(self.along_grid(x, grid), grid)
            y = over_map(self.out_norm, y, grid) * z
        else:
            y = self.merged(self.along_sequences(x, grid) * z.unsqueeze(1), grid)
        return self.out_proj(y)

    def along_grid(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        u = self.act(over_map(self.conv, x, grid))
        return self.ssm(u, self.table(grid, x.device), merge=None, revisits=self.revisits)

    def along_sequences(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Every step has values of its own, those on padding too: they go on through the scan and are dropped there."""
        conv, ssm, cells = self.sequence_conv, self.ssm, x.shape[1]
        table = self.table(grid, x.device)
        if self.leaves_out:
            table = padded(table, cells)
        u, _ = causal_conv1d(
            x, conv.weight, conv.bias, activation="silu", table=table, write="steps", revisits=self.revisits
        )
        dt, B, C = (u @ ssm.x_proj.mT).split(ssm.splits, -1)  # each (b, k, t, ·)
        y, _ = selective_scan(
            u, dt @ ssm.dt_weight.mT, decay(ssm.A_log), B, C, ssm.D, None, ssm.dt_bias,
            delta_softplus=True, write=targets(table, cells), revisits=self.revisits,
        )  # fmt: skip
        return y[:, :, :cells]

    def table(self, grid: Sequence[int], device: torch.device) -> Tensor:
        """(K, T): the order over all cells, the class token included."""
        table = scan_table(self.scan, grid, device, **self.scan_options)
        return table if self.class_token is None else with_middle_token(table, grid)

    def merged(self, y: Tensor, grid: Sequence[int]) -> Tensor:
        """Directions (b, k, l, d), each under the attention, added up: (b, l, d)."""
        y = self.attention(y)
        if not self.columns:
            return y.sum(1)
        return sum_with_columns(y, grid, self.columns, self.class_token is not None)


@register_notrace_function
def with_middle_token(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Insert a token that lies between cells p - 1 and p, p = L // 2, and is read after p steps in every row.

    >>> with_middle_token(torch.tensor([[0, 1, 2], [2, 1, 0]]), (1, 3)).tolist()
    [[0, 1, 2, 3], [3, 1, 2, 0]]
    """
    p = math.prod(grid) // 2
    token = torch.full_like(table[:, :1], p)
    table = torch.where(table >= p, table + 1, table)
    return torch.cat([table[:, :p], token, table[:, p:]], 1)


@register_notrace_function
def padded(table: Tensor, steps: int) -> Tensor:
    """Rows of at least as many steps as there are cells, ``steps``."""
    return nn.functional.pad(table, (0, max(0, steps - table.shape[1])), value=steps)


@register_notrace_function
def targets(table: Tensor, cells: int) -> Tensor:
    """Where T steps are written that count as T cells: padding is cell T, no longer cell ``cells``.

    >>> targets(torch.tensor([[0, 2, 1, 2]]), cells=2).tolist()
    [[0, 4, 1, 4]]
    """
    return table.masked_fill(table == cells, table.shape[1])


@register_notrace_function
def sum_with_columns(y: Tensor, grid: Sequence[int], columns: Sequence[int], token: bool) -> Tensor:
    """Add up directions (b, k, l, d), of which ``columns`` read column by column."""
    h, w = grid
    if isinstance(h, int) and h == w:  # a comparison of symbolic sizes would be a guard of an export
        return y.sum(1)
    # As published: a column-major path is undone by transposing (H, W), which is right only where H = W. On other grids
    # its cells change places; the attention before does not mind.
    path = scan_table("raster", grid, y.device, axes="wh").long()
    place = path[:, path[0]]
    place = with_middle_token(place, grid)[0] if token else place[0]
    rows = y.unbind(1)
    moved = torch.stack([rows[k] for k in columns]).sum(0)[:, place]
    rest = [row for k, row in enumerate(rows) if k not in columns]
    return moved + torch.stack(rest).sum(0) if rest else moved


def _mixers(
    scan: str, scan_options: Mapping[str, Any] | None, directions: Directions, depth: int, conv: str, **options: Any
) -> Callable[[int, int], LocalMixer]:
    """A function ``(block, dim) -> LocalMixer``; blocks read ``directions`` if ``scan`` is "local"."""
    choices = [directions] * depth if isinstance(directions, str) else list(directions)
    if len(choices) != depth:
        raise ValueError(f"LocalMamba: directions must be one choice a block ({depth} blocks), got {len(choices)}")

    def make(i: int, dim: int) -> LocalMixer:
        if scan != "local":
            return LocalMixer(dim, scan, scan_options, (), conv, **options)
        columns = [k for k, name in enumerate(choices[i].split()) if name.startswith("v")]
        return LocalMixer(dim, scan, {"directions": choices[i]}, columns, conv, **options)

    return make


class PaddedPatchEmbed(PatchEmbed):
    """Patches that touch; the image is padded with zeros at the right and below. (B, 3, H, W) to (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        # Not -size % p: torch.compile has no such remainder of symbols.
        bottom, right = (self.patch_size - 1 - (size - 1) % self.patch_size for size in (x.shape[2], x.shape[3]))
        return self.proj(nn.functional.pad(x, (0, right, 0, bottom)))


class ResizedRotary(Rotary):
    """Rotary embedding whose table is that of one grid. On others, as published, sines and cosines are resized."""

    grid: tuple[int, ...]

    def set_grid(self, grid: Sequence[int]) -> None:
        self.grid = tuple(grid)
        super().set_grid(grid)

    def turn(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        sin, cos = (positions(table[None], self.grid, grid)[0] for table in (self.sin, self.cos))
        return apply_rot_embed(x, sin, cos)


@torch.fx.wrap
def positions(table: Tensor, own: Sequence[int], grid: Sequence[int]) -> Tensor:
    """A table (1, L, C) of the grid ``own``, resized to another one where it differs."""
    known = all(isinstance(size, int) for size in grid)  # a comparison of symbolic sizes would be a guard of an export
    return table if known and tuple(grid) == tuple(own) else resize_tokens(table, own, grid, None)


@torch.fx.wrap
def check_grid(grid: Sequence[int], own: Sequence[int], patch_size: int) -> None:
    """Refuse images of another grid than the model's."""
    if tuple(grid) != tuple(own):
        raise ValueError(
            f"LocalVim: with a class token the position table is of one size; images must have {own[0]} x {own[1]} "
            f"patches of {patch_size} pixels, got {grid[0]} x {grid[1]}; create the model with img_size=, or call "
            "set_input_size"
        )


class LocalVimBlock(nn.Module):
    """Norm, mix, add. (B, L, C) tokens in and out; with ``rope`` the stream turns before the block."""

    def __init__(self, mixer: nn.Module, norm: nn.Module, rope: ResizedRotary | None, drop_path: float = 0.0):
        super().__init__()
        self.norm, self.mixer, self.rope = norm, mixer, rope
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def turned(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        return x if self.rope is None else self.rope.turn(x, grid)

    def branch(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """What the block adds to the stream."""
        return self.mixer(self.norm(x), grid)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        x = self.turned(x, grid)
        return x + self.drop_path(self.branch(x, grid))


class LocalVim(Isotropic):
    """LocalVim classifier. The defaults are ``localvim_tiny``.

    Without a class token it takes images of any size: tables of positions are resized in every forward pass.

    Args:
        img_size: Size of the images that the tables are for, one number or (H, W).
        in_chans, num_classes, drop_rate, drop_path_rate: As in timm.
        global_pool: ``"avg"``: mean of the patches; ``"token"``: the class token; ``""``: none.
        patch_size: Pixels of the image to one patch, each way.
        embed_dim, depth: Channels and blocks.
        directions: What each block reads, see ``vssm.scans.local``; one choice for all of them, or one a block.
        scan, scan_options: A registered order to read in the place of ``"local"`` and its directions.
        class_token: ``"middle"`` or None.
        rope: Rotary embedding of the stream before each block.
        norm: ``"rms"`` or ``"layer"``.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 20,
        directions: Directions = SEARCHED_VIM,
        scan: str = "local",
        scan_options: Mapping[str, Any] | None = None,
        class_token: str | None = None,
        rope: bool = True,
        norm: str = "rms",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        _check_part("class_token", class_token, ("middle", None))
        _check_part("norm", norm, NORMS)
        _check_pool(global_pool, class_token)
        if rope and class_token:
            raise ValueError("LocalVim: rope turns patches only; pass rope=False or class_token=None")
        self.class_token = class_token
        self.patch_embed = PaddedPatchEmbed(in_chans, embed_dim, patch_size)
        self.grid = self._grid(img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        length = math.prod(self.grid) + CLASS_TOKENS[class_token]
        self.pos_embed = nn.Parameter(torch.empty(1, length, embed_dim))
        self.rope = ResizedRotary(embed_dim, self.grid) if rope else None

        make_mixer = _mixers(scan, scan_options, directions, depth, "sequence", class_token=class_token)
        self.blocks = nn.ModuleList(
            LocalVimBlock(make_mixer(i, embed_dim), NORMS[norm](embed_dim, eps=EPS), self.rope, rate)
            for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.norm = NORMS[norm](embed_dim, eps=EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = linear_head(embed_dim, num_classes)
        self.describe(embed_dim, patch_size, num_classes, global_pool)
        self.init_weights()

    def _grid(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        # As published: whole patches alone count for the tables, though an image is padded.
        grid = self.patch_embed.grid(*to_2tuple(img_size))
        if min(grid) < 1:
            patch = self.patch_embed.patch_size
            raise ValueError(f"LocalVim: img_size must be at least one patch ({patch}) each way, got {img_size}")
        return grid

    def init_weights(self) -> None:
        self.apply(linear_like_transformers)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            # As published: the rule for linear layers comes last and overwrites Mamba's step sizes.
            mixer = block.mixer
            nn.init.trunc_normal_(mixer.ssm.x_proj, std=0.02)
            nn.init.trunc_normal_(mixer.ssm.dt_weight, std=0.02)
            nn.init.zeros_(mixer.ssm.dt_bias)
            nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
            with torch.no_grad():
                mixer.out_proj.weight.div_(math.sqrt(len(self.blocks)))

    def embed(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        x = self.patch_embed(x)
        grid = x.shape[2:]
        x = to_tokens(x)
        if self.class_token is None:
            return x + positions(self.pos_embed, self.grid, grid), grid
        check_grid(grid, self.grid, self.patch_embed.patch_size)
        return insert_class_tokens(x, self.cls_token.expand(x.shape[0], -1, -1), "middle") + self.pos_embed, grid

    def patches(self, x: Tensor) -> Tensor:
        return split_class_tokens(x, self.class_token)[0]

    def class_tokens(self, x: Tensor) -> Tensor:
        return split_class_tokens(x, self.class_token)[1]

    def pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "token":
            return self.class_tokens(x)[:, 0]
        return self.patches(x).mean(1) if self.global_pool == "avg" else x

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            _check_pool(global_pool, self.class_token)
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Make the tables those of other images: positions are resized, angles computed."""
        old, self.grid = self.grid, self._grid(img_size)
        with torch.no_grad():
            table = resize_tokens(self.pos_embed, old, self.grid, self.class_token)
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        if self.rope is not None:
            self.rope.set_grid(self.grid)

    def adapt_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict whose position table has this model's size, resized from that of square images.

        Raises:
            ValueError: If the table is not that of square images.
        """
        return adapted(state, "pos_embed", self._resized)

    def _resized(self, table: Tensor) -> Tensor:
        if table.shape == self.pos_embed.shape:
            return table
        count = table.shape[1] - CLASS_TOKENS[self.class_token]
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(
                f"LocalVim.adapt_state: the position table must be that of square images, got {count} patches; "
                "load it into a model of its own img_size, then call set_input_size"
            )
        return resize_tokens(table, (side, side), self.grid, self.class_token)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows them). As published: A_log is decayed."""
        tokens = {"cls_token"} if self.class_token else set()
        return {"pos_embed", *tokens, *ssm_parameters(self, "D", "dt_bias")}


def _check_part(name: str, value: str | None, parts: Collection[str | None]) -> None:
    if value not in parts:
        raise ValueError(f"LocalVim: {name} must be one of {', '.join(map(repr, parts))}, got {value!r}")


def _check_pool(global_pool: str, class_token: str | None) -> None:
    _check_part("global_pool", global_pool, POOLS)
    if global_pool == "token" and class_token is None:
        raise ValueError("LocalVim: global_pool='token' needs class_token='middle'; pass global_pool='avg'")


class LocalVimBackbone(nn.Module):
    """Maps of one stride: what the blocks ``out_indices`` add to the stream, each under a norm of its own.

    Args:
        trunk: A classifier without class token, which loses its last norm and its head.
        out_indices: Blocks.
    """

    def __init__(self, trunk: LocalVim, out_indices: Sequence[int] = (4, 9, 14, 19)):
        super().__init__()
        if not all(0 <= i < len(trunk.blocks) for i in out_indices):
            raise ValueError(
                f"LocalVimBackbone: out_indices must name blocks 0 to {len(trunk.blocks) - 1}, got {tuple(out_indices)}"
            )
        if trunk.class_token is not None:
            raise ValueError("LocalVimBackbone: the trunk must have no class token, got class_token='middle'")
        self.out_indices = tuple(out_indices)
        trunk.reset_classifier(0, "")
        trunk.norm = nn.Identity()
        self.trunk = trunk
        self.out_norms = nn.ModuleList(LayerNorm(trunk.embed_dim, eps=EPS) for _ in self.out_indices)
        self.feature_info = [trunk.feature_info[i] for i in self.out_indices]

    def forward(self, x: Tensor) -> list[Tensor]:
        x, grid = self.trunk.embed(x)
        found = {}
        for i, block in enumerate(self.trunk.blocks[: max(self.out_indices) + 1]):
            x = block.turned(x, grid)
            saving = self.trunk.grad_checkpointing
            branch = checkpoint(block.branch, x, grid) if saving else block.branch(x, grid)
            x = x + block.drop_path(branch)
            if i in self.out_indices:
                found[i] = branch
        return [to_map(norm(found[i]), grid) for i, norm in zip(self.out_indices, self.out_norms, strict=True)]


class LocalVMambaBlock(nn.Module):
    """Norm, mix, add. (B, C, H, W) in and out, channels last in memory."""

    def __init__(self, mixer: nn.Module, dim: int, drop_path: float = 0.0):
        super().__init__()
        self.norm, self.mixer = ChannelNorm(dim, EPS), mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        return x + self.drop_path(to_map(self.mixer(to_tokens(self.norm(x)), grid), grid))


class LocalVMamba(Hierarchical):
    """LocalVMamba classifier for images of any size from one patch. The defaults are ``localvmamba_tiny``.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: As in timm.
        depths: Blocks of each stage.
        dim: Channels of the first stage, which double with every stage; or of all of them.
        directions, scan, scan_options: As in ``LocalVim``; blocks count through all stages.
        patch_size: Pixels of the image to one cell of the first stage.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 9, 2),
        dim: int | Sequence[int] = 96,
        directions: Directions = SEARCHED_TINY,
        scan: str = "local",
        scan_options: Mapping[str, Any] | None = None,
        patch_size: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        dims = [dim * 2**i for i in range(len(depths))] if isinstance(dim, int) else list(dim)
        if len(dims) != len(depths):
            raise ValueError(f"LocalVMamba: dim must name one width a stage ({len(depths)} in depths), got {dims}")
        make_mixer = _mixers(scan, scan_options, directions, sum(depths), "grid")
        rates = enumerate(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, (depth, width) in enumerate(zip(depths, dims, strict=True)):
            shrink = PatchMerging(dims[i - 1], width) if i else nn.Identity()
            blocks = [LocalVMambaBlock(make_mixer(j, width), width, rate) for j, rate in islice(rates, depth)]
            stages.append(Stage(shrink, blocks))
        super().__init__(
            PatchStem(in_chans, dims[0], patch_size), stages, dims, ChannelNorm(dims[-1], EPS),
            reduction=patch_size, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip
        self.apply(linear_like_transformers)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows them). As published: A_log and the step-size bias are decayed."""
        return set(ssm_parameters(self, "D"))


def _each(ours: str, published: str) -> Rule:
    """The four directions' own parameters in one; ``published`` has a place for their number."""
    return stack([published.format(k) for k in range(4)], ours)


ATTENTION = [
    rename(r"\.attention\.global_reduce\.", r".attention.reduce."),
    rename(r"\.attention\.channel_select\.", r".attention.expand."),
]
KEYS: list[Rule] = [  # of LocalVim
    drop(r"^rope\.freqs_(cos|sin)$"),
    _each("ssm.A_log", "A_log_{}"),
    _each("ssm.D", "D_{}"),
    _each("ssm.x_proj", "x_proj_{}.weight"),
    _each("ssm.dt_weight", "dt_proj_{}.weight"),
    _each("ssm.dt_bias", "dt_proj_{}.bias"),
    _each("sequence_conv.weight", "conv1d_{}.weight"),
    _each("sequence_conv.bias", "conv1d_{}.bias"),
    reshape(r"\.sequence_conv\.weight$", "k d 1 w -> k d w"),
    rename(r"\.mixer\.attn\.", r".mixer.attention."),
    *ATTENTION,
    rename(r"^layers\.(\d+)\.", r"blocks.\1."),
    rename(r"^norm_f\.", r"norm."),
]
BACKBONE_KEYS: list[Rule] = [
    *KEYS,
    rename(r"^outnorm_(\d+)\.", r"out_norms.\1."),
    rename(r"^(pos_embed|patch_embed|blocks)", r"trunk.\1"),
]
VMAMBA_KEYS: list[Rule] = [  # of LocalVMamba and its backbone
    reshape(r"\.A_logs$", "(k d) n -> k d n"),
    reshape(r"\.Ds$", "(k d) -> k d"),
    rename(r"^patch_embed\.0\.", r"stem.conv1."),
    rename(r"^patch_embed\.2\.", r"stem.norm1."),
    *(rename(rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
    rename(r"^layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."),
    rename(r"\.op\.", r".mixer."),
    rename(r"\.mixer\.multi_scan\.attn\.", r".mixer.attention."),
    *ATTENTION,
    rename(r"\.mixer\.conv2d\.", r".mixer.conv."),
    rename(r"\.mixer\.x_proj_weight$", r".mixer.ssm.x_proj"),
    rename(r"\.mixer\.dt_projs_weight$", r".mixer.ssm.dt_weight"),
    rename(r"\.mixer\.dt_projs_bias$", r".mixer.ssm.dt_bias"),
    rename(r"\.mixer\.A_logs$", r".mixer.ssm.A_log"),
    rename(r"\.mixer\.Ds$", r".mixer.ssm.D"),
    rename(r"^classifier\.norm\.", r"norm."),
    rename(r"^classifier\.head\.", r"head.fc."),
    rename(r"^outnorm(\d+)\.", r"out_norms.\1."),
]


def _weights(file: str, top1: float, notes: str = "") -> dict[str, Weights]:
    origin = f"https://github.com/{REPOSITORY}"
    url = f"{origin}/releases/download/v1.0.0/{file}.ckpt"
    return {"in1k": Weights("apache-2.0", origin, "arXiv:2403.09338", url=url, top1=top1, notes=notes)}


def _vim(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    fixed = kwargs.get("class_token") is not None
    return Variant(name, LocalVim, kwargs, KEYS, weights or {}, fixed_input_size=fixed, description=description)


def _vmamba(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    return Variant(
        name, LocalVMamba, kwargs, VMAMBA_KEYS, weights or {}, first_conv="stem.conv1", classifier="head.fc",
        pool_size=(7, 7), description=description,
    )  # fmt: skip


RETRAINED = "82.7 is that of the paper; the repository marks this model as being trained again"
VARIANTS = [
    _vim("localvim_tiny", _weights("local_vim_tiny", 76.2), drop_path_rate=0.1),
    _vim("localvim_tiny_cls", _weights("local_vim_tiny_middle_cls_token", 77.8), "with a class token",
         class_token="middle", rope=False, global_pool="token", drop_path_rate=0.1),
    _vim("localvim_tiny_fixed", None, "published without weights; directions that no search chose",
         directions=FIXED, drop_path_rate=0.1),
    _vim("localvim_small", None, "as the repository builds it, with directions that no search chose; published with "
         "top-1 81.1, by a link to the weights of another model", embed_dim=384, directions=FIXED, drop_path_rate=0.1),
    _vim("localvim_small_searched", None, "with searched directions, as the published downstream recipes build it; its "
         "weights fit localvim_small, too, and compute something else there", embed_dim=384, drop_path_rate=0.1),
    _vmamba("localvmamba_tiny", _weights("local_vssm_tiny", 82.7, RETRAINED), drop_path_rate=0.2),
    _vmamba("localvmamba_small", _weights("local_vssm_small", 83.7),
            depths=(2, 2, 27, 2), directions=SEARCHED_SMALL, drop_path_rate=0.2),
    _vim("test_localvim", None, "for tests", img_size=32, patch_size=8, embed_dim=16, depth=3,
         directions=("h v_flip w3 w3_flip", "h_flip v w2_flip w3", FIXED)),
    _vmamba("test_localvmamba", None, "for tests", depths=(1, 1, 1, 1), dim=8,
            directions=("h v_flip w3 w3_flip", "h_flip v w2_flip w3", FIXED, FIXED)),
]  # fmt: skip

VIM_FACTORIES: dict[str, dict[str, Any]] = {  # published constructors, by what sets them apart
    "local_vim_tiny": {},
    "local_vim_tiny_wo_search": {"directions": [FIXED.split()] * 20},
    "local_vim_tiny_middle_cls_token": {
        "if_cls_token": True, "use_middle_cls_token": True, "if_rope": False, "if_rope_residual": False,
    },
    "local_vim_small": {"embed_dim": 384, "directions": [FIXED.split()] * 20},
}  # fmt: skip
VIM_FACTORY = {
    "patch_size": 16, "embed_dim": 192, "depth": 20, "rms_norm": True, "final_pool_type": "mean", "if_rope": True,
    "if_rope_residual": True, "if_abs_pos_embed": True, "directions": [names.split() for names in SEARCHED_VIM],
}  # fmt: skip
VIM_DEFAULTS = {  # of the published class, where it is not given; None must be given
    "img_size": 224, "patch_size": 16, "depth": 24, "embed_dim": 192, "channels": 3, "num_classes": 1000,
    "rms_norm": None, "final_pool_type": None, "if_abs_pos_embed": None, "if_rope": False, "if_rope_residual": False,
    "if_cls_token": False, "use_middle_cls_token": False, "directions": None,
}  # fmt: skip
VIM_UNCHANGED = {"d_state": 16, "ssm_cfg": None, "bimamba_type": "v2", "norm_epsilon": EPS, "stride": 16}
ELSEWHERE = {  # change no output: training, precision, fused or not
    "drop_rate", "drop_path_rate", "fused_add_norm", "residual_in_fp32", "pretrained", "pretrained_ckpt",
    "use_checkpoint",
}  # fmt: skip


def translate_vim(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LocalVim`` for those of the published ``VisionMamba``."""
    given = {key: value for key, value in kwargs.items() if key not in ELSEWHERE}
    for key, value in VIM_UNCHANGED.items():
        if given.pop(key, value) not in (value, None):
            raise NotCovered(f"{key}={kwargs[key]!r}")
    unknown = sorted(given.keys() - VIM_DEFAULTS.keys())
    if unknown:
        raise NotCovered(f"arguments {', '.join(unknown)}")
    given = VIM_DEFAULTS | given
    needed = {"if_abs_pos_embed": True, "if_rope_residual": given["if_rope"]}
    if given["if_cls_token"]:
        needed |= {"use_middle_cls_token": True, "if_rope": False}
    else:
        needed |= {"final_pool_type": "mean"}
    for key, value in needed.items():
        if given[key] != value:
            raise NotCovered(f"{key}={given[key]!r}")
    if given["directions"] is None:
        raise NotCovered("directions=None is the network that directions are searched with")
    same = ("img_size", "num_classes", "patch_size", "embed_dim", "depth")
    return {
        **{key: given[key] for key in same},
        "in_chans": given["channels"],
        "directions": [" ".join(names) for names in given["directions"]],
        "class_token": "middle" if given["if_cls_token"] else None,
        "global_pool": "token" if given["if_cls_token"] else "avg",
        "rope": given["if_rope"],
        "norm": "rms" if given["rms_norm"] else "layer",
    }


VMAMBA_SAME = {"patch_size": "patch_size", "in_chans": "in_chans", "num_classes": "num_classes", "depths": "depths",
               "dims": "dim"}  # fmt: skip
VMAMBA_UNCHANGED = {
    "ssm_d_state": 16, "ssm_dt_rank": "auto", "ssm_ratio": 2.0, "mlp_ratio": 0.0, "patch_norm": True, "d_state": 16,
}  # fmt: skip


def translate_vmamba(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LocalVMamba`` for those of the published ``VSSM``."""
    given = {key: value for key, value in kwargs.items() if key not in ELSEWHERE}
    for key, value in VMAMBA_UNCHANGED.items():
        if given.pop(key, value) != value:
            raise NotCovered(f"{key}={kwargs[key]!r}")
    directions = given.pop("directions", None)
    if directions is None:
        raise NotCovered("directions=None is the network that directions are searched with")
    if given.keys() - VMAMBA_SAME.keys():
        raise NotCovered(f"arguments {', '.join(sorted(given.keys() - VMAMBA_SAME.keys()))}")
    ours = {VMAMBA_SAME[key]: value for key, value in given.items()}
    return {**ours, "directions": [" ".join(names) for names in directions]}


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """A factory, a class or a backbone of the published code as our model."""
    name = entry.partition(":")[2].split(" ")[0]
    given = dict(kwargs)
    out_indices = given.pop("out_indices", None)
    if name in VIM_FACTORIES:
        model = LocalVim(**translate_vim({**VIM_FACTORY, **VIM_FACTORIES[name], **kwargs}))
        return Published(model, KEYS, _run_vim)
    if name == "VisionMamba":
        return Published(LocalVim(**translate_vim(kwargs)), KEYS, _run_vim)
    if name == "Backbone_LocalVisionMamba":
        trunk = LocalVim(**{**translate_vim(given), "num_classes": 0})
        return Published(LocalVimBackbone(trunk, out_indices or (4, 9, 14, 19)), BACKBONE_KEYS, _run_backbone)
    if name in ("local_vssm_tiny", "local_vssm_small"):
        # As published: these factories take arguments and leave them out.
        row = next(v for v in VARIANTS if v.name == name.replace("local_vssm", "localvmamba"))
        return Published(row.build(), VMAMBA_KEYS, _run_vmamba)
    if name == "VSSM":
        return Published(LocalVMamba(**translate_vmamba(kwargs)), VMAMBA_KEYS, _run_vmamba)
    if name == "Backbone_LocalVSSM":
        model = StageMaps(LocalVMamba(**{**translate_vmamba(given), "num_classes": 0}), out_indices or (0, 1, 2, 3))
        return Published(model, VMAMBA_KEYS, _run_backbone)
    raise NotCovered(f"entry {entry!r} is no model of this family")


def _run_vim(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x, grid = model.embed(inputs["x"])
    out: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        x = block.turned(x, grid)
        branch = block.branch(x, grid)
        out |= {f"layers.{i}.hidden": branch, f"layers.{i}.residual": x}
        x = x + branch
    x = model.norm(x)
    return out | {"features": model.forward_head(x, pre_logits=True), "logits": model.forward_head(x)}


def _run_vmamba(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    features, maps = model.forward_intermediates(inputs["x"])
    stem = model.stem(inputs["x"])
    out = {"patch_embed": stem, "stage0.block0": model.stages[0].blocks[0](stem)}
    out |= {f"stage{i}": x for i, x in enumerate(maps)}
    return {"logits": model.forward_head(features)} | {name: x.movedim(1, -1) for name, x in out.items()}


def _run_backbone(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"feat{i}": x for i, x in enumerate(model(inputs["x"]))}
