"""Multi-head scans: channels split into heads, each of which reads rows of the table of its own."""

from __future__ import annotations

from torch import Tensor

MERGES = ("sum", "mean", "attention")


def split_heads(x: Tensor, heads: int, rows: int) -> Tensor:
    """The channels of each head, for each of its rows: (b, l, c) to (b, rows, l, c / heads), rows of a head together.

    A view where each head has one row.
    """
    x = x.unflatten(-1, (heads, -1)).permute(0, 2, 1, 3)
    return x if rows == heads else x.repeat_interleave(rows // heads, dim=1)


def join_heads(y: Tensor, heads: int, merge: str = "sum", threshold: float = 0.5) -> Tensor:
    """Merge the rows of each head and put the heads side by side: (b, rows, l, d) to (b, l, heads d).

    ``merge`` is ``"sum"``, ``"mean"``, or ``"attention"`` for ``route_attention`` with ``threshold``.
    """
    y = y.unflatten(1, (heads, -1))
    if merge == "attention":
        y = route_attention(y, threshold)
    else:
        y = y.sum(2) if merge == "sum" else y.mean(2)
    return y.transpose(1, 2).flatten(2)


def route_attention(y: Tensor, threshold: float) -> Tensor:
    """The sum of a head's routes, weighed by how much they differ: (b, h, r, l, d) to (b, h, l, d).

        sum(y) relu(std(y) / (mean(y - min(y)) + 1e-5) - threshold)

    MHS-VM's fusion of scan routes (arXiv:2406.05992, section 3.3), each value by itself; std is unbiased, so a head
    needs two routes. The quotient does not change with the scale of y.
    """
    spread = (y - y.amin(2, keepdim=True)).mean(2) + 1e-5
    return y.sum(2) * (y.std(2) / spread - threshold).relu()
