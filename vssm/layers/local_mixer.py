"""The mixer of LocalMamba (arXiv:2403.09338): every direction passes one channel attention before the sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vssm.kernels import causal_conv1d, selective_scan
from vssm.layers.layout import over_map
from vssm.layers.mixer import ScanMixer
from vssm.layers.norm import TokenNorm
from vssm.layers.ssm import decay
from vssm.scans import scan_shape, scan_table

Directions = str | Sequence[str] | None  # see ``vssm.scans.local``; one choice for all blocks, one a block, or all
ALL = "h h_flip v v_flip w2 w2_flip w7 w7_flip"


class ChannelAttention(nn.Module):
    """Scale the channels of each direction by what the mean of its normalised cells says. (b, k, l, d) in and out."""

    def __init__(self, dim: int, reduction: int = 8):
        super().__init__()
        self.norm = TokenNorm(dim, eps=1e-5)
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
        weighted: Normalise the directions and add them up by learnt weights, as the search for directions does.
        d_state, expand, dt_rank: See ``ScanMixer``.
        conv_size, conv_bias, act: See ``ScanMixer``; ``conv_size=0`` for no convolution over the grid. A convolution
            along each direction has its own.
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
        *,
        weighted: bool = False,
        d_state: int = 16,
        expand: float = 2.0,
        dt_rank: int | None = None,
        conv_size: int = 3,
        conv_bias: bool = True,
        act: str = "silu",
    ):
        sequences = conv == "sequence"
        super().__init__(
            dim, scan=scan, scan_options=scan_options, conv=conv if conv_size else None,
            conv_size=4 if sequences else conv_size, conv_bias=conv_bias, act=act,
            out_norm=None if sequences else "layer", class_token=class_token, d_state=d_state, expand=expand,
            dt_rank=dt_rank,
        )  # fmt: skip
        self.columns = tuple(columns)
        grid = (12, 12)
        self.leaves_out = scan_shape(scan, grid, **self.scan_options)[1] < math.prod(grid)
        self.attention = ChannelAttention(self.out_proj.in_features)
        self.weights = nn.Parameter(1e-3 * torch.randn(self.rows)) if weighted else None

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        z = self.act(z)
        if self.sequence_conv is None:
            y = self.merged(self.along_grid(x, grid), grid)
            y = over_map(self.out_norm, y, grid) * z
        else:
            y = self.merged(self.along_sequences(x, grid) * z.unsqueeze(1), grid)
        return self.out_proj(y)

    def along_grid(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        u = self.act(x if self.conv is None else over_map(self.conv, x, grid))
        return self.ssm(u, self.table(grid, x.device), merge=None, revisits=self.revisits)

    def along_sequences(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Every step has values of its own, those on padding too: they go on through the scan and are dropped there."""
        conv, ssm, cells = self.sequence_conv, self.ssm, x.shape[1]
        table = self.table(grid, x.device)
        if self.leaves_out:
            table = padded(table, cells)
        weight, bias = conv.taps()
        u, _ = causal_conv1d(x, weight, bias, activation="silu", table=table, write="steps", revisits=self.revisits)
        dt, B, C = (u @ ssm.x_proj.mT).split(ssm.splits, -1)  # each (b, k, t, ·)
        A_log, D, dt_bias = ssm.coefficients()
        y, _ = selective_scan(
            u, dt @ ssm.dt_weight.mT, decay(A_log), B, C, D, None, dt_bias,
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
        if self.weights is not None:
            weights = self.weights.softmax(0).type_as(y)
            y = nn.functional.layer_norm(y, y.shape[-1:]) * weights[:, None, None]
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


def local_mixers(
    scan: str, scan_options: Mapping[str, Any] | None, directions: Directions, depth: int, conv: str, **options: Any
) -> Callable[[int, int], LocalMixer]:
    """A function ``(block, dim) -> LocalMixer``; blocks read ``directions`` if ``scan`` is "local"."""
    if scan == "local" and scan_options:
        raise ValueError(f"LocalMamba: scan 'local' takes directions and no scan_options, got {dict(scan_options)}")
    weighted, directions = directions is None, ALL if directions is None else directions
    choices = [directions] * depth if isinstance(directions, str) else list(directions)
    if len(choices) != depth:
        raise ValueError(f"LocalMamba: directions must be one choice a block ({depth} blocks), got {len(choices)}")

    def make(i: int, dim: int) -> LocalMixer:
        if scan != "local":
            return LocalMixer(dim, scan, scan_options, (), conv, weighted=weighted, **options)
        columns = [k for k, name in enumerate(choices[i].split()) if name.startswith("v")]
        return LocalMixer(dim, scan, {"directions": choices[i]}, columns, conv, weighted=weighted, **options)

    return make
