"""Segmenters against short re-derivations of the published ones, on sizes and channels that no golden file holds.

Each network below is computed from its published state dict ``p``, in float64, with one plain recurrence; it shares no
code with ``vssm``. Batch norms are in training, sides differ, tokens are flattened first axis slowest.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sheets import linear, norm, sub
from tolerance import error

from vssm.models import lightmunet, mambamim, segmamba, umamba, vivim
from vssm.models.keys import to_published

CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def conv(x, p, name, stride=1, padding=None):
    """Depthwise where a kernel has one input channel; half its side of padding."""
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    groups = x.shape[1] if weight.shape[1] == 1 else 1
    padding = tuple(side // 2 for side in weight.shape[2:]) if padding is None else padding
    return CONV[x.ndim](x, weight, bias, stride, padding, groups=groups)


def instance_norm(x, p=None, name=""):
    return F.instance_norm(x, weight=p and p[f"{name}.weight"], bias=p and p[f"{name}.bias"], eps=1e-5)


def tokens(x):
    return x.flatten(2).mT


def directed(xz, p, suffix=""):
    """One direction of Mamba over (b, t, 2 d), with the parameters of this suffix."""
    x, z = xz.chunk(2, -1)
    A = -p[f"A{suffix}_log"].exp()
    (d, n), rank = A.shape, p[f"dt_proj{suffix}.weight"].shape[1]
    u = F.pad(x.mT, (3, 0))
    u = F.silu(F.conv1d(u, p[f"conv1d{suffix}.weight"], p[f"conv1d{suffix}.bias"], groups=d)).mT
    dt, B, C = linear(u, p, f"x_proj{suffix}").split((rank, n, n), -1)
    dt, h, y = F.softplus(linear(dt, p, f"dt_proj{suffix}")), 0.0, []
    for dt_t, u_t, B_t, C_t in zip(dt.unbind(1), u.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t[:, None]
        y.append((h * C_t[:, None]).sum(-1))
    return (torch.stack(y, 1) + p[f"D{suffix}"] * u) * F.silu(z)


def mamba(x, p):
    return linear(directed(linear(x, p, "in_proj"), p), p, "out_proj")


def mamba_in_three_directions(x, p, slices, divisor=1):
    xz, length = linear(x, p, "in_proj"), x.shape[1] // slices
    order = torch.tensor([s * length + j for j in range(length) for s in range(slices)])
    y = directed(xz, p) + directed(xz.flip(1), p, "_b").flip(1)
    y = y + torch.zeros_like(y).index_copy(1, order, directed(xz[:, order], p, "_s"))
    return linear(y / divisor, p, "out_proj")


def unetr_block(x, p):
    y = F.leaky_relu(instance_norm(conv(x, p, "conv1.conv")), 0.01)
    y = instance_norm(conv(y, p, "conv2.conv"))
    x = instance_norm(conv(x, p, "conv3.conv")) if "conv3.conv.weight" in p else x
    return F.leaky_relu(x + y, 0.01)


def unetr_up(x, skip, p):
    x = F.conv_transpose3d(x, p["transp_conv.conv.weight"], stride=2)
    return unetr_block(torch.cat([x, skip], 1), sub(p, "conv_block."))


def seg_mamba(p, x):
    image, maps = x, []
    for i in range(4):
        if i:
            x = conv(instance_norm(x), p, f"vit.downsample_layers.{i}.1", 2, 0)
        else:
            x = conv(x, p, "vit.downsample_layers.0.0", 2, 3)
        g = sub(p, f"vit.gscs.{i}.")

        def unit(x, name, g=g):
            return instance_norm(conv(x, g, name)).relu()

        x = x + unit(unit(unit(x, "proj"), "proj2") + unit(x, "proj3"), "proj4")
        for j in range(2):
            b = sub(p, f"vit.stages.{i}.{j}.")
            y = mamba_in_three_directions(norm(tokens(x), b, "norm"), sub(b, "mamba."), 64 // 2**i) if b else 0
            x = x + y.mT.view(x.shape) if b else x
        maps.append(conv(F.gelu(conv(instance_norm(x), p, f"vit.mlps.{i}.fc1")), p, f"vit.mlps.{i}.fc2"))
    skips = [unetr_block(y, sub(p, f"encoder{i + 1}.layer.")) for i, y in enumerate([image, *maps])]
    x = skips.pop()
    for n in (5, 4, 3, 2):
        x = unetr_up(x, skips.pop(), sub(p, f"decoder{n}."))
    return conv(unetr_block(x, sub(p, "decoder1.layer.")), p, "out.conv.conv")


def u_mamba(p, x, *, strides, features, parity=None, size=None):
    """Deep supervision on. Mamba layers in the encoder's stages of this ``parity``; None: one at the bottleneck."""

    def blocks(x, p, stride):
        for j in range(3):
            b = sub(p, f"{j}.")
            inner = "" if j == 0 else ".conv"
            if b:
                y = conv(x, b, f"conv1{inner}", stride if j == 0 else 1)
                y = F.leaky_relu(instance_norm(y, b, "norm1" if j == 0 else "conv1.norm"), 0.01)
                y = instance_norm(conv(y, b, f"conv2{inner}"), b, "norm2" if j == 0 else "conv2.norm")
                x = F.leaky_relu(y + (conv(x, b, "conv3", stride) if j == 0 else x), 0.01)
        return x

    def layer(x, p, by_channels):
        t = x.flatten(2) if by_channels else tokens(x)
        y = mamba(norm(t, p, "norm"), sub(p, "mamba."))
        return (y if by_channels else y.mT).reshape(x.shape)

    n, flat = len(strides), x.ndim == 4
    x, skips, grid = blocks(x, sub(p, "encoder.stem."), strides[0]), [], size
    for s in range(n):
        x = blocks(x, sub(p, f"encoder.stages.{s}."), strides[s])
        grid = grid and [side // step for side, step in zip(grid, strides[s])]
        if parity is not None and s % 2 in parity:
            x = layer(x, sub(p, f"encoder.mamba_layers.{s}."), torch.Size(grid).numel() <= features[s])
        skips.append(x)
    x = skips.pop() if parity is not None else layer(skips.pop(), sub(p, "mamba_layer."), False)
    outputs = []
    for s in range(n - 1):
        low = n - 1 - s
        for axis, step in enumerate(strides[low]):
            x = x.repeat_interleave(step, axis + 2)
        x, skip = conv(x, p, f"decoder.upsample_layers.{s}.conv"), skips.pop()
        x = x if flat and s == n - 2 else torch.cat([x, skip], 1)
        x = blocks(x, sub(p, f"decoder.stages.{s}."), 1)
        outputs.insert(0, conv(x, p, f"decoder.seg_layers.{s}"))
    return outputs


def light_m_unet(p, x):
    def group_norm(x, p, name):
        return F.group_norm(x, 8, p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def layer(x, p):
        t = tokens(x)
        t = mamba(norm(t, p, "norm"), sub(p, "mamba.")) + p["skip_scale"] * t
        y = linear(norm(t, p, "norm"), p, "proj")
        return y.mT.reshape(len(x), -1, *x.shape[2:])

    x, maps = conv(conv(x, p, "convInit.0.conv"), p, "convInit.1.conv"), []
    while down := sub(p, f"down_layers.{len(maps)}."):
        if maps:
            x = (F.max_pool2d if x.ndim == 4 else F.max_pool3d)(layer(x, sub(down, "0.0.")), 2)
        for j in range(1, 5):
            if b := sub(down, f"{j}."):
                y = layer(group_norm(x, b, "norm1").relu(), sub(b, "conv1."))
                x = x + layer(group_norm(y, b, "norm2").relu(), sub(b, "conv2."))
        maps.append(x)
    maps.pop()
    mode, k = "bilinear" if x.ndim == 4 else "trilinear", 0
    while maps:
        x = conv(x, p, f"up_samples.{k}.0.conv")
        x = F.interpolate(x, scale_factor=2, mode=mode, align_corners=False) + maps.pop()
        for j in range(3):
            if b := sub(p, f"up_layers.{k}.{j}."):
                y = conv(conv(group_norm(x, b, "norm1").relu(), b, "conv.0.conv"), b, "conv.1.conv")
                x = group_norm(y + b["skip_scale"] * x, b, "norm2").relu()
        k += 1
    return conv(conv(group_norm(x, p, "conv_final.0").relu(), p, "conv_final.2.0.conv"), p, "conv_final.2.1.conv")


def channel_norm(x, p, name):
    return norm(x.movedim(1, -1), p, name, 1e-6).movedim(-1, 1)


def hybird(p, x):
    e = sub(p, "embeddings.")

    def residual(x, p):
        y = F.leaky_relu(channel_norm(conv(x, p, "conv1"), p, "norm1"), 0.01)
        y = channel_norm(conv(y, p, "conv2"), p, "norm2")
        x = channel_norm(conv(x, p, "conv3"), p, "norm3") if "conv3.weight" in p else x
        return F.leaky_relu(x + y, 0.01)

    x, maps = conv(x, e, "stem"), []
    for level in range(1, 6):
        if level > 1:
            x = F.max_pool3d(x, 2)
            for j in range(3):
                if b := sub(e, f"layer{level}.{j}."):
                    y = conv(channel_norm(conv(x, b, "conv1"), b, "norm"), b, "conv2")
                    x = x + conv(F.gelu(y), b, "conv3")
        if level < 5:
            x = conv(x, e, f"expend{level}")
            maps.append(residual(x, sub(e, f"encoder{level}.")))
    grid, dim = x.shape[2:], x.shape[1]
    omega = 1 / 10000 ** (torch.arange(dim // 6, dtype=torch.float32) / (dim // 6))
    places = [place.flatten()[:, None] * omega for place in torch.meshgrid(*map(torch.arange, grid), indexing="ij")]
    t = tokens(x) + torch.cat([part for angle in places for part in (angle.sin(), angle.cos())], 1).double()
    for i in range(3):
        if b := sub(p, f"mae.blocks.{i}."):
            t = t + mamba(norm(t, b, "norm1"), sub(b, "mamba."))
            t = t + linear(F.gelu(linear(norm(t, b, "norm2"), b, "mlp.fc1")), b, "mlp.fc2")
    x = t.mT.reshape(x.shape)
    for n in (5, 4, 3, 2):
        x = unetr_up(x, maps.pop(), sub(p, f"decoder.decoder{n}."))
    return conv(residual(x, sub(p, "decoder.decoder1.")), p, "decoder.out.conv")


def video_vivim(p, x, heads, reductions, edge):
    """Dropout left out."""
    (batch, frames), size = x.shape[:2], x.shape[3:]
    x, maps, former = x.flatten(0, 1), [], sub(p, "encoder.downsample_layers.")
    for i, stride in enumerate((4, 2, 2, 2)):
        x = conv(x, former, f"patch_embeddings.{i}.proj", stride)
        grid, t = x.shape[2:], norm(tokens(x), former, f"patch_embeddings.{i}.layer_norm")
        for j in range(2):
            if b := sub(former, f"block.{i}.{j}."):
                a, h = sub(b, "attention.self."), norm(t, b, "layer_norm_1")
                source = h
                if reductions[i] > 1:
                    source = conv(h.mT.reshape(x.shape), a, "sr", reductions[i], 0)
                    source = norm(tokens(source), a, "layer_norm")
                q, k, v = (linear(y, a, name).unflatten(-1, (heads[i], -1)).transpose(1, 2)
                           for y, name in ((h, "query"), (source, "key"), (source, "value")))  # fmt: skip
                weight = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
                t = t + linear((weight @ v).transpose(1, 2).flatten(2), b, "attention.output.dense")
                h = linear(norm(t, b, "layer_norm_2"), b, "mlp.dense1")
                h = tokens(conv(h.mT.unflatten(-1, grid), b, "mlp.dwconv.dwconv"))
                t = t + linear(F.gelu(h), b, "mlp.dense2")
        t = t.unflatten(0, (batch, frames)).flatten(1, 2)
        for j in range(2):
            if b := sub(p, f"encoder.stages.{i}.{j}.0."):
                t = t + mamba_in_three_directions(norm(t, b, "norm1"), sub(b, "mamba."), 5, divisor=3)
                h = linear(norm(t, b, "norm2"), b, "mlp.fc1").mT.unflatten(-1, (frames, *grid))
                t = t + linear(F.gelu(tokens(conv(h, b, "mlp.dwconv.dwconv"))), b, "mlp.fc2")
        x = t.unflatten(1, (frames, -1)).flatten(0, 1).mT.reshape(batch * frames, -1, *grid)
        maps.append(x)

    def resized(x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    parts = [linear(y.movedim(1, -1), p, f"decoder.linear_c.{i}.proj").movedim(-1, 1) for i, y in enumerate(maps)]
    y = conv(torch.cat([resized(part, maps[0].shape[2:]) for part in parts[::-1]], 1), p, "decoder.linear_fuse")
    y = F.batch_norm(y, None, None, p["decoder.batch_norm.weight"], p["decoder.batch_norm.bias"], training=True)
    outputs = [resized(conv(y.relu(), p, "out"), size)]
    return outputs + [resized(conv(maps[0], p, "edgeocr_cls_head"), size)] if edge else outputs


PLAN_3D = dict(
    input_channels=3, n_stages=4, features_per_stage=[6, 8, 10, 12], num_classes=5, deep_supervision=True,
    kernel_sizes=[[1, 3, 3], [3, 1, 3], [3, 3, 5], [3, 3, 3]], strides=[[1, 1, 1], [1, 2, 2], [2, 2, 1], [2, 1, 3]],
    n_conv_per_stage=[3, 2, 2, 2], n_conv_per_stage_decoder=[3, 2, 1],
)  # fmt: skip
PLAN_2D = dict(
    input_channels=2, n_stages=5, features_per_stage=[4, 6, 8, 10, 12], num_classes=1, deep_supervision=True,
    kernel_sizes=[[3, 3]] * 5, strides=[[1, 1], [2, 2], [2, 1], [2, 2], [1, 2]], n_conv_per_stage=[2] * 5,
    n_conv_per_stage_decoder=[2] * 4,
)  # fmt: skip
SHALLOW = dict(depths=[2, 1, 1, 1], hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 4, 2],
               sr_ratios=[8, 4, 2, 1], decoder_hidden_size=24)  # fmt: skip
CASES = {  # published constructor, its arguments, the shape of an image, the sheet
    "segmamba": (segmamba, "SegMamba", dict(in_chans=3, out_chans=1, depths=[0, 1, 0, 1], feat_size=[8, 6, 10, 12],
                 hidden_size=14), (1, 3, 16, 32, 64), seg_mamba),
    "segmamba_like_widths": (segmamba, "SegMamba", dict(in_chans=1, out_chans=2, depths=[0, 0, 1, 0],
                             feat_size=[6, 6, 6, 8], hidden_size=8), (1, 1, 64, 16, 32), seg_mamba),
    **{
        f"umamba_{name}": (
            umamba, f"UMamba{kind}_{dims}d.py:UMamba{kind}", {**plan, **({"input_size": size} if parity else {})},
            (2, plan["input_channels"], *size),
            lambda p, x, plan=plan, size=size, parity=parity: u_mamba(
                p, x, strides=plan["strides"], features=plan["features_per_stage"], parity=parity, size=size),
        )
        for name, kind, dims, plan, size, parity in (
            ("bot_3d", "Bot", 3, PLAN_3D, (4, 12, 18), None), ("enc_3d", "Enc", 3, PLAN_3D, (8, 4, 12), (0, 1)),
            ("bot_2d", "Bot", 2, PLAN_2D, (24, 16), None), ("enc_2d", "Enc", 2, PLAN_2D, (8, 24), (0,)),
        )
    },
    "lightmunet_2d": (lightmunet, "LightMUNet", dict(spatial_dims=2, in_channels=5, out_channels=1, init_filters=8,
                      blocks_down=(1, 2, 1), blocks_up=(2, 1)), (2, 5, 12, 20), light_m_unet),
    "lightmunet_3d": (lightmunet, "LightMUNet", dict(spatial_dims=3, in_channels=2, out_channels=4, init_filters=16,
                      blocks_down=(2, 1), blocks_up=(3,)), (1, 2, 6, 4, 10), light_m_unet),
    "hymamba": (mambamim, "Hybird", dict(in_channel=2, n_classes=3, img_size=32, depth=2, channels=(4, 6, 8, 10, 12),
                depths=(9, 2, 1, 1, 1), kernels=(9, 5, 3, 1, 3), exp_r=(9, 2, 3, 1, 2)), (1, 2, 32, 32, 32), hybird),
    **{
        f"vivim_{frames}_frames": (
            vivim, "Vivim", dict(out_chans=2, with_edge=edge, feat_size=SHALLOW["hidden_sizes"],
            segformer_config=SHALLOW), (batch, frames, 3, *size),
            lambda p, x, edge=edge: video_vivim(p, x, (1, 2, 4, 2), (8, 4, 2, 1), edge),
        )
        for frames, batch, size, edge in ((5, 1, (37, 45), False), (10, 1, (32, 29), True), (3, 2, (29, 160), True))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_segmenter_is_that_of_its_sheet(name):
    """Its outputs in training, and the gradient of the image."""
    family, entry, kwargs, shape, sheet = CASES[name]
    torch.manual_seed(0)
    built = family.published(entry if ":" in entry else f"x.py:{entry}", kwargs)
    model = built.model.double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) or type(module).__name__ == "DropPath":
            module.eval()
    with torch.no_grad():
        for value in model.parameters():                        # a mistake with a norm, a scale or a bias must show
            value.add_(0.1 * torch.rand_like(value) if value.ndim < 2 else 0.05 * torch.randn_like(value))
    p = {key: value.detach() for key, value in to_published(model.state_dict(), built.keys).items()}
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(network):
        outputs = network(x)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        loss = sum((y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).mean() for y in outputs)
        return outputs, torch.autograd.grad(loss, x)[0]

    (outputs, gradient), (expected, expected_gradient) = run(model), run(lambda x: sheet(p, x))
    assert len(outputs) == len(expected)
    for y, wanted in zip([*outputs, gradient], [*expected, expected_gradient], strict=True):
        y = y.flatten(0, 1) if y.ndim > wanted.ndim else y                        # frames of clips
        assert y.shape == wanted.shape
        assert error(y, wanted) < 1e-7
