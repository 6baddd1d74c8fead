"""Published operators under the names of their golden files, as calls of ours: tensors by name in and out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from vssm.kernels import scan2d
from vssm.kernels.compat import causal_conv1d_fn, mamba_chunk_scan_combined, selective_scan_fn
from vssm.scans import scan_table, to_grid, to_sequences


def _selective_scan(options: dict[str, Any], **inputs: Tensor) -> dict[str, Tensor]:
    y, last = selective_scan_fn(**inputs, delta_softplus=options["softplus"], return_last_state=True)
    return {"out": y, "last_state": last}


def _causal_conv1d(options: dict[str, Any], **inputs: Tensor) -> dict[str, Tensor]:
    y, last = causal_conv1d_fn(**inputs, activation=options["activation"], return_final_states=True)
    return {"out": y, "final_states": last}


def _mamba2_ssd(options: dict[str, Any], **inputs: Any) -> dict[str, Tensor]:
    y, last = mamba_chunk_scan_combined(**inputs, dt_softplus=options["dt_softplus"], return_final_states=True)
    return {"y": y, "final_state": last}


def _scan2d(options: dict[str, Any], **inputs: Tensor) -> dict[str, Tensor]:
    """y, and the states hs one by one: what y would be if C read that one alone."""
    x, top, left, A_top, A_left, B_top, B_left, C, D = (inputs[name] for name in SCAN2D)
    read = partial(scan2d, x, top, left, A_top, A_left, B_top, B_left)
    states = []
    with torch.no_grad():
        for n in range(C.shape[-1]):
            one = torch.zeros_like(C)
            one[..., n] = 1
            states.append(read(one))
    return {"y": read(C, D), "hs": torch.stack(states, -1)}


SCAN2D = ("x", "deltaT", "deltaL", "AT", "AL", "BT", "BL", "C", "D")


def _scan2d_projected(options: dict[str, Any], **p: Tensor) -> dict[str, Tensor]:
    rank, n = p["dt_projT_weight"].shape[1], p["AT_log"].shape[1]
    top, left, B_top, B_left, C = (p["x"] @ p["x_proj_weight"].T).split([rank, rank, n, n, n], -1)
    top = linear(top, p["dt_projT_weight"], p["dt_projT_bias"])
    left = linear(left, p["dt_projL_weight"], p["dt_projL_bias"])
    A_top, A_left = -p["AT_log"].exp(), -p["AL_log"].exp()
    return {"y": scan2d(p["x"], top, left, A_top, A_left, B_top, B_left, C, p["D"], delta_softplus=True)}


OPERATORS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "selective_scan": _selective_scan,
    "causal_conv1d": _causal_conv1d,
    "mamba2_ssd": _mamba2_ssd,
    "mamba2d.scan2d_core": _scan2d,
    "mamba2d.scan2d_projected": _scan2d_projected,
}


def _scan_and_merge(order: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x (b, c, h, w) as sequences (b, k, c, t), and sequences y back on the grid of x and summed, (b, c, h w)."""
    table = scan_table(order, tuple(x.shape[-2:]), x.device)
    sequences = to_sequences(x.flatten(2).transpose(1, 2), table)
    merged = to_grid(y.transpose(2, 3), table, x.shape[-2] * x.shape[-1]).sum(1)
    return sequences.transpose(2, 3), merged.transpose(1, 2)


def _vmamba_scans(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    outputs = {}
    for published, order in (("cross2d", "cross"), ("unidi", "unidi"), ("bidi", "bidi"), ("rot90", "rot90")):
        outputs[f"scan_{published}"], outputs[f"merge_{published}"] = _scan_and_merge(order, x, y)
    return outputs


def _efficient_scan(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return dict(zip(("scan", "merge"), _scan_and_merge("atrous", x, y)))


def _vmamba_selective_scan(
    u: Tensor, delta: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> dict[str, Tensor]:
    biased, _ = selective_scan_fn(u, delta, -A_log.exp(), B, C, D, None, delta_bias, True, return_last_state=True)
    plain, _ = selective_scan_fn(u, delta.abs(), -A_log.exp(), B, C, return_last_state=True)
    return {"y_softplus_bias_D": biased, "y_no_softplus": plain}


SUMMARIES: dict[tuple[str, str], Callable[..., dict[str, Tensor]]] = {
    ("MzeroMiko/VMamba", "ops_cross_scan"): _vmamba_scans,
    ("MzeroMiko/VMamba", "ops_selective_scan"): _vmamba_selective_scan,
    ("TerryPei/EfficientVMamba", "ops_efficient_scan"): _efficient_scan,
}
