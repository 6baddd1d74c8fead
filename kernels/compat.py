"""mamba_ssm's and causal_conv1d's functions over our ops: the same signatures, layouts and results.

Who uses ``mamba_ssm.ops.selective_scan_interface.selective_scan_fn`` or ``causal_conv1d.causal_conv1d_fn`` changes the
import. Sequences lie last there, (b, d, l), and channels last here: inputs that are channels last in memory, which
``x.transpose(1, 2)`` of a (b, l, d) tensor is, are taken as they are, others are copied.
"""

from __future__ import annotations

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
