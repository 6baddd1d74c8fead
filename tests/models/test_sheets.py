"""Whole models against short re-derivations of the published ones, on sizes that no golden file holds.

Each function below computes a published network from its published state dict ``p``, in float64, with one plain
recurrence; it shares no code with ``vssm``. Sides are odd or no multiple of anything, images have one or five channels.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from sheets import batch_norm, conv, linear, merge, norm, scan, ssm, sub, unit, without_statistics
from tolerance import error

import vssm
from vssm.models.groupmamba import published as groupmamba_published
from vssm.models.keys import to_published
from vssm.models.plainmamba import published as plainmamba_published
from vssm.models.variant import variants


def efficientvmamba(p, x, depths):
    x = norm(conv(x, p, "patch_embed.0", 4, 0), p, "patch_embed.2")
    for s, depth in enumerate(depths):
        for j in range(depth):
            if s < 2:
                x = atrous_block(x, sub(p, f"layers.{s}.blocks.{j}."))
            else:
                x = inverted(x.permute(0, 3, 1, 2), sub(p, f"layers.{s}.{j + 1}.")).permute(0, 2, 3, 1)
        if s < 3:
            x = merge(x, p, f"layers.{s}.downsample" if s < 2 else f"layers.{s}.{depth + 2}")
    return linear(norm(x, p, "classifier.norm").mean((1, 2)), p, "classifier.head")


def atrous_block(x, p):
    h, op = norm(x, p, "norm"), sub(p, "op.")
    a, z = linear(h, op, "in_proj").chunk(2, -1)
    a = F.silu(conv(a, op, "conv2d"))
    height, width = a.shape[1:3]
    a = F.pad(a, (0, 0, 0, width % 2, 0, height % 2))
    out = torch.zeros_like(a)
    for k, (i, j) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        part = a[:, i::2, j::2]
        part = part.transpose(1, 2) if k in (1, 3) else part                        # column by column
        y = ssm(part.flatten(1, 2), op, k, op["dt_projs_weight"].shape[-1], 16).view(part.shape)
        out[:, i::2, j::2] = y.transpose(1, 2) if k in (1, 3) else y
    a = linear(norm(out[:, :height, :width], op, "out_norm") * F.silu(z), op, "out_proj")
    b = conv(h, p, "conv_branch.0").permute(0, 3, 1, 2)
    b = conv(F.gelu(batch_norm(b, p, "conv_branch.1")).permute(0, 2, 3, 1), p, "conv_branch.3")

    def gated(t):
        mean = norm(t, p, "se.norm").mean((1, 2), keepdim=True)
        return t * linear(F.gelu(linear(mean, p, "se.global_reduce")), p, "se.channel_select").sigmoid()

    return x + gated(a) + gated(b)


def inverted(x, p):
    y = batch_norm(F.conv2d(x, p["conv_pw.0.weight"]), p, "conv_pw.1").relu()
    y = F.conv2d(y, p["conv_dw.0.weight"], padding=1, groups=y.shape[1])
    y = batch_norm(y, p, "conv_dw.1").relu()
    s = F.conv2d(y.mean((2, 3), keepdim=True), p["se.conv_reduce.weight"], p["se.conv_reduce.bias"]).relu()
    y = y * F.conv2d(s, p["se.conv_expand.weight"], p["se.conv_expand.bias"]).sigmoid()
    return x + batch_norm(F.conv2d(y, p["conv_pw2.0.weight"]), p, "conv_pw2.1")


def msvmamba(p, x, depths):
    third = "patch_embed.5.weight" in p
    if third:
        x = F.gelu(norm(conv(x, p, "patch_embed.0", 2), p, "patch_embed.2"))
        x = norm(conv(x, p, "patch_embed.5", 2), p, "patch_embed.7")
    else:
        x = norm(conv(x, p, "patch_embed.0", 4, 0), p, "patch_embed.2")
    for s, depth in enumerate(depths):
        for j in range(depth):
            b = sub(p, f"layers.{s}.blocks.{j}.")
            x = x + multiscale(norm(x, b, "norm"), sub(b, "op."), third)
            x = x + (norm(conv_ffn(x, b), b, "norm2") if third else conv_ffn(norm(x, b, "norm2"), b))
        if s < 3 and third:
            x = norm(conv(x, p, f"layers.{s}.downsample.1", 2), p, f"layers.{s}.downsample.3")
        elif s < 3:
            x = merge(x, p, f"layers.{s}.downsample")
    return linear(norm(x, p, "classifier.norm").mean((1, 2)), p, "classifier.head")


def conv_ffn(x, p):
    x = conv(x, p, "convFFN.linear1")
    return conv(F.gelu(x + conv(x, p, "convFFN.dwc")), p, "convFFN.linear2")


def multiscale(x, p, third):
    gate = p["in_proj.weight"].shape[0] == 2 * p["out_proj.weight"].shape[1]
    x, z = linear(x, p, "in_proj").chunk(2, -1) if gate else (linear(x, p, "in_proj"), None)
    full, low = F.silu(conv(x, p, "conv2d")), F.silu(conv(x, p, "conv2d_b1", 2))
    (h, w), rank = low.shape[1:3], p["dt_projs_weight"].shape[-1]
    rows, columns = low.flatten(1, 2), low.transpose(1, 2).flatten(1, 2)
    tour = torch.cat([rows.flip(1), columns, columns.flip(1)], 1)
    y = ssm(full.flatten(1, 2), p, 0 if third else 1, rank, 1)
    tour = ssm(tour, p, 1 if third else 0, rank, 1)
    if not third:
        y, tour = norm(y, p, "out_norm"), norm(tour, p, "out_norm")
    back, down, up = tour.chunk(3, 1)
    low = back.flip(1).unflatten(1, (h, w)) + (down + up.flip(1)).unflatten(1, (w, h)).transpose(1, 2)
    options = {"mode": "nearest"} if third else {"mode": "bilinear", "align_corners": False}
    low = F.interpolate(low.permute(0, 3, 1, 2), full.shape[1:3], **options).permute(0, 2, 3, 1)
    y = y.view(full.shape) + low
    y = norm(y, p, "out_norm") if third else y
    y = y * linear(linear(y.mean((1, 2), keepdim=True), p, "se.fc.0").relu(), p, "se.fc.2").sigmoid()
    return linear(y if z is None else y * F.silu(z), p, "out_proj")


def groupmamba(p, x, depths, eps=1e-6):
    for i, stride in ((0, 2), (3, 1), (6, 1)):
        x = conv(x, p, f"patch_embed1.conv.{i}", stride).permute(0, 3, 1, 2)
        x = batch_norm(x, p, f"patch_embed1.conv.{i + 1}").relu().permute(0, 2, 3, 1)
    for s, depth in enumerate(depths, 1):
        x = norm(conv(x, p, f"patch_embed{s}.proj", 2), p, f"patch_embed{s}.norm")
        for j in range(depth):
            b = sub(p, f"block{s}.{j}.")
            x = x + modulated(x, sub(b, "attn."))
            m = conv(linear(norm(x, b, "norm2", eps), b, "mlp.fc1"), b, "mlp.dwconv.dwconv")
            x = x + linear(F.gelu(m), b, "mlp.fc2")
        if s < 4:
            x = norm(x, p, f"norm{s}", eps)
    x, b = x.mean((1, 2), keepdim=True), sub(p, "post_network.0.")
    x = x + norm(modulated(x, sub(b, "attn.")), b, "norm1", eps)
    x = x + linear(F.gelu(linear(norm(x, b, "norm2", eps), b, "mlp.fc1")), b, "mlp.fc2")
    x = norm(x, p, "norm4", eps)[:, 0, 0]
    return (linear(x, p, "head") + linear(x, p, "dist_head")) / 2


def modulated(x, p):
    u = norm(x, p, "norm")
    affinity = linear(linear(u.mean((1, 2), keepdim=True), p, "fc1").relu(), p, "fc2").sigmoid()
    parts = []
    for g, part in enumerate(u.chunk(4, -1), 1):
        q = sub(p, f"mamba_g{g}.")
        a, z = linear(part, q, "in_proj").chunk(2, -1)
        a = F.silu(conv(a, q, "conv2d"))
        a = a.transpose(1, 2) if g in (2, 4) else a
        seq = a.flatten(1, 2).flip(1) if g > 2 else a.flatten(1, 2)
        y = ssm(seq, q, 0, q["dt_projs_weight"].shape[-1], 1)
        y = (y.flip(1) if g > 2 else y).view(a.shape)
        y = y.transpose(1, 2) if g in (2, 4) else y
        parts.append(linear(norm(y, q, "out_norm") * F.silu(z), q, "out_proj"))
    v = torch.cat(parts, -1) * p["skip_scale"] * u * affinity
    return linear(norm(v, p, "norm"), p, "proj")


def mlla_frame(p, x, depths, mix, names):
    x = unit(x, p, "patch_embed.conv1", 2)
    x = x + unit(unit(x, p, "patch_embed.conv2.0"), p, "patch_embed.conv2.1", act=False)
    x = unit(unit(x, p, "patch_embed.conv3.0", 2), p, "patch_embed.conv3.1", act=False)
    for s, depth in enumerate(depths):
        for j in range(depth):
            b = sub(p, f"layers.{s}.blocks.{j}.")
            x = x + conv(x, b, "cpe1")
            x = x + mix(norm(x, b, names[0]), b)
            x = x + conv(x, b, "cpe2")
            x = x + linear(F.gelu(linear(norm(x, b, names[1]), b, "mlp.fc1")), b, "mlp.fc2")
        if s < 3:
            d = sub(p, f"layers.{s}.downsample.conv.")
            x = unit(unit(unit(x, d, "0"), d, "1", 2), d, "2", act=False)
    return linear(norm(x, p, "norm").mean((1, 2)), p, "head")


def spatialmamba(p, x, depths):
    return mlla_frame(p, x, depths, lambda x, b: fused_states(x, sub(b, "self_attention.")), ("ln_1", "ln_2"))


def fused_states(x, p):
    x, z = linear(x, p, "in_proj").chunk(2, -1)
    x = F.silu(conv(x, p, "conv2d"))
    dt, B, C = F.linear(x, p["x_proj_weight"]).split((p["dt_projs_weight"].shape[-1], 1, 1), -1)
    dt = F.softplus(F.linear(dt, p["dt_projs_weight"]) + p["dt_projs_bias"])
    ones, seq = torch.ones_like(B), [t.flatten(1, 2) for t in (x, dt, B)]
    h = scan(seq[0], seq[1], -p["A_logs"].exp(), seq[2], ones.flatten(1, 2), 0.0).view(x.shape).permute(0, 3, 1, 2)
    fused = 0.0
    for m, name in enumerate(("kernel_3", "kernel_3_1", "kernel_3_2")):
        reach = 2 * m + 1
        rows, columns = ((torch.arange(-reach, n + reach)).clamp(0, n - 1) for n in h.shape[2:])
        wide = h[:, :, rows][:, :, :, columns]                                      # edges go on
        kernel = p[f"state_fusion.{name}"]
        fused = fused + p["state_fusion.alpha"][m] * F.conv2d(wide, kernel, dilation=reach, groups=h.shape[1])
    y = fused.permute(0, 2, 3, 1) * C + p["Ds"] * x
    return linear(norm(y, p, "out_norm") * F.silu(z), p, "out_proj")


def vssd(p, x, depths):
    def mix(x, b):
        q = sub(b, "attn.")
        return duality(x, q) if "A_log" in q else attention(x, q, heads=16)

    return mlla_frame(p, x, depths, mix, ("norm1", "norm2"))


def duality(x, p):
    inner, heads = p["out_proj.weight"].shape[1], len(p["A_log"])
    n = (p["conv2d.weight"].shape[0] - inner) // 2
    z, x, dt = linear(x, p, "in_proj").split((inner, inner + 2 * n, heads), -1)
    x, B, C = F.silu(conv(x, p, "conv2d")).split((inner, n, n), -1)
    V = x.unflatten(-1, (heads, -1))
    m = F.softplus(dt + p["dt_bias"]) * p["A_log"].exp()
    S = torch.einsum("bhwn,bhwk,bhwkp->bknp", B, m, V)
    y = torch.einsum("bhwn,bknp->bhwkp", C, S) + p["D"][:, None] * V
    return linear(norm(y.flatten(-2), p, "norm") * z, p, "out_proj")


def attention(x, p, heads):
    q, k, v = (t.flatten(1, 2).unflatten(-1, (heads, -1)) for t in linear(x, p, "to_qkv").chunk(3, -1))
    weight = (torch.einsum("bihc,bjhc->bhij", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return linear(torch.einsum("bhij,bjhc->bihc", weight, v).flatten(-2).view(x.shape), p, "to_out")


def mamba2d(p, x, depths):
    x = norm(conv(x, p, "backbone.ds.stem.conv", 4, 2), p, "backbone.ds.stem.post_norm.norm")
    for s, depth in enumerate(depths):
        x = conv(x, p, f"backbone.ds.ds{s}.conv", 2) if s else x
        for j in range(depth):
            b = sub(p, f"backbone.stages.{s}.{j}.")
            mix = natural_scan if s < 2 else rotary_attention
            x = x * b["res_scale1.scale"] + mix(norm(x, b, "norm1"), sub(b, "token_mixer."), j % 2 == 1)
            m = linear(F.gelu(linear(norm(x, b, "norm2"), b, "MLP.fc1")), b, "MLP.fc2")
            x = x * b["res_scale2.scale"] + m
        x = norm(x, p, f"backbone.stages.{s}.{depth}")
    x = norm(x.mean((1, 2)), p, "norm")
    return linear(norm(F.gelu(linear(x, p, "head.fc1")), p, "head.norm"), p, "head.fc2")


def natural_scan(x, p, turned):
    def star(t, name):
        return p[f"{name}.scale"] * t.relu() ** 2 + p[f"{name}.bias"]

    local = star(linear(norm(x, p, "local_norm"), p, "local_path.pwconv1"), "local_path.act1")
    local = linear(star(conv(local, p, "local_path.dwconv"), "local_path.act2"), p, "local_path.pwconv2")
    u = F.gelu(linear(x.flip(1, 2) if turned else x, p, "in_proj"))
    rank, n = p["dt_projT.weight"].shape[1], p["AT_log"].shape[1]
    dT, dL, BT, BL, C = linear(u, p, "x_proj").split((rank, rank, n, n, n), -1)
    dT, dL = F.softplus(linear(dT, p, "dt_projT")), F.softplus(linear(dL, p, "dt_projL"))
    AT, AL, h, y = -p["AT_log"].exp(), -p["AL_log"].exp(), {}, torch.zeros_like(u)
    for i in range(u.shape[1]):
        for j in range(u.shape[2]):
            at = (slice(None), i, j)
            top = (dT[at] * u[at])[..., None] * BT[at][:, None]
            left = (dL[at] * u[at])[..., None] * BL[at][:, None]
            top = top + torch.exp(dT[at][..., None] * AT) * h[i - 1, j] if i else top
            left = left + torch.exp(dL[at][..., None] * AL) * h[i, j - 1] if j else left
            h[i, j] = 0.5 * (top + left) if i and j else top if i else left
            y[at] = (h[i, j] * C[at][:, None]).sum(-1) + p["D"] * u[at]
    y = linear(F.gelu(y), p, "out_proj")
    return (y.flip(1, 2) if turned else y) + local


def rotary_attention(x, p, turned):
    (h, w), heads = x.shape[1:3], p["q_norm.weight"].shape[0]
    q, k, v = linear(x, p, "qkv").flatten(1, 2).unflatten(-1, (3, -1, heads)).unbind(2)
    turn = torch.exp(1j * torch.outer(torch.arange(max(h, w)).float(), 10000.0 ** (-torch.arange(8.0) / 8)))
    angle = torch.cat([turn[:h, None].expand(h, w, 8), turn[None, :w].expand(h, w, 8)], -1).flatten(0, 1)[:, None]

    def rotated(t):
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * angle).flatten(-2)

    q, k = norm(rotated(q), p, "q_norm"), norm(rotated(k), p, "k_norm")
    weight = (torch.einsum("bihc,bjhc->bhij", q, k) * heads**-0.5).softmax(-1)
    return linear(torch.einsum("bhij,bjhc->bihc", weight, v).flatten(-2).view(*x.shape[:3], -1), p, "proj")


def plainmamba(p, x, depth):
    p = {key.removeprefix("backbone."): value for key, value in p.items()}

    def activated(x, name):
        return batch_norm(x.permute(0, 3, 1, 2), p, name).relu().permute(0, 2, 3, 1)

    x = activated(conv(x, p, "patch_embed.stem.0", 2), "patch_embed.stem.1")
    for i in range(0, 6, 3):
        if f"patch_embed.convs.{i}.weight" in p:
            x = activated(conv(x, p, f"patch_embed.convs.{i}"), f"patch_embed.convs.{i + 1}")
    side = p["patch_embed.projection.weight"].shape[-1]
    x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
    x = conv(x, p, "patch_embed.projection", side, 0)
    own = int(p["pos_embed"].shape[1] ** 0.5)
    table = p["pos_embed"].view(1, own, own, -1).permute(0, 3, 1, 2)
    x = x + F.interpolate(table, x.shape[1:3], mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    for i in range(depth):
        b = sub(p, f"layers.{i}.")
        read = norm(x, b, "norm") if "norm.bias" in b else F.rms_norm(x, x.shape[-1:], b["norm.weight"], 1e-5)
        x = x + zigzag(read, sub(b, "mamba.")) * b.get("mamba.gamma", 1)
        if "dw.0.weight" in b:
            x = F.gelu(batch_norm(conv(x, b, "dw.0").permute(0, 3, 1, 2), b, "dw.1")).permute(0, 2, 3, 1)
    return linear(norm(x, p, "ln1", 1e-6).mean((1, 2)), p, "head.fc")


def zigzag(x, p):
    (h, w), n = x.shape[1:3], p["A_log"].shape[1]
    u, z = linear(x, p, "in_proj").chunk(2, -1)
    u = F.silu(conv(u, p, "conv2d")).flatten(1, 2)
    dt, B, C = linear(u, p, "x_proj").split((p["dt_proj.weight"].shape[1], n, n), -1)
    dt = F.softplus(linear(dt, p, "dt_proj") + p["dt_proj.bias"])                   # the bias twice
    rows = [(i, j if i % 2 == 0 else w - 1 - j) for i in range(h) for j in range(w)]
    columns = [(i if j % 2 == 0 else h - 1 - i, j) for j in range(w) for i in range(h)]
    codes, out = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}, 0.0
    for path in (rows, rows[::-1], columns, columns[::-1]):
        moves = [0, *(codes[after[0] - before[0], after[1] - before[1]] for before, after in pairwise(path))]
        cells = [i * w + j for i, j in path]
        y = scan(u[:, cells], dt, -p["A_log"].exp(), B + p["direction_Bs"][moves], C, p["D"])
        out = out + torch.zeros_like(u).index_copy(1, torch.tensor(cells), y)
    return linear(out.view(z.shape) * F.silu(z), p, "out_proj")


SHEETS = {
    "test_efficientvmamba": efficientvmamba, "test_msvmamba": msvmamba, "test_msvmambav3": msvmamba,
    "test_groupmamba": groupmamba, "test_spatialmamba": spatialmamba, "test_vssd": vssd, "test_mamba2d": mamba2d,
    "test_plainmamba": plainmamba,
}  # fmt: skip


@pytest.mark.parametrize(("size", "channels", "batch"), [((37, 45), 1, 1), ((51, 30), 5, 2)], ids=str)
@pytest.mark.parametrize("name", SHEETS)
def test_a_model_is_that_of_its_sheet(name, size, channels, batch):
    """In evaluation, with the gradient of the images; a batch of several in training too."""
    torch.manual_seed(0)
    row = variants()[name]
    model = vssm.create_model(name, in_chans=channels, num_classes=7).double().eval()
    with torch.no_grad():
        for value in model.state_dict().values():               # a mistake with a norm, a scale or a bias must show
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value) if value.ndim < 2 else 0.05 * torch.randn_like(value))
    p = to_published(model.state_dict(), row.keys)
    x = torch.randn(batch, channels, *size, dtype=torch.float64, requires_grad=True)
    depths, bound = row.kwargs.get("depths", row.kwargs.get("depth")), 1e-6 if name == "test_mamba2d" else 1e-9
    expected, y = SHEETS[name](p, x.permute(0, 2, 3, 1), depths), model(x)
    assert y.shape == (batch, 7)
    assert error(y, expected) < bound, name
    weight = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((each * weight).sum(), x)[0] for each in (y, expected))
    assert error(ours, theirs) < 10 * bound, name
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(0)
        assert torch.equal(model(x), features)
    if batch > 1:
        model = vssm.create_model(name, in_chans=channels, num_classes=7).double().train()
        p = without_statistics(to_published(model.state_dict(), row.keys))
        with torch.no_grad():
            assert error(model(x), SHEETS[name](p, x.permute(0, 2, 3, 1), depths)) < bound, name


@pytest.mark.parametrize(
    "mixer",
    [
        {"d_state": 3, "expand": 1, "dt_rank": 2}, {"conv_size": 5, "conv_bias": False},
        {"bias": True, "init_layer_scale": 0.5, "dt_min": 0.01},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("rms", [False, True])
def test_plainmamba_has_other_parts_as_published(mixer, rms):
    """Arguments of ``layer_cfgs``, which the published architectures leave as they are."""
    torch.manual_seed(0)
    parts = {"img_size": 32, "patch_size": 8, "embed_dims": 16, "num_layers": 2, "layers_with_dwconv": [1]}
    backbone = {**parts, "layer_cfgs": {"use_rms_norm": rms, "mamba_cfg": mixer}}
    built = plainmamba_published("ImageClassifier", {"backbone": backbone, "num_classes": 7})
    model, x = built.model.double().eval(), torch.randn(2, 3, 45, 30, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        p = to_published(model.state_dict(), built.keys)
        assert ("backbone.layers.0.mamba.in_proj.bias" in p) == mixer.get("bias", False)
        assert error(model(x), plainmamba(p, x.permute(0, 2, 3, 1), 2)) < 1e-9


def test_groupmamba_has_other_norms_where_the_class_is_called_without_them():
    parts = dict(embed_dims=(16, 16, 20, 24), stem_hidden_dim=8, mlp_ratios=(2, 2, 1, 1), depths=(1, 1, 1, 1))
    built = groupmamba_published("x.py:GroupMamba", {**parts, "num_classes": 7})
    model, x = built.model.double().eval(), torch.randn(2, 3, 45, 30, dtype=torch.float64)
    with torch.no_grad():
        p, x_last, y = to_published(model.state_dict(), built.keys), x.permute(0, 2, 3, 1), model(x)
        assert error(y, groupmamba(p, x_last, (1, 1, 1, 1), eps=1e-5)) < 1e-9
        assert error(y, groupmamba(p, x_last, (1, 1, 1, 1))) > 1e-9
