"""The parameters of a selective SSM: their shapes, their initialisation, and the scan that they feed.

Every row of a scan table (direction, head, group) has its own; the first axis of each parameter counts rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vssm.kernels import selective_scan
from vssm.layers.again import MadeAgain, Make

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class SelectiveSSM(nn.Module):
    """Projections to dt, B and C, and the scan along a table, rows summed. (b, l, d) or (b, k, l, d) to (b, l, d).

    The recurrence is that of Mamba (arXiv:2312.00752, Algorithm 2); see ``vssm.kernels.selective_scan``.

    Args:
        dim: Channels d of the scan.
        rows: Rows k of the table; one set of parameters, ``rows=1``, serves a table of any number of rows.
        d_state: States n of each channel.
        dt_rank: Rank of the projection that makes the step sizes.
        per_row: The input has its own values in each row, (b, k, l, d).
        shared: All rows have one set of parameters, except the decay A.
        init: One of INITS.
    """

    def __init__(
        self,
        dim: int,
        rows: int,
        d_state: int,
        dt_rank: int,
        *,
        per_row: bool = False,
        shared: bool = False,
        init: str = "mamba",
    ):
        super().__init__()
        if per_row and shared:
            raise ValueError("SelectiveSSM: rows with inputs of their own cannot share parameters; choose one")
        sets = 1 if shared else rows
        shared = sets == 1  # so that one row serves a table of any number of rows
        self.splits = (dt_rank, d_state, d_state)
        self.per_row, self.shared, self.one_decay, self.init = per_row, shared, rows == 1, init
        self.x_proj = nn.Parameter(torch.empty(sets, sum(self.splits), dim))
        self.dt_weight = nn.Parameter(torch.empty(sets, dim, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(sets, dim))
        self.A_log = nn.Parameter(torch.empty(rows, dim, d_state))
        self.D = nn.Parameter(torch.empty(sets, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.A_log.is_meta:  # of a model whose parameters are only counted or named
            return
        nn.init.uniform_(self.x_proj, -(self.x_proj.shape[-1] ** -0.5), self.x_proj.shape[-1] ** -0.5)
        nn.init.ones_(self.D)
        INITS[self.init](self)

    def forward(
        self,
        u: Tensor,
        table: Tensor,
        z: Tensor | None = None,
        *,
        rows: slice = slice(None),
        write: str | None = None,
        merge: str | None = "sum",
        revisits: bool | None = None,
        origin: tuple[Make, Sequence[Tensor]] | None = None,
    ) -> Tensor:
        """Scan ``u`` along ``table``, gate with silu(z), and sum; ``rows`` are those whose parameters are used.

        ``merge=None`` keeps the rows apart, (b, k, l, d). Backward makes the step sizes again, and ``u`` too if
        ``origin`` says how: a function and its arguments.
        """
        with MadeAgain() as again:
            if origin is not None:
                again.later(u, origin[0], *origin[1])
            delta, B, C = self.project(u, rows, again)
            A_log, D, dt_bias = self.coefficients(rows)
            if self.shared and not self.per_row:
                delta, B, C = delta[:, 0], B[:, 0], C[:, 0]
            y, _ = selective_scan(
                u, delta, decay(A_log), B, C, D, z, dt_bias,
                delta_softplus=True, table=table, write=write, merge=merge, revisits=revisits,
            )  # fmt: skip
        return y

    def project(
        self, u: Tensor, rows: slice = slice(None), again: MadeAgain | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the scan reads beside ``u``: raw step sizes (b, k, l, d), B and C (b, k, l, n)."""
        x_proj, dt_weight = self.x_proj[rows], self.dt_weight[rows]
        if self.per_row:
            low = u @ x_proj.mT
        else:
            low = nn.functional.linear(u, x_proj.flatten(0, 1)).unflatten(-1, (-1, sum(self.splits))).transpose(1, 2)
        dt, B, C = low.split(self.splits, -1)  # each (b, k, l, ·), a view
        delta = step_sizes(dt, dt_weight)
        return delta if again is None else again.later(delta, step_sizes, dt, dt_weight), B, C

    def coefficients(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """A_log (k, d, n), D (k, d) and the bias of the step sizes (k, d), without k where one set serves all rows."""
        A_log, D, dt_bias = self.A_log[rows], self.D[rows], self.dt_bias[rows]
        if self.shared:
            D, dt_bias = D[0], dt_bias[0]
        return A_log[0] if self.one_decay else A_log, D, dt_bias

    def extra_repr(self) -> str:
        rows, dim, d_state = self.A_log.shape
        return f"{dim}, rows={rows}, d_state={d_state}, dt_rank={self.splits[0]}"


@torch.fx.wrap  # models call project() alone, which timm's registration does not reach
@register_notrace_function
def step_sizes(dt: Tensor, weight: Tensor) -> Tensor:
    """Raw step sizes (b, k, l, d) from their factors (b, k, l, r) and (k, d, r).

    A product a sample and row: the gradient of the weight then sums over few cells at a time, which a GPU does in
    parallel; over all samples it took a fifth of a training step of VMamba. On a GPU ranks are filled up for its matrix
    units.
    """
    fill = -weight.shape[-1] % 8 if weight.is_cuda else 0
    if fill:
        dt, weight = nn.functional.pad(dt, (0, fill)), nn.functional.pad(weight, (0, fill))
    return dt @ weight.mT


@register_notrace_function
def decay(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 or wider: the decay of one step is close to 1, where half precision is coarse."""
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())


def dt_bias_(bias: Tensor) -> Tensor:
    """Fill with the values whose softplus is log-uniform in [DT_MIN, DT_MAX], as Mamba's authors do."""
    with torch.no_grad():
        dt = torch.exp(torch.empty_like(bias).uniform_(math.log(DT_MIN), math.log(DT_MAX))).clamp(min=DT_FLOOR)
        return bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def _mamba(ssm: SelectiveSSM) -> None:
    """S4D-real decay, steps between DT_MIN and DT_MAX."""
    states = torch.arange(1, ssm.A_log.shape[-1] + 1, dtype=torch.float32, device=ssm.A_log.device)
    with torch.no_grad():
        ssm.A_log.copy_(states.log().expand_as(ssm.A_log))
    bound = ssm.dt_weight.shape[-1] ** -0.5
    nn.init.uniform_(ssm.dt_weight, -bound, bound)
    dt_bias_(ssm.dt_bias)


def _normal(ssm: SelectiveSSM) -> None:
    nn.init.normal_(ssm.A_log)
    nn.init.normal_(ssm.dt_weight, std=0.1)
    nn.init.normal_(ssm.dt_bias, std=0.1)


def _uniform(ssm: SelectiveSSM) -> None:
    nn.init.zeros_(ssm.A_log)
    nn.init.uniform_(ssm.dt_weight, 0, 0.1)
    nn.init.uniform_(ssm.dt_bias, 0, 0.1)


INITS = {"mamba": _mamba, "normal": _normal, "uniform": _uniform}


def ssm_parameters(model: nn.Module, *names: str) -> Iterator[str]:
    """Full names of these parameters of every SSM in ``model``; of A_log, D and dt_bias if none is named.

    For recipes that decay no SSM parameter, as Mamba's authors advise; a model's own ``no_weight_decay()`` follows the
    recipe that its weights were trained with.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, SelectiveSSM):
            yield from (f"{prefix}.{name}".lstrip(".") for name in names or ("A_log", "D", "dt_bias"))
