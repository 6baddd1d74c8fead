"""U-shaped networks against short re-derivations of the published ones, on sizes and widths that no golden file holds.

As in ``test_sheets``: every function computes from the published state dict ``p`` and shares no code with ``vssm``.
Maps are channels last, (b, h, w, c), but in the blocks of UNETR.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sheets import batch_norm, conv, linear, merge, norm, ssm, sub, without_statistics
from timm.layers import DropPath
from tolerance import error

import vssm
from vssm.models.keys import to_published
from vssm.models.variant import variants


def four_ways(x, p):
    """Rows, columns and both backwards, summed."""
    rank, n = p["dt_projs_weight"].shape[-1], p["A_logs"].shape[-1]
    rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
    rows = ssm(rows, p, 0, rank, n) + ssm(rows.flip(1), p, 2, rank, n).flip(1)
    columns = ssm(columns, p, 1, rank, n) + ssm(columns.flip(1), p, 3, rank, n).flip(1)
    return rows.view(x.shape) + columns.unflatten(1, (x.shape[2], x.shape[1])).transpose(1, 2)


def vss(x, p):
    """The block of VMamba's first release."""
    q = sub(p, "self_attention.")
    u, z = linear(norm(x, p, "ln_1"), q, "in_proj").chunk(2, -1)
    y = four_ways(F.silu(conv(u, q, "conv2d")), q)
    return x + linear(norm(y, q, "out_norm") * F.silu(z), q, "out_proj")


def blocks(x, p, name, block=vss):
    for i in range(99):
        if part := sub(p, f"{name}.blocks.{i}."):
            x = block(x, part)
    return x


def spread(x, scale):
    """Channels (row, column, c) to cells."""
    b, h, w, _ = x.shape
    return x.view(b, h, w, scale, scale, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h * scale, w * scale, -1)


def expand(x, p, name, scale):
    return norm(spread(linear(x, p, f"{name}.expand"), scale), p, f"{name}.norm")


def vmunet(p, x, block=vss):
    p, skips = sub(p, "vmunet."), []
    x = norm(conv(x.expand(*x.shape[:3], 3), p, "patch_embed.proj", 4, 0), p, "patch_embed.norm")
    for i in range(4):
        skips.append(x)
        x = blocks(x, p, f"layers.{i}", block)
        x = merge(x, p, f"layers.{i}.downsample") if i < 3 else x
    for j in range(4):
        x = expand(x + skips[4 - j], p, f"layers_up.{j}.upsample", 2) if j else x
        x = blocks(x, p, f"layers_up.{j}", block)
    return [conv(expand(x, p, "final_up", 4), p, "final_conv").permute(0, 3, 1, 2)]


def walk(head, h, w):
    """The two routes of a head of MHS-VM, as lists of (row, column)."""
    if head == "Z":
        return [(i, j) for i in range(h) for j in range(w)], [(i, j) for j in range(w) for i in range(h)]
    if head == "C":
        rows = [(i, j) for i in range(h) for j in (range(w) if i % 2 == 0 else reversed(range(w)))]
        return rows, [(i, j) for j in range(w) for i in (range(h) if j % 2 == 0 else reversed(range(h)))]
    if head == "X":
        route = []
        for k in range(h + w - 1):
            line = [(i, k - i) for i in range(h) if 0 <= k - i < w]
            route += line if k % 2 else line[::-1]
        return route, [(i, w - 1 - j) for i, j in route]
    route, cell, move, left = [], (0, 0), (0, 1), {(i, j) for i in range(h) for j in range(w)}
    while left:                                                     # turn right at the border and at visited cells
        route.append(cell)
        left.remove(cell)
        if (cell[0] + move[0], cell[1] + move[1]) not in left:
            move = (move[1], -move[0])
        cell = (cell[0] + move[0], cell[1] + move[1])
    return route, [(h - 1 - i, j) for i, j in route]


def multi_head(threshold):
    def block(x, p):
        q = sub(p, "self_attention.")
        (h, w), names = x.shape[1:3], [name for name in "CXSZ" if f"mhs.scanhead_{name}.mambaeng.Ds" in q]
        u, z = linear(norm(x, p, "ln_1"), q, "in_proj").chunk(2, -1)
        u = linear(F.silu(conv(u, q, "conv2d")), q, "mhs.x_ssproj").flatten(1, 2)
        parts = []
        for name, part in zip(names, u.chunk(len(names), -1), strict=True):
            engine, found = sub(q, f"mhs.scanhead_{name}.mambaeng."), []
            routes = [route for base in walk(name, h, w) for route in (base, base[::-1])]
            for k, route in enumerate(routes):
                cells = torch.tensor([i * w + j for i, j in route])
                y = ssm(part[:, cells], engine, k, engine["dt_projs_weight"].shape[-1], engine["A_logs"].shape[-1])
                found.append(torch.zeros_like(y).index_copy(1, cells, y))
            y = torch.stack(found)
            ratio = y.std(0) / ((y - y.min(0).values).mean(0) + 1e-5)
            parts.append(y.sum(0) * (ratio - threshold).relu())
        y = linear(norm(torch.cat(parts, -1), q, "mhs.cat_norm"), q, "mhs.y_proj").view(x.shape)
        return x + norm(y, q, "out_norm") * F.silu(z)

    return block


def ungated(x, p, multiscale):
    """The block of VMamba's last release; its MLP convolves at three scales on the way up."""
    q = sub(p, "op.")
    y = four_ways(F.silu(conv(linear(norm(x, p, "norm"), q, "in_proj"), q, "conv2d")), q)
    x = x + linear(norm(y, q, "out_norm"), q, "out_proj")
    y = F.gelu(linear(norm(x, p, "norm2"), p, "mlp.fc1"))
    if multiscale:
        y = y + sum(conv(y, p, f"mlp.multiscale_conv.dw_convs.{i}") for i in range(3))
    return x + linear(y, p, "mlp.fc2")


def large_kernel(x, p, name, scale):
    x = conv(x, p, f"{name}.expand.0").permute(0, 3, 1, 2)
    x = conv(batch_norm(x, p, f"{name}.expand.1").relu().permute(0, 2, 3, 1), p, f"{name}.expand.3")
    return norm(spread(x, scale), p, f"{name}.norm")


def msvmunet(p, x):
    x = F.gelu(norm(conv(x.expand(*x.shape[:3], 3), p, "encoder.layer0.0", 2), p, "encoder.layer0.2"))
    x, skips = norm(conv(x, p, "encoder.layer1.0", 2), p, "encoder.layer1.2"), []
    for i in range(4):
        x = blocks(x, p, f"encoder.layers.{i}", lambda x, b: ungated(x, b, False))
        skips.append(x)
        if i < 3:
            x = norm(conv(x, p, f"encoder.downsamples.{i}.1", 2), p, f"encoder.downsamples.{i}.3")
    for i in range(3):
        level = f"decoder.layers.{i}"
        x = torch.cat([large_kernel(x, p, f"{level}.up", 2), skips[2 - i]], -1)
        x = blocks(linear(x, p, f"{level}.concat_layer"), p, f"{level}.vss_layer", lambda x, b: ungated(x, b, True))
    x = large_kernel(x, p, "decoder.out_layers.0", 4)
    return [conv(x, p, "decoder.out_layers.0.out").permute(0, 3, 1, 2)]


def vmamba_encoder(x, p, patch):
    x, maps = norm(conv(x, p, "patch_embed.proj", patch, 0), p, "patch_embed.norm"), []
    for i in range(4):
        x = blocks(x, p, f"layers.{i}")
        maps.append(x)
        x = merge(x, p, f"downsamples.{i}") if i < 3 else x
    return maps


def swinumamba_d(p, x):
    *skips, x = vmamba_encoder(x, sub(p, "vssm_encoder."), 4)
    p, outputs = sub(p, "decoder."), []
    for s in range(4):
        x = expand(x, p, f"expand_layers.{s}", 2 if s < 3 else 4)
        if s < 3:
            x = linear(torch.cat([x, skips[2 - s]], -1), p, f"concat_back_dim.{s}")
            x = blocks(x, p, f"stages.{s}")
        outputs.append(conv(x, p, f"seg_layers.{s}").permute(0, 3, 1, 2))
    return outputs[::-1]


def residual(x, p, name):
    """UNETR's residual block, channels first."""
    y = F.instance_norm(F.conv2d(x, p[f"{name}.conv1.conv.weight"], padding=1))
    y = F.instance_norm(F.conv2d(F.leaky_relu(y, 0.01), p[f"{name}.conv2.conv.weight"], padding=1))
    if f"{name}.conv3.conv.weight" in p:
        x = F.instance_norm(F.conv2d(x, p[f"{name}.conv3.conv.weight"]))
    return F.leaky_relu(x + y, 0.01)


def swinumamba(p, x):
    image = x.permute(0, 3, 1, 2)
    half = F.conv2d(image, p["stem.0.weight"], p["stem.0.bias"], 2, 3)
    half = F.instance_norm(half, weight=p["stem.1.weight"], bias=p["stem.1.bias"])
    maps = vmamba_encoder(half.permute(0, 2, 3, 1), sub(p, "vssm_encoder."), 2)
    *maps, x = [m.permute(0, 3, 1, 2) for m in maps]
    skips = [residual(m, p, f"encoder{i + 1}.layer") for i, m in enumerate([image, half, *maps])]
    levels = []
    for i in (6, 5, 4, 3, 2):
        x = F.conv_transpose2d(x, p[f"decoder{i}.transp_conv.conv.weight"], stride=2)
        x = residual(torch.cat([x, skips[i - 2]], 1), p, f"decoder{i}.conv_block")
        levels.append(x)
    outputs = [residual(x, p, "decoder1.layer"), levels[3], levels[2], levels[1]]
    heads = [sub(p, f"out_layers.{i}.conv.conv.") for i in range(4)]
    return [F.conv2d(y, head["weight"], head["bias"]) for y, head in zip(outputs, heads, strict=True)]


UNEVEN = {"depths": (1, 2, 1, 1), "dim": 20}
FLAT = {"depths": (1, 1, 1, 1), "decoder_depths": (1, 1, 1, 1), "dim": 20}
CASES = [  # row, its options, the sheet, channels and size of the images
    ("vmunet_synapse", {**UNEVEN, "decoder_depths": (2, 1, 1, 1)}, vmunet, 1, (32, 64)),
    ("vmunet_isic", {**UNEVEN, "decoder_depths": (1, 1, 2, 1), "d_state": 3}, vmunet, 3, (64, 32)),
    ("mhsunet_isic18", FLAT, lambda p, x: vmunet(p, x, multi_head(0.5)), 3, (32, 64)),
    ("mhsunet", FLAT, lambda p, x: vmunet(p, x, multi_head(0.4)), 1, (64, 32)),
    ("mhsunet_3h", {**FLAT, "dim": 16}, lambda p, x: vmunet(p, x, multi_head(0.0)), 3, (32, 96)),
    ("msvmunet_acdc", {**UNEVEN, "dim": 12}, msvmunet, 1, (32, 64)),
    ("msvmunet_small", {**UNEVEN, "dim": 12}, msvmunet, 3, (64, 32)),
    ("swinumamba_endovis17", {"depths": (1, 1, 2, 1), "features": (6, 12, 20, 24, 40)}, swinumamba, 3, (32, 64)),
    ("swinumamba_abdomenmr", {"depths": (1, 1, 1, 1), "features": (6, 8, 16, 24, 48), "in_channels": 5}, swinumamba, 5,
     (64, 32)),
    ("swinumamba_d_neuripscell", {"depths": (1, 1, 2, 1), "dim": 12, "in_channels": 2, "decoder_d_state": 3},
     swinumamba_d, 2, (32, 64)),
]  # fmt: skip
QUICK = {"vmunet_synapse", "mhsunet", "mhsunet_3h", "msvmunet_acdc", "swinumamba_abdomenmr", "swinumamba_d_neuripscell"}


def still(model):
    """No stochastic depth."""
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


@pytest.mark.parametrize(
    ("name", "options", "sheet", "channels", "size"),
    [pytest.param(*case, id=case[0], marks=() if case[0] in QUICK else pytest.mark.slow) for case in CASES],
)
def test_a_network_is_that_of_its_sheet(name, options, sheet, channels, size):
    """In evaluation mode, with a gradient; in training mode, with several outputs and the statistics of the batch."""
    torch.manual_seed(0)
    model = still(vssm.create_model(name, out_channels=3, **options)).double().eval()
    with torch.no_grad():
        for value in model.state_dict().values():               # a mistake with a norm, a scale or a bias must show
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value) if value.ndim < 2 else 0.1 * torch.randn_like(value))
    x = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    p = to_published(model.state_dict(), variants()[name].keys)
    expected = sheet(p, x.permute(0, 2, 3, 1))
    y = model(x)
    assert y.shape == (2, 3, *size)
    assert error(y, expected[0]) < 1e-9
    weights = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((z * weights).sum(), x)[0] for z in (y, expected[0]))
    assert error(ours, theirs) < 1e-8
    if len(expected) > 1 or any("running_" in key for key in p):
        with torch.no_grad():
            every = model.train()(x)
            expected = sheet(without_statistics(p), x.permute(0, 2, 3, 1))
        for ours, theirs in zip(every if len(expected) > 1 else [every], expected, strict=True):
            assert error(ours, theirs) < 1e-9


def test_the_decoder_of_swinumamba_d_starts_as_pytorch_does():
    """Its encoder's linear layers are drawn from a normal of deviation 0.02; convolutions of both as Kaiming He's."""
    torch.manual_seed(0)
    model = vssm.create_model("swinumamba_d_endovis17", depths=(1, 1, 1, 1), dim=48)
    inner = model.encoder.stages[2].blocks[0].mixer.in_proj.weight
    assert inner.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in (model.expands[0].expand, model.joins[0], model.blocks[0][1].mixer.out_proj):
        bound = layer.in_features**-0.5                            # of PyTorch's uniform distribution
        assert 0.98 * bound < layer.weight.abs().max() <= bound
    assert model.joins[1].bias.any()
    for layer in (model.encoder.stem.conv1, model.blocks[2][0].mixer.conv, model.heads[0]):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / (1 + 1e-4) / fan_in) ** 0.5, rel=0.1)
        assert not layer.bias.any()
