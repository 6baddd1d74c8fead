"""Where a token is: learned tables resized to other grids, class tokens among patches, rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import apply_rot_embed
from torch import Tensor, nn

CLASS_TOKENS = {None: 0, "first": 1, "middle": 1, "ends": 2}  # how many there are, by where they lie
ROTARY_GRID = 14  # cells a side of the grid that rotary positions are measured on


def insert_class_tokens(patches: Tensor, tokens: Tensor, where: str) -> Tensor:
    """Put class tokens (b, n, c) among patches (b, l, c): first, in the middle, or one at each end.

    >>> insert_class_tokens(torch.arange(5).view(1, 5, 1), torch.full((1, 1, 1), 9), "middle").flatten().tolist()
    [0, 1, 9, 2, 3, 4]
    """
    if where == "ends":
        return torch.cat([tokens[:, :1], patches, tokens[:, 1:]], 1)
    p = patches.shape[1] // 2 if where == "middle" else 0
    return torch.cat([patches[:, :p], tokens, patches[:, p:]], 1)


def split_class_tokens(x: Tensor, where: str | None) -> tuple[Tensor, Tensor]:
    """Patches and class tokens of a sequence. Undoes ``insert_class_tokens``.

    >>> x = torch.tensor([0, 1, 9, 2, 3, 4]).view(1, 6, 1)
    >>> [part.flatten().tolist() for part in split_class_tokens(x, "middle")]
    [[0, 1, 2, 3, 4], [9]]
    """
    if where is None:
        return x, x[:, :0]
    if where == "ends":
        return x[:, 1:-1], torch.cat([x[:, :1], x[:, -1:]], 1)
    p = (x.shape[1] - 1) // 2 if where == "middle" else 0
    return torch.cat([x[:, :p], x[:, p + 1 :]], 1), x[:, p : p + 1]


def resize_map(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Resize a table of positions (1, C, H, W) to another grid, bicubic, as the published models do."""
    wide = table if table.dtype == torch.float64 else table.float()
    return nn.functional.interpolate(wide, tuple(grid), mode="bicubic", align_corners=False).to(table.dtype)


def resize_tokens(
    table: Tensor, grid: Sequence[int], new_grid: Sequence[int], where: str | None, class_row: str = "own"
) -> Tensor:
    """Resize a table of positions (1, L, C), class tokens included, from one grid of patches to another.

    Args:
        table: One row a token, in the order of the sequence.
        grid, new_grid: Sizes of the grids of patches.
        where: Where class tokens lie: None, ``"first"``, ``"middle"`` or ``"ends"``.
        class_row: ``"own"`` takes the rows of the class tokens out first. ``"first"`` takes the first rows for theirs
            wherever they lie, as Vim's published loaders do: patches before the middle then move by one.
    """
    if not torch.compiler.is_compiling() and tuple(grid) == tuple(new_grid):  # a traced comparison would fix the size
        return table
    first = class_row == "first" and where is not None
    count = CLASS_TOKENS[where]
    patches, tokens = (table[:, count:], table[:, :count]) if first else split_class_tokens(table, where)
    patches = patches.transpose(1, 2).unflatten(2, tuple(grid))
    patches = resize_map(patches, new_grid).flatten(2).transpose(1, 2)
    if first:
        return torch.cat([tokens, patches], 1)
    return patches if where is None else insert_class_tokens(patches, tokens, where)


def positions(table: Tensor, own: Sequence[int], grid: Sequence[int]) -> Tensor:
    """A table (1, L, C) of the grid ``own``, resized to another one where it differs. For FX, wrap it."""
    known = all(isinstance(size, int) for size in grid)  # a comparison of symbolic sizes would be a guard of an export
    return table if known and tuple(grid) == tuple(own) else resize_tokens(table, own, grid, None)


def resize_square(
    who: str, table: Tensor, grid: Sequence[int], where: str | None = None, class_row: str = "own"
) -> Tensor:
    """Resize the table of square images to another grid; see ``resize_tokens``.

    Raises:
        ValueError: If its patches are not those of square images.
    """
    count = table.shape[1] - CLASS_TOKENS[where]
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(
            f"{who}: the position table must be that of square images, got {count} patches; load it into a model of "
            "its own img_size, and resize that one"
        )
    return resize_tokens(table, (side, side), grid, where, class_row)


def axial_angles(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Angles of rotary embedding on a grid, (h w, dim): half of the channels for the row, half for the column.

    Args:
        rows, columns: Where they lie, (h,) and (w,); the angles have their dtype.
        dim: Channels, a multiple of 4; pairs of them turn by one angle.
    """
    half = dim // 2
    frequency = 1.0 / 10000 ** (torch.arange(0, half, 2, dtype=rows.dtype, device=rows.device) / half)
    h, w = len(rows), len(columns)
    by_row, by_column = ((place[:, None] * frequency).repeat_interleave(2, -1) for place in (rows, columns))
    return torch.cat([by_row[:, None].expand(h, w, half), by_column[None].expand(h, w, half)], -1).flatten(0, 1)


class Rotary(nn.Module):
    """Turn pairs of channels by the position of their cell (axial 2D rotary embedding). (B, L, C) in and out.

    The first half of the channels turns with the row, the second with the column. ``skip`` tokens at the start of the
    sequence are left as they are.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, grid: Sequence[int], skip: int = 0):
        super().__init__()
        if dim % 4:
            raise ValueError(f"Rotary: dim must be a multiple of 4, got {dim}")
        self.dim, self.skip = dim, skip
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.set_grid(grid)

    def set_grid(self, grid: Sequence[int]) -> None:
        """Compute the table (L, C) of this grid. In float32, as the published buffers."""
        rows, columns = (torch.arange(n, dtype=torch.float32) / n * ROTARY_GRID for n in grid)
        angle = axial_angles(rows, columns, self.dim)
        self.cos, self.sin = angle.cos().to(self.cos), angle.sin().to(self.sin)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """``grid``: not looked at here, where the table is of one grid."""
        still, x = x[:, : self.skip], x[:, self.skip :]
        turned = apply_rot_embed(x, self.sin, self.cos)
        return torch.cat([still, turned], 1) if self.skip else turned


def turns(rotary: Rotary | None, rope: str | None, i: int, depth: int) -> tuple[Rotary | None, Rotary | None]:
    """What turns the stream before block i of ``depth`` blocks, and what turns the branch that it adds.

    ``rope`` is ``"stream"``: the whole stream turns before each block; or ``"block"``: only what the last block added,
    and before the first one all of it.
    """
    if rope == "stream":
        return rotary, None
    return rotary if i == 0 else None, rotary if i < depth - 1 else None
