"""ScanMixer: the block of Mamba for grids, over any scan order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vssm.layers.again import Make
from vssm.layers.conv import SequenceConv, depthwise
from vssm.layers.heads import MERGES, join_heads, split_heads
from vssm.layers.layout import over_map
from vssm.layers.norm import OUT_NORMS
from vssm.layers.parts import activation, check_choice
from vssm.layers.ssm import SelectiveSSM
from vssm.scans import scan_rows, scan_table, visits_once

GATES = ("none", "act", "raw")
EXTRA_CELLS = {None: (0, 0), "first": (1, 0), "ends": (1, 1)}  # class tokens before and after the cells of the grid


class ScanMixer(nn.Module):
    """Project in, convolve, scan in every direction of an order, merge, gate, project out. (B, L, C) tokens in and out.

    Args:
        dim: Channels C of the tokens.
        scan: A registered order; its K rows are the directions, each with its own SSM. Where the number of rows follows
            the grid (``"slices"``), all share one.
        scan_options: Options of the order, ``{"window": 7}``.
        spatial_dims: 2 or 3.
        expand: Channels of the scan over C.
        d_state: States of each channel.
        dt_rank: Rank of the step-size projection, C / 16 rounded up if None, of a head's share of C if there are heads.
        conv: ``"grid"``: depthwise over the grid, one for all directions; ``"sequence"``: causal along each direction,
            with its own taps; None: no convolution, only the activation.
        conv_size, conv_bias: Taps (each way on a grid) and bias of the convolution.
        act: Activation after the convolution, and of the gate, by timm's name. ``conv="sequence"`` has SiLU.
        gate: ``"act"``: times the activation of a second projection; ``"raw"``: times that projection; or ``"none"``.
        heads: Groups of channels, each of which reads its own K / heads rows of the order.
        merge: ``"sum"`` or ``"mean"`` of the directions, or of each head's; ``"attention"``: MHS-VM's route attention.
        threshold: Of the route attention, see ``vssm.layers.heads.route_attention``.
        out_norm: Between scan and gate, None or one of ``OUT_NORMS``.
        out_act: Activation after ``out_norm``, by timm's name.
        class_token: Where class tokens lie among the cells: None, ``"first"``, ``"middle"``, ``"ends"``.
        shared: All directions have one convolution and one SSM, except its decay; the convolution runs along the first.
        init: Of the SSM, one of ``vssm.layers.ssm.INITS``.
    """

    fuses_gate = True  # the kernel may gate
    ssm_type: type[nn.Module] = SelectiveSSM

    def __init__(
        self,
        dim: int,
        *,
        scan: str,
        scan_options: Mapping[str, Any] | None = None,
        spatial_dims: int = 2,
        expand: float = 2.0,
        d_state: int = 16,
        dt_rank: int | None = None,
        conv: str | None = "grid",
        conv_size: int = 3,
        conv_bias: bool = True,
        act: str = "silu",
        gate: str = "act",
        heads: int = 1,
        merge: str = "sum",
        threshold: float = 0.5,
        out_norm: str | None = None,
        out_act: str | None = None,
        class_token: str | None = None,
        shared: bool = False,
        init: str = "mamba",
    ):
        super().__init__()
        for argument, value, choices in (
            ("gate", gate, GATES), ("conv", conv, ("grid", "sequence", None)), ("merge", merge, MERGES),
            ("out_norm", out_norm, (*OUT_NORMS, None)), ("class_token", class_token, (*EXTRA_CELLS, "middle")),
        ):  # fmt: skip
            check_choice("ScanMixer", argument, value, choices)
        if class_token and (conv == "grid" or out_norm):
            raise ValueError("ScanMixer: class tokens lie on no grid; take conv='sequence' or None, and no out_norm")
        if conv == "sequence" and act != "silu":
            raise ValueError(f"ScanMixer: conv='sequence' has SiLU built in, got act={act!r}")
        self.scan, self.scan_options = scan, dict(scan_options or {})
        self.class_token, self.revisits = class_token, not visits_once(scan)
        rows = scan_rows(scan, spatial_dims, **self.scan_options) or 1  # one for all if they follow the grid
        width = int(expand * dim)
        if heads < 1 or rows % heads or width % heads:
            raise ValueError(
                f"ScanMixer: heads must divide the rows of the order and the channels of the scan, got heads={heads} "
                f"for the {rows} rows of {scan!r} and {width} channels"
            )
        if shared and heads > 1:
            raise ValueError("ScanMixer: heads read channels of their own, so they share no SSM; drop shared or heads")
        if merge == "attention" and rows < 2 * heads:
            raise ValueError(
                f"ScanMixer: route attention compares the rows of a head, which needs two; {scan!r} has {rows} "
                f"for {heads} heads"
            )
        sequences = conv == "sequence"
        self.heads, self.rows, self.merge, self.threshold = heads, rows, merge, threshold
        self.shared, self.in_heads = shared, heads > 1 or merge == "attention"
        self.gate, self.scale = gate, 1 / rows if merge == "mean" and not self.in_heads else 1.0
        # The kernel gates with silu(z) where nothing stands between scan and gate.
        between = out_norm is not None or out_act is not None or self.in_heads
        self.fused_gate = self.fuses_gate and gate == "act" and act == "silu" and not between

        self.in_proj = nn.Linear(dim, width if gate == "none" else 2 * width, bias=False)
        self.conv = self.sequence_conv = None
        if conv == "grid":
            self.conv = depthwise(width, conv_size, spatial_dims, conv_bias)
        elif sequences:
            self.sequence_conv = SequenceConv(width // heads, 1 if shared else rows, conv_size, conv_bias)
        self.act = activation("ScanMixer", "act", act)()
        rank = dt_rank or math.ceil(dim // heads / 16)
        self.ssm = self.ssm_type(
            width // heads, rows, d_state, rank,
            per_row=(sequences and not shared) or self.in_heads, shared=shared, init=init,
        )  # fmt: skip
        self.out_norm = OUT_NORMS[out_norm](width, spatial_dims) if out_norm else None
        self.out_act = activation("ScanMixer", "out_act", out_act)() if out_act else nn.Identity()
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``grid``: sizes of the grid whose cells the tokens are, class tokens not counted."""
        x, z = self.in_proj(x), None
        if self.gate != "none":
            x, z = x.chunk(2, dim=-1)
        if self.fused_gate:
            y = self.mix(x, z, grid)
        else:
            y = self.mix(x, None, grid)
            if z is not None:
                y = y * (self.act(z) if self.gate == "act" else z)
        y = self.out_proj(y)
        return y if self.scale == 1.0 else y * self.scale

    def mix(self, x: Tensor, z: Tensor | None, grid: Sequence[int]) -> Tensor:
        """Convolve, scan (and gate with silu(z)) and normalise (b, l, d) tokens."""
        table = self.table(grid, x.device)
        origin: tuple[Make, list[Tensor]] | None  # of u
        if self.sequence_conv is not None:
            x = split_heads(x, self.heads, self.rows) if self.in_heads else x
            convolve: Make = partial(self.convolved, table=table)
            u, origin = convolve(x), (convolve, [x])
        else:
            x = x if self.conv is None else over_map(self.conv, x, grid)
            u, origin = self.act(x), (self.act, [x])
            if self.in_heads:
                u, origin = split_heads(u, self.heads, self.rows), None
        if self.in_heads:
            y = self.ssm(u, table, merge=None, revisits=self.revisits, origin=origin)
            y = join_heads(y, self.heads, self.merge, self.threshold)
        else:
            y = self.ssm(u, table, z, revisits=self.revisits, origin=origin)
        return self.out_act(y if self.out_norm is None else over_map(self.out_norm, y, grid))

    def convolved(self, x: Tensor, table: Tensor) -> Tensor:
        """Tokens convolved along each row of ``table``, (b, k, l, d); along the first, (b, l, d), if rows share all."""
        if not self.shared:
            return self.sequence_conv(x, table, self.revisits)
        return self.sequence_conv(x, table[:1], self.revisits)[:, 0]

    def table(self, grid: Sequence[int], device: torch.device) -> Tensor:
        """(K, T): the order over all cells, class tokens included."""
        if self.class_token == "middle":
            return scan_table(self.scan, grid, device, middle_token=True, **self.scan_options)
        table = scan_table(self.scan, grid, device, **self.scan_options)
        before, after = EXTRA_CELLS[self.class_token]
        return table if before == after == 0 else with_ends(table, math.prod(grid), before, after)


@register_notrace_function
def with_ends(table: Tensor, cells: int, before: int, after: int) -> Tensor:
    """A table over ``before + cells + after`` cells, whose rows start and end with the added ones.

    Rows of the first half start with the cells before; the others are reverses and start with those after.

    >>> with_ends(torch.tensor([[0, 1], [1, 0]]), 2, before=1, after=1).tolist()
    [[0, 1, 2, 3], [3, 2, 1, 0]]
    """
    k = len(table)
    inner = torch.where(table == cells, cells + before + after, table + before)  # padding stays one past the last
    start = torch.arange(before, dtype=table.dtype, device=table.device)
    end = torch.arange(before + cells, before + cells + after, dtype=table.dtype, device=table.device)
    forward = torch.cat([start.expand(k, -1), inner, end.expand(k, -1)], 1)
    backward = torch.cat([end.flip(0).expand(k, -1), inner, start.flip(0).expand(k, -1)], 1)
    return torch.cat([forward[: (k + 1) // 2], backward[(k + 1) // 2 :]])
