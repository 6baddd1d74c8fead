"""mamba_ssm's and causal_conv1d's functions over our ops: the same signatures, layouts and results.

Who uses ``mamba_ssm.ops.selective_scan_interface.selective_scan_fn``, Mamba-2's ``mamba_chunk_scan_combined`` or
``causal_conv1d.causal_conv1d_fn`` changes the import. Sequences of the first and the last lie last there, (b, d, l),
and channels last here: inputs that are channels last in memory, which ``x.transpose(1, 2)`` of a (b, l, d) tensor is,
are taken as they are, others are copied.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from vssm.kernels.conv1d import causal_conv1d
from vssm.kernels.selective_scan import selective_scan


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan with the signature of mamba_ssm (github.com/state-spaces/mamba, Apache-2.0).

    Sizes: b batch, d channels, l steps, n states, g groups. Channels of a group, d / g neighbours, share B and C.

    Args:
        u, delta: (b, d, l).
        A: (d, n), real.
        B, C: (b, n, l), (b, g, n, l), or constant, (d, n); constant ones cost a row for each channel.
        D, delta_bias: (d).
        z: (b, d, l), gate of the output: y silu(z).
        delta_softplus: Pass delta, after its bias, through softplus.
        return_last_state: Return (y, last state) instead of y.

    Returns:
        y (b, d, l) in the dtype of ``u``; the last state is (b, d, n). Unlike there, the last state has gradients.

    Raises:
        ValueError: If shapes disagree, or A is complex.
    """
    if A.is_complex():
        raise ValueError("selective_scan_fn: A must be real, got a complex tensor; complex states are not supported")
    if A.dim() != 2 or u.dim() != 3 or A.shape[0] != u.shape[1]:
        shapes = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"selective_scan_fn: u must be (b, d, l) and A (d, n), got {shapes}")
    d, rows = u.shape[1], _rows(u, B, C)
    gate_here = z is not None and rows > 1  # each row has channels of its own, z among them
    y, last_state = selective_scan(
        _split(u.float() if gate_here and u.dtype.itemsize < 4 else u, rows),
        _split(delta, rows),
        A.unflatten(0, (rows, d // rows)),
        _gates("B", B, u, rows),
        _gates("C", C, u, rows),
        None if D is None else D.unflatten(0, (rows, d // rows)),
        None if z is None or gate_here else z.transpose(1, 2),
        None if delta_bias is None else delta_bias.unflatten(0, (rows, d // rows)),
        delta_softplus=delta_softplus,
    )
    y = y.transpose(-1, -2).flatten(1, 2)
    if gate_here:
        y = (y * F.silu(z.to(y.dtype))).to(u.dtype)
    return (y, last_state.flatten(1, 2)) if return_last_state else y


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of Mamba-2 (arXiv:2405.21060, section 6) with the signature of mamba_ssm (Apache-2.0).

    Each head is a selective scan whose channels decay alike: the same values and gradients for a sequence of any
    length, without the products of matrices that the published kernels are made of, so slower than they are.

    Sizes: b batch, l steps, h heads, p channels of a head, n states, g groups. Heads of a group, h / g neighbours,
    share B and C.

    Args:
        x: (b, l, h, p).
        dt: (b, l, h).
        A: (h), real.
        B, C: (b, l, g, n).
        chunk_size: Not looked at: no value depends on it.
        D: (h) or (h, p).
        z: (b, l, h, p), gate of the output: y silu(z).
        dt_bias: (h).
        initial_states: (b, h, p, n), zero if None.
        seq_idx, cu_seqlens: Must be None: packed sequences are not supported.
        dt_softplus: Pass dt, after its bias, through softplus.
        dt_limit: Bounds of dt behind that.
        return_final_states: Return (y, final states (b, h, p, n)) instead of y. Both have gradients.

    Returns:
        y (b, l, h, p) in the dtype of ``x``.

    Raises:
        ValueError: If shapes disagree, or sequences are packed.
    """
    who = "mamba_chunk_scan_combined"
    if seq_idx is not None or cu_seqlens is not None:
        raise ValueError(f"{who}: seq_idx and cu_seqlens must be None, packed sequences are not supported")
    if x.dim() != 4 or B.dim() != 4 or C.shape != B.shape or B.shape[2] == 0 or x.shape[2] % B.shape[2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, B, C))
        raise ValueError(f"{who}: x must be (b, l, h, p), B and C (b, l, g, n) with g a divisor of h, got {shapes}")
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    wanted = {"dt": (dt, (b, l, h)), "A": (A, (h,)), "B": (B, (b, l, g, n)), "dt_bias": (dt_bias, (h,)),
              "z": (z, (b, l, h, p)), "initial_states": (initial_states, (b, h, p, n))}  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{who}: {name} must be {shape}, got {tuple(tensor.shape)}")
    if D is not None and D.shape not in ((h,), (h, p)):
        raise ValueError(f"{who}: D must be {(h,)} or {(h, p)}, got {tuple(D.shape)}")

    def channels(t: Tensor) -> Tensor:
        """(…, h, p) as (…, g, channels of a group)."""
        return t.unflatten(-2, (g, h // g)).flatten(-2)

    def repeated(t: Tensor) -> Tensor:
        """(…, h) as (…, g, channels of a group)."""
        return channels(t[..., None].expand(*t.shape, p))

    dt = dt if dt.dtype.itemsize > 4 else dt.float()
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    u = x.float() if z is not None and x.dtype.itemsize < 4 else x      # rounded once, behind the gate
    y, last = selective_scan(
        channels(u).transpose(1, 2),
        repeated(dt).transpose(1, 2),
        repeated(A)[..., None].expand(-1, -1, n),
        B.transpose(1, 2),
        C.transpose(1, 2),
        None if D is None else channels(D) if D.dim() == 2 else repeated(D),
        initial_state=None if initial_states is None else initial_states.reshape(b, g, -1, n),
    )
    y = y.transpose(1, 2).reshape(b, l, h, p)
    y = y if z is None else (y * F.silu(z.to(y.dtype))).to(x.dtype)
    return (y, last.reshape(b, h, p, n)) if return_final_states else y


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution with causal_conv1d's signature (github.com/Dao-AILab/causal-conv1d, BSD-3-Clause).

    Args:
        x: (b, d, l).
        weight: (d, w); the last tap meets the current step.
        bias: (d).
        seq_idx: Must be None: packed sequences are not supported.
        initial_states: The w - 1 inputs before the first, (b, d, w - 1); zero if None.
        return_final_states: Return (y, final states) instead of y; these are the last w - 1 inputs, (b, d, w - 1).
        final_states_out: Filled with the final states.
        activation: None, ``"silu"`` or ``"swish"``, which is the same.

    Raises:
        ValueError: If shapes disagree, or ``seq_idx`` is given.
    """
    if seq_idx is not None:
        raise ValueError("causal_conv1d_fn: seq_idx must be None, packed sequences are not supported; call once each")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"causal_conv1d_fn: activation must be None, 'silu' or 'swish', got {activation!r}")
    y, last = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation="silu" if activation else None,
        initial_state=None if initial_states is None else initial_states.unsqueeze(1),
    )
    y, last = y.transpose(1, 2), last.squeeze(1)
    if final_states_out is not None:
        last = final_states_out.copy_(last)
    return (y, last) if return_final_states else y


def _rows(u: Tensor, B: Tensor, C: Tensor) -> int:
    """How many rows of the scan have a B and a C of their own: groups, or channels where one of them is constant."""
    d = u.shape[1]
    groups = [x.shape[1] if x.dim() == 4 else 1 for x in (B, C) if x.dim() > 2]
    rows = d if len(groups) < 2 else max(groups)
    if any(size == 0 or rows % size for size in groups) or d % rows:
        raise ValueError(f"selective_scan_fn: groups of B and C must divide d={d} and agree, got {groups}")
    return rows


def _split(x: Tensor, rows: int) -> Tensor:
    """(b, d, l) as (b, rows, l, d / rows)."""
    return x.unflatten(1, (rows, -1)).transpose(-1, -2)


def _gates(name: str, x: Tensor, u: Tensor, rows: int) -> Tensor:
    """B or C as (b, l, n), or (b, rows, l, n) if rows differ."""
    if x.dim() == 2:
        if x.shape[0] != u.shape[1]:
            raise ValueError(f"selective_scan_fn: a constant {name} must be (d={u.shape[1]}, n), got {tuple(x.shape)}")
        return x[:, None].expand(u.shape[0], -1, u.shape[2], -1)
    x = x.transpose(-1, -2)
    if x.dim() == 4:
        x = x.repeat_interleave(rows // x.shape[1], 1) if x.shape[1] != rows else x
    return x
