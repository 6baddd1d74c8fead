"""Parts of the networks that tests re-derive from published state dicts: plain functions without a line of ``vssm``.

``p`` is a published state dict, or what of it lies under a prefix. Maps are channels last, (b, h, w, c).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def scan(u, dt, A, B, C, D, h=0.0):
    """u, dt (b, t, d), B, C (b, t, n), A (d, n), D (d,)."""
    y = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(y, 1)


def sub(p, prefix):
    """Entries under ``prefix``, without it."""
    return {key[len(prefix):]: value for key, value in p.items() if key.startswith(prefix)}


def norm(x, p, name, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def linear(x, p, name):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def batch_norm(x, p, name):
    """Channels first; by the statistics of the batch where ``p`` has none."""
    mean = p[f"{name}.running_mean"] if f"{name}.running_mean" in p else x.mean((0, 2, 3))
    var = p[f"{name}.running_var"] if f"{name}.running_var" in p else x.var((0, 2, 3), unbiased=False)
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return x * p[f"{name}.weight"].view(shape) + p[f"{name}.bias"].view(shape)


def without_statistics(p):
    """As ``p`` is in training."""
    return {key: value for key, value in p.items() if "running_" not in key}


def conv(x, p, name, stride=1, padding=None):
    """Channels last; depthwise where the kernel has one input channel."""
    weight = p[f"{name}.weight"]
    groups = weight.shape[0] if weight.shape[1] == 1 and x.shape[-1] == weight.shape[0] else 1
    padding = weight.shape[-1] // 2 if padding is None else padding
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, p.get(f"{name}.bias"), stride, padding, groups=groups)
    return x.permute(0, 2, 3, 1)


def unit(x, p, name, stride=1, act=True, padding=None):
    """A convolution ``name.conv``, a batch norm where there is one, a ReLU."""
    x = conv(x, p, f"{name}.conv", stride, padding)
    if f"{name}.norm.weight" in p:
        x = batch_norm(x.permute(0, 3, 1, 2), p, f"{name}.norm").permute(0, 2, 3, 1)
    return x.relu() if act else x


def ssm(seq, p, k, rank, n):
    """A sequence (b, t, d) through the k-th of VMamba's parameter sets."""
    d = seq.shape[-1]
    dt, B, C = F.linear(seq, p["x_proj_weight"][k]).split((rank, n, n), -1)
    delta = F.softplus(F.linear(dt, p["dt_projs_weight"][k]) + p["dt_projs_bias"][k])
    A = -p["A_logs"].view(-1, d, n)[k].exp()
    return scan(seq, delta, A, B, C, p["Ds"].view(-1, d)[k])


def merge(x, p, name):
    """Patch merging of VMamba."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    return linear(norm(x, p, f"{name}.norm"), p, f"{name}.reduction")
