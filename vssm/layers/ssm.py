"""The parameters of a selective SSM: their shapes, their initialisation, and the scan that they feed.

Every row of a scan table (direction, head, group) has its own; the first axis of each parameter counts rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vssm.kernels import selective_scan
from vssm.kernels.backends import forced_backend, implementation, launches
from vssm.kernels.kinds import autocast_dtype, once, recording
from vssm.kernels.selective_scan.op import gradients, recorded
from vssm.layers import again
from vssm.layers.again import Make
from vssm.layers.parts import check_choice

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
        check_choice("SelectiveSSM", "init", init, INITS)
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
        rows: slice | None = None,
        write: str | None = None,
        merge: str | None = "sum",
        revisits: bool | None = None,
        origin: tuple[Make, Sequence[Tensor]] | None = None,
    ) -> Tensor:
        """Scan ``u`` along ``table``, gate with silu(z), and sum; ``rows`` are those whose parameters are used.

        ``merge=None`` keeps the rows apart, (b, k, l, d). Backward makes the step sizes again, and ``u`` too if
        ``origin`` says how: a function and its arguments.
        """
        parameters = self.parameters_of(rows)
        how = How(self.splits, self.shared, self.per_row, self.one_decay, table, write, merge == "sum",
                  revisits is not False, origin[0] if origin else None)  # fmt: skip
        tensor = isinstance(u, Tensor) and not u.is_meta
        if tensor and again.free() and forced_backend() != "reference":
            inputs = origin[1] if origin else [u]
            return _apply(how, [x.detach() for x in inputs], u, z, *parameters)
        if tensor and has_fused_weights(self.x_proj):
            u, delta, A, B, C, D, dt_bias, _ = operands(how, True, u, *parameters)
        else:
            delta, B, C = self.project(u, rows)
            A_log, D, dt_bias = self.coefficients(rows)
            A = decay(A_log)
            if self.shared and not self.per_row:
                delta, B, C = delta[:, 0], B[:, 0], C[:, 0]
        y, _ = selective_scan(
            u, delta, A, B, C, D, z, dt_bias,
            delta_softplus=True, table=table, write=write, merge=merge, revisits=revisits,
        )  # fmt: skip
        return y

    def project(self, u: Tensor, rows: slice | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the scan reads beside ``u``: raw step sizes (b, k, l, d), B and C (b, k, l, n)."""
        x_proj, dt_weight, *_ = self.parameters_of(rows)
        x_proj, dt_weight = filled(x_proj, dt_weight)
        return parts(projected(u, x_proj, self.per_row), dt_weight, self.splits)

    def coefficients(self, rows: slice | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """A_log (k, d, n), D (k, d) and the bias of the step sizes (k, d), without k where one set serves all rows."""
        _, _, dt_bias, A_log, D = self.parameters_of(rows)
        if self.shared:
            D, dt_bias = D[0], dt_bias[0]
        return A_log[0] if self.one_decay else A_log, D, dt_bias

    def parameters_of(self, rows: slice | None) -> list[Tensor]:
        """x_proj, dt_weight, dt_bias, A_log and D of these rows, of all if None."""
        parameters: list[Tensor] = [self.x_proj, self.dt_weight, self.dt_bias, self.A_log, self.D]
        return parameters if rows is None else [x[rows] for x in parameters]

    def extra_repr(self) -> str:
        rows, dim, d_state = self.A_log.shape
        return f"{dim}, rows={rows}, d_state={d_state}, dt_rank={self.splits[0]}"


@register_notrace_function
def decay(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 or wider: the decay of one step is close to 1, where half precision is coarse."""
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())


@torch.fx.wrap  # models call project() alone, which timm's registration does not reach
@register_notrace_function
def filled(x_proj: Tensor, dt_weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The weights (k, m, d) and (k, d, r) in ``dtype``, for the matrix units of a GPU, which want rows of 16 bytes.

    There ``m`` is filled up to a multiple of 8 with zeros, and ``r`` to ``m``, so that step sizes are made from whole
    rows of what x_proj makes.
    """
    dtype = dtype or x_proj.dtype
    if not x_proj.is_cuda:
        return x_proj.to(dtype), dt_weight.to(dtype)
    (k, used, d), rank = x_proj.shape, dt_weight.shape[2]
    m = -(-used // 8) * 8
    wide, tall = x_proj.new_zeros((k, m, d), dtype=dtype), dt_weight.new_zeros((k, d, m), dtype=dtype)
    wide[:, :used], tall[..., :rank] = x_proj, dt_weight
    return wide, tall


@torch.fx.wrap
@register_notrace_function
def projected(u: Tensor, x_proj: Tensor, per_row: bool) -> Tensor:
    """What the scan reads beside ``u``, step sizes still of their rank: (b, k, l, m)."""
    if per_row:
        return u @ x_proj.mT
    return nn.functional.linear(u, x_proj.flatten(0, 1)).unflatten(-1, x_proj.shape[:2]).transpose(1, 2)


@torch.fx.wrap
@register_notrace_function
def parts(low: Tensor, dt_weight: Tensor, splits: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Raw step sizes (b, k, l, d), B and C (b, k, l, n), views, from what x_proj makes."""
    rank, n, _ = splits
    return low[..., : dt_weight.shape[-1]] @ dt_weight.mT, low[..., rank : rank + n], low[..., rank + n : rank + 2 * n]


class How(NamedTuple):
    """What a scan with its projections does, beside its tensors: see :class:`SelectiveSSM`."""

    splits: tuple[int, int, int]
    shared: bool
    per_row: bool
    one_decay: bool
    table: Tensor
    write: str | None
    merge: bool
    revisits: bool
    make: Make | None  # of u


def operands(
    how: How, fused: bool, u: Tensor, x_proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, delta, A, B, C, D and delta_bias of the scan, and what x_proj makes, (b k, l, m); none of it recorded.

    ``fused``: see :func:`has_fused_weights`.
    """
    dtype = autocast_dtype(u)
    u = u if dtype is None else u.to(dtype)
    rows = u.shape[:2] if how.per_row else (len(u), len(x_proj))
    wide, tall, A = weights(fused, x_proj, dt_weight, A_log, dtype, how.per_row, rows)
    if how.per_row:
        low = torch.bmm(u.flatten(0, 1), wide.mT)
    else:
        low = (u @ wide.flatten(0, 1).mT).unflatten(-1, wide.shape[:2]).transpose(1, 2).flatten(0, 1)
    delta, (rank, n, _) = torch.bmm(low[..., : tall.shape[-1]], tall.mT), how.splits
    B, C = low[..., rank : rank + n], low[..., rank + n : rank + 2 * n]
    if not how.shared or how.per_row:
        delta, B, C = delta.unflatten(0, rows), B.unflatten(0, rows), C.unflatten(0, rows)
    if how.shared:
        D, dt_bias = D[0], dt_bias[0]
    return u, delta, A[0] if how.one_decay else A, B, C, D, dt_bias, low


def weights(
    fused: bool,
    x_proj: Tensor,
    dt_weight: Tensor,
    A_log: Tensor | None,
    dtype: torch.dtype | None,
    per_row: bool,
    rows: Sequence[int],
) -> Sequence[Any]:
    """x_proj (·, m, d) and dt_weight (·, d, m or rank) in ``dtype``, as products with many samples take them; and A.

    There is one dt_weight for each of the ``rows`` of each sample, and one x_proj too if they have inputs of their own:
    the gradients of weights then sum over few cells at a time, which a GPU does in parallel; over all samples it took a
    fifth of a training step of VMamba.
    """
    count, dtype = math.prod(rows), dtype or x_proj.dtype
    copies = count if per_row else len(x_proj), count
    if fused:
        spread = implementation("ssm_weights", "triton").forward
        return spread(x_proj, dt_weight, A_log, copies, dtype)
    wide, tall = filled(x_proj, dt_weight, dtype)
    return repeated(wide, copies[0]), repeated(tall, copies[1]), None if A_log is None else decay(A_log)


def repeated(x: Tensor, count: int) -> Tensor:
    """The sets of ``x`` one after another, ``count`` in all, as autograd's products lay them: the same bits."""
    return x.mT.expand(count // len(x), -1, -1, -1).flatten(0, 1).mT


def has_fused_weights(x_proj: Tensor) -> bool:
    """Whether a GPU makes the weights in one launch, which is neither recorded nor traced."""
    return not torch.is_grad_enabled() and launches("ssm_weights", x_proj)


class _Scan(torch.autograd.Function):
    """What ``SelectiveSSM.forward`` does for compilers and tracers, as one node of the graph, which keeps little.

    ``inputs`` are those of ``how.make``, or u itself; ``parameters`` those of ``SelectiveSSM.parameters_of``.
    """

    @staticmethod
    def forward(
        ctx: Any, how: How, inputs: Sequence[Tensor], u: Tensor, z: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        ctx.how, ctx.dtype, ctx.autocast = how, autocast_dtype(u), again.autocast_now(u.device.type)
        ctx.parameters = [(x.shape, x.dtype) for x in parameters]
        ctx.fused = has_fused_weights(parameters[0])
        u, delta, A, B, C, D, dt_bias, low = operands(how, ctx.fused, u, *parameters)
        write = how.table if how.write is None else None
        scanned = (u, delta, A, B, C, D, z, dt_bias, how.table, how.table, write, None)
        y, ctx.kind, saved = recorded(scanned, (True, how.merge, how.revisits))
        ctx.save_for_backward(*parameters[:2], low, *saved[2:], *inputs)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        how: How = ctx.how
        x_proj, dt_weight, low, *saved = ctx.saved_tensors
        saved, inputs = saved[:12], saved[12:]
        with ctx.autocast():
            given = inputs[0] if how.make is None else how.make(*inputs)
        u = given if ctx.dtype is None else given.to(ctx.dtype)
        rank, n, _ = how.splits
        used, rows = rank + 2 * n, u.shape[:2] if how.per_row else (len(u), len(x_proj))
        wide, tall, _ = weights(ctx.fused, x_proj, dt_weight, None, ctx.dtype, how.per_row, rows)
        delta = torch.bmm(low[..., : tall.shape[-1]], tall.mT)
        by_row = delta if how.shared and not how.per_row else delta.unflatten(0, rows)
        du, ddelta, dA, dB, dC, dD, dz, dbias, _ = gradients(ctx.kind, (u, by_row, *saved), dy)
        ddelta, dB, dC = ddelta.view_as(delta), dB.view(*low.shape[:2], n), dC.view(*low.shape[:2], n)
        ddt = torch.bmm(ddelta, tall)  # zero behind the rank
        pieces = ddt[..., :rank], dB, dC, ddt[..., used:]
        if how.per_row:
            dlow = torch.cat(pieces, -1)
            dwide = torch.bmm(u.flatten(0, 1).mT, dlow).mT
        else:
            dlow = torch.cat([x.unflatten(0, rows).transpose(1, 2) for x in pieces], -1).flatten(2).flatten(0, 1)
            wide = wide.flatten(0, 1)
            dwide = (dlow.mT @ u.flatten(0, 1)).unflatten(0, (len(x_proj), -1))
        du = du.to(given.dtype).flatten(0, 1)
        if ctx.fused and du.dtype == wide.dtype:
            (du.baddbmm_ if how.per_row else du.addmm_)(dlow, wide)
        else:
            du.add_(dlow @ wide)
        dtall = torch.bmm(low[..., : tall.shape[-1]].mT, ddelta)
        of_x_proj, of_dt_weight, (of_bias, _), of_A, (of_D, _) = ctx.parameters
        if ctx.fused:
            collect = implementation("ssm_weights", "triton").backward
            to_x_proj, to_dt_weight, to_A = collect(dwide, dtall, dA, saved[0], (of_x_proj, of_dt_weight, of_A))
        else:
            to_x_proj, to_dt_weight = summed(dwide[:, :used], *of_x_proj), summed(dtall[:, :rank].mT, *of_dt_weight)
            to_A = (dA * saved[0]).view(of_A[0])
        return (
            None, None, du.view_as(given), dz,
            to_x_proj, to_dt_weight, dbias.view(of_bias), to_A, dD.view(of_D),
        )  # fmt: skip


def summed(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The sum of gradients (b k, ·, ·) for weights of ``shape`` over samples, and over rows where they have one set."""
    return x.unflatten(0, (len(x) // shape[0], shape[0])).sum(0, dtype=dtype)


_apply = recording(_Scan)


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
